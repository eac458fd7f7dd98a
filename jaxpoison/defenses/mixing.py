"""Strong augmentation: every example is mixed with another of its batch, and so is its label.

MixUp (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899). As in
their authors' code, one weight is drawn for a batch. Labels become shares, float32 [B, K], so a
defense that needs class numbers in `on_batch` (adversarial training) comes before in a chain.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.core.settings import check_range, settle
from jaxpoison.data import Dataset, check
from jaxpoison.defenses._checks import check_between
from jaxpoison.training.hooks import Defense


def mixup(num_classes: int, alpha: float = 1.0) -> Defense:
    """Returns MixUp: x' = w x_i + (1 - w) x_j, y' = w y_i + (1 - w) y_j, w ~ Beta(alpha, alpha).

    Args:
      num_classes: K.
      alpha: of the distribution; 1 is uniform, less leaves images more as they were.

    Raises:
      ValueError: if alpha is not positive; from `init` if a label is not below K.
    """
    on_batch = MixUp(num_classes, alpha)
    return Defense(on_batch.init, on_batch=on_batch)


def cutmix(num_classes: int, alpha: float = 1.0) -> Defense:
    """Returns CutMix: a box of x_j replaces that of x_i, labels are mixed by its share of the area.

    The box has the image's proportions, sides sqrt(1 - w) of it with w ~ Beta(alpha, alpha), and a
    uniform center; what sticks out is cut off, and does not count in the share.

    Args:
      num_classes: K.
      alpha: as for `mixup`.

    Raises:
      ValueError: if alpha is not positive; from `init` if a label is not below K.
    """
    on_batch = CutMix(num_classes, alpha)
    return Defense(on_batch.init, on_batch=on_batch)


@dataclasses.dataclass(frozen=True)
class _Mix:
    num_classes: int
    alpha: float

    def __post_init__(self):
        settle(self)
        check_range(self, "num_classes", 1, whole=True)
        check_between(self, "alpha", 0)

    def init(self, key, dataset, num_epochs):
        """Checks the labels; an `InitFn`."""
        check(dataset, self.num_classes)
        return ()

    def weight(self, key, dtype):
        """Returns w, shape ()."""
        return jax.random.beta(key, self.alpha, self.alpha, dtype=dtype)

    def labels(self, labels, order, weight):
        """Returns shares of the classes, [B, K]."""
        shares = jax.nn.one_hot(labels, self.num_classes, dtype=weight.dtype)
        return weight * shares + (1 - weight) * shares[order]


class MixUp(_Mix):
    """Mixes a batch; a `BatchFn`. See `mixup`."""

    def __call__(self, state: Any, key: jax.Array, train_state: Any, batch: Dataset) -> Dataset:
        weight_key, order_key = jax.random.split(key)
        weight = self.weight(weight_key, batch.images.dtype)
        order = jax.random.permutation(order_key, len(batch.labels))
        images = weight * batch.images + (1 - weight) * batch.images[order]
        return batch._replace(images=images, labels=self.labels(batch.labels, order, weight))


class CutMix(_Mix):
    """Pastes boxes within a batch; a `BatchFn`. See `cutmix`."""

    def __call__(self, state: Any, key: jax.Array, train_state: Any, batch: Dataset) -> Dataset:
        weight_key, box_key, order_key = jax.random.split(key, 3)
        weight = self.weight(weight_key, batch.images.dtype)
        order = jax.random.permutation(order_key, len(batch.labels))
        height, width = batch.images.shape[1:3]
        rows, columns = (
            _interval(side_key, side, jnp.sqrt(1 - weight))
            for side_key, side in zip(jax.random.split(box_key), (height, width), strict=True)
        )
        inside = rows[:, None] & columns[None, :]
        images = jnp.where(inside[None, :, :, None], batch.images[order], batch.images)
        kept = 1 - jnp.mean(inside.astype(weight.dtype))
        return batch._replace(images=images, labels=self.labels(batch.labels, order, kept))


def _interval(key, side, share):
    """Returns which of `side` pixels lie in an interval of `share` of them, at a random place."""
    half = jnp.floor(share * side).astype(jnp.int32) // 2
    center = jax.random.randint(key, (), 0, side, jnp.int32)
    pixels = jnp.arange(side)
    return (pixels >= center - half) & (pixels < center + half)
