"""The MNIST network of HINT (arXiv 2309.08549): two 5x5 convolutions and one linear layer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxpoison.models import layers
from jaxpoison.models.classifier import Classifier


class MnistBody(nn.Module):
    """Twice (5x5 convolution without padding, BatchNorm, ReLU, 2x2 average), then flattened."""

    widths: tuple[int, ...] = (40, 100)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        fan_in = x.shape[-1] * 25
        for width in self.widths:
            x = layers.Conv(
                width, (5, 5), padding="VALID", bias_init=layers.bias_init(fan_in), dtype=self.dtype
            )(x)
            x = layers.BatchNorm(use_running_average=not train, dtype=self.dtype)(x)
            x = layers.average_pool_2x2(nn.relu(x))
            fan_in = width * 25
        return x.reshape(x.shape[0], -1)


def mnist_cnn(*, num_classes: int = 10, dtype: Any = jnp.float32) -> Classifier:
    """Returns the CNN: conv 1->40, conv 40->100, 1,600 features, linear; pixels not normalized."""
    return Classifier(
        body=MnistBody(dtype=dtype), num_features=1600, num_classes=num_classes, dtype=dtype
    )
