"""Layers with PyTorch's initial values, and convolutions that are also fast on CPU.

The papers trained with PyTorch, whose convolutions and linear layers start from
U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases alike (Kaiming-uniform with a = sqrt 5).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpoison.models import convolution

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int):
    """Returns the initializer of a bias that follows weights with `fan_in` inputs."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


Conv = functools.partial(
    nn.Conv,
    kernel_init=kernel_init,
    conv_general_dilated=convolution.conv_general_dilated,
)
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the convolution of images [B,H,W,C] with a kernel [h,w,C,F], without padding."""
    return convolution.conv_general_dilated(
        x, kernel, (1, 1), "VALID", lhs_dilation=(1, 1), rhs_dilation=(1, 1),
        feature_group_count=1, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Returns the maxima of 2x2 blocks: [B,H,W,C] -> [B,H//2,W//2,C]; an odd row is left out.

    Blocks are an axis of their own here: XLA's windows take long on CPU, their gradient above all.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def average_pool_2x2(x: jax.Array) -> jax.Array:
    """Returns the means of 2x2 blocks: [B,H,W,C] -> [B,H/2,W/2,C]; H and W must be even."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
