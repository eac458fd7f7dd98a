"""Layers with PyTorch's initial values, and a first convolution that is also fast on CPU.

The papers trained with PyTorch, whose convolutions and linear layers start from
U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases alike (Kaiming-uniform with a = sqrt 5).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpoison import loops

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int):
    """Returns the initialiser of a bias that follows weights with `fan_in` inputs."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs):
    """Convolution of images [B,H,W,C] with a kernel [h,w,C,F]; arguments and value as JAX's.

    On CPU a convolution of one to three channels is one matrix product with the image's patches:
    XLA's own kernels for it take 4 (forward and backward) to 15 times (kernel gradient) longer.
    """
    plain = {*kwargs["lhs_dilation"], *kwargs["rhs_dilation"], kwargs["feature_group_count"]} == {1}
    if not (loops.steps_from_host() and plain and lhs.shape[-1] <= 3):
        return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    height, width, channels, features = rhs.shape
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], (height, width), window_strides, padding)
    lhs = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    down, across = window_strides
    rows = (lhs.shape[1] - height) // down + 1
    columns = (lhs.shape[2] - width) // across + 1
    patches = [
        lhs[:, i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, axis=-1) @ rhs.reshape(height * width * channels, features)


Conv = functools.partial(
    nn.Conv, kernel_init=kernel_init, conv_general_dilated=conv_general_dilated
)
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


def average_pool_2x2(x: jax.Array) -> jax.Array:
    """Returns the means of 2x2 blocks: [B,H,W,C] -> [B,H/2,W/2,C]; H and W must be even."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
