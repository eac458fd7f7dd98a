"""A network for 32x32 color images that trains to over 90% in minutes, on a CPU too.

Few wide layers: that is where convolutions come closest to the arithmetic that a processor can do.
Whitened patches, identity-like initial kernels, max-pooling right after the first convolution of a
stage and scaled-down logits follow K. Jordan's airbench (arXiv 2404.00498) and D. Page's "How to
train your ResNet"; body, BatchNorm and linear head are as in the other networks here.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.models import layers
from jaxpoison.models.classifier import Classifier
from jaxpoison.models.resnet import CIFAR10_MEAN, CIFAR10_STD

# Of 2x2 patches of normalized CIFAR-10 images: standard deviations of sum, left-right, top-bottom
# and diagonal differences (rows) of brightness, red-blue and green-magenta (columns). Below 0.1,
# where little but quantization noise is left, 0.1.
_PATCH_STD = np.array(
    [[3.98, 1.16, 0.54], [0.72, 0.15, 0.10], [0.79, 0.16, 0.10], [0.29, 0.10, 0.10]]
)
_FEATURE_SCALE = 1 / 8


class FastBody(nn.Module):
    """Whitened patches, then stages of two 3x3 convolutions, each stage at half the resolution.

    The patches are a fixed map, not parameters. Features are maxima over the last map, times 1/8.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        def convolve(x, width):
            return layers.Conv(
                width, (3, 3), padding=1, use_bias=False, kernel_init=_near_identity,
                dtype=self.dtype,
            )(x)  # fmt: skip

        def activate(x):
            norm = layers.BatchNorm(use_running_average=not train, dtype=self.dtype)
            return nn.relu(norm(x))

        x = whiten(x)
        x = nn.relu(jnp.concatenate([x, -x], axis=-1))
        for width in self.widths:
            x = activate(layers.max_pool_2x2(convolve(x, width)))
            x = activate(convolve(x, width))
        return _FEATURE_SCALE * x.max(axis=(1, 2))


def whiten(x: jax.Array) -> jax.Array:
    """Returns 2x2 patches of color images in a basis in which natural images are nearly white.

    [B,H,W,3] -> [B,H-1,W-1,12]. On CIFAR-10's images, normalized, all 12 have a standard deviation
    of at most 1, and correlations of at most 0.16 in size.
    """
    return layers.convolve(x, jnp.asarray(whitening_kernel(), x.dtype))


@functools.cache
def whitening_kernel():
    """Returns Haar's functions times color axes over their deviations, [2,2,3,12]."""
    haar = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    colors = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    basis = np.einsum("ah,bw,kc->hwcabk", haar, haar, colors)
    return basis.reshape(2, 2, 3, 12) / _PATCH_STD.ravel()


def _near_identity(key, shape, dtype=jnp.float32):
    """Returns a kernel of small random values that hands on its inputs, as many as fit."""
    rows, columns, inputs, outputs = shape
    kept = jnp.arange(min(inputs, outputs))
    return layers.kernel_init(key, shape, dtype).at[rows // 2, columns // 2, kept, kept].add(1)


def fast_cnn(
    *,
    widths: tuple[int, ...] = (64, 128, 256),
    num_classes: int = 10,
    dtype: Any = jnp.float32,
) -> Classifier:
    """Returns the network, for 32x32 color images; pixels normalized by CIFAR-10's statistics.

    Made for the recipe `training.FAST`. Images of other sizes must leave at least one pixel: each
    stage halves the resolution, rounded down.

    Args:
      widths: channels of each stage; the last is the number of features. 1.2 M parameters.
      num_classes: number of logits.
      dtype: type of the computation in the body, e.g. `jnp.bfloat16`.
    """
    return Classifier(
        body=FastBody(tuple(widths), dtype),
        num_features=widths[-1],
        num_classes=num_classes,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        dtype=dtype,
    )
