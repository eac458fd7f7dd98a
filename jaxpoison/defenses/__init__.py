"""Defenses against poisoned training sets, as pure functions that `training.fit` calls."""

from jaxpoison.defenses._abl import AblConfig as AblConfig
from jaxpoison.defenses._abl import anti_backdoor as anti_backdoor
from jaxpoison.defenses._characteristic import characteristic_filter as characteristic_filter
from jaxpoison.defenses._epic import EpicConfig as EpicConfig
from jaxpoison.defenses._epic import epic as epic
from jaxpoison.defenses._friends import FriendsConfig as FriendsConfig
from jaxpoison.defenses._friends import friends as friends
from jaxpoison.defenses._hint import PAPER as PAPER
from jaxpoison.defenses._hint import RELEASED_CODE as RELEASED_CODE
from jaxpoison.defenses._hint import HintConfig as HintConfig
from jaxpoison.defenses._hint import HintState as HintState
from jaxpoison.defenses._hint import hint as hint
from jaxpoison.defenses.adversarial import FatConfig as FatConfig
from jaxpoison.defenses.adversarial import adversarial_training as adversarial_training
from jaxpoison.defenses.mixing import cutmix as cutmix
from jaxpoison.defenses.mixing import mixup as mixup
from jaxpoison.defenses.noise import fixed_noise as fixed_noise
from jaxpoison.defenses.noise import random_noise as random_noise
from jaxpoison.defenses.squeezing import gray as gray
from jaxpoison.defenses.squeezing import jpeg as jpeg
from jaxpoison.defenses.trusted import add_trusted as add_trusted
from jaxpoison.defenses.trusted import recommended as recommended
from jaxpoison.defenses.trusted import refit_head as refit_head
from jaxpoison.training.hooks import Defense as Defense
from jaxpoison.training.hooks import chain as chain
from jaxpoison.training.hooks import none as none
