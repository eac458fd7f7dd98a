"""Random noise in training: FRIENDS' second half by itself, and the control for HINT."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpoison.core.settings import check_range, settle
from jaxpoison.data import Dataset, check
from jaxpoison.defenses._checks import check_between, check_choices
from jaxpoison.defenses._ids import with_noise
from jaxpoison.training.hooks import Defense, Info

Kind = Literal["bernoulli", "uniform", "gaussian"]


def random_noise(size: float, kind: Kind = "bernoulli") -> Defense:
    """Returns the defense that adds fresh noise to every image at every step, after augmentation.

    Pixels may leave [0, 1], as in FRIENDS' code.

    Args:
      size: mu, in units of [0, 1]: noise is +-mu with equal chances (bernoulli), U(-mu, mu)
        (uniform) or N(0, mu^2) (gaussian), independent in every pixel and channel.
      kind: the distribution.

    Raises:
      ValueError: for a size outside [0, 1] or an unknown distribution.
    """
    return Defense(on_batch=RandomNoise(size, kind))


def fixed_noise(size: float, ratio: float, kind: Kind = "uniform") -> Defense:
    """Returns the control for HINT: noise of the same size on as many examples, both at random.

    Examples and noise are drawn once; pixels stay in [0, 1].

    Args:
      size: as for `random_noise`; HINT's beta.
      ratio: share r of the examples, in (0, 1].
      kind: the distribution.

    Raises:
      ValueError: as for `random_noise`, or for a ratio outside (0, 1]; from `init` for a bad
        training set.
    """
    return Defense(functools.partial(_init, FixedNoise(size, kind, ratio)), _on_epoch)


@dataclasses.dataclass(frozen=True)
class RandomNoise:
    """Adds fresh noise to a batch; a `BatchFn` for any state. See `random_noise`."""

    size: float
    kind: Kind

    def __post_init__(self):
        settle(self)
        check_choices(self)
        check_range(self, "size", 0, 1)

    def __call__(self, state: Any, key: jax.Array, train_state: Any, batch: Dataset) -> Dataset:
        images = batch.images
        return batch._replace(images=images + self.draw(key, images.shape, images.dtype))

    def draw(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Returns noise of this shape."""
        match self.kind:
            case "bernoulli":
                return self.size * jax.random.rademacher(key, shape, dtype)
            case "uniform":
                return jax.random.uniform(key, shape, dtype, minval=-self.size, maxval=self.size)
            case _:
                return self.size * jax.random.normal(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class FixedNoise(RandomNoise):
    """Settings of `fixed_noise`."""

    ratio: float

    def __post_init__(self):
        super().__post_init__()
        check_between(self, "ratio", 0, 1)


def _init(noise, key, dataset, num_epochs):
    check(dataset)
    return _drawn(noise, key, dataset.images)


@functools.partial(jax.jit, static_argnums=0)
def _drawn(noise, key, images):
    choose_key, noise_key = jax.random.split(key)
    num_chosen = max(1, round(noise.ratio * len(images)))
    ranks = jax.random.permutation(choose_key, len(images))
    chosen = (ranks < num_chosen)[:, None, None, None]
    return jnp.where(chosen, noise.draw(noise_key, images.shape, jnp.float32), 0)


def _on_epoch(state, epoch, train_state, dataset):
    return state, with_noise(state, dataset), Info(changed=epoch == 0)
