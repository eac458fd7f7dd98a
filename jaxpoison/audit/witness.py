"""The first witness: an embedding of images that the data under audit cannot have poisoned.

`embed` is EfficientNet-Lite0, trained on ImageNet by others and kept inside the package. With
`of_network` a user's own network takes its place; it is foreign only if it was trained elsewhere.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import models
from jaxpoison.core import devices, loops
from jaxpoison.data import to_float
from jaxpoison.network import Network, shared

SIZE = 96
"""Side in pixels of the images that EfficientNet-Lite0 sees; others are resized."""
MEANS, DEVIATIONS = (3, 4, 5, 6), (3, 4, 5)
"""Stages of the network of which means, and standard deviations, over the map are taken."""
Embed = Callable[[np.ndarray], np.ndarray]
"""Images, uint8 [B, S, S, 3], to rows of unit length, float32 [B, D]."""


def embed(images: np.ndarray) -> np.ndarray:
    """Returns the foreign embedding, float32 [B, D] with rows of unit length.

    Compiled once for each S, whatever B is.

    Args:
      images: uint8 [B, S, S, 3]; B may be 0.

    Raises:
      ValueError: for another shape or type.
    """
    return _in_batches(shared(_compiled_lite0), lite0_variables(), images)


@functools.cache
def lite0_variables() -> dict[str, Any]:
    """Returns the weights behind `embed`."""
    return models.load_efficientnet_lite0().variables


def lite0_features(variables: Any, images: jax.Array) -> jax.Array:
    """Returns what `embed` does, as a function that can be traced and differentiated.

    Args:
      variables: `lite0_variables()`.
      images: float [B, S, S, 3] in [0, 1].

    Returns:
      float32 [B, D], rows of unit length.
    """
    resized = jax.image.resize(images, (images.shape[0], SIZE, SIZE, 3), "bilinear")
    _, state = models.efficientnet_lite0().apply(
        variables, resized, method="features", mutable=["intermediates"]
    )
    sown = state["intermediates"]["body"]
    maps = [sown[f"stage{stage}"][0] for stage in range(len(sown))]
    parts = [maps[stage].mean(axis=(1, 2)) for stage in MEANS]
    parts += [_deviation(maps[stage]) for stage in DEVIATIONS]
    return jnp.concatenate([_of_unit_length(x) for x in parts], axis=1) / math.sqrt(len(parts))


class Whitening(NamedTuple):
    """An affine map of embeddings, made by `whitening`.

    Attributes:
      mean: float32 [D].
      matrix: float32 [D, D].
    """

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, embedding: np.ndarray) -> np.ndarray:
        """Returns embeddings [B, D] in the new coordinates, float32, rows of unit length."""
        return _of_unit_length_on_host((embedding - self.mean) @ self.matrix)


def whitening(embedding: np.ndarray, *, shrinkage: float = 1.0) -> Whitening:
    """Returns the map under which a set's embeddings are nearly white around zero.

    Near neighbors agree far more often after it (table above). It knows no labels, and follows the
    second moments of the whole set, which few images hardly move. Embed canaries and trusted images
    with the map of the set under audit.

    Args:
      embedding: float32 [N, D]; may be memory-mapped, and is read in blocks.
      shrinkage: variance that is added to every direction, in units of the mean variance.

    Raises:
      ValueError: if there is no row.
    """
    if len(embedding) == 0:
        raise ValueError("the embedding has no rows; whitening needs a set of images")
    blocks = [slice(start, start + 8192) for start in range(0, len(embedding), 8192)]
    total = sum(embedding[block].sum(axis=0, dtype=np.float64) for block in blocks)
    mean = (total / len(embedding)).astype(np.float32)
    covariance = np.zeros((embedding.shape[1],) * 2)
    for block in blocks:
        centered = embedding[block] - mean
        covariance += (centered.T @ centered) / len(embedding)
    values, vectors = np.linalg.eigh(covariance)
    scale = np.maximum(values, 0) + max(shrinkage * values.mean(), 1e-12)
    return Whitening(mean, (vectors / np.sqrt(scale)).astype(np.float32))


def of_network(network: Network, variables: Any = None) -> Embed:
    """Returns the features of another network, in place of `embed`.

    Args:
      network: for images of shape [S, S, 3]; the input of its last linear layer is what is taken.
      variables: of the network; None for those that it was made from.

    Raises:
      ValueError: if there are no variables, or, when it is called, no last linear layer.
    """
    variables = network.variables if variables is None else variables
    if variables is None:
        raise ValueError("the network has no variables: pass variables=, or make it from some")
    return lambda images: _in_batches(
        shared(_compiled_network, network.for_images(images.shape[1:])), variables, images
    )


def _compiled_lite0():
    return jax.jit(lambda variables, images: lite0_features(variables, to_float(images)))


def _compiled_network(network):
    return jax.jit(
        lambda variables, images: _of_unit_length(network.features(variables, to_float(images)))
    )


def _of_unit_length(features):
    features = features.astype(jnp.float32)
    return features * jax.lax.rsqrt(jnp.maximum((features**2).sum(1, keepdims=True), 1e-24))


def _of_unit_length_on_host(rows):
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _deviation(maps):
    # With a small constant under the root, whose gradient is infinite at 0.
    return jnp.sqrt(maps.var(axis=(1, 2)) + 1e-6)


def _in_batches(fn, variables, images):
    """Returns `fn` of images in batches of one size, of which the last is filled up."""
    if images.ndim != 4 or images.shape[1:] != (images.shape[1], images.shape[1], 3):
        raise ValueError(f"images have shape {images.shape}; expected [B, S, S, 3]")
    if images.dtype != np.uint8:
        raise ValueError(f"images are of type {images.dtype}; expected uint8 in 0..255")
    mesh = devices.data_mesh()
    # On CPU a batch whose maps stay in the caches is twice as fast as one of 32.
    size = mesh.size * (16 if loops.steps_from_host() else 256)
    variables = devices.replicate(variables, mesh)
    missing = max(1, math.ceil(len(images) / size)) * size - len(images)
    images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
    # Calls return before their work is done, so the next batch is placed meanwhile.
    found = [
        fn(variables, devices.shard_examples(images[start : start + size], mesh))
        for start in range(0, len(images), size)
    ]
    return np.concatenate([devices.to_host(each) for each in found])[: len(images) - missing]
