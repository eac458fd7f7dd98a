"""Random noise in training: FRIENDS' second half by itself, and the control for HINT."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxpoison.defenses._ids import with_noise
from jaxpoison.training.hooks import Defense, Info

Kind = Literal["bernoulli", "uniform", "gaussian"]


def random_noise(size: float, kind: Kind = "bernoulli") -> Defense:
    """Returns the defence that adds fresh noise to every image at every step, after augmentation.

    Pixels may leave [0, 1], as in FRIENDS' code.

    Args:
      size: mu, in units of [0, 1]: noise is +-mu with equal chances (bernoulli), U(-mu, mu)
        (uniform) or N(0, mu^2) (gaussian), independent in every pixel and channel.
      kind: the distribution.

    Raises:
      ValueError: for a size outside [0, 1] or an unknown distribution.
    """
    draw = _sampler(size, kind)

    def on_batch(state, key, train_state, batch):
        return batch._replace(images=batch.images + draw(key, batch.images.shape))

    return Defense(on_batch=on_batch)


def fixed_noise(size: float, ratio: float, kind: Kind = "uniform") -> Defense:
    """Returns the control for HINT: noise of the same size on as many examples, both at random.

    Examples and noise are drawn once; pixels stay in [0, 1].

    Args:
      size: as for `random_noise`; HINT's beta.
      ratio: share r of the examples, in (0, 1].
      kind: the distribution.

    Raises:
      ValueError: as for `random_noise`, or for a ratio outside (0, 1].
    """
    draw = _sampler(size, kind)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio r must be in (0, 1], not {ratio}")

    @jax.jit
    def drawn(key, images):
        choose_key, noise_key = jax.random.split(key)
        num_chosen = max(1, round(ratio * len(images)))
        ranks = jax.random.permutation(choose_key, len(images))
        chosen = (ranks < num_chosen)[:, None, None, None]
        return jnp.where(chosen, draw(noise_key, images.shape), 0)

    def init(key, dataset, num_epochs):
        return drawn(key, dataset.images)

    def on_epoch(state, epoch, train_state, dataset):
        return state, with_noise(state, dataset), Info(changed=epoch == 0)

    return Defense(init, on_epoch)


def _sampler(size, kind):
    if not 0 <= size <= 1:
        raise ValueError(f"the size of noise is in units of pixels in [0, 1], not {size}")
    match kind:
        case "bernoulli":
            return lambda key, shape: size * jax.random.rademacher(key, shape, jnp.float32)
        case "uniform":
            return lambda key, shape: jax.random.uniform(key, shape, minval=-size, maxval=size)
        case "gaussian":
            return lambda key, shape: size * jax.random.normal(key, shape)
    raise ValueError(f"noise is bernoulli, uniform or gaussian, not {kind!r}")
