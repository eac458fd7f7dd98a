"""SIG (Barni et al. 2019, arXiv 1902.11237): a plane wave on images of one class, labels unchanged.

t(i, j) = delta sin(2 pi f j / W)     of column j; the same in all rows and channels
"""

import functools
import math

import jax.numpy as jnp

from jaxpoison.attacks.base import BackdoorAttack, check_epsilon
from jaxpoison.attacks.triggers import Trigger
from jaxpoison.core.checks import check_positive


def sig(*, delta: float = 40 / 255, frequency: float = 6.0) -> BackdoorAttack:
    """Returns the backdoor of a wave, with clean labels.

    Args:
      delta: its amplitude, in units of [0, 1]; in (0, 1].
      frequency: f, periods in the width of an image; above 0.

    Raises:
      TypeError, ValueError: for values out of range; from `implant`, for a wave that the columns
        cannot show: f of half the width or more.
    """
    check_epsilon(delta)
    check_positive(frequency=frequency)
    settings = {"delta": float(delta), "frequency": float(frequency)}
    make = functools.partial(_trigger, *settings.values())
    return BackdoorAttack("sig", make, settings, clean_label=True)


def _trigger(delta, frequency, key, image_shape: tuple[int, int, int], target_class: int):
    width = image_shape[1]
    if frequency >= width / 2:
        raise ValueError(
            f"frequency is {frequency:g} in images of {width} columns, which can show less than "
            f"{width / 2:g} periods: lower it"
        )
    wave = delta * jnp.sin(2 * math.pi * frequency * jnp.arange(width) / width)
    return Trigger("add", jnp.broadcast_to(wave[:, None], image_shape), target_class)
