"""DenseNet-121 in CIFAR form (Huang et al. 2017, arXiv 1608.06993): 3x3 stem, no max-pool."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxpoison.models import layers
from jaxpoison.models.classifier import Classifier
from jaxpoison.models.resnet import CIFAR10_MEAN, CIFAR10_STD


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1 and again, 3x3: `growth` new channels, put before those that came in."""

    growth: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(name):
            return layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name=name)

        y = nn.relu(norm("norm1")(x))
        y = layers.Conv(4 * self.growth, (1, 1), use_bias=False, dtype=self.dtype, name="conv1")(y)
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        y = nn.relu(norm("norm2")(y))
        y = layers.Conv(
            self.growth, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="conv2"
        )(y)
        return jnp.concatenate([y, x], axis=-1)


class DenseNetBody(nn.Module):
    """Stem of twice `growth` channels, dense stages, and between them a halving of both sizes."""

    growth: int = 32
    blocks: tuple[int, ...] = (6, 12, 24, 16)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(name):
            return layers.BatchNorm(use_running_average=not train, dtype=self.dtype, name=name)

        x = layers.Conv(
            2 * self.growth, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="stem"
        )(x)
        for stage, num_layers in enumerate(self.blocks):
            if stage > 0:
                x = nn.relu(norm(f"transition{stage}_norm")(x))
                x = layers.Conv(
                    x.shape[-1] // 2, (1, 1), use_bias=False, dtype=self.dtype,
                    name=f"transition{stage}",
                )(x)  # fmt: skip
                x = layers.average_pool_2x2(x)
            for layer in range(num_layers):
                x = DenseLayer(
                    self.growth, self.dropout, self.dtype, name=f"stage{stage}_layer{layer}"
                )(x, train)
        return nn.relu(norm("last_norm")(x)).mean(axis=(1, 2))


def densenet121(
    *,
    growth: int = 32,
    blocks: tuple[int, ...] = (6, 12, 24, 16),
    num_classes: int = 10,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Classifier:
    """Returns DenseNet-121 for 32x32 color images, pixels normalized by CIFAR-10's statistics.

    Args:
      growth: channels that each layer adds; 32 is DenseNet-121 (7.0 M parameters).
      blocks: layers in each stage; each stage after the first halves the resolution.
      num_classes: number of logits.
      dropout: rate in each layer, active where `apply` is given an rng named "dropout".
      dtype: type of the computation in the body, e.g. `jnp.bfloat16`.
    """
    num_features = 2 * growth
    for stage, num_layers in enumerate(blocks):
        num_features = (num_features // 2 if stage else num_features) + num_layers * growth
    return Classifier(
        body=DenseNetBody(growth, tuple(blocks), dropout, dtype),
        num_features=num_features,
        num_classes=num_classes,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        dtype=dtype,
    )
