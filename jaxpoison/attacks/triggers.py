"""Triggers of backdoors: a change of images at which a network with the backdoor says one class.

    overlay   x -> (1 - a) x + a t      the opacity a may differ from pixel to pixel
    add       x -> clip(x + t, 0, 1)
    warp      x -> x(u), bilinear       u says where each pixel comes from

Each is a pure function of images and of one array, the field. A trigger can therefore be kept in an
archive without code, and is the same for every image.
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import ndimage

from jaxpoison.data import to_float

Kind = Literal["overlay", "add", "warp"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["field"], meta_fields=["kind", "target_class"]
)
@dataclasses.dataclass(frozen=True)
class Trigger:
    """A trigger and the class that it stands for; a pytree, whose leaf is the field.

    Attributes:
      kind: "overlay", "add" or "warp", see the functions of these names.
      field: float32 [H, W, C + 1], [H, W, C] or [H, W, 2], in this order; an overlay's last channel
        is its opacity.
      target_class: what a network with the backdoor says of images with the trigger.
    """

    kind: Kind
    field: jax.Array | np.ndarray
    target_class: int

    def apply(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Returns images with the trigger, float32 [N, H, W, C] in [0, 1].

        Args:
          images: float32 [N, H, W, C] in [0, 1], or uint8 in 0..255.

        Raises:
          ValueError: for images of a shape that the trigger was not made for, or another kind.
        """
        check_trigger(self, images.shape[1:])
        return _apply(self.kind, self.field, images)


def overlay(images: jax.Array, field: jax.Array) -> jax.Array:
    """Returns (1 - a) x + a t; the field is t [H, W, C] and a [H, W, 1] in [0, 1], concatenated."""
    pattern, opacity = field[..., :-1], field[..., -1:]
    return (1 - opacity) * images + opacity * pattern


def add(images: jax.Array, field: jax.Array) -> jax.Array:
    """Returns x + t, clipped to [0, 1]; the field is t [H, W, C]."""
    return jnp.clip(images + field, 0, 1)


def warp(images: jax.Array, field: jax.Array) -> jax.Array:
    """Returns each pixel from another place, bilinearly.

    Args:
      images: float32 [N, H, W, C].
      field: float32 [H, W, 2] or one for each image [N, H, W, 2]: row and column in pixels, from 0;
        beyond the border stands the border.
    """
    places = jnp.broadcast_to(field, (len(images), *field.shape[-3:]))

    def plane(pixels, place):
        return ndimage.map_coordinates(
            pixels, [place[..., 0], place[..., 1]], order=1, mode="nearest"
        )

    channels = jax.vmap(plane, in_axes=(2, None), out_axes=2)
    return jnp.clip(jax.vmap(channels)(images, places), 0, 1)  # rounding may leave the range


def check_trigger(trigger: Trigger, image_shape: tuple[int, ...], name: str = "trigger") -> None:
    """Raises a ValueError unless the trigger fits images of (H, W, C)."""
    if trigger.kind not in get_args(Kind):
        raise ValueError(f"{name}: kind is {trigger.kind!r}; expected one of {get_args(Kind)}")
    height, width, channels = image_shape
    depth = {"overlay": channels + 1, "add": channels, "warp": 2}[trigger.kind]
    shape, dtype = jnp.shape(trigger.field), trigger.field.dtype
    if shape != (height, width, depth) or dtype != np.float32:
        raise ValueError(
            f"{name}: the field is {dtype} {shape}; expected float32 {(height, width, depth)} for "
            f"{trigger.kind} on images of {tuple(image_shape)}"
        )


@functools.partial(jax.jit, static_argnums=0)
def _apply(kind, field, images):
    return {"overlay": overlay, "add": add, "warp": warp}[kind](to_float(images), field)
