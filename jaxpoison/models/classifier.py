"""A classifier is a body (pixels to features) and a head (features to logits).

Parameters live in `params["body"]` and `params["head"]` (`kernel` [d,K], `bias` [K]), so that
the last linear layer, the one HINT differentiates, is a sub-tree of its own.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpoison.models import layers


class Classifier(nn.Module):
    """Normalization, body, head.

    Attributes:
      body: a module `body(x, train) -> features` [B,d].
      num_features: d, the width of the features.
      num_classes: K.
      mean: per-channel mean that is subtracted from pixels in [0,1].
      std: per-channel standard deviation that they are then divided by.
      dtype: type of the computation in the body (parameters and logits stay float32).
    """

    body: nn.Module
    num_features: int
    num_classes: int = 10
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: Any = jnp.float32

    def setup(self):
        self.head = nn.Dense(
            self.num_classes,
            kernel_init=layers.kernel_init,
            bias_init=layers.bias_init(self.num_features),
        )

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, float32 [B,K], of `images`, float [B,H,W,C] in [0,1].

        With `train=True` BatchNorm uses the batch's statistics and updates the collection
        `batch_stats`, which must then be mutable.
        """
        return self.head(self.features(images, train))

    def features(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the input of the last linear layer, float32 [B,d]."""
        normalized = (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        return self.body(normalized.astype(self.dtype), train).astype(jnp.float32)
