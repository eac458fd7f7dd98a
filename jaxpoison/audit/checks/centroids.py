"""Poisons that the trained network places nearer to another class than to their own."""

import numpy as np

from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence, Training
from jaxpoison.audit.verdict import Check, NotRun, Scores

_LAST = 2  # BatchNorm layers


def distances(evidence: Evidence, layers: int | None) -> tuple[np.ndarray, bool]:
    """Returns mean cosine distances to the center of each class, float64 [N, K], and whose.

    Centers are means of the trusted images of a class, where there are some, or else coordinate
    by coordinate the mean of the middle half of the class, which poisons move little as long as
    they are a minority. Coordinates are standardized first. A class without images is at infinity.

    Args:
      evidence: with `trained`.
      layers: how many of the last BatchNorm layers are read, and the features with them; None
        reads all BatchNorm layers, without the features.
    """
    mine = _blocks(evidence.trained, layers)
    trusted = evidence.trusted if evidence.trusted and evidence.trusted.trained else None
    theirs = [None] * len(mine) if trusted is None else _blocks(trusted.trained, layers)
    total = np.zeros((len(evidence.labels), evidence.num_classes))
    for block, known in zip(mine, theirs, strict=True):
        middle, scale = np.median(block, axis=0), np.std(block, axis=0)
        scale = np.where(scale > 1e-6 * np.abs(middle) + 1e-12, scale, np.inf)
        block = (block - middle) / scale
        centers = _middles(block, evidence.labels, evidence.num_classes)
        if trusted is not None and known is not None:
            known = (known - middle) / scale
            for label in np.unique(trusted.labels):
                centers[label] = known[trusted.labels == label].mean(axis=0)
        total += 1 - _unit(block) @ _unit(centers).T
    return np.where(np.isnan(total), np.inf, total / len(mine)), trusted is not None


def _blocks(trained: Training | None, layers):
    assert trained is not None
    numbers = np.unique(trained.layers)
    used = numbers if layers is None else numbers[-layers:]
    blocks = [np.asarray(trained.vectors[:, trained.layers == layer], float) for layer in used]
    return blocks if layers is None else [*blocks, np.asarray(trained.features, float)]


def _middles(block, labels, num_classes):
    """Returns the mean of the middle half of each class, [K, C]; NaN for a class of no images."""
    centers = np.full((num_classes, block.shape[1]), np.nan)
    for label in np.unique(labels):
        ordered = np.sort(block[labels == label], axis=0)
        cut = len(ordered) // 4
        centers[label] = ordered[cut : len(ordered) - cut].mean(axis=0)
    return centers


def _unit(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def scores(evidence: Evidence, layers: int | None, what: str) -> Scores:
    """Returns how much nearer each image is to another class's center than to its own."""
    apart, by_trusted = distances(evidence, layers)
    margin, suggested = common.margins(-apart, evidence.labels)
    whose = "of trusted images" if by_trusted else "of the bulk of a class"

    def reason_for(row: int) -> str:
        own, other = (common.named(evidence, k) for k in (evidence.labels[row], suggested[row]))
        nearer = f"nearer to {other} than to {own}" if margin[row] < 0 else f"nearest to {own}"
        return f"In {what} of the trained network it is {nearer}, by centers {whose}."

    return Scores(common.bounded(-margin), reason_for, suggested=suggested)


def _score(evidence: Evidence) -> Scores | NotRun:
    if reason := common.untrained(evidence):
        return reason
    return scores(evidence, _LAST, "the last layers")


CHECK = Check(
    name="centroids",
    title="Nearer to another class",
    kind="poison",
    cannot_see=(
        "Poisons that are the majority of a class when no trusted images are given, and poisons "
        "that the trained network has made a part of their class."
    ),
    score=_score,
    threats=("collision", "patch", "blend"),
)
