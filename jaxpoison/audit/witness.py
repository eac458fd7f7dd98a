"""The first witness: an embedding of images that the data under audit cannot have poisoned.

`embed` is EfficientNet-Lite0, trained on ImageNet by others and kept inside the package. With
`of_network` a user's own network takes its place; it is foreign only if it was trained elsewhere.

Candidates on 3,000 training images each (`benchmarks/witness.py`): accuracy of the 10 nearest
neighbors, and average precision of 2% flipped labels ranked by neighbors; images a second on one
core of an EPYC, the fastest of all batches. "Whitened" is by `whitening`. Taken: 96 pixels, the
means over stages 3 to 6 and the deviations of 3 to 5 ("+").

| embedding | D | CIFAR-10 | whitened | MNIST | whitened | images/s |
|---|---|---|---|---|---|---|
| Lite0 at 96, head | 1280 | 0.759, 0.31 | 0.764, 0.36 | 0.878, 0.49 | 0.922, 0.73 | 600 |
| Lite0 at 96, stage 6 | 320 | 0.769, 0.35 | 0.774, 0.33 | 0.894, 0.59 | 0.936, 0.77 | 600 |
| Lite0 at 96, 3 to 6 | 704 | 0.762, 0.30 | 0.791, 0.37 | 0.922, 0.74 | 0.966, 0.88 | 600 |
| Lite0 at 96, 3 to 6 + | 1088 | 0.761, 0.31 | 0.793, 0.35 | 0.936, 0.79 | 0.975, 0.91 | 600 |
| Lite0 at 64, head | 1280 | 0.618, 0.17 | 0.645, 0.22 | 0.842, 0.41 | 0.902, 0.68 | 803 |
| Lite0 at 64, stage 6 | 320 | 0.629, 0.17 | 0.630, 0.20 | 0.860, 0.51 | 0.913, 0.71 | 803 |
| Lite0 at 64, 3 to 6 | 704 | 0.660, 0.19 | 0.682, 0.28 | 0.927, 0.76 | 0.962, 0.87 | 803 |
| Lite0 at 64, 3 to 6 + | 1088 | 0.669, 0.19 | 0.693, 0.27 | 0.954, 0.77 | 0.974, 0.95 | 803 |
| HOG | 324 | 0.463, 0.08 | 0.490, 0.09 | 0.954, 0.69 | 0.960, 0.83 | 27,556 |
| fast_cnn, CIFAR-10 | 256 | (its own) | (its own) | 0.864, 0.39 | 0.936, 0.60 | 967 |

With 60 flips an average precision is uncertain by several hundredths. 64 pixels instead of 96 cost
a tenth of the accuracy on photographs, and nothing on digits. The choice itself was made on 10,000
images each, at 96 pixels and whitened: with deviations 0.826, 0.44 on CIFAR-10 and 0.981, 0.94 on
MNIST; without them 0.818, 0.42 and 0.975, 0.91.
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
    sown: Any = state["intermediates"]["body"]
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

    Near neighbors agree far more often after it. It knows no labels, and follows the
    second moments of the whole set, which few images hardly move. Canaries and trusted images are
    to be mapped as the set under audit is.

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
    mean = np.asarray(total / len(embedding), np.float32)
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
