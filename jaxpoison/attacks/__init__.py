"""Attacks on training sets: functions from clean images to poisoned ones, and sets of poisons."""

from jaxpoison.attacks.poisoned import PoisonedDataset as PoisonedDataset
from jaxpoison.attacks.poisoned import load as load
from jaxpoison.attacks.poisoned import mixture as mixture
from jaxpoison.attacks.poisoned import save as save
from jaxpoison.attacks.untargeted import Attack as Attack
from jaxpoison.attacks.untargeted import Victim as Victim
from jaxpoison.attacks.untargeted import dap as dap
from jaxpoison.attacks.untargeted import durp as durp
from jaxpoison.attacks.untargeted import pgd as pgd
