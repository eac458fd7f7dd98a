"""The two kinds of pixels, uint8 in 0..255 and float32 in [0, 1], and the ways between them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def to_float(images: ArrayLike) -> jax.Array:
    """Returns float32 images in [0, 1]: uint8 divided by 255, float32 as it is.

    For use under `jit`. XLA may multiply by 1/255 instead, so the last bit can differ from
    NumPy's division; `to_unit` is the same on the host.

    Args:
        images: uint8 in 0..255 or float32 in [0, 1], any shape.

    Raises:
        ValueError: for any other dtype.
    """
    images = jnp.asarray(images)
    _check_dtype(images.dtype)
    return images if images.dtype == jnp.float32 else images.astype(jnp.float32) / 255


def to_unit(images: ArrayLike) -> np.ndarray:
    """Returns float32 images in [0, 1] on the host: uint8 divided by 255, float32 as it is.

    Raises:
        ValueError: for any other dtype.
    """
    images = np.asarray(images)
    _check_dtype(images.dtype)
    return images if images.dtype == np.float32 else images.astype(np.float32) / 255


def to_uint8(images: ArrayLike) -> np.ndarray:
    """Returns images in 0..255 on the host: float32 ones times 255 and rounded, uint8 as it is.

    Raises:
        ValueError: for any other dtype, or pixels outside [0, 1]; nothing wraps around.
    """
    images = np.asarray(images)
    _check_dtype(images.dtype)
    if images.dtype == np.uint8:
        return images
    check_range(images)
    return np.round(images * 255).astype(np.uint8)


def quantize(images: ArrayLike, bases: ArrayLike, epsilon: float) -> np.ndarray:
    """Returns `images` as uint8, rounded but never out of the budget around `bases`.

    Plain rounding would cross a budget that is no whole number of 255ths: 0.1 is 25.5 of them.

    Args:
        images: float32 in [0, 1], any shape.
        bases: float32 in [0, 1], the same shape.
        epsilon: largest absolute change of a pixel, in units of [0, 1]; at least half of 1/255.

    Raises:
        ValueError: if some images are not finite, or no 8-bit pixel lies within the budget.
    """
    images, center = np.asarray(images), np.asarray(bases, np.float64)
    check_finite(images)
    slack = 1e-3  # float32 images of 8-bit origin are whole numbers up to about 1e-5
    low = np.maximum(np.ceil(255 * (center - epsilon) - slack), 0)
    high = np.minimum(np.floor(255 * (center + epsilon) + slack), 255)
    if (low > high).any():
        raise ValueError(
            f"epsilon {epsilon:g} leaves some pixels no 8-bit value; it must be at least "
            f"{0.5 / 255:.5f}, and bases must lie in [0, 1]"
        )
    return np.clip(np.round(255 * images), low, high).astype(np.uint8)


def check_finite(images: np.ndarray, name: str = "images") -> None:
    """Raises a ValueError that names the first of `images` [N, ...] with a NaN or infinity."""
    # min and max pass a NaN on, so two passes over the pixels are enough in the usual case.
    if images.size and not (np.isfinite(images.min()) and np.isfinite(images.max())):
        bad = ~np.isfinite(images).reshape(len(images), -1).all(axis=1)
        raise ValueError(
            f"{name}: {bad.sum()} images hold NaN or infinite pixels, the first is image "
            f"{int(bad.argmax())}; remove or repair them"
        )


def check_range(images: np.ndarray, name: str = "images") -> None:
    """Raises a ValueError unless all of the float `images` [N, ...] are finite and in [0, 1]."""
    check_finite(images, name)
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"{name}: float pixels lie in [{images.min():g}, {images.max():g}]; expected [0, 1]. "
            "Divide 0..255 images by 255, and leave normalization to the model"
        )


def _check_dtype(dtype: np.dtype) -> None:
    if dtype not in (np.float32, np.uint8):
        raise ValueError(f"images are {dtype}; expected uint8 or float32")
