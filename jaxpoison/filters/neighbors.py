"""Filters by the labels of an example's neighbors in feature space."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.filters.features import checked, over_rows, squared_distances, verdict
from jaxpoison.filters.result import FilterResult


def deep_knn(
    features: Any, y: Any, *, k: int | None = None, exclude_self: bool = True
) -> FilterResult:
    """Flags examples whose label is not among the most frequent ones of their k neighbors.

    Peri et al. 2020 (arXiv 1909.13374): Euclidean distance, plurality vote, ties keep. The score
    is (votes of the strongest other label - votes of the own) / k, distances are 1 - votes / k.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      k: neighbors; default 2 * (largest class) - 1, at most N - 1. It matters: sweep it.
      exclude_self: whether an example is not its own neighbor.

    Raises:
      ValueError: for bad features, labels or k.
    """
    features, labels, classes = checked(features, y)
    exclude_self = bool(exclude_self)
    most = len(labels) - exclude_self
    if k is None:
        k = min(2 * int(np.bincount(labels).max()) - 1, most)
    if not 1 <= k <= most or k != int(k):
        raise ValueError(f"k must be between 1 and {most} for {len(labels)} examples, not {k}")
    k = int(k)
    votes = over_rows(_votes, k=k, num_classes=len(classes), exclude_self=exclude_self)(
        (features, labels), len(labels)
    )
    own = jnp.arange(len(classes)) == labels[:, None]
    score = jnp.max(jnp.where(own, -1, votes), axis=1) - jnp.sum(jnp.where(own, votes, 0), axis=1)
    # The own label first, so that a tie is its.
    real = jnp.where(score > 0, jnp.argmax(votes, axis=1), labels)
    settings = {"filter": "deep_knn", "k": k, "exclude_self": exclude_self}
    return verdict(y, score > 0, score / k, labels, classes, settings, real, 1 - votes / k)


def _votes(constants, rows, *, k, num_classes, exclude_self):
    features, labels = constants
    distances = squared_distances(features, rows)
    if exclude_self:
        distances = distances.at[jnp.arange(len(rows)), rows].set(jnp.inf)
    _, nearest = jax.lax.top_k(-distances, k)
    none = jnp.zeros((len(rows), num_classes), jnp.float32)
    return none.at[jnp.arange(len(rows))[:, None], labels[nearest]].add(1)
