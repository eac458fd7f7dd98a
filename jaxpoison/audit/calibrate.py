"""From scores to p-values: the null of honest images, with the planted ones as the alternative.

The data are a mixture, f = share_0 f0 + sum_k share_k fk: f0 of honest images, fk of images with
fault k, of which the canaries of that fault are a sample. This is the case-control study with
contaminated controls (Lancaster and Imbens, 1996); with log(fk / f0) = offset_k + weights_k z in
the scores z of several checks, its likelihood gives shares, offsets and weights at once: which
checks tell, how the rest is to be read, and how many images have each fault already. z are normal
scores, by rank, so f0 is normal whatever a check's scores are. share_0 f0 / f is the probability
that an image is honest; the tail of all images, counted with it, is the null, and a p-value. The
procedure of Benjamini and Hochberg (1995) on it keeps the expected part of false findings below q.

What honest images have in common with a fault to the last (an ambiguous image looks mislabeled)
counts as the fault. So faults that look different have shares of their own: with one share for
both, obvious mistakes would be evidence of ambiguous ones, and the lack of the former evidence
against the latter.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit, ndtri

LEAST = 8
"""Canaries that a model rests on, at the least."""
LEAST_GAIN = 5.0
"""What each share above 0 must gain in log-likelihood; with less, there may be no such image.

Twice the gain by chance alone is about half the time 0 and otherwise chi-squared (a share is at
the end of its range): 5 or more happens once in 1,300 honest sets. Canaries are not quite a sample
of the faults, nor honest images of one kind, so that gains of 2 to 4 do occur."""
_LEAST_SHARE = 1e-6
_DECAY = 0.02
_STARTS = (0.0005, 0.02, 0.2)  # the likelihood can have several maxima in the shares
_BEFORE = (-5.0, 4.0)  # mean and standard deviation of log(share_k / share_0), before any score


class Model(NamedTuple):
    """How the scores of J checks are read together, for K faults.

    Attributes:
      references: float64 [J, N], scores of all images, ascending, NaN last.
      weights: float64 [K, J], not negative, of the normal scores.
      offsets: float64 [K], of log(fk / f0).
      shares: float64 [K], estimated parts of the images that have each fault, in (0, 1).
      there: bool [K], whether the data are less likely without the fault, by LEAST_GAIN; the share
        of one that is not there is next to 0.
      thresholds: float64 [M], ascending odds of a fault, in logarithms.
      tail: float64 [M], share of honest images with at least these odds, in (0, 1]; descending.
    """

    references: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    shares: np.ndarray
    there: np.ndarray
    thresholds: np.ndarray
    tail: np.ndarray


def fit(
    images: np.ndarray,
    canaries: Sequence[np.ndarray],
    among: np.ndarray | None = None,
    known: np.ndarray | None = None,
    there: np.ndarray | None = None,
) -> Model:
    """Returns how to read scores, of which unknown shares are like those of the canaries.

    Args:
      images: float [J, N], higher is worse; NaN speaks neither for nor against a fault.
      canaries: K of float [J, C_k], C_k >= LEAST, scores of images that surely have fault k.
      among: float [J, M], scores of the images that the canaries were planted among, where the
        checks ran on a copy: scores of two runs may differ in scale, so the rank of a canary is
        that in its own run. None if that is `images`.
      known: float [N], what a person has said of images: 1 for honest, 0 for a fault, NaN for
        nothing. Given its scores, such an image says whether there is a fault or not, whatever it
        was chosen by; and it counts as what it is in the tail of honest images.
      there: bool [K], which faults are in the data; None to find out.

    Returns:
      Tails of at least 1 / (N + 1): no image is rarer than one among those that were seen.

    Raises:
      ValueError: for fewer canaries, or if no score is a number.
    """
    images, *canaries = (np.asarray(x, np.float64) for x in (images, *canaries))
    for scores in canaries:
        if scores.shape[1] < LEAST:
            raise ValueError(f"{scores.shape[1]} canaries; expected at least {LEAST}")
    if np.isnan(images).all():
        raise ValueError("no image has a score: nothing to calibrate")
    references = np.sort(images, axis=1)
    surroundings = references if among is None else np.sort(among, axis=1)
    samples = [normal_scores(references, images)]
    samples += [normal_scores(surroundings, scores) for scores in canaries]
    known = np.full(images.shape[1], np.nan) if known is None else np.asarray(known, np.float64)
    weights, offsets, log_odds, there = _maximum_likelihood(samples, known, there)
    odds = _odds(weights, offsets + log_odds, samples[0])
    honest = np.where(np.isnan(known), expit(-odds), known)
    thresholds, place = np.unique(odds, return_inverse=True)
    counts = np.bincount(place, honest, len(thresholds))
    tail = np.cumsum(counts[::-1])[::-1] / counts.sum()
    tail = np.clip(tail, 1 / (images.shape[1] + 1), 1)
    shares = np.exp(log_odds - np.logaddexp.reduce([0.0, *log_odds]))
    return Model(references, weights, offsets, shares, there, thresholds, tail)


def _odds(weights, offsets, z):
    """Returns log(sum_k share_k fk / (share_0 f0)) [B] of normal scores [J, B]."""
    return np.logaddexp.reduce(weights @ z + offsets[:, None], axis=0)


def _maximum_likelihood(samples, known, there):
    """Returns (weights [K, J], offsets [K], log(share_k / share_0) [K], there [K]).

    Args:
      samples: normal scores [J, N] of the data and [J, C_k] of each fault's canaries.
      known, there: see `fit`.
    """
    num_faults, num_checks = len(samples) - 1, len(samples[0])
    sizes = np.array([x.shape[1] for x in samples])
    z, sample = np.concatenate(samples, axis=1), np.repeat(np.arange(num_faults + 1), sizes)
    own = sample == np.arange(num_faults + 1)[:, None]
    decided = np.flatnonzero(~np.isnan(known))
    signs = np.where(known[decided] == 1, 1, -1)

    def parts(parameters):
        weights, rest = np.split(parameters, [num_faults * num_checks])
        return weights.reshape(num_faults, num_checks), *np.split(rest, 2)

    def loss(parameters):
        weights, offsets, log_odds = parts(parameters)
        ratios = weights @ z + offsets[:, None]  # log(fk / f0)
        terms = np.concatenate([np.zeros((1, z.shape[1])), ratios + log_odds[:, None]])
        whole = np.logaddexp.reduce(terms, axis=0)
        total = np.logaddexp.reduce([0.0, *log_odds])
        posterior, shares = np.exp(terms - whole), np.exp(log_odds - total)
        # Which sample an image is from, given its scores and how large the samples are.
        logits = np.concatenate([(whole - total)[None], ratios]) + np.log(sizes)[:, None]
        logits -= np.logaddexp.reduce(logits, axis=0)
        outer = np.exp(logits) - own
        of_ratios = outer[1:] + outer[0] * posterior[1:]
        of_odds = (outer[0] * (posterior[1:] - shares[:, None])).sum(axis=1)
        value = -logits[own].sum() + 0.5 * _DECAY * np.sum(weights**2) + _penalty(log_odds)
        if len(decided):
            odds = np.logaddexp.reduce(terms[1:, decided], axis=0)
            value += np.logaddexp(0, signs * odds).sum()
            of_terms = signs * expit(signs * odds) * np.exp(terms[1:, decided] - odds)
            of_ratios[:, decided] += of_terms
            of_odds += of_terms.sum(axis=1)
        of_odds += (log_odds - _BEFORE[0]) / _BEFORE[1] ** 2
        of_weights = of_ratios @ z.T + _DECAY * weights
        return value, np.concatenate([of_weights.ravel(), of_ratios.sum(axis=1), of_odds])

    least, most = logit(_LEAST_SHARE), logit(0.9)

    def best(there):
        """Returns (loss without penalty and with LEAST_GAIN for each fault, parameters)."""
        bounds = [(0, None)] * (num_faults * num_checks) + [(-60, 60)] * num_faults
        bounds += [(least, most if it else least) for it in there]
        first = [1 / num_checks] * (num_faults * num_checks) + [-2.0] * num_faults
        starts = [logit(_STARTS) if it else [least] for it in there]
        found = [
            minimize(loss, [*first, *start], jac=True, bounds=bounds, method="L-BFGS-B")
            for start in itertools.product(*starts)
        ]
        result = min(found, key=lambda result: result.fun)
        return result.fun - _penalty(parts(result.x)[2]) + LEAST_GAIN * sum(there), result.x

    choices = itertools.product([False, True], repeat=num_faults) if there is None else [there]
    (_, x), there = min(((best(there), there) for there in choices), key=lambda pair: pair[0][0])
    return *parts(x), np.array(there)


def _penalty(log_odds):
    return 0.5 * np.sum(((log_odds - _BEFORE[0]) / _BEFORE[1]) ** 2)


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


def fault_log_odds(model: Model, scores: np.ndarray) -> np.ndarray:
    """Returns float64 [B] for scores [J, B]: natural logarithms of the odds of any fault."""
    z = normal_scores(model.references, np.asarray(scores, np.float64))
    of_shares = np.log(model.shares) - np.log1p(-model.shares.sum())
    return _odds(model.weights, model.offsets + of_shares, z)


def p_values(model: Model, scores: np.ndarray) -> np.ndarray:
    """Returns float64 [B] in (0, 1] for scores [J, B]: the tail of honest images."""
    odds = fault_log_odds(model, scores)
    # The largest threshold that is not above the odds: between two, the larger tail.
    at = np.searchsorted(model.thresholds, odds + 1e-9, side="right") - 1
    return np.where(at < 0, 1.0, model.tail[np.maximum(at, 0)])


def beyond_other_classes(
    values: np.ndarray, labels: np.ndarray, faults: np.ndarray | None = None
) -> np.ndarray:
    """Returns float64 [N] in (0, 1]: p-values of how far an image stands out, other classes' null.

    What is planted for one class is not on the images of the others, and these are as natural. So
    they tell how far out honest images come: p is the share of other classes' images that are at
    least as far above the middle of their class. No known faults are needed, nor that any of them
    look like those in the data. Faults in several classes are in each other's null: there the
    p-values are too large. A class whose honest images differ from the middle much more than those
    of all other classes makes them too small.

    Args:
      values: float [N], higher is worse; NaN is not judged, and its p-value 1.
      labels: int [N].
      faults: bool [N], images that are in no null; None for none.
    """
    values = less_middle(values, labels)
    is_honest = ~np.isnan(values)
    if faults is not None:
        is_honest &= ~faults
    everything, p = np.sort(values[is_honest]), np.ones(len(values))
    for label in np.unique(labels):
        mine = labels == label
        own = np.sort(values[mine & is_honest])
        above = [len(x) - np.searchsorted(x, values[mine] - 1e-9) for x in (everything, own)]
        p[mine] = (1 + above[0] - above[1]) / (1 + len(everything) - len(own))
    return np.where(np.isnan(values), 1.0, p)


def less_middle(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns float64 [N], values [N] less the median of their class [N]; NaN stays NaN."""
    values = np.array(values, np.float64)
    for label in np.unique(labels):
        mine = labels == label
        known = values[mine & ~np.isnan(values)]
        values[mine] -= np.median(known) if len(known) else 0.0
    return values


def q_values(model: Model, p: np.ndarray) -> np.ndarray:
    """Returns `benjamini_hochberg(p)`; 1 where the data may well be without any fault."""
    return benjamini_hochberg(p) if model.there.any() else np.ones(np.shape(p))


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
