"""A filter by what stands out once the honest spread of a class is divided out.

SPECTRE (Hayase et al. 2021, arXiv 2104.11315). Poisons need not lie along the direction in which
a class spreads most, where `spectral_signatures` looks. For each class, in its k main components:

    z    = S^-1/2 (x - m),   m and S a robust mean and covariance
    QUE  = z^T Q z / tr Q,   Q = exp(alpha (C - I) / (|C| - 1)),   C the covariance of all z

QUE, quantum entropy, counts a direction the more, the more all examples vary in it beyond what is
honest. k is the one for which the mean of QUE is largest.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.filters.features import (
    EXACT,
    by_class,
    check_share,
    checked,
    class_means,
    verdict,
)
from jaxpoison.filters.result import FilterResult, top_of_each_class
from jaxpoison.filters.spectral import principal_components

RIDGE = 1e-6  # of the mean variance, so that the covariance of few examples has an inverse


def spectre(
    features: Any,
    y: Any,
    *,
    poison_share: float = 0.1,
    max_components: int = 32,
    alpha: float = 4.0,
    num_steps: int = 20,
) -> FilterResult:
    """Flags the 1.5 * poison_share * n_y examples of a class with the largest QUE scores.

    The authors take their robust covariance from an iterative filter with a guarantee; here it is
    that of the examples that concentration steps keep (Rousseeuw & Van Driessen 1999): all but the
    share assumed to be poisoned, those nearest to the mean in the covariance of the step before.
    Numbers of components are tried in powers of two. Of each class at least one example stays.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      poison_share: the assumed share of poisons in a class, below 1/3 for the covariance to be that
        of a majority. The truth is oracle knowledge; 0.1 is not.
      max_components: the largest k that is tried, at most d and half of the smallest class.
      alpha: how much QUE prefers the directions that stand out; 0 makes it the squared length.
      num_steps: concentration steps.

    Raises:
      ValueError: for bad features, labels, share or settings.
    """
    check_share("poison_share", poison_share)
    if poison_share >= 1 / 3:
        raise ValueError(
            f"poison_share is {poison_share}; the covariance needs a share below 1/3, such as 0.1"
        )
    for name, value, low in (("max_components", max_components, 1), ("num_steps", num_steps, 1)):
        if value != int(value) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, not {value}")
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a finite number of at least 0, not {alpha}")
    features, labels, classes = checked(features, y)
    around = features - class_means(features, labels, len(classes))[labels]
    score = by_class(
        _scores, around, labels=labels, share=1.5 * float(poison_share),
        max_components=min(int(max_components), features.shape[1]), alpha=float(alpha),
        num_steps=int(num_steps),
    )  # fmt: skip
    settings = {
        "filter": "spectre",
        "poison_share": poison_share,
        "max_components": max_components,
        "alpha": alpha,
        "num_steps": num_steps,
    }
    flagged = top_of_each_class(score, labels, 1.5 * float(poison_share))
    return verdict(y, flagged, score, labels, classes, settings)


def _scores(members, around, *, share, max_components, alpha, num_steps):
    """Returns QUE of the members of a class, [m], for the k of the largest mean."""
    reduced = principal_components(jnp.where(members[:, None], around, 0), max_components)
    count = jnp.sum(members)
    scores, means = [], []
    for k in (2**power for power in range(max_components.bit_length())):
        white = _whitened(members, reduced[:, :k], share, num_steps)
        score = _que(members, white, alpha)
        mean = jnp.sum(score) / count
        scores.append(score)
        # With more components than half of the examples, a covariance says nothing.
        means.append(jnp.where((2 * k <= count) | (k == 1), mean, -jnp.inf))
    return jnp.stack(scores)[jnp.argmax(jnp.stack(means))]


def _whitened(members, x, share, num_steps):
    """Returns x [m, k] less a robust mean, in units of a robust covariance; 0 for no members."""
    k = x.shape[1]
    num_kept = jnp.ceil((1 - share) * jnp.sum(members)).astype(jnp.int32)

    def standardized(kept):
        weights = kept.astype(x.dtype) / jnp.maximum(jnp.sum(kept), 1)
        centered = x - weights @ x
        covariance = jnp.matmul((weights[:, None] * centered).T, centered, precision=EXACT)
        ridge = RIDGE * jnp.trace(covariance) / k + jnp.finfo(x.dtype).tiny
        values, vectors = jnp.linalg.eigh(covariance + ridge * jnp.eye(k, dtype=x.dtype))
        # Nothing is measured where rounding made a variance negative.
        root = vectors / jnp.sqrt(jnp.maximum(values, ridge))
        return jnp.where(members[:, None], jnp.matmul(centered, root, precision=EXACT), 0)

    def concentrate(_, kept):
        lengths = jnp.where(members, jnp.sum(standardized(kept) ** 2, axis=1), jnp.inf)
        ranks = jnp.argsort(jnp.argsort(lengths))
        return members & (ranks < num_kept)

    white = standardized(jax.lax.fori_loop(0, num_steps, concentrate, members))
    # What was cut off makes the covariance small: the median length says by how much.
    lengths = jnp.where(members, jnp.sum(white**2, axis=1), jnp.nan)
    expected = k * (1 - 2 / (9 * k)) ** 3  # of the chi-square distribution, Wilson & Hilferty 1931
    return white * jnp.sqrt(expected / jnp.maximum(jnp.nanmedian(lengths), 1e-12))


def _que(members, white, alpha):
    """Returns z^T Q z / tr Q of each row, 0 for no members."""
    k = white.shape[1]
    covariance = jnp.matmul(white.T, white, precision=EXACT) / jnp.maximum(jnp.sum(members), 1)
    values, vectors = jnp.linalg.eigh(covariance)
    excess = jnp.maximum(values[-1] - 1, 1e-6)
    # exp of the largest is divided out, so that nothing overflows.
    shares = jnp.exp(alpha * (values - values[-1]) / excess)
    along = jnp.matmul(white, vectors, precision=EXACT)
    return jnp.sum(along**2 * shares, axis=1) / jnp.sum(shares) if k > 1 else along[:, 0] ** 2
