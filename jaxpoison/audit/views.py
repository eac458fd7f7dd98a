"""Transformed versions of an image: the same thing for a person, other pixels for a network."""

import functools

import jax
import jax.numpy as jnp

MAX_ANGLE = 15.0
"""Degrees."""
MAX_SHIFT = 0.1
"""Of height and width."""
MAX_GAIN = 0.2
"""Relative change of contrast."""
MAX_OFFSET = 0.1
"""Of brightness and of each channel, in units of pixels in [0, 1]."""
MAX_NOISE = 0.03
"""Standard deviation, in the same units."""


@functools.partial(jax.jit, static_argnames="number")
def random_views(key: jax.Array, image: jax.Array, *, number: int) -> jax.Array:
    """Returns random versions of an image: mirrored, turned, shifted, blurred, recolored, noisy.

    Each has all of these, as strong as it is drawn, uniformly: mirrored or not, an angle of up to
    15 degrees, a shift of up to a tenth of the image, a binomial blur of 3x3 pixels mixed in,
    contrast up to 20%, brightness and tint up to 0.1, Gaussian noise of up to 0.03.

    Args:
      key: PRNG key.
      image: float32 [H, W, C] in [0, 1].
      number: T, how many.

    Returns:
      float32 [T, H, W, C] in [0, 1].
    """
    return jax.vmap(_view, (0, None))(jax.random.split(key, number), image)


def _view(key, image):
    height, width, channels = image.shape
    keys = jax.random.split(key, 7)

    def draw(index, most, shape=()):
        return jax.random.uniform(keys[index], shape, image.dtype, -most, most)

    angle = jnp.deg2rad(draw(0, MAX_ANGLE))
    shift = draw(1, MAX_SHIFT, (2,)) * jnp.array([height, width])
    side = jnp.where(jax.random.bernoulli(keys[2]), 1.0, -1.0)
    center = jnp.array([height - 1, width - 1]) / 2
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    y, x = rows - center[0], (columns - center[1]) * side
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    places = [cos * y - sin * x + center[0] + shift[0], sin * y + cos * x + center[1] + shift[1]]

    def moved(channel):
        return jax.scipy.ndimage.map_coordinates(channel, places, order=1, mode="nearest")

    image = jax.vmap(moved, -1, -1)(image)
    softness = jax.random.uniform(keys[3], (), image.dtype)
    image = (1 - softness) * image + softness * _blurred(image)
    image = (image - 0.5) * (1 + draw(4, MAX_GAIN)) + 0.5
    offsets = draw(5, MAX_OFFSET, (1 + channels,))
    image = image + offsets[0] + offsets[1:]
    level_key, noise_key = jax.random.split(keys[6])
    level = jax.random.uniform(level_key, (), image.dtype, 0, MAX_NOISE)
    return jnp.clip(image + level * jax.random.normal(noise_key, image.shape), 0, 1)


def _blurred(image):
    """Returns the image under the kernel [1, 2, 1] / 4 in both directions; edges are repeated."""
    for axis in (0, 1):
        pad = [(1, 1) if axis == side else (0, 0) for side in range(3)]
        size = image.shape[axis]
        wide = jnp.pad(image, pad, mode="edge")
        parts = [jax.lax.slice_in_dim(wide, start, start + size, axis=axis) for start in range(3)]
        image = (parts[0] + 2 * parts[1] + parts[2]) / 4
    return image
