"""Squeezing: JPEG, grayscale and fewer bits, by which small perturbations lose what they carry.

After image shortcut squeezing (Liu et al. 2023, arXiv 2301.13838). Only the training set is
squeezed: what is trained must work on images as they come.
"""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.core import devices
from jaxpoison.core.settings import plain
from jaxpoison.data import check, to_float
from jaxpoison.defenses._ids import for_rows
from jaxpoison.training.hooks import Defense, Info

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and JPEG use


def jpeg(quality: int = 10) -> Defense:
    """Returns the defense that trains on the images as JPEG leaves them.

    The set as collected is compressed once, in `init`, on the host and in 8 bits: about 20 s for
    50,000 images of 32 x 32. What defenses before it in a chain have done to pixels is lost. Images
    have one channel or three.

    Args:
      quality: of the encoder, 1 to 95; 10 is that of the paper.

    Raises:
      ValueError: for another quality; from `init` for a bad training set.
    """
    quality = plain(quality)
    if type(quality) is not int or not 1 <= quality <= 95:
        raise ValueError(f"the quality of JPEG is a whole number from 1 to 95, not {quality!r}")
    return Defense(functools.partial(_init_jpeg, quality), _on_epoch_jpeg)


def _init_jpeg(quality, key, dataset, num_epochs):
    check(dataset)
    _check_channels(dataset, (1, 3), "JPEG")
    return jnp.asarray(compress(devices.to_host(dataset.images), quality))


def _on_epoch_jpeg(state, epoch, train_state, dataset):
    return state, _squeezed(state, dataset), Info(changed=epoch == 0)


@jax.jit
def _squeezed(compressed, dataset):
    own = (dataset.ids >= 0)[:, None, None, None]
    images, after = dataset.images, for_rows(compressed, dataset.ids)
    if images.dtype != after.dtype:
        images, after = to_float(images), to_float(after)
    return dataset._replace(images=jnp.where(own, after, images))


def compress(images: np.ndarray, quality: int) -> np.ndarray:
    """Returns images after JPEG, uint8 [N, H, W, C].

    Args:
      images: uint8, or float32 in [0, 1], which is rounded to 8 bits first; C is 1 or 3.
      quality: of the encoder, 1 to 95.
    """
    from PIL import Image

    if images.dtype != np.uint8:
        images = np.round(images * 255).astype(np.uint8)
    squeezed = np.empty_like(images)
    gray = images.shape[-1] == 1
    for image, into in zip(images, squeezed, strict=True):
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if gray else image).save(file, "JPEG", quality=quality)
        into[...] = np.asarray(Image.open(file)).reshape(image.shape)
    return squeezed


def gray() -> Defense:
    """Returns the defense that trains on gray images: 0.299 R + 0.587 G + 0.114 B, three times.

    Raises:
      ValueError: from `init`, for a bad training set or images that are not in color.
    """
    return Defense(_init_gray, _on_epoch_gray)


def _init_gray(key, dataset, num_epochs):
    check(dataset)
    _check_channels(dataset, (3,), "grayscale")
    return ()


def _on_epoch_gray(state, epoch, train_state, dataset):
    return state, _without_color(dataset), Info(changed=epoch == 0)


@jax.jit
def _without_color(dataset):
    images = to_float(dataset.images)
    weights = jnp.asarray(LUMA, images.dtype)
    luma = jnp.tensordot(images, weights, 1, precision=jax.lax.Precision.HIGHEST)
    return dataset._replace(images=jnp.broadcast_to(luma[..., None], images.shape))


def bit_depth(bits: int = 2) -> Defense:
    """Returns the defense that trains on images of fewer levels: round(L x) / L, L = 2^bits - 1.

    Args:
      bits: of each channel, 1 to 7; 2 is that of the paper.

    Raises:
      ValueError: for another number; from `init`, for a bad training set.
    """
    bits = plain(bits)
    if type(bits) is not int or not 1 <= bits <= 7:
        raise ValueError(f"the bits of a channel are a whole number from 1 to 7, not {bits!r}")
    return Defense(_init_bits, functools.partial(_on_epoch_bits, bits))


def _init_bits(key, dataset, num_epochs):
    check(dataset)
    return ()


def _on_epoch_bits(bits, state, epoch, train_state, dataset):
    return state, _of_fewer_levels(dataset, 2**bits - 1), Info(changed=epoch == 0)


@jax.jit
def _of_fewer_levels(dataset, top):
    return dataset._replace(images=jnp.round(to_float(dataset.images) * top) / top)


def _check_channels(dataset, allowed, what):
    channels = dataset.images.shape[-1]
    if channels not in allowed:
        raise ValueError(
            f"{what} is for images of {' or '.join(map(str, allowed))} channels, these have "
            f"{channels}: leave this defense out"
        )
