"""VGG-16 in CIFAR form (Simonyan & Zisserman 2015, arXiv 1409.1556), with BatchNorm.

Thirteen 3x3 convolutions, a maximum over 2x2 after the second, fourth, seventh, tenth and last, and
one linear layer. Tao et al. (arXiv 2102.04716) craft their delusive poisons against it.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxpoison.models import layers
from jaxpoison.models.classifier import Classifier
from jaxpoison.models.resnet import CIFAR10_MEAN, CIFAR10_STD

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # width as a multiple of the first, layers


class VggBody(nn.Module):
    """Stages of convolutions, a maximum over 2x2 after each, and a global average."""

    width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        for stage, (multiple, num_layers) in enumerate(STAGES):
            for layer in range(num_layers):
                name = f"stage{stage}_{{}}{layer}"
                x = layers.Conv(
                    self.width * multiple, (3, 3), padding=1, dtype=self.dtype,
                    bias_init=layers.bias_init(9 * x.shape[-1]), name=name.format("conv"),
                )(x)  # fmt: skip
                x = layers.BatchNorm(
                    use_running_average=not train, dtype=self.dtype, name=name.format("norm")
                )(x)
                x = nn.relu(x)
            x = layers.max_pool_2x2(x)
        return x.mean(axis=(1, 2))


def vgg16(*, width: int = 64, num_classes: int = 10, dtype: Any = jnp.float32) -> Classifier:
    """Returns VGG-16 for 32x32 color images, pixels normalized by CIFAR-10's statistics.

    Args:
      width: channels of the first stage; 64 is VGG-16 (14.7 M parameters). Features are 8 width.
      num_classes: number of logits.
      dtype: type of the computation in the body, e.g. `jnp.bfloat16`.
    """
    return Classifier(
        body=VggBody(width, dtype),
        num_features=width * STAGES[-1][0],
        num_classes=num_classes,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        dtype=dtype,
    )
