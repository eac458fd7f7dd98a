"""Backdoors by the main direction in which a class varies."""

import numpy as np

from jaxpoison import filters
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def _score(evidence: Evidence) -> Scores | NotRun:
    """Spectral signatures (arXiv 1811.00636) of the trained network's features."""
    if reason := common.untrained(evidence):
        return reason
    assert evidence.trained is not None
    features = common.unit_scale(evidence.trained.features)
    found = filters.spectral_signatures(features, evidence.labels)
    apart = np.sqrt(np.asarray(found.score, float))
    score = common.bounded(common.scaled(apart) - 1)
    judged = common.large_enough(evidence)

    def reason_for(row: int) -> str:
        usual = np.median(apart[evidence.labels == evidence.labels[row]])
        return (
            f"Along the main direction of {common.named(evidence, evidence.labels[row])} in the "
            f"trained network it is {apart[row] / max(usual, 1e-12):.1f} times as far out as is "
            "usual in this class."
        )

    return Scores(np.where(judged, score, np.nan).astype(np.float32), reason_for)


CHECK = Check(
    name="spectral",
    title="Spectral signature",
    kind="poison",
    cannot_see="Poisons that do not dominate the variation of a class: a few among many images.",
    score=_score,
    threats=("patch", "blend", "wave"),
)
