"""Backdoors by two clusters in a class: what is on the images, and the trigger."""

import numpy as np

from jaxpoison import filters
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores

_COMPONENTS = 10


def scores(evidence: Evidence, values: np.ndarray, where: str) -> Scores:
    """Returns how much nearer each row is to the smaller of two clusters of its class.

    In variances of the smaller cluster: every class has two clusters, but those of honest images
    are wide and close, and those of a trigger tight and far. That makes classes comparable.

    Args:
      evidence: labels of at least two classes.
      values: float [N, F], in which every class is clustered (arXiv 1811.03728).
      where: what `values` are, for the sentence.
    """
    values, labels = common.unit_scale(values), evidence.labels
    count = min(_COMPONENTS, values.shape[1])
    found = filters.activation_clustering(values, labels, num_components=count)
    nearer = np.asarray(found.score, float)
    smaller = nearer > 0
    apart, share = np.zeros(evidence.num_classes), np.zeros(evidence.num_classes)
    score = np.full(len(labels), np.nan)
    for label in np.unique(labels[common.large_enough(evidence)]):
        mine = labels == label
        around = values[mine] - values[mine].mean(axis=0)
        tight = values[mine & smaller]
        tight = tight - tight.mean(axis=0) if len(tight) >= common.LEAST else around
        variance = (tight**2).sum(axis=1).mean() + 0.01 * (around**2).sum(axis=1).mean()
        score[mine] = nearer[mine] / max(float(variance), 1e-12)
        share[label] = smaller[mine].mean()
        apart[label] = np.sqrt(np.abs(score[mine]).max())

    def reason_for(row: int) -> str:
        name = common.named(evidence, labels[row])
        which = "smaller" if smaller[row] else "larger"
        part = share[labels[row]] if smaller[row] else 1 - share[labels[row]]
        return (
            f"In {where}, {name} falls into two clusters, {apart[labels[row]]:.1f} radii apart at "
            f"most; it is in the {which} one ({part:.0%})."
        )

    return Scores(common.bounded(score), reason_for)


def _score(evidence: Evidence) -> Scores | NotRun:
    if reason := common.untrained(evidence):
        return reason
    assert evidence.trained is not None
    return scores(evidence, evidence.trained.features, "the features of the trained network")


CHECK = Check(
    name="clustering",
    title="Small cluster in its class",
    kind="poison",
    cannot_see=(
        "Poisons too few for a cluster of their own, and those that are more than half of a class."
    ),
    score=_score,
    threats=("patch", "blend", "wave"),
)
