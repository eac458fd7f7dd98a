"""From scores to p-values: the null of honest images, with the planted ones as the alternative.

Scores of a set are a mixture, f = (1 - share) f0 + share f1: f0 of honest images, f1 of images with
the fault, known from canaries. A higher score must speak for the fault, so f1 / f rises with the
score; isotonic regression estimates it. It is at most 1 / share, so its largest value, over the
top quarter of the canaries, gives the share, and share f1 / f is the probability that an image has
the fault. The tail of what is left, f - share f1, is that of honest images: a p-value. The
procedure of Benjamini and Hochberg (1995) on it keeps the expected part of false findings below q.

Nothing is assumed of the shape of f0. What honest images have in common with the fault to the last
(an ambiguous image looks mislabeled) counts as the fault.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

LEAST = 8
"""Canaries that an estimate rests on, at the least."""


class Null(NamedTuple):
    """Scores of honest images.

    Attributes:
      thresholds: float64 [M], ascending scores.
      tail: float64 [M], share of honest images with at least this score, in (0, 1]; descending.
      share: estimated part of the images that has the fault, in [0, 1].
    """

    thresholds: np.ndarray
    tail: np.ndarray
    share: float


def fit_null(scores: np.ndarray, canaries: np.ndarray) -> Null:
    """Returns the null of scores, of which an unknown share is like those of the canaries.

    Args:
      scores: float [N], higher is worse; NaN is left out.
      canaries: float [C], scores of images that surely have the fault; NaN is left out. With fewer
        than LEAST, the share is taken as 0, which is conservative.

    Returns:
      Tails of at least 1 / (N + 1): no image is rarer than one among those that were seen.

    Raises:
      ValueError: if no score is a number.
    """
    scores, canaries = (np.asarray(x, np.float64) for x in (scores, canaries))
    scores, canaries = scores[~np.isnan(scores)], canaries[~np.isnan(canaries)]
    if not len(scores):
        raise ValueError("no image has a score: nothing to calibrate")
    thresholds, counts = np.unique(scores, return_counts=True)
    faulty = np.zeros(len(thresholds))
    if len(canaries) >= LEAST:
        faulty = _probabilities(thresholds, counts, canaries)
    honest = counts * (1 - faulty)
    left = honest.sum()
    tail = np.cumsum(honest[::-1])[::-1] / left if left else np.ones(len(thresholds))
    tail = np.clip(tail, 1 / (len(scores) + 1), 1)
    return Null(thresholds, tail, float(counts @ faulty / len(scores)))


def _probabilities(thresholds, counts, canaries):
    """Returns for each threshold, held by `counts` images, the probability of the fault."""
    # A canary stands with the largest threshold that is not above it, or below them all.
    place = np.searchsorted(thresholds, canaries, side="right")
    among = np.bincount(place, minlength=len(thresholds) + 1)
    of_images = np.insert(counts, 0, 0)
    both = among + of_images
    some = both > 0
    part = np.zeros(len(both))
    part[some] = isotonic_regression(among[some] / both[some], weights=both[some]).x
    # The top: as many thresholds as hold a quarter of the canaries.
    top = np.cumsum(among[::-1])[::-1] <= max(LEAST, len(canaries) / 4)
    top[np.flatnonzero(~top)[-1]] = True
    part[top] = np.average(part[top], weights=both[top])
    largest = part[top][0]
    odds = part[1:] / np.maximum(1 - part[1:], 1e-12)
    return np.minimum(odds * (1 - largest) / largest, 1)


def p_values(null: Null, scores: np.ndarray) -> np.ndarray:
    """Returns float64 [N] in (0, 1], NaN where the score is: the tail at each score."""
    scores = np.asarray(scores, np.float64)
    # The largest threshold that is not above the score: between two, the larger tail.
    at = np.searchsorted(null.thresholds, scores, side="right") - 1
    found = np.where(at < 0, 1.0, null.tail[np.maximum(at, 0)])
    return np.where(np.isnan(scores), np.nan, found)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Returns q-values [N]: the smallest false discovery rate at which each is found; NaN stays.

    Benjamini and Hochberg (1995): of m p-values, the k smallest are found at rate q if the k-th is
    at most q k / m.
    """
    p = np.asarray(p, np.float64)
    judged = np.flatnonzero(~np.isnan(p))
    order = judged[np.argsort(p[judged], kind="stable")]
    raw = p[order] * len(order) / np.arange(1, len(order) + 1)
    q = np.full(p.shape, np.nan)
    q[order] = np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1)
    return q


def combine(p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns one score for each image from several checks; higher is worse.

    The Cauchy combination (Liu and Xie, 2020): sum of weight tan((1/2 - p) pi), which hardly
    depends on how the checks are correlated. A p-value that is missing does not count.

    Args:
      p: float [J, N] in (0, 1], NaN where a check cannot judge.
      weights: float [J], not negative.

    Returns:
      float64 [N]: the combined p-value's complement, in [0, 1); NaN where no check judges.
    """
    p, weights = np.asarray(p, np.float64), np.asarray(weights, np.float64)[:, None]
    judges = ~np.isnan(p) & (weights > 0)
    shares = np.where(judges, weights, 0.0)
    total = shares.sum(0)
    # tan has no value at p = 1.
    angles = (0.5 - np.where(judges, np.minimum(p, 1 - 1e-6), 0.5)) * np.pi
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (shares * np.tan(angles)).sum(0) / total
    return 0.5 + np.arctan(mean) / np.pi


def recall(scores: np.ndarray, canaries: np.ndarray, false_alarms: float = 0.01) -> float:
    """Returns the share of canaries above the score that a share of the others exceeds."""
    scores, canaries = (np.asarray(x, np.float64) for x in (scores, canaries))
    scores = scores[~np.isnan(scores)]
    if not len(scores) or not len(canaries):
        return 0.0
    threshold = np.quantile(scores, 1 - false_alarms, method="higher")
    # NaN compares false: a canary that a check cannot judge is one that it did not find.
    return float(np.mean(canaries > threshold))
