"""Backdoors by how soon they are learned."""

import math

import numpy as np

from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def _score(evidence: Evidence) -> Scores | NotRun:
    """Low loss in the first third of training (anti-backdoor learning, arXiv 2110.11571)."""
    if reason := common.untrained(evidence):
        return reason
    assert evidence.trained is not None
    epochs = math.ceil(len(evidence.trained.losses) / 3)
    losses = np.asarray(evidence.trained.losses[:epochs], float)
    low = -np.log(np.maximum(losses, 1e-12)).mean(axis=0)
    rank = np.argsort(np.argsort(low)) / max(len(low) - 1, 1)

    def reason_for(row: int) -> str:
        first = "After the first epoch" if epochs == 1 else f"In the first {epochs} epochs"
        return (
            f"{first} its loss was {losses[:, row].mean():.2g}, lower than that of "
            f"{rank[row]:.1%} of the images."
        )

    return Scores(common.bounded(low - np.median(low)), reason_for)


CHECK = Check(
    name="early",
    title="Learned too soon",
    kind="poison",
    cannot_see="Triggers learned no sooner than what is on the images: faint or rare ones.",
    score=_score,
    threats=("patch", "blend", "wave"),
)
