"""From scores to p-values: the null of honest images, with the planted ones as the alternative.

The data are a mixture, f = (1 - share) f0 + share f1: f0 of honest images, f1 of images with the
fault, of which the canaries are a sample. This is the case-control study with contaminated controls
(Lancaster and Imbens, 1996); with log(f1 / f0) = offset + weights z in the scores z of several
checks, its likelihood gives share, offset and weights at once: which checks tell, how the rest is
to be read, and how many images have the fault already. z are normal scores, by rank, so f0 is
normal whatever a check's scores are. 1 - share f1 / f is the probability that an image is honest;
the tail of all images, counted with it, is the null, and a p-value. The procedure of Benjamini and
Hochberg (1995) on it keeps the expected part of false findings below q.

What honest images have in common with the fault to the last (an ambiguous image looks mislabeled)
counts as the fault.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit, ndtri

LEAST = 8
"""Canaries that a model rests on, at the least."""
LEAST_GAIN = 2.0
"""What a share above 0 must gain in log-likelihood; with less, there may be no such image."""
_LEAST_SHARE = 1e-6
_DECAY = 0.02
_STARTS = (0.0005, 0.02, 0.2)  # the likelihood can have several maxima in the share
_BEFORE = (-5.0, 4.0)  # mean and standard deviation of logit(share), before any score is seen


class Model(NamedTuple):
    """How the scores of J checks are read together.

    Attributes:
      references: float64 [J, N], scores of all images, ascending, NaN last.
      weights: float64 [J], not negative, of the normal scores.
      offset: of log(f1 / f0).
      share: estimated part of the images that has the fault, in (0, 1).
      gain: by how much the logarithm of the likelihood is larger than with no share at all.
      thresholds: float64 [M], ascending values of the weighted sum.
      tail: float64 [M], share of honest images with at least this value, in (0, 1]; descending.
    """

    references: np.ndarray
    weights: np.ndarray
    offset: float
    share: float
    gain: float
    thresholds: np.ndarray
    tail: np.ndarray


def fit(
    images: np.ndarray,
    canaries: np.ndarray,
    among: np.ndarray | None = None,
    known: np.ndarray | None = None,
) -> Model:
    """Returns how to read scores, of which an unknown share is like those of the canaries.

    Args:
      images: float [J, N], higher is worse; NaN speaks neither for nor against a fault.
      canaries: float [J, C], C >= LEAST, scores of images that surely have the fault.
      among: float [J, M], scores of the images that the canaries were planted among, where the
        checks ran on a copy: scores of two runs may differ in scale, so the rank of a canary is
        that in its own run. None if that is `images`.
      known: float [N], what a person has said of images: 1 for honest, 0 for the fault, NaN for
        nothing. Given its scores, such an image says whether there is a fault or not, whatever it
        was chosen by; and it counts as what it is in the tail of honest images.

    Returns:
      Tails of at least 1 / (N + 1): no image is rarer than one among those that were seen.

    Raises:
      ValueError: for fewer canaries, or if no score is a number.
    """
    images, canaries = (np.asarray(x, np.float64) for x in (images, canaries))
    if canaries.shape[1] < LEAST:
        raise ValueError(f"{canaries.shape[1]} canaries; expected at least {LEAST}")
    if np.isnan(images).all():
        raise ValueError("no image has a score: nothing to calibrate")
    references = np.sort(images, axis=1)
    surroundings = references if among is None else np.sort(among, axis=1)
    ours, theirs = normal_scores(references, images), normal_scores(surroundings, canaries)
    known = np.full(images.shape[1], np.nan) if known is None else np.asarray(known, np.float64)
    weights, offset, share, gain = _maximum_likelihood(ours, theirs, known)
    values = weights @ ours
    honest = 1 - expit(logit(share) + offset + values)
    honest = np.where(np.isnan(known), honest, known)
    thresholds, place = np.unique(values, return_inverse=True)
    counts = np.bincount(place, honest, len(thresholds))
    tail = np.cumsum(counts[::-1])[::-1] / counts.sum()
    tail = np.clip(tail, 1 / (images.shape[1] + 1), 1)
    return Model(references, weights, offset, share, gain, thresholds, tail)


def _maximum_likelihood(ours, theirs, known):
    """Returns (weights [J], offset, share, gain) of normal scores [J, N] and [J, C], known [N]."""
    decided = ~np.isnan(known)
    judged, signs = ours[:, decided], np.where(known[decided] == 1, 1, -1)
    log_ratio_of_counts = np.log(theirs.shape[1] / ours.shape[1])

    def loss(parameters):
        weights, offset, logit_share = parameters[:-2], parameters[-2], parameters[-1]
        share = expit(logit_share)
        value = _penalty(logit_share) + 0.5 * _DECAY * weights @ weights
        slope = np.concatenate(
            [_DECAY * weights, [0.0, (logit_share - _BEFORE[0]) / _BEFORE[1] ** 2]]
        )
        for z, sign in ((ours, 1), (theirs, -1)):
            odds = offset + weights @ z
            honest = expit(-(logit_share + odds))  # (1 - share) f0 / f
            # f1 / f = 1 / (share + (1 - share) exp(-odds)); in logs, without overflow.
            log_ratio = -np.logaddexp(np.log(share), np.log1p(-share) - odds)
            value += np.logaddexp(0, sign * (log_ratio_of_counts + log_ratio)).sum()
            outer = sign * expit(sign * (log_ratio_of_counts + log_ratio))
            of_share = -(1 - honest) * (1 - share) + honest * share
            slope[:-2] += z @ (outer * honest)
            slope[-2] += outer @ honest
            slope[-1] += outer @ of_share
        posterior = logit_share + offset + weights @ judged
        value += np.logaddexp(0, signs * posterior).sum()
        outer = signs * expit(signs * posterior)
        slope += np.concatenate([judged @ outer, [outer.sum()] * 2])
        return value, slope

    count = len(ours)
    least, most = logit(_LEAST_SHARE), logit(0.9)

    def best(starts, highest):
        bounds = [(0, None)] * count + [(-60, 60), (least, highest)]
        found = [
            minimize(
                loss,
                np.concatenate([np.full(count, 1 / count), [-2.0, start]]),
                jac=True,
                bounds=bounds,
                method="L-BFGS-B",
            )
            for start in starts
        ]
        result = min(found, key=lambda result: result.fun)
        return result.x, result.fun - _penalty(result.x[-1])

    (_, without), (x, value) = best([least], least), best(logit(np.array(_STARTS)), most)
    return x[:-2], float(x[-2]), float(expit(x[-1])), float(without - value)


def _penalty(logit_share):
    return 0.5 * ((logit_share - _BEFORE[0]) / _BEFORE[1]) ** 2


def normal_scores(references: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns float64 [J, B]: scores by rank among references, as quantiles of a normal variable.

    NaN becomes 0: a check that cannot judge speaks neither for nor against a fault.

    Args:
      references: float [J, N], ascending, NaN last.
      scores: float [J, B].
    """
    out = np.zeros(scores.shape)
    for j, (reference, values) in enumerate(zip(references, scores, strict=True)):
        known = reference[: np.count_nonzero(~np.isnan(reference))]
        # In the middle of equal ones, and inside of (0, 1).
        below = sum(np.searchsorted(known, values, side=side) for side in ("left", "right")) / 2
        out[j] = np.where(np.isnan(values), 0.0, ndtri((below + 0.5) / (len(known) + 1)))
    return out


def p_values(model: Model, scores: np.ndarray) -> np.ndarray:
    """Returns float64 [B] in (0, 1] for scores [J, B]: the tail of honest images."""
    values = model.weights @ normal_scores(model.references, np.asarray(scores, np.float64))
    # The largest threshold that is not above the value: between two, the larger tail.
    at = np.searchsorted(model.thresholds, values + 1e-9, side="right") - 1
    return np.where(at < 0, 1.0, model.tail[np.maximum(at, 0)])


def agreement(
    values: np.ndarray, labels: np.ndarray, *, seed: int = 0, draws: int = 300_000
) -> np.ndarray:
    """Returns float64 [N] in (0, 1]: p-values of how far sources agree that an image is at fault.

    The null: within a class, what one source says of an image tells nothing of what another one
    says of it. Its sums are those of the values of different images, drawn anew until there are
    enough; no known faults are needed, nor that any of them look like those in the data. Faults in
    the data are among what is drawn from, so the p-values are rather too large.

    Args:
      values: float [G, N], of G sources; higher is worse, and their sum decides.
      labels: int [N].
      seed: of the draws.
      draws: sums of the null, at the least.
    """
    sums = values.sum(axis=0)
    random, null = np.random.default_rng(seed), []
    by_class = np.argsort(labels, kind="stable")
    for _ in range(-(-draws // len(labels))):
        drawn = np.zeros(len(labels))
        for row in values:
            # Sorted by class and, within it, by chance.
            order = np.lexsort((random.random(len(labels)), labels))
            drawn[by_class] += row[order]
        null.append(drawn)
    null = np.sort(np.concatenate(null))
    above = len(null) - np.searchsorted(null, sums - 1e-9)
    return (1 + above) / (1 + len(null))


def q_values(model: Model, p: np.ndarray) -> np.ndarray:
    """Returns `benjamini_hochberg(p)`; 1 where the data may well be without the fault."""
    return benjamini_hochberg(p) if model.gain >= LEAST_GAIN else np.ones(np.shape(p))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Returns q-values [N]: the smallest false discovery rate at which each is found.

    Benjamini and Hochberg (1995): of m p-values, the k smallest are found at rate q if the k-th is
    at most q k / m.
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    raw = p[order] * len(order) / np.arange(1, len(order) + 1)
    q = np.empty(p.shape)
    q[order] = np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1)
    return q


def recall(scores: np.ndarray, canaries: np.ndarray, false_alarms: float = 0.01) -> float:
    """Returns the share of canaries above the score that a share of the others exceeds."""
    scores, canaries = (np.asarray(x, np.float64) for x in (scores, canaries))
    scores = scores[~np.isnan(scores)]
    if not len(scores) or not len(canaries):
        return 0.0
    threshold = np.quantile(scores, 1 - false_alarms, method="higher")
    # NaN compares false: a canary that a check cannot judge is one that it did not find.
    return float(np.mean(canaries > threshold))


def superiority(canaries: np.ndarray, others: np.ndarray) -> float:
    """Returns the probability that a canary has a higher score than another image (the AUC).

    A score that is missing is as good as a coin: it counts one half against all.
    """
    known = np.sort(others[~np.isnan(others)])
    if not len(known) or not len(canaries):
        return 0.5
    places = [np.searchsorted(known, canaries, side=side) for side in ("left", "right")]
    return float(np.mean(np.where(np.isnan(canaries), 0.5, sum(places) / 2 / len(known))))
