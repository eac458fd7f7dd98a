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


class BatchNorm(nn.BatchNorm):
    """Flax's BatchNorm over the last axis, written as x a + b.

    With a = scale / sqrt(var + epsilon) and b = bias - mean a, a training step on CPU passes over
    the images half as often as with (x - mean) a + bias: sums of x times a gradient are taken
    without that product in memory. Of Flax's fields, those of the axes and of several devices are
    not used: under `jit`, means over a sharded batch are over all of it.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        running = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape, axes = x.shape[-1:], range(x.ndim - 1)
        means = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variances = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        dtype = jnp.result_type(x, scale, bias) if self.dtype is None else self.dtype
        if running:
            mean, var = means.value, variances.value
        else:
            values = x.astype(jnp.promote_types(dtype, jnp.float32))
            mean = values.mean(axes, where=mask)
            var = jnp.square(values).mean(axes, where=mask) - jnp.square(mean)
            var = jnp.maximum(var, 0)
            if not self.is_initializing():
                for kept, new in ((means, mean), (variances, var)):
                    kept.value = self.momentum * kept.value + (1 - self.momentum) * new
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return (x * factor + (bias - mean * factor)).astype(dtype)


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
