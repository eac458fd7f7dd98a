"""Blended injection (Chen et al. 2017, arXiv 1712.05526): a picture shines through all poisons."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.attacks.base import BackdoorAttack
from jaxpoison.attacks.triggers import Trigger
from jaxpoison.core.checks import number
from jaxpoison.data.pixels import check_range


def blended(*, alpha: float = 0.2, pattern: np.ndarray | None = None) -> BackdoorAttack:
    """Returns the backdoor x -> (1 - alpha) x + alpha t with a wrong label.

    Args:
      alpha: opacity of the pattern, in (0, 1].
      pattern: t, float32 [H, W, C] in [0, 1]; None for pixels drawn from U(0, 1) with the key of
        `implant`.

    Raises:
      ValueError: for an opacity or pixels out of range; from `implant`, for a pattern of another
        shape than the images.
    """
    alpha = number(alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}; expected an opacity in (0, 1]")
    if pattern is not None:
        pattern = np.asarray(pattern, np.float32)
        check_range(pattern, "pattern")
    settings = {"alpha": float(alpha), "pattern": "random" if pattern is None else "given"}
    return BackdoorAttack("blended", functools.partial(_trigger, alpha, pattern), settings)


def _trigger(alpha, pattern, key: jax.Array, image_shape: tuple[int, int, int], target_class: int):
    if pattern is None:
        pattern = jax.random.uniform(key, image_shape)
    elif pattern.shape != image_shape:
        raise ValueError(f"pattern is {pattern.shape}; the images are {image_shape}")
    opacity = jnp.full((*image_shape[:2], 1), alpha, jnp.float32)
    return Trigger("overlay", jnp.concatenate([pattern, opacity], axis=-1), target_class)
