"""Defences against poisoned training sets, as pure functions that `training.fit` calls."""

from jaxpoison.defenses.base import Defense as Defense
from jaxpoison.defenses.base import chain as chain
from jaxpoison.defenses.base import none as none
from jaxpoison.defenses.hint import PAPER as PAPER
from jaxpoison.defenses.hint import RELEASED_CODE as RELEASED_CODE
from jaxpoison.defenses.hint import HintConfig as HintConfig
from jaxpoison.defenses.hint import HintState as HintState
from jaxpoison.defenses.hint import hint as hint
