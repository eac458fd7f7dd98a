"""Judging: whether an attack worked, and how sure that is."""

from jaxpoison.evaluation.outcomes import Outcome as Outcome
from jaxpoison.evaluation.outcomes import ScratchOutcome as ScratchOutcome
from jaxpoison.evaluation.outcomes import scratch_outcome as scratch_outcome
from jaxpoison.evaluation.outcomes import transfer_outcome as transfer_outcome
from jaxpoison.evaluation.statistics import wilson as wilson
