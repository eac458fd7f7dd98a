"""Filters by the main direction of a class's features."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.filters.features import (
    EXACT,
    TINY,
    by_class,
    check_share,
    checked,
    class_means,
    verdict,
)
from jaxpoison.filters.result import FilterResult, top_of_each_class


def spectral_signatures(
    features: Any, y: Any, *, poison_share: float = 0.1, centered: bool = True
) -> FilterResult:
    """Flags the 1.5 * poison_share * n_y examples of a class furthest along its main direction.

    Tran et al. 2018 (arXiv 1811.00636): with v the top right singular vector of the centered
    features of a class, the score is ((f - mean) . v)^2. Of each class at least one example stays,
    so a share of 2/3 or more leaves exactly one. Time and memory are linear in d where a class has
    fewer examples than that.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      poison_share: the assumed share of poisons in a class. The truth is oracle knowledge; 0.1 is
        not.
      centered: False projects f itself on v, as the authors' released code does.

    Raises:
      ValueError: for bad features, labels or share.
    """
    check_share("poison_share", poison_share)
    features, labels, classes = checked(features, y)
    around = features - class_means(features, labels, len(classes))[labels]
    score = by_class(_scores, around, around if centered else features, labels=labels)
    settings = {"filter": "spectral_signatures", "poison_share": poison_share, "centered": centered}
    flagged = top_of_each_class(score, labels, 1.5 * float(poison_share))
    return verdict(y, flagged, score, labels, classes, settings)


def principal_components(around: jax.Array, num_components: int) -> jax.Array:
    """Returns the main components of centered features [m, d], float32 [m, num_components].

    By the smaller of the two matrices of products. Components that there are not, or that
    rounding would make up, are 0.
    """
    num_examples, width = around.shape
    if width <= num_examples:
        _, vectors = jnp.linalg.eigh(jnp.matmul(around.T, around, precision=EXACT))
        return jnp.matmul(around, vectors[:, : -num_components - 1 : -1], precision=EXACT)
    values, vectors = jnp.linalg.eigh(jnp.matmul(around, around.T, precision=EXACT))
    values, vectors = (a[..., : -num_components - 1 : -1] for a in (values, vectors))
    known = values > num_examples * jnp.finfo(around.dtype).eps * values[0]
    found = vectors * jnp.sqrt(jnp.where(known, values, 0))
    return jnp.pad(found, ((0, 0), (0, num_components - found.shape[1])))


def _scores(members, around, projected):
    around = jnp.where(members[:, None], around, 0)
    num_examples, width = around.shape
    if width <= num_examples:
        _, vectors = jnp.linalg.eigh(jnp.matmul(around.T, around, precision=EXACT))
        direction = vectors[:, -1]
    else:
        _, vectors = jnp.linalg.eigh(jnp.matmul(around, around.T, precision=EXACT))
        direction = jnp.matmul(around.T, vectors[:, -1], precision=EXACT)
        direction /= jnp.maximum(jnp.linalg.norm(direction), TINY)
    return jnp.square(jnp.matmul(projected, direction, precision=EXACT))
