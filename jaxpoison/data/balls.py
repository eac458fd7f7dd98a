"""How far images may change: balls around them, in the largest pixel or in the length of a change.

linf   |x' - x| <= epsilon in every pixel and channel
l2     |x' - x|_2 <= epsilon over all pixels and channels of an image
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Norm = Literal["l2", "linf"]


def check_norm(norm: Any) -> None:
    """Raises a ValueError unless `norm` is one of `Norm`."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")


def largest_budget(norm: Norm) -> float:
    """Returns the largest budget that makes sense: 1 for a pixel, any length for an image."""
    return 1.0 if norm == "linf" else float("inf")


def steepest(gradient: jax.Array, norm: Norm) -> jax.Array:
    """Returns the change of size 1 by which a loss rises most, image by image.

    Args:
      gradient: float [B, H, W, C].
      norm: "linf" gives the sign, "l2" the gradient over its length (0 where that is 0).
    """
    if norm == "linf":
        return jnp.sign(gradient)
    return gradient / jnp.maximum(_lengths(gradient), 1e-12)


def random_change(key: jax.Array, images: jax.Array, epsilon: float, norm: Norm) -> jax.Array:
    """Returns random changes, shaped like `images`.

    Args:
      key: PRNG key.
      images: float [B, H, W, C]; only shape and type matter.
      epsilon: the budget.
      norm: "linf" draws from U(-epsilon, epsilon), "l2" a random direction of length epsilon.
    """
    if norm == "linf":
        span = epsilon
        return jax.random.uniform(key, images.shape, images.dtype, minval=-span, maxval=span)
    return epsilon * steepest(jax.random.normal(key, images.shape, images.dtype), "l2")


def project(change: jax.Array, epsilon: float, norm: Norm) -> jax.Array:
    """Returns the nearest change within the budget, image by image."""
    if norm == "linf":
        return jnp.clip(change, -epsilon, epsilon)
    return change * jnp.minimum(1.0, epsilon / jnp.maximum(_lengths(change), 1e-12))


def _lengths(changes):
    """Returns the lengths of images, [B, 1, 1, 1]."""
    return jnp.sqrt(jnp.sum(changes**2, axis=(1, 2, 3), keepdims=True))
