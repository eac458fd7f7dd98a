"""Judging: whether an attack worked, whether a filter found it, and how sure that is."""

from jaxpoison.evaluation.backdoors import BackdoorOutcome as BackdoorOutcome
from jaxpoison.evaluation.backdoors import backdoor_outcome as backdoor_outcome
from jaxpoison.evaluation.certify import Certificate as Certificate
from jaxpoison.evaluation.certify import certified_radius as certified_radius
from jaxpoison.evaluation.certify import certify as certify
from jaxpoison.evaluation.detection import Detection as Detection
from jaxpoison.evaluation.detection import average_precision as average_precision
from jaxpoison.evaluation.detection import detection as detection
from jaxpoison.evaluation.detection import false_positive_rate as false_positive_rate
from jaxpoison.evaluation.detection import roc_auc as roc_auc
from jaxpoison.evaluation.detection import roc_curve as roc_curve
from jaxpoison.evaluation.detection import true_positive_rate as true_positive_rate
from jaxpoison.evaluation.outcomes import Outcome as Outcome
from jaxpoison.evaluation.outcomes import ScratchOutcome as ScratchOutcome
from jaxpoison.evaluation.outcomes import scratch_outcome as scratch_outcome
from jaxpoison.evaluation.outcomes import transfer_outcome as transfer_outcome
from jaxpoison.evaluation.statistics import wilson as wilson
