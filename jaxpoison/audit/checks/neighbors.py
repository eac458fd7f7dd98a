"""Mislabeled images by the labels of what looks like them to the foreign witness."""

import numpy as np

from jaxpoison.audit import nearest
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores

_SHOWN = 10  # neighbors that the sentence counts
_PRIOR = 0.03  # votes that every class has from the start: without them most scores are ties


def votes(evidence: Evidence) -> np.ndarray:
    """Returns the votes of the neighbors for each class, float64 [N, K], rows of sum 1.

    A neighbor's vote falls by a factor e for each step away from the nearest one; a step is what
    separates the nearest from the last in the median row. A vote for a class of few images counts
    for more: it is divided by the square root of the number of its images.
    """
    found = nearest.neighbors(evidence)
    known = found.rows >= 0
    behind = found.similarity[:, :1] - np.where(known, found.similarity, -1.0)
    step = float(np.median(behind[known[:, -1], -1])) if known[:, -1].any() else 1.0
    theirs = evidence.labels[found.rows]
    counts = np.bincount(evidence.labels, minlength=evidence.num_classes)
    weights = known * np.exp(-behind / max(step, 1e-6)) / np.sqrt(counts[theirs])
    total = np.zeros((len(known), evidence.num_classes))
    np.add.at(total, (np.arange(len(known))[:, None], theirs), weights)
    return total / total.sum(axis=1, keepdims=True)


def _score(evidence: Evidence) -> Scores | NotRun:
    if reason := common.one_class(evidence):
        return reason
    found = nearest.neighbors(evidence)
    if (found.rows[:, 0] < 0).any():
        return NotRun("Some images have no other image to be compared with.")
    margin, suggested = common.margins(np.log(votes(evidence) + _PRIOR), evidence.labels)
    shown = found.rows[:, :_SHOWN]

    def reason_for(row: int) -> str:
        mine = shown[row][shown[row] >= 0]
        counts = np.bincount(evidence.labels[mine], minlength=evidence.num_classes)
        most = int(counts.argmax())
        name = common.named(evidence, most)
        return f"{counts[most]} of its {len(mine)} nearest neighbors are {name}."

    return Scores(
        score=common.bounded(-margin),
        reason=reason_for,
        suggested=suggested,
        related=lambda row: shown[row][shown[row] >= 0],
    )


CHECK = Check(
    name="neighbors",
    title="Neighbors disagree",
    kind="label",
    cannot_see=(
        "Wrong labels that similar images share, such as a whole batch labeled alike, and classes "
        "that look the same to a network trained on other photos."
    ),
    score=_score,
    threats=("flip", "mistake"),
)
