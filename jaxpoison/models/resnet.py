"""ResNet-18 and -50 in CIFAR form (He et al. 2016, arXiv 1512.03385): 3x3 stem, no max-pool."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxpoison.models import layers
from jaxpoison.models.classifier import Classifier

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 convolution where shapes change."""

    width: int
    stride: int
    dtype: Any = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        def conv(size, stride, name):
            padding = size // 2
            return layers.Conv(
                self.width, (size, size), stride, padding, use_bias=False, dtype=self.dtype,
                name=name,
            )  # fmt: skip

        def norm(name):
            return layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name=name)

        y = nn.relu(norm("norm1")(conv(3, self.stride, "conv1")(x)))
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        y = norm("norm2")(conv(3, 1, "conv2")(y))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = norm("norm_shortcut")(conv(1, self.stride, "conv_shortcut")(x))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution to four times `width`, and a shortcut as in `BasicBlock`."""

    width: int
    stride: int
    dtype: Any = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        def conv(width, size, stride, name):
            return layers.Conv(
                width, (size, size), stride, size // 2, use_bias=False, dtype=self.dtype, name=name
            )

        def norm(name):
            return layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name=name)

        y = nn.relu(norm("norm1")(conv(self.width, 1, 1, "conv1")(x)))
        y = nn.relu(norm("norm2")(conv(self.width, 3, self.stride, "conv2")(y)))
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        y = norm("norm3")(conv(4 * self.width, 1, 1, "conv3")(y))
        if self.stride != 1 or x.shape[-1] != 4 * self.width:
            x = norm("norm_shortcut")(conv(4 * self.width, 1, self.stride, "conv_shortcut")(x))
        return nn.relu(x + y)


class ResNetBody(nn.Module):
    """Stem, stages of blocks, each after the first of stride 2, and a global average."""

    width: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    dtype: Any = jnp.float32
    block_type: type[BasicBlock] | type[Bottleneck] = BasicBlock
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        x = layers.Conv(
            self.width, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="stem"
        )(x)
        x = layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name="stem_norm")(x)
        x = nn.relu(x)
        for stage, num_blocks in enumerate(self.blocks):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self.block_type(
                    self.width * 2**stage, stride, self.dtype, self.dropout,
                    name=f"stage{stage}_block{block}",
                )(x, train)  # fmt: skip
        return x.mean(axis=(1, 2))


def resnet18(
    *,
    width: int = 64,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    num_classes: int = 10,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Classifier:
    """Returns ResNet-18 for 32x32 color images, pixels normalized by CIFAR-10's statistics.

    Args:
      width: channels of the first stage; 64 is ResNet-18 (11.2 M parameters), less for small
        machines. Features are `width * 2**(len(blocks) - 1)` wide.
      blocks: basic blocks in each stage; each stage after the first halves the resolution.
      num_classes: number of logits.
      dropout: rate in each block, active where `apply` is given an rng named "dropout".
      dtype: type of the computation in the body, e.g. `jnp.bfloat16`.
    """
    return _resnet(BasicBlock, 1, width, blocks, num_classes, dropout, dtype)


def resnet50(
    *,
    width: int = 64,
    blocks: tuple[int, ...] = (3, 4, 6, 3),
    num_classes: int = 10,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Classifier:
    """Returns ResNet-50 for 32x32 color images; arguments as of `resnet18`.

    With a width of 64 it has 23.5 M parameters. Features are `width * 2**(len(blocks) + 1)` wide.
    """
    return _resnet(Bottleneck, 4, width, blocks, num_classes, dropout, dtype)


def _resnet(block_type, expansion, width, blocks, num_classes, dropout, dtype) -> Classifier:
    return Classifier(
        body=ResNetBody(width, tuple(blocks), dtype, block_type, dropout),
        num_features=expansion * width * 2 ** (len(blocks) - 1),
        num_classes=num_classes,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        dtype=dtype,
    )
