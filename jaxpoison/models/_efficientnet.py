"""EfficientNet-Lite0 as trained on ImageNet, for its features.

EfficientNet (Tan and Le 2019, arXiv 1905.11946) without squeeze-and-excitation, and with ReLU6
(TensorFlow's `efficientnet/lite`). BatchNorm is part of the kernels and biases, so this network is
for evaluation; its head can be trained.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpoison.models import fused, layers
from jaxpoison.models.classifier import Classifier

# Kernel, expansion, channels, blocks and the first block's stride of each stage.
EFFICIENTNET_STAGES = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)


class Layer(nn.Module):
    """Convolution with bias, and then the shortcut or ReLU6."""

    width: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    relu6: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, shortcut: jax.Array | None = None) -> jax.Array:
        channels = 1 if self.depthwise else x.shape[-1]
        kernel = self.param(
            "kernel", layers.kernel_init, (self.size, self.size, channels, self.width)
        )
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
        return fused.layer(x, kernel, bias, shortcut, stride=self.stride, relu6=self.relu6)


class EfficientNetBody(nn.Module):
    """Stem, inverted residuals, 1x1 convolution, and a global average.

    What each stage puts out is sown in the collection `intermediates` as `stage0` to `stage6`.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        del train  # it has nothing that differs
        x = Layer(32, 3, 2, name="stem")(x)
        for stage, (size, expansion, width, num_blocks, first_stride) in enumerate(
            EFFICIENTNET_STAGES
        ):
            for block in range(num_blocks):
                name, stride = f"stage{stage}_block{block}", 1 if block else first_stride
                wide, y = expansion * x.shape[-1], x
                if expansion != 1:
                    y = Layer(wide, name=f"{name}_expand")(y)
                y = Layer(wide, size, stride, depthwise=True, name=f"{name}_depthwise")(y)
                x = Layer(width, relu6=False, name=f"{name}_project")(y, x if block else None)
            self.sow("intermediates", f"stage{stage}", x)
        return Layer(1280, name="last")(x).mean(axis=(1, 2))


def efficientnet_lite0(*, num_classes: int = 1000, dtype: Any = jnp.float32) -> Classifier:
    """Returns EfficientNet-Lite0, for color images; made for 224x224, and usable from 32x32 on.

    Pixels are normalized as in its training, to about [-1, 1]. Trained weights of the body, 3.4 M
    numbers, are in the package: `models.load_efficientnet_lite0()`.

    Args:
      num_classes: number of logits.
      dtype: type of the computation in the body, e.g. `jnp.bfloat16`.
    """
    return Classifier(
        body=EfficientNetBody(),
        num_features=1280,
        num_classes=num_classes,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        dtype=dtype,
    )
