"""A U-Net from images to images (Ronneberger et al., arXiv 1505.04597), as DeepConfuse uses it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpoison.models import layers


class DoubleConv(nn.Module):
    """Twice (3x3 convolution, BatchNorm, ReLU)."""

    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        for index in range(2):
            x = layers.Conv(self.width, (3, 3), padding=1, use_bias=False, name=f"conv{index}")(x)
            x = layers.BatchNorm(use_running_average=not train, name=f"norm{index}")(x)
            x = nn.relu(x)
        return x


class UNet(nn.Module):
    """Down by 2x2 averages, up by bilinear interpolation, with a skip connection at each size.

    Attributes:
      widths: channels at each size, the image's own first; each next size is half the one before,
        so height and width must be divisible by 2^(len(widths) - 1).
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns float32 [B,H,W,C], unbounded, from images [B,H,W,C]."""
        channels, passed = images.shape[-1], []
        x = DoubleConv(self.widths[0], name="down0")(images, train)
        for level, width in enumerate(self.widths[1:], start=1):
            passed.append(x)
            x = DoubleConv(width, name=f"down{level}")(layers.average_pool_2x2(x), train)
        for level in reversed(range(len(passed))):
            x = jnp.concatenate([passed[level], upsample_2x(x)], axis=-1)
            x = DoubleConv(self.widths[level], name=f"up{level}")(x, train)
        x = layers.Conv(channels, (1, 1), use_bias=False, name="last")(x)
        return layers.BatchNorm(use_running_average=not train, name="last_norm")(x)


def upsample_2x(x: jax.Array) -> jax.Array:
    """Returns [B,2H,2W,C], interpolated bilinearly so that corners fall on corners."""
    for axis in (1, 2):
        size = x.shape[axis]
        place = jnp.linspace(0.0, size - 1.0, 2 * size, dtype=x.dtype)
        weights = jnp.maximum(0.0, 1 - jnp.abs(place[:, None] - jnp.arange(size, dtype=x.dtype)))
        x = jnp.moveaxis(jnp.tensordot(weights, x, axes=(1, axis)), 0, axis)
    return x
