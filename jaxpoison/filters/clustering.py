"""Filters by clusters within a class."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.filters.features import EXACT, TINY, by_class, checked, class_means, verdict
from jaxpoison.filters.result import FilterResult
from jaxpoison.filters.spectral import principal_components


def activation_clustering(
    features: Any,
    y: Any,
    *,
    num_components: int = 10,
    max_relative_size: float = 1.0,
    min_silhouette: float = -1.0,
) -> FilterResult:
    """Flags the smaller of two clusters of each class.

    Chen et al. 2018 (arXiv 1811.03728): principal components of a class (the authors took
    independent ones), then 2-means. The start is the sign of the first component, so nothing is
    random. The score is how much nearer an example is to the smaller cluster's center.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      num_components: of each class, at most d; a class of n_y examples has at most n_y - 1.
      max_relative_size: flag only where the smaller cluster holds less than this share of the
        class; 1 flags in every class, clean ones too, 0.35 is common.
      min_silhouette: flag only where the mean silhouette of the class is above this; -1 in every
        class, 0.1 is common.

    Raises:
      ValueError: for bad features, labels or number of components.
    """
    features, labels, classes = checked(features, y)
    width = features.shape[1]
    if not 1 <= num_components <= width or num_components != int(num_components):
        raise ValueError(
            f"num_components must be between 1 and {width}, the width of the features, "
            f"not {num_components}"
        )
    num_components = int(num_components)
    around = features - class_means(features, labels, len(classes))[labels]
    reduced, score = by_class(two_means, around, labels=labels, num_components=num_components)
    smaller, counts = score > 0, np.bincount(labels)
    suspect = np.bincount(labels, smaller) / counts < max_relative_size
    if min_silhouette > -1:
        silhouettes = by_class(_silhouettes, reduced, smaller, labels=labels)
        suspect &= np.bincount(labels, silhouettes) / counts > min_silhouette
    settings = {
        "filter": "activation_clustering",
        "num_components": num_components,
        "max_relative_size": max_relative_size,
        "min_silhouette": min_silhouette,
    }
    return verdict(y, smaller & suspect[labels], score, labels, classes, settings)


def two_means(mine, around, *, num_components):
    """Returns principal components [m, c] and how much nearer the smaller cluster's center is."""
    reduced = principal_components(jnp.where(mine[:, None], around, 0), num_components)

    def distances(second):
        """Returns squared distances [m, 2] to the centers of both clusters."""
        members = jnp.stack([mine & ~second, mine & second]).astype(reduced.dtype)
        sizes = jnp.sum(members, axis=1, keepdims=True)
        centers = jnp.matmul(members / jnp.maximum(sizes, 1), reduced, precision=EXACT)
        return jnp.sum(jnp.square(reduced[:, None] - centers), axis=-1)

    def assign(state):
        steps, _, second = state
        squares = distances(second)
        return steps + 1, second, mine & (squares[:, 1] < squares[:, 0])

    def moving(state):
        steps, last, second = state
        return (steps == 0) | ((steps < 300) & jnp.any(last != second))

    start = mine & (reduced[:, 0] > 0)
    second = jax.lax.while_loop(moving, assign, (0, start, start))[2]
    first_is_smaller = jnp.sum(mine & ~second) < jnp.sum(second)
    squares = distances(second)
    margin = squares[:, 0] - squares[:, 1]
    return reduced, jnp.where(first_is_smaller, -margin, margin)


def _silhouettes(mine, reduced, smaller):
    """Returns each example's silhouette between the two clusters of its class; 0 if alone."""

    def one(row):
        x, smaller_too = row
        distances = jnp.sqrt(jnp.sum(jnp.square(reduced - x), axis=1))
        same = mine & (smaller == smaller_too)
        other = mine & (smaller != smaller_too)
        size = jnp.sum(same)
        inside = jnp.sum(distances * same) / jnp.maximum(size - 1, 1)
        outside = jnp.sum(distances * other) / jnp.maximum(jnp.sum(other), 1)
        value = (outside - inside) / jnp.maximum(jnp.maximum(inside, outside), TINY)
        return jnp.where((size > 1) & jnp.any(other), value, 0)

    return jax.lax.map(one, (reduced, smaller), batch_size=256)
