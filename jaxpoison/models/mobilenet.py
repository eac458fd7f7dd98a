"""MobileNetV2 in CIFAR form (Sandler et al. 2018, arXiv 1801.04381): strides 1, 1, 2, 2, 1, 2, 1.

As in the nets of Zhu et al. (arXiv 1905.05897): 3x3 stem of stride 1, and in the blocks of stride
1 a shortcut, projected by a 1x1 convolution where the width changes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpoison.core import loops
from jaxpoison.models import fused, layers
from jaxpoison.models.classifier import Classifier
from jaxpoison.models.resnet import CIFAR10_MEAN, CIFAR10_STD

# Expansion, channels, blocks and the first block's stride of each stage.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def depthwise_conv(lhs, rhs, window_strides, padding, **kwargs):
    """Depthwise convolution of images [B,H,W,C] with a kernel [h,w,1,C]; arguments as of JAX's.

    On CPU it is a sum of shifted and scaled images: XLA's kernel for grouped convolutions there
    takes several times as long, and far longer for the gradient.
    """
    if not loops.steps_from_host():
        return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    return fused.shifted(lhs, rhs, window_strides, padding)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, 1x1 projection without ReLU."""

    expansion: int
    width: int
    stride: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        def pointwise(width, name):
            return layers.Conv(width, (1, 1), use_bias=False, dtype=self.dtype, name=name)

        def norm(name):
            return layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name=name)

        expanded = self.expansion * x.shape[-1]
        y = nn.relu(norm("norm1")(pointwise(expanded, "conv1")(x)))
        depthwise = nn.Conv(
            expanded, (3, 3), self.stride, 1, feature_group_count=expanded, use_bias=False,
            dtype=self.dtype, kernel_init=layers.kernel_init, conv_general_dilated=depthwise_conv,
            name="conv2",
        )  # fmt: skip
        y = nn.relu(norm("norm2")(depthwise(y)))
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        y = norm("norm3")(pointwise(self.width, "conv3")(y))
        if self.stride != 1:
            return y
        if x.shape[-1] != self.width:
            x = norm("norm_shortcut")(pointwise(self.width, "conv_shortcut")(x))
        return x + y


class MobileNetV2Body(nn.Module):
    """Stem, the stages of inverted residuals, 1x1 convolution, and a global average."""

    width: float = 1.0
    stages: tuple[tuple[int, int, int, int], ...] = STAGES
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(name):
            return layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name=name)

        x = layers.Conv(
            scaled(32, self.width), (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="stem"
        )(x)
        x = nn.relu(norm("stem_norm")(x))
        for stage, (expansion, channels, num_blocks, first_stride) in enumerate(self.stages):
            for block in range(num_blocks):
                x = InvertedResidual(
                    expansion, scaled(channels, self.width), 1 if block else first_stride,
                    self.dropout, self.dtype, name=f"stage{stage}_block{block}",
                )(x, train)  # fmt: skip
        x = layers.Conv(
            scaled(1280, self.width), (1, 1), use_bias=False, dtype=self.dtype, name="last"
        )(x)
        return nn.relu(norm("last_norm")(x)).mean(axis=(1, 2))


def mobilenet_v2(
    *,
    width: float = 1.0,
    stages: tuple[tuple[int, int, int, int], ...] = STAGES,
    num_classes: int = 10,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Classifier:
    """Returns MobileNetV2 for 32x32 color images, pixels normalized by CIFAR-10's statistics.

    Args:
      width: factor of all channel numbers; 1 is MobileNetV2 (2.3 M parameters).
      stages: expansion, channels, blocks and first stride of each stage.
      num_classes: number of logits.
      dropout: rate in each block, active where `apply` is given an rng named "dropout".
      dtype: type of the computation in the body, e.g. `jnp.bfloat16`.
    """
    return Classifier(
        body=MobileNetV2Body(width, tuple(stages), dropout, dtype),
        num_features=scaled(1280, width),
        num_classes=num_classes,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        dtype=dtype,
    )


def scaled(channels: int, width: float) -> int:
    """Returns the number of channels times `width`, at least one."""
    return max(1, round(channels * width))
