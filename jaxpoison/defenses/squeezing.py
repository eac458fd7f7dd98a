"""Squeezing: JPEG and grey-scale, by which small perturbations lose most of what they carry.

After image shortcut squeezing (Liu et al. 2023, arXiv 2301.13838). Only the training set is
squeezed: what is trained must work on images as they come.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.core import devices
from jaxpoison.data import check, to_float
from jaxpoison.defenses._ids import for_rows
from jaxpoison.training.hooks import Defense, Info

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and JPEG use


def jpeg(quality: int = 10) -> Defense:
    """Returns the defence that trains on the images as JPEG leaves them.

    The set as collected is compressed once, in `init`, on the host and in 8 bits: about 20 s for
    50,000 images of 32 x 32. What defenses before it in a chain have done to pixels is lost. Images
    have one channel or three.

    Args:
      quality: of the encoder, 1 to 95; 10 is that of the paper.

    Raises:
      ValueError: for another quality; from `init` for a bad training set.
    """
    if not 1 <= quality <= 95:
        raise ValueError(f"the quality of JPEG is 1 to 95, not {quality}")

    def init(key, dataset, num_epochs):
        check(dataset)
        _check_channels(dataset, (1, 3), "JPEG")
        return jnp.asarray(compress(devices.to_host(dataset.images), quality))

    def on_epoch(state, epoch, train_state, dataset):
        return state, squeezed(state, dataset), Info(changed=epoch == 0)

    @jax.jit
    def squeezed(state, dataset):
        own = (dataset.ids >= 0)[:, None, None, None]
        images = to_float(for_rows(state, dataset.ids))
        return dataset._replace(images=jnp.where(own, images, to_float(dataset.images)))

    return Defense(init, on_epoch)


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
    grey = images.shape[-1] == 1
    for image, into in zip(images, squeezed, strict=True):
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if grey else image).save(file, "JPEG", quality=quality)
        into[...] = np.asarray(Image.open(file)).reshape(image.shape)
    return squeezed


def grey() -> Defense:
    """Returns the defence that trains on grey images: 0.299 R + 0.587 G + 0.114 B, three times.

    Raises:
      ValueError: from `init`, for a bad training set or images that are not in colour.
    """

    def init(key, dataset, num_epochs):
        check(dataset)
        _check_channels(dataset, (3,), "grey-scale")
        return ()

    @jax.jit
    def without_colour(dataset):
        images = to_float(dataset.images)
        luma = jnp.tensordot(images, jnp.asarray(LUMA), 1, precision=jax.lax.Precision.HIGHEST)
        return dataset._replace(images=jnp.broadcast_to(luma[..., None], images.shape))

    def on_epoch(state, epoch, train_state, dataset):
        return state, without_colour(dataset), Info(changed=epoch == 0)

    return Defense(init, on_epoch)


def _check_channels(dataset, allowed, what):
    channels = dataset.images.shape[-1]
    if channels not in allowed:
        raise ValueError(
            f"{what} is for images of {' or '.join(map(str, allowed))} channels, these have "
            f"{channels}: leave this defence out"
        )
