"""Images that show nothing, and images that are like no other."""

import numpy as np

from jaxpoison.audit import nearest
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores

_COUNT = 10
_RANGE = 4  # gray levels between the darkest and the brightest pixel of a constant image
_BEYOND = 8.0  # robust standard deviations from the median
_LEAST = 20  # images for a median and a deviation


def _score(evidence: Evidence) -> Scores | NotRun:
    """Mean distance to the nearest neighbors; flagged far beyond all others, or where constant."""
    pixels = np.asarray(evidence.images).reshape(len(evidence.images), -1, 3)
    constant = (np.ptp(pixels, axis=1) < _RANGE).all(axis=1)
    found = nearest.neighbors(evidence)
    enough = len(np.unique(nearest.copies_of(evidence))) >= _LEAST
    if not enough and not constant.any():
        return NotRun(f"With fewer than {_LEAST} different images, none can be out of place.")
    distance = np.zeros(len(pixels))
    if enough:
        near = found.similarity[:, :_COUNT].astype(float)
        distance = np.sqrt(np.maximum(2 - 2 * near, 0)).mean(axis=1)
    apart = common.robust_z(distance)
    far = apart > _BEYOND
    score = np.where(constant, 1.0, common.bounded(apart / _BEYOND)).astype(np.float32)

    def reason_for(row: int) -> str:
        if constant[row]:
            return "It has one color only."
        if not far[row]:
            return "It is about as far from its nearest neighbors as other images are."
        typical = distance[row] / np.median(distance)
        return f"It is {typical:.1f} times as far from its nearest neighbors as is usual here."

    return Scores(
        score,
        reason_for,
        flagged=constant | far,
        related=lambda row: found.rows[row, :_COUNT][found.rows[row, :_COUNT] >= 0],
    )


CHECK = Check(
    name="odd",
    title="Odd one out",
    kind="file",
    cannot_see="Images off the topic in groups, or that look like the others at 32 pixels.",
    score=_score,
)
