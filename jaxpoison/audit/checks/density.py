"""Poisons by their place in the foreign embedding: where it is thinner than around them."""

import numpy as np

from jaxpoison.audit import nearest
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores

_COUNT = 20
_LEAST = 25  # different images, for a local density


def _score(evidence: Evidence) -> Scores | NotRun:
    """Dimensionality-aware outliers (arXiv 2502.01385).

    The mean over neighbors o of (d_k(x) / d_k(o)) ^ LID(o), with d_k the distance to the last of
    the neighbors and LID the local intrinsic dimension by maximum likelihood.
    """
    if len(np.unique(nearest.copies_of(evidence))) < _LEAST:
        return NotRun(f"There are fewer than {_LEAST} different images, too few for a density.")
    found = nearest.neighbors(evidence)
    rows, similarity = found.rows[:, :_COUNT], found.similarity[:, :_COUNT].astype(float)
    known = rows >= 0
    distance = np.sqrt(np.maximum(2 - 2 * np.where(known, similarity, 1), 1e-12))
    last = distance.max(axis=1)
    steps = np.log(np.maximum(distance / last[:, None], 1e-6)) * known
    dimension = -known.sum(axis=1) / np.minimum(steps.sum(axis=1), -1e-6)
    theirs = np.where(known, rows, 0)
    ratio = dimension[theirs] * np.log(last[:, None] / last[theirs])
    ratio = np.where(known, ratio, -np.inf)
    most = ratio.max(axis=1)
    total = np.exp(ratio - most[:, None]).sum(axis=1)
    sparse = most + np.log(total / known.sum(axis=1))
    times = np.median(last[theirs], axis=1)

    def reason_for(row: int) -> str:
        return (
            f"Its neighbors in the foreign embedding are {last[row] / times[row]:.2f} times as far "
            "from it as theirs are from them."
        )

    return Scores(
        common.bounded(common.scaled(sparse)),
        reason_for,
        related=lambda row: rows[row][known[row]],
    )


CHECK = Check(
    name="density",
    title="In a thin place",
    kind="poison",
    cannot_see="Poisons among many images of their look, and in groups as large as 20.",
    score=_score,
    threats=("collision", "patch", "blend"),
)
