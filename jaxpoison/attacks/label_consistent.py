"""Label-consistent backdoors (Turner et al. 2019, arXiv 1912.02771): true labels, hard images.

    x' = trigger(PGD(x)),    x of the target class, label unchanged

PGD moves an image away from its label, so that what is left to learn from is the trigger: a pattern
of 3x3 pixels in each corner, of ours, which a flip leaves where it was.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.attacks._pgd import pgd
from jaxpoison.attacks.base import BackdoorAttack, Victim, check_victim
from jaxpoison.attacks.triggers import Trigger
from jaxpoison.core.checks import number

PATTERN = ((0, 1, 0), (1, 0, 1), (0, 1, 1))
"""Of the bottom right corner, 0 is black and 1 white; the other corners show it mirrored."""


def label_consistent(
    victim: Victim, *, epsilon: float = 16 / 255, opacity: float = 1.0, num_steps: int = 100
) -> BackdoorAttack:
    """Returns the backdoor of corner patterns on adversarial images, with clean labels.

    Args:
      victim: a network trained on clean data, that PGD is run against.
      epsilon: largest change of a pixel by PGD, in units of [0, 1].
      opacity: of the pattern, in (0, 1]; theirs is also tried at an eighth.
      num_steps: of PGD, each of 1.5 epsilon over `num_steps`.

    Raises:
      TypeError, ValueError: for settings out of range; from `implant`, for a victim that does not
        fit the images, or images smaller than two patterns.
    """
    check_victim(victim)
    opacity = number(opacity)
    if isinstance(opacity, bool) or not 0 < opacity <= 1:
        raise ValueError(f"opacity must be in (0, 1], not {opacity!r}")
    attack = pgd(epsilon=epsilon, step=1.5 * epsilon / num_steps, num_steps=num_steps)
    settings = {"epsilon": attack.epsilon, "opacity": float(opacity), "num_steps": num_steps}
    return BackdoorAttack(
        "label_consistent", functools.partial(_trigger, float(opacity)), settings,
        clean_label=True, prepare=functools.partial(_perturbed, attack.craft, victim),
    )  # fmt: skip


def _perturbed(craft: Any, victim: Victim, key: jax.Array, images: Any, labels: Any) -> jax.Array:
    return craft(key, victim, images, labels)


def _trigger(opacity, key, image_shape: tuple[int, int, int], target_class: int) -> Trigger:
    height, width, channels = image_shape
    size = len(PATTERN)
    if min(height, width) < 2 * size:
        raise ValueError(
            f"images of {height}x{width} have no room for patterns of {size} pixels in each corner"
        )
    corner = jnp.asarray(PATTERN, jnp.float32)[..., None]
    corner = jnp.concatenate([jnp.repeat(corner, channels, -1), jnp.full_like(corner, opacity)], -1)
    field = jnp.zeros((height, width, channels + 1), jnp.float32)
    for rows in (False, True):
        for columns in (False, True):
            axes = [axis for axis, mirrored in enumerate((rows, columns)) if mirrored]
            where = (
                slice(0, size) if rows else slice(height - size, height),
                slice(0, size) if columns else slice(width - size, width),
            )
            field = field.at[where].set(jnp.flip(corner, axes) if axes else corner)
    return Trigger("overlay", field, target_class)
