"""What several checks need: scores in [0, 1], margins, sentences, and why a check cannot run."""

from collections.abc import Callable

import numpy as np

from jaxpoison.audit import patterns
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import NotRun, Scores

LEAST = 3
"""Images of a class below which a class is not judged by its own statistics."""


def bounded(values: np.ndarray) -> np.ndarray:
    """Returns float32 in [0, 1]: the values in the same order, 0.5 at 0; NaN stays NaN.

    x / (1 + |x|) and not a logistic function, which would make ties of what is far from 0.
    """
    values = np.asarray(values, np.float64)
    return (0.5 + 0.5 * values / (1 + np.abs(values))).astype(np.float32)


def unbounded(scores: np.ndarray) -> np.ndarray:
    """Returns float64 values whose `bounded` ones are the scores, in [-1e6, 1e6]."""
    around = 2 * np.asarray(scores, np.float64) - 1
    return around / np.maximum(1 - np.abs(around), 1e-6)


def scaled(values: np.ndarray) -> np.ndarray:
    """Returns values over their median magnitude, so that a factor on all of them is no matter."""
    values = np.asarray(values, np.float64)
    size = np.nanmedian(np.abs(values)) if np.isfinite(values).any() else 0.0
    return values / size if size > 0 else values


def margins(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the value of the label less the largest other one, and whose that is.

    Args:
      values: float [N, K], K >= 2; higher where a class fits better.
      labels: int [N].
    """
    rows = np.arange(len(labels))
    others = np.array(values)
    others[rows, labels] = -np.inf
    best = others.argmax(axis=1).astype(np.int32)
    return values[rows, labels] - others[rows, best], best


def robust_z(values: np.ndarray) -> np.ndarray:
    """Returns (values - median) / (1.4826 MAD), float64; 0 where nothing varies."""
    values = np.asarray(values, np.float64)
    around = values - np.median(values)
    spread = 1.4826 * np.median(np.abs(around))
    return around / spread if spread > 0 else np.zeros_like(around)


def unit_scale(values: np.ndarray) -> np.ndarray:
    """Returns centered columns, float32 [N, F], by one number: mean variance 1, or 0."""
    values = np.asarray(values, float)
    size = np.sqrt(values.var(axis=0).mean())
    return ((values - values.mean(axis=0)) / (size if size > 0 else 1.0)).astype(np.float32)


def large_enough(evidence: Evidence) -> np.ndarray:
    """Returns which rows are of classes with at least `LEAST` images, bool [N]."""
    return np.bincount(evidence.labels, minlength=evidence.num_classes)[evidence.labels] >= LEAST


def one_class(evidence: Evidence) -> NotRun | None:
    """Returns why labels cannot be compared, or None where at least two classes have images."""
    if len(np.unique(evidence.labels)) < 2:
        return NotRun("All images have the same label, so there is no other label to compare with.")
    return None


def untrained(evidence: Evidence) -> NotRun | None:
    """Returns why there is no second witness, or None."""
    if evidence.trained is None:
        return NotRun("No network was trained on this data (run without --quick).")
    return one_class(evidence)


def without_layers(evidence: Evidence) -> NotRun | None:
    """Returns why there are no statistics of the trained network's layers, or None."""
    if reason := untrained(evidence):
        return reason
    if evidence.trained is not None and not evidence.trained.vectors.shape[1]:
        return NotRun("The trained network has no BatchNorm layers, whose statistics are compared.")
    return None


def of_patterns(
    evidence: Evidence, found: patterns.Shared, where: Callable[[int], str]
) -> Scores | NotRun:
    """Returns scores of how much of its class's patterns an image has.

    Args:
      evidence: the images.
      found: `patterns.small` or `large` of it.
      where: row -> how the sentence begins, such as "At the top left, ".
    """
    if reason := one_class(evidence):
        return reason
    if np.isnan(found.apart).all():
        return NotRun(f"Fewer than two classes have {patterns.LEAST} different images.")

    def reason_for(row: int) -> str:
        name = named(evidence, evidence.labels[row])
        if np.isnan(found.apart[row]):
            return f"There are too few images of {name} to see what they share."
        return (
            f"{where(row)}its pixels have something that other images of {name} have as well, "
            f"{found.apart[row]:.1f} times as far out as images of other classes usually are."
        )

    def related(row: int) -> np.ndarray:
        same = (evidence.labels == evidence.labels[row]) & (found.place == found.place[row])
        others = np.flatnonzero(same & (np.arange(len(same)) != row) & ~np.isnan(found.apart))
        return others[np.argsort(-found.apart[others], kind="stable")[:10]]

    # With several directions, about 2 is usual.
    return Scores(bounded(found.apart - 2).astype(np.float32), reason_for, related=related)


def named(evidence: Evidence, label: int | np.integer) -> str:
    """Returns a class in quotes, as sentences name it."""
    return f"'{evidence.class_names[label]}'"
