"""Random translation and flip of image batches, differentiable and without gathers.

Bilinear translation by (dy, dx) is separable, so each image becomes R x K^T with

    R[i, h] = max(0, 1 - |i - dy - h|),    K[j, w] = max(0, 1 - |c(j) - dx - w|),

where c(j) = j, or W - 1 - j for a flipped image. Two small batched matrix products run fast on
CPU, GPU and TPU alike. Each example has its own key, hence its result does not depend on how
a batch is divided over devices.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def random_translate_flip(
    keys: jax.Array,
    images: jax.Array,
    *,
    max_shift: float = 4.0,
    fill: ArrayLike,
    flip: bool = True,
    whole_pixels: bool = False,
) -> jax.Array:
    """Returns images, each moved by its own random shift and flipped at random.

    Both shifts are uniform in [-max_shift, max_shift) pixels, or over the whole numbers in
    [-max_shift, max_shift]; a flip mirrors left and right with probability 1/2. Differentiable in
    `images`.

    Args:
        keys: typed PRNG keys [B], one for each example, for instance
            `jax.vmap(jax.random.fold_in, (None, 0))(key, example_indices)`.
        images: float32 [B, H, W, C] in [0, 1].
        max_shift: largest shift along either axis, in pixels.
        fill: value outside the image, scalar or [C]. To fill with zeros *after* normalization,
            as the HINT authors do, give the mean that the model subtracts.
        flip: whether to flip at all.
        whole_pixels: whether shifts are whole numbers of pixels; others blur the image a little.

    Returns:
        float32 [B, H, W, C], in the range that `images` and `fill` span.

    Raises:
        ValueError: if images are not a batch of floats, there is not one key for each, or
            `max_shift` is negative.
    """
    if isinstance(max_shift, int | float) and not max_shift >= 0:
        raise ValueError(f"max_shift must not be negative, got {max_shift}")
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype} {images.shape}; expected float32 [B, H, W, C]")
    if keys.shape != images.shape[:1]:
        raise ValueError(
            f"keys have shape {keys.shape}; expected one typed key for each of the "
            f"{images.shape[0]} images (jax.random.split(jax.random.key(0), {images.shape[0]}))"
        )
    shifts, flips = jax.vmap(lambda key: _draw(key, max_shift, whole_pixels))(keys)
    return _translate_flip(images, shifts, flips & flip, fill)


def _draw(key, max_shift, whole_pixels) -> tuple[jax.Array, jax.Array]:
    """Returns the shift (dy, dx), float32 [2], and whether to flip, bool [], of one example."""
    shift_key, flip_key = jax.random.split(key)
    if whole_pixels:
        most = jnp.floor(jnp.asarray(max_shift)).astype(jnp.int32)
        whole = jax.random.randint(shift_key, (2,), -most, most + 1, jnp.int32)
        return whole.astype(jnp.float32), jax.random.bernoulli(flip_key, jnp.float32(0.5))
    shift = jax.random.uniform(shift_key, (2,), jnp.float32, minval=-max_shift, maxval=max_shift)
    # float32 throughout, so that enabling x64 does not change what is drawn.
    return shift, jax.random.bernoulli(flip_key, jnp.float32(0.5))


def _translate_flip(
    images: jax.Array, shifts: jax.Array, flips: jax.Array, fill: ArrayLike
) -> jax.Array:
    """Returns images [B, H, W, C] moved down and right by shifts [B, 2], then flipped where said.

    A flip reverses the rows of K, which mirrors the image after it has been moved.
    """
    rows = _tent_weights(shifts[:, 0], images.shape[1])
    columns = _tent_weights(shifts[:, 1], images.shape[2])
    columns = jnp.where(flips[:, None, None], columns[:, ::-1], columns)
    # TPUs, and GPUs with TF32, would otherwise round the pixels to 8 or 10 bits of mantissa.
    precision = jax.lax.Precision.HIGHEST
    moved = jnp.einsum("bih,bhwc->biwc", rows, images, precision=precision)
    moved = jnp.einsum("bjw,biwc->bijc", columns, moved, precision=precision)
    inside = rows.sum(-1)[:, :, None, None] * columns.sum(-1)[:, None, :, None]
    # Not fill + R (x - fill) K^T: that is the same number, but a zero shift would round it.
    return moved + (1 - inside) * jnp.asarray(fill, images.dtype)


def _tent_weights(shifts: jax.Array, size: int) -> jax.Array:
    """Returns max(0, 1 - |i - shift - h|), float32 [B, i, h] with i and h in [0, size)."""
    position = jnp.arange(size, dtype=jnp.float32)
    offset = position[:, None] - position[None, :]
    return jnp.maximum(0, 1 - jnp.abs(offset - shifts[:, None, None]))
