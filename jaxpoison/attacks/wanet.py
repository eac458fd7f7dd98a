"""WaNet (Nguyen & Tran 2021, arXiv 2102.10369): images are warped a little, all in the same way.

In coordinates from -1 to 1 over the image, an offset of U(-1, 1) in both directions is drawn at
k x k points, divided by its mean absolute value and interpolated bicubically to H x W. With
identity e,

    u       = clip(e + s offset / H, -1, 1)              the trigger: x(u), label the target class
    u_noise = clip(u + U(-1, 1) / H, -1, 1)              noise mode: x(u_noise), label unchanged

Without the second a network learns any warp; with it, this one. The authors draw poisons and noise
again in each batch of training; here, as for an attacker who hands out data, both are drawn once.
Bicubic interpolation is PyTorch's (a = -0.75, corners aligned, border repeated), as in their code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.attacks.base import BackdoorAttack
from jaxpoison.attacks.triggers import Trigger, warp
from jaxpoison.core.checks import check_count, check_positive
from jaxpoison.data import to_float

SHARPNESS = -0.75  # a of the cubic kernel


def wanet(*, grid: int = 4, strength: float = 0.5, cross_ratio: float = 2.0) -> BackdoorAttack:
    """Returns the backdoor of a smooth warp, with a wrong label.

    Args:
      grid: k, points of the field in each direction; at least 2.
      strength: s, above 0.
      cross_ratio: images in noise mode for each poison, at least 0.

    Raises:
      TypeError, ValueError: for values out of range.
    """
    check_count(grid=grid)
    check_positive(strength=strength)
    if grid < 2:
        raise ValueError("grid is 1: a field needs at least 2 points in each direction")
    if not 0 <= cross_ratio < np.inf:
        raise ValueError(f"cross_ratio is {cross_ratio}; expected a number of at least 0")
    settings = {
        "grid": int(grid), "strength": float(strength), "cross_ratio": float(cross_ratio)
    }  # fmt: skip
    make = functools.partial(_trigger, settings["grid"], settings["strength"])
    return BackdoorAttack("wanet", make, settings, cover_ratio=settings["cross_ratio"], cover=noisy)


def noisy(key: jax.Array, trigger: Trigger, images: jax.Array) -> jax.Array:
    """Returns images in noise mode, each with its own jitter; float32 [N, H, W, C] in [0, 1]."""
    return _noisy(key, trigger.field, images)


@jax.jit
def _noisy(key, field, images):
    height, width = field.shape[:2]
    # 1 / H in coordinates from -1 to 1 is (side - 1) / (2 H) pixels.
    unit = jnp.array([height - 1, width - 1]) / (2 * height)
    jitter = jax.random.uniform(key, (len(images), *field.shape), minval=-1, maxval=1)
    places = jnp.clip(field + unit * jitter, 0, jnp.array([height - 1, width - 1]))
    return warp(to_float(images), places)


def _trigger(grid, strength, key, image_shape: tuple[int, int, int], target_class: int) -> Trigger:
    points = jax.random.uniform(key, (grid, grid, 2), minval=-1, maxval=1)
    field = _field(strength, *image_shape[:2], points / jnp.mean(jnp.abs(points)))
    return Trigger("warp", field, target_class)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _field(strength, height, width, points):
    """Returns u in pixels, float32 [H, W, 2], of normalized offsets [k, k, 2]."""
    down, across = (_bicubic(points.shape[0], side) for side in (height, width))
    offset = jnp.einsum("ik,jl,klc->ijc", down, across, points)
    last = jnp.array([height - 1, width - 1])
    here = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1)
    return jnp.clip(here + strength * offset * last / (2 * height), 0, last).astype(jnp.float32)


def _bicubic(num_points: int, side: int) -> np.ndarray:
    """Returns the matrix [side, num_points] that interpolates along one axis."""
    place = np.arange(side) * (num_points - 1) / max(side - 1, 1)
    first = np.floor(place).astype(int)
    matrix = np.zeros((side, num_points), np.float32)
    for tap in range(-1, 3):
        distance = np.abs(place - first - tap)
        near = ((SHARPNESS + 2) * distance - (SHARPNESS + 3)) * distance**2 + 1
        far = SHARPNESS * (((distance - 5) * distance + 8) * distance - 4)
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
        np.add.at(matrix, (np.arange(side), np.clip(first + tap, 0, num_points - 1)), weight)
    return matrix
