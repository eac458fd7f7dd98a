"""BadNets (Gu et al. 2017, arXiv 1708.06733): a white square in a corner, with a wrong label."""

import functools

import jax
import jax.numpy as jnp

from jaxpoison.attacks.base import BackdoorAttack
from jaxpoison.attacks.triggers import Trigger
from jaxpoison.core.checks import check_count


def badnets(*, size: int = 3) -> BackdoorAttack:
    """Returns the backdoor of a white square at the bottom right, all to one class.

    Args:
      size: its side, in pixels.

    Raises:
      TypeError, ValueError: unless it is a whole number of at least 1; from `implant`, if the
        square is larger than the images.
    """
    check_count(size=size)
    return BackdoorAttack("badnets", functools.partial(_trigger, size), {"size": int(size)})


def _trigger(size: int, key: jax.Array, image_shape: tuple[int, int, int], target_class: int):
    height, width, channels = image_shape
    if size > min(height, width):
        raise ValueError(f"size is {size} pixels, the images are {height}x{width}: make it smaller")
    field = jnp.zeros((height, width, channels + 1), jnp.float32)
    return Trigger("overlay", field.at[-size:, -size:].set(1), target_class)
