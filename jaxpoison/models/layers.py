"""Layers with PyTorch's initial values, and convolutions that are also fast on CPU.

The papers trained with PyTorch, whose convolutions and linear layers start from
U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases alike (Kaiming-uniform with a = sqrt 5).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpoison.core import loops

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int):
    """Returns the initialiser of a bias that follows weights with `fan_in` inputs."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs):
    """Convolution of images [B,H,W,C] with a kernel [h,w,C,F]; arguments and value as JAX's.

    On CPU, where patches are cheap to form, it is one matrix product with the image's patches: see
    `_as_patches`.
    """
    plain = {*kwargs["lhs_dilation"], *kwargs["rhs_dilation"], kwargs["feature_group_count"]} == {1}
    if not (loops.steps_from_host() and plain and _as_patches(rhs.shape, window_strides)):
        return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    height, width, _, features = rhs.shape
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
    # Transposed, and kept so: the kernel's gradient is then (outputs^T patches), which takes two
    # thirds of the time of (patches^T outputs).
    kernel = jax.lax.optimization_barrier(rhs.reshape(-1, features).T)
    return jnp.concatenate(patches, axis=-1) @ kernel.T


def _as_patches(kernel_shape: tuple[int, ...], strides: tuple[int, int]) -> bool:
    """Returns whether a convolution is computed from patches on CPU.

    XLA's kernels on CPU are as fast or faster than patches by themselves, but inside a loop (a
    solver's) a gradient to their kernel takes 10 to 30 times as long, which patches do not. Patches
    hold each pixel h w / (strides) times. Up to 4 times that costs about 5 % more than XLA outside
    of loops, so they win: 3x3 of stride 2, 1x1, 2x2. For 3x3 of stride 1 it is 9 times, the memory
    with it, and whole networks train 1.4 times slower; there patches are for one to three channels.
    """
    height, width, channels, _ = kernel_shape
    copies = height * width / math.prod(strides)
    return copies <= 4 or channels <= 3


Conv = functools.partial(
    nn.Conv, kernel_init=kernel_init, conv_general_dilated=conv_general_dilated
)
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


def average_pool_2x2(x: jax.Array) -> jax.Array:
    """Returns the means of 2x2 blocks: [B,H,W,C] -> [B,H/2,W/2,C]; H and W must be even."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
