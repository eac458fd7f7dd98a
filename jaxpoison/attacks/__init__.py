"""Attacks on training sets: functions from clean images to poisoned ones, and sets of poisons."""

from jaxpoison.attacks.poisoned import PoisonedDataset as PoisonedDataset
from jaxpoison.attacks.poisoned import Target as Target
from jaxpoison.attacks.poisoned import load as load
from jaxpoison.attacks.poisoned import mixture as mixture
from jaxpoison.attacks.poisoned import save as save
from jaxpoison.attacks.success import Outcome as Outcome
from jaxpoison.attacks.success import transfer_outcome as transfer_outcome
from jaxpoison.attacks.targeted import Crafted as Crafted
from jaxpoison.attacks.targeted import TargetedAttack as TargetedAttack
from jaxpoison.attacks.targeted import Trials as Trials
from jaxpoison.attacks.targeted import draw_trials as draw_trials
from jaxpoison.attacks.targeted import poison as poison
from jaxpoison.attacks.transfer import Draws as Draws
from jaxpoison.attacks.transfer import bp_toolkit as bp_toolkit
from jaxpoison.attacks.transfer import bullseye_polytope as bullseye_polytope
from jaxpoison.attacks.transfer import convex_polytope as convex_polytope
from jaxpoison.attacks.transfer import fc_toolkit as fc_toolkit
from jaxpoison.attacks.transfer import feature_collision as feature_collision
from jaxpoison.attacks.transfer import head_gradient_matching as head_gradient_matching
from jaxpoison.attacks.untargeted import Attack as Attack
from jaxpoison.attacks.untargeted import Victim as Victim
from jaxpoison.attacks.untargeted import dap as dap
from jaxpoison.attacks.untargeted import durp as durp
from jaxpoison.attacks.untargeted import pgd as pgd
