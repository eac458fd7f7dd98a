"""Poisons by characteristic vectors: the statistics of every BatchNorm layer (arXiv 2403.13523)."""

from jaxpoison.audit.checks import common
from jaxpoison.audit.checks.centroids import scores
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def _score(evidence: Evidence) -> Scores | NotRun:
    if reason := common.without_layers(evidence):
        return reason
    return scores(evidence, None, "the statistics of all layers")


CHECK = Check(
    name="characteristic",
    title="Characteristic vectors",
    kind="poison",
    cannot_see=(
        "Poisons that the trained network has made a part of their class, and poisons that are the "
        "majority of a class when no trusted images are given."
    ),
    score=_score,
    threats=("collision", "patch", "blend"),
)
