"""UEraser: strong random augmentation, and of several views the one of the largest loss.

    x' = argmax over v in {a_1(x), ..., a_V(x)} of CE(f(v), y)

with a = TrivialAugment, shuffled channels, plasma contrast and plasma brightness, in the reverse
order. After Qin et al. 2023 (arXiv 2303.15127). V = 1 is their UEraser-Lite; V = 5 at every epoch
their UEraser-Max.

A plasma is a smooth random picture, here the sum over octaves o of roughness^o times a random grid
of 2^o + 1 points a side, interpolated; theirs is of the diamond-square algorithm, which differs in
how the midpoints are averaged. TrivialAugment (Müller & Hutter 2021, arXiv 2103.10158) is one of
thirteen operations at a random strength; equalization, its fourteenth, is left out.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpoison.core.settings import check_range, settle
from jaxpoison.data import Dataset, check
from jaxpoison.network import Network, as_network
from jaxpoison.training.hooks import Defense

ROUGHNESS = (0.1, 0.7)
SHEAR, SHIFT, DEGREES = 0.3, 0.45, 30.0  # largest: of the side, of the side, of a circle's 360


def ueraser(model: Any, num_views: int = 5) -> Defense:
    """Returns UEraser: every batch is augmented strongly, after the recipe's own augmentation.

    A step costs `num_views` forward passes more; one view costs none.

    Args:
      model: the network that is trained, a `Network` or what `network.as_network` takes.
      num_views: V, random views of each image, of which the one of the largest loss is trained on.

    Raises:
      TypeError: for arguments of another kind. ValueError: for fewer than one view; from `init` for
        a bad training set.
    """
    on_batch = UEraser(as_network(model).without_variables(), num_views)
    return Defense(on_batch.init, on_batch=on_batch)


@dataclasses.dataclass(frozen=True)
class UEraser:
    """Augments a batch; a `BatchFn`. See `ueraser`.

    Attributes:
      network: that is trained.
      num_views: V.
    """

    network: Network
    num_views: int

    def __post_init__(self):
        settle(self)
        check_range(self, "num_views", 1, whole=True)

    def init(self, key, dataset, num_epochs):
        """Checks the training set; an `InitFn`."""
        check(dataset, self.network.num_classes)
        return ()

    def __call__(self, state: Any, key: jax.Array, train_state: Any, batch: Dataset) -> Dataset:
        if self.num_views == 1:
            return batch._replace(images=augment(key, batch.images))
        variables = jax.lax.stop_gradient(train_state.variables)
        best = None
        for view_key in jax.random.split(key, self.num_views):
            view = augment(view_key, batch.images)
            logits = self.network.logits(variables, view)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            best = (view, losses) if best is None else _harder(best, (view, losses))
        assert best is not None
        return batch._replace(images=best[0])


def _harder(one, other):
    """Returns of two results (images, losses) the one of the larger loss, image by image."""
    larger = other[1] > one[1]
    images = jnp.where(larger[:, None, None, None], other[0], one[0])
    return images, jnp.maximum(one[1], other[1])


@jax.jit
def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Returns images, each augmented in its own way.

    Args:
      key: PRNG key.
      images: float32 [B, H, W, C] in [0, 1].

    Returns:
      float32 [B, H, W, C] in [0, 1].
    """
    augmented = jax.vmap(_augment)(jax.random.split(key, len(images)), images)
    return augmented.astype(images.dtype)


def _augment(key, image):
    """Returns one image [H, W, C], augmented."""
    brightness_key, strength_key, contrast_key, shuffle_key, trivial_key = jax.random.split(key, 5)
    height, width, channels = image.shape
    brightness = 2 * plasma(brightness_key, height, width) - 1
    image = jnp.clip(image + jax.random.uniform(strength_key) * brightness[..., None], 0, 1)
    contrast = 4 * plasma(contrast_key, height, width)
    image = jnp.clip((image - 0.5) * contrast[..., None] + 0.5, 0, 1)
    whether_key, order_key = jax.random.split(shuffle_key)
    order = jnp.where(
        jax.random.bernoulli(whether_key),
        jax.random.permutation(order_key, channels),
        jnp.arange(channels),
    )
    return trivial(trivial_key, image[..., order])


def plasma(key: jax.Array, height: int, width: int) -> jax.Array:
    """Returns a smooth random picture, float32 [height, width], from 0 to 1."""
    roughness_key, grids_key = jax.random.split(key)
    low, high = ROUGHNESS
    roughness = jax.random.uniform(roughness_key, minval=low, maxval=high)
    octaves = max(1, math.ceil(math.log2(max(height, width))))
    total = jnp.zeros((height, width))
    for octave, grid_key in enumerate(jax.random.split(grids_key, octaves + 1)):
        points = 2**octave + 1
        grid = jax.random.uniform(grid_key, (points, points), minval=-1)
        total += roughness**octave * (_tents(height, points) @ grid @ _tents(width, points).T)
    total -= jnp.min(total)
    return total / jnp.maximum(jnp.max(total), 1e-6)


def _tents(size, points):
    """Returns the weights [size, points] that interpolate a grid linearly at `size` pixels."""
    places = jnp.linspace(0, points - 1, size)
    return jnp.maximum(0, 1 - jnp.abs(places[:, None] - jnp.arange(points)))


def trivial(key: jax.Array, image: jax.Array) -> jax.Array:
    """Returns an image [H, W, C] after one random operation of a random strength."""
    number_key, strength_key, sign_key = jax.random.split(key, 3)
    strength = jax.random.uniform(strength_key)
    signed = strength * jax.random.rademacher(sign_key, (), image.dtype)
    motions = _motions(signed, *image.shape[:2])
    number = jax.random.randint(number_key, (), 0, len(motions) + len(COLORS))
    matrices, shifts = (jnp.stack(parts) for parts in zip(*motions, strict=True))
    motion = jnp.minimum(number, len(motions) - 1)
    moved = warp(image, matrices[motion], shifts[motion])
    colored = jnp.stack([color(image, strength, signed) for color in COLORS])
    colored = jnp.clip(colored[jnp.maximum(number - len(motions), 0)], 0, 1)
    return jnp.where(number < len(motions), moved, colored)


def _motions(signed, height, width):
    """Returns (matrix [2, 2], shift [2]) in (row, column) of each operation that moves pixels."""
    unmoved, still = jnp.eye(2), jnp.zeros(2)
    angle = jnp.deg2rad(DEGREES) * signed
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return [
        (unmoved, still),
        (unmoved.at[0, 1].set(SHEAR * signed), still),
        (unmoved.at[1, 0].set(SHEAR * signed), still),
        (unmoved, still.at[0].set(SHIFT * height * signed)),
        (unmoved, still.at[1].set(SHIFT * width * signed)),
        (jnp.array([[cos, -sin], [sin, cos]]), still),
    ]


def warp(image: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns an image whose pixel at p is that of `image` at matrix (p - center) + center + shift.

    Args:
      image: float [H, W, C]; what lies outside is 0.
      matrix: [2, 2], in rows and columns.
      shift: [2], in pixels.
    """
    height, width, _ = image.shape
    center = jnp.array([height - 1, width - 1])[:, None, None] / 2
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    places = jnp.tensordot(matrix, grid - center, 1) + center + shift[:, None, None]
    take = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=list(places), order=1)
    return jax.vmap(take, -1, -1)(image)


def _gray(image):
    return jnp.mean(image, axis=-1, keepdims=True)


def _blurred(image):
    return (
        sum(jnp.roll(image, (row, column), (0, 1)) for row in (-1, 0, 1) for column in (-1, 0, 1))
        / 9
    )


COLORS = (
    lambda image, strength, signed: image + 0.9 * signed,  # brightness
    lambda image, strength, signed: _about(jnp.mean(_gray(image)), image, signed),  # contrast
    lambda image, strength, signed: _about(_gray(image), image, signed),  # saturation
    lambda image, strength, signed: _about(_blurred(image), image, signed),  # sharpness
    lambda image, strength, signed: _of_bits(image, 8 - jnp.round(6 * strength)),  # posterization
    lambda image, strength, signed: jnp.where(image < 1 - strength, image, 1 - image),  # solar
    lambda image, strength, signed: _stretched(image),  # automatic contrast
)
"""The operations that change colors: of an image, a strength in [0, 1], and one with a sign."""


def _about(base, image, signed):
    """Returns the image moved away from a base, or towards it."""
    return base + (1 + 0.9 * signed) * (image - base)


def _of_bits(image, bits):
    levels = 2.0**bits
    return jnp.floor(image * 255 * levels / 256) * 256 / levels / 255


def _stretched(image):
    low, high = jnp.min(image, axis=(0, 1)), jnp.max(image, axis=(0, 1))
    return jnp.where(high > low, (image - low) / jnp.maximum(high - low, 1e-6), image)
