"""How well a filter or a detector finds poisons: its verdict against the truth.

Pure functions of arrays whose last axis is the N examples of a set; axes before it, such as trials,
are kept, and all arrays broadcast against each other. They work under `jit` and `vmap`. A rate over
no examples is NaN: a set without poisons has no true positive rate. So is a curve of scores that
hold a NaN; outside of `jit` those are an error. Scores are compared in the precision that JAX has
for them, float32 unless x64 is enabled.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core


class Detection(NamedTuple):
    """A verdict against the truth; each field [...], without the axis of the examples.

    Attributes:
      tpr: share of the poisons that are flagged.
      fpr: share of the clean examples that are flagged.
      roc_auc: see `roc_auc`.
      average_precision: see `average_precision`.
    """

    tpr: jax.Array
    fpr: jax.Array
    roc_auc: jax.Array
    average_precision: jax.Array


def detection(flagged: Any, score: Any, is_poisoned: Any) -> Detection:
    """Returns all measures of a verdict.

    Args:
      flagged: bool [..., N], the filter's decisions.
      score: float [..., N], higher for more suspicious examples.
      is_poisoned: bool [..., N], the truth.

    Raises:
      ValueError: for other types or shapes, or (outside `jit`) a NaN score.
    """
    return Detection(
        true_positive_rate(flagged, is_poisoned),
        false_positive_rate(flagged, is_poisoned),
        roc_auc(score, is_poisoned),
        average_precision(score, is_poisoned),
    )


def true_positive_rate(flagged: Any, is_poisoned: Any) -> jax.Array:
    """Returns the share of the poisons that are flagged, float [...]; bool [..., N] both."""
    flagged, is_poisoned = _decisions(flagged, is_poisoned)
    return _share(flagged, is_poisoned)


def false_positive_rate(flagged: Any, is_poisoned: Any) -> jax.Array:
    """Returns the share of the clean examples that are flagged, float [...]; bool [..., N] both."""
    flagged, is_poisoned = _decisions(flagged, is_poisoned)
    return _share(flagged, ~is_poisoned)


def roc_auc(score: Any, is_poisoned: Any) -> jax.Array:
    """Returns the area under the ROC curve, float [...].

    That is the probability that a random poison has a higher score than a random clean example;
    equal scores count half.

    Args:
      score: float [..., N].
      is_poisoned: bool [..., N].
    """
    score, is_poisoned = _scores(score, is_poisoned)
    return _roc_auc(score, is_poisoned)


def roc_curve(score: Any, is_poisoned: Any, fpr: Any) -> jax.Array:
    """Returns the true positive rate at given false positive rates, float [..., F].

    Between the thresholds that the scores allow, the curve is linear; where it is vertical, its
    upper end is taken.

    Args:
      score: float [..., N].
      is_poisoned: bool [..., N].
      fpr: float [F], in [0, 1].
    """
    score, is_poisoned = _scores(score, is_poisoned)
    return _roc_curve(score, is_poisoned, jnp.asarray(fpr, float))


def average_precision(score: Any, is_poisoned: Any) -> jax.Array:
    """Returns the mean over the poisons of the precision at each one's score, float [...].

    The precision at a score is the share of poisons among the examples with at least that score.

    Args:
      score: float [..., N].
      is_poisoned: bool [..., N].
    """
    score, is_poisoned = _scores(score, is_poisoned)
    return _average_precision(score, is_poisoned)


def _share(flagged, among):
    return _ratio(jnp.sum(flagged & among, axis=-1), jnp.sum(among, axis=-1))


def _ratio(part, total):
    """Returns part / total; NaN, and not a division by zero, where the total is zero."""
    return jnp.where(total > 0, part / jnp.maximum(total, 1), jnp.nan)


class _Ranks(NamedTuple):
    """Counts of the examples below, and of those not above, the score of each example.

    Attributes:
      below: int32 [N], examples with a lower score.
      poisons_below: int32 [N].
      poisons_to: int32 [N], poisons with the same or a lower score.
      clean_below: int32 [N].
      clean_to: int32 [N].
    """

    below: jax.Array
    poisons_below: jax.Array
    poisons_to: jax.Array
    clean_below: jax.Array
    clean_to: jax.Array


def _ranks(score, is_poisoned):
    order = jnp.argsort(score)
    ascending = score[order]
    below, up_to = (
        jnp.searchsorted(ascending, score, side=side).astype(jnp.int32)
        for side in ("left", "right")
    )
    zero = jnp.zeros(1, jnp.int32)
    poisons = jnp.concatenate([zero, jnp.cumsum(is_poisoned[order], dtype=jnp.int32)])
    clean = jnp.concatenate([zero, jnp.cumsum(~is_poisoned[order], dtype=jnp.int32)])
    return _Ranks(below, poisons[below], poisons[up_to], clean[below], clean[up_to])


@functools.partial(jnp.vectorize, signature="(n),(n)->()")
def _roc_auc(score, is_poisoned):
    ranks = _ranks(score, is_poisoned)
    num_clean = jnp.sum(~is_poisoned)
    won = _ratio((ranks.clean_below + ranks.clean_to) / 2, num_clean)
    area = _ratio(jnp.sum(jnp.where(is_poisoned, won, 0.0)), jnp.sum(is_poisoned))
    return jnp.where(num_clean > 0, area, jnp.nan) + _nan_if_any(score)


@functools.partial(jnp.vectorize, signature="(n),(n)->()")
def _average_precision(score, is_poisoned):
    ranks = _ranks(score, is_poisoned)
    num_poisons = jnp.sum(is_poisoned)
    precision = (num_poisons - ranks.poisons_below) / (len(score) - ranks.below)
    total = jnp.sum(jnp.where(is_poisoned, precision, 0.0))
    return _ratio(total, num_poisons) + _nan_if_any(score)


@functools.partial(jnp.vectorize, signature="(n),(n),(f)->(f)")
def _roc_curve(score, is_poisoned, fpr):
    ranks = _ranks(score, is_poisoned)
    num_poisons, num_clean = jnp.sum(is_poisoned), jnp.sum(~is_poisoned)
    # With each score as the threshold, from the highest one down; before it, nothing is flagged.
    order = jnp.argsort(-ranks.below)
    zero = jnp.zeros(1, jnp.int32)
    x = jnp.concatenate([zero, (num_clean - ranks.clean_below)[order]]).astype(fpr.dtype)
    y = jnp.concatenate([zero, (num_poisons - ranks.poisons_below)[order]]).astype(fpr.dtype)
    at = fpr * num_clean
    # A rate that means a whole number of examples, such as 0.8 of 30, is that number.
    whole = jnp.round(at)
    at = jnp.where(jnp.abs(at - whole) <= 8 * jnp.finfo(at.dtype).eps * num_clean, whole, at)
    left = jnp.searchsorted(x, at, side="right") - 1  # the last point not beyond: the upper end
    right = jnp.minimum(left + 1, len(score))
    width = x[right] - x[left]
    part = jnp.where(width > 0, (at - x[left]) / jnp.where(width > 0, width, 1.0), 0.0)
    curve = _ratio(y[left] + part * (y[right] - y[left]), num_poisons)
    return jnp.where(num_clean > 0, curve, jnp.nan) + _nan_if_any(score)


def _nan_if_any(score):
    """Returns NaN if some score is NaN, 0 otherwise."""
    return jnp.where(jnp.any(jnp.isnan(score)), jnp.nan, 0.0)


def _decisions(flagged, is_poisoned):
    return _bools("flagged", flagged), _bools("is_poisoned", is_poisoned, flagged)


def _scores(score, is_poisoned):
    score = jnp.asarray(score)
    if not jnp.issubdtype(score.dtype, jnp.number):
        raise ValueError(f"score is {score.dtype}; expected numbers [..., N]")
    is_poisoned = _bools("is_poisoned", is_poisoned, score)
    if not isinstance(score, core.Tracer):
        bad = np.isnan(np.asarray(score))
        if bad.any():
            raise ValueError(
                f"score: {bad.sum()} scores are NaN, the first is that of "
                f"{np.argwhere(bad)[0].tolist()}; give every example a score"
            )
    return score, is_poisoned


def _bools(name, array, other=None):
    """Returns bool [..., N], N >= 1, with as many examples as `other`."""
    array = jnp.asarray(array)
    if array.dtype != bool or array.ndim < 1 or not array.shape[-1]:
        raise ValueError(f"{name} is {array.dtype} {array.shape}; expected bool [..., N]")
    if other is not None and jnp.shape(other)[-1:] != array.shape[-1:]:
        raise ValueError(
            f"{name} has {array.shape[-1]} examples, the verdict has shape {jnp.shape(other)}; "
            "expected the same number along the last axis"
        )
    return array
