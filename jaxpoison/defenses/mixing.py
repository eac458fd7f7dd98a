"""Strong augmentation: every example is mixed with another of its batch, and so is its label.

MixUp (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899). As in
their authors' code, one weight is drawn for a batch. Labels become shares, float32 [B, K], so a
defence that needs class numbers in `on_batch` (adversarial training) comes before in a chain.
"""

import jax
import jax.numpy as jnp

from jaxpoison.training.hooks import Defense


def mixup(num_classes: int, alpha: float = 1.0) -> Defense:
    """Returns MixUp: x' = w x_i + (1 - w) x_j, y' = w y_i + (1 - w) y_j, w ~ Beta(alpha, alpha).

    Args:
      num_classes: K.
      alpha: of the distribution; 1 is uniform, less leaves images more as they were.

    Raises:
      ValueError: if alpha is not positive.
    """
    _check(alpha)

    def on_batch(state, key, train_state, batch):
        weight_key, order_key = jax.random.split(key)
        weight = jax.random.beta(weight_key, alpha, alpha)
        order = jax.random.permutation(order_key, len(batch.labels))
        images = weight * batch.images + (1 - weight) * batch.images[order]
        labels = _mix_labels(batch.labels, order, weight, num_classes)
        return batch._replace(images=images, labels=labels)

    return Defense(on_batch=on_batch)


def cutmix(num_classes: int, alpha: float = 1.0) -> Defense:
    """Returns CutMix: a box of x_j replaces that of x_i, labels are mixed by its share of the area.

    The box has the image's proportions, sides sqrt(1 - w) of it with w ~ Beta(alpha, alpha), and a
    uniform centre; what sticks out is cut off, and does not count in the share.

    Args:
      num_classes: K.
      alpha: as for `mixup`.

    Raises:
      ValueError: if alpha is not positive.
    """
    _check(alpha)

    def on_batch(state, key, train_state, batch):
        weight_key, box_key, order_key = jax.random.split(key, 3)
        weight = jax.random.beta(weight_key, alpha, alpha)
        order = jax.random.permutation(order_key, len(batch.labels))
        height, width = batch.images.shape[1:3]
        rows, columns = (
            _interval(side_key, side, jnp.sqrt(1 - weight))
            for side_key, side in zip(jax.random.split(box_key), (height, width), strict=True)
        )
        inside = rows[:, None] & columns[None, :]
        images = jnp.where(inside[None, :, :, None], batch.images[order], batch.images)
        kept = 1 - jnp.mean(inside.astype(jnp.float32))
        labels = _mix_labels(batch.labels, order, kept, num_classes)
        return batch._replace(images=images, labels=labels)

    return Defense(on_batch=on_batch)


def _interval(key, side, share):
    """Returns which of `side` pixels lie in an interval of `share` of them, at a random place."""
    half = jnp.floor(share * side).astype(jnp.int32) // 2
    centre = jax.random.randint(key, (), 0, side)
    pixels = jnp.arange(side)
    return (pixels >= centre - half) & (pixels < centre + half)


def _mix_labels(labels, order, weight, num_classes):
    shares = jax.nn.one_hot(labels, num_classes)
    return weight * shares + (1 - weight) * shares[order]


def _check(alpha):
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, not {alpha}")
