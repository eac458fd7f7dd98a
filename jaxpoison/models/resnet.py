"""ResNet-18 in CIFAR form (He et al. 2016, arXiv 1512.03385): 3x3 stem, no max-pool."""

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
        y = norm("norm2")(conv(3, 1, "conv2")(y))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = norm("norm_shortcut")(conv(1, self.stride, "conv_shortcut")(x))
        return nn.relu(x + y)


class ResNetBody(nn.Module):
    """Stem, four stages of basic blocks with strides 1, 2, 2, 2, and a global average."""

    width: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    dtype: Any = jnp.float32

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
                x = BasicBlock(
                    self.width * 2**stage, stride, self.dtype, name=f"stage{stage}_block{block}"
                )(x, train)
        return x.mean(axis=(1, 2))


def resnet18(
    *,
    width: int = 64,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    num_classes: int = 10,
    dtype: Any = jnp.float32,
) -> Classifier:
    """Returns ResNet-18 for 32x32 colour images, pixels normalised by CIFAR-10's statistics.

    Args:
      width: channels of the first stage; 64 is ResNet-18 (11.2 M parameters), less for small
        machines. Features are `width * 2**(len(blocks) - 1)` wide.
      blocks: basic blocks in each stage; each stage after the first halves the resolution.
      num_classes: number of logits.
      dtype: type of the computation in the body, e.g. `jnp.bfloat16`.
    """
    return Classifier(
        body=ResNetBody(width, tuple(blocks), dtype),
        num_features=width * 2 ** (len(blocks) - 1),
        num_classes=num_classes,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        dtype=dtype,
    )
