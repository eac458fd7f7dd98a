"""FRIENDS: friendly noise and random noise (Liu et al. 2022, arXiv 2208.10224).

Friendly noise is as large as it can be without moving the prediction of the current model:

    minimise over e:   KL(p(x) || p(clip(x + e, 0, 1))) - friendliness * mean(e^2),   |e| <= zeta

by SGD with momentum, once, before one epoch. It is then part of the training set, and random noise
is added afresh at every step from the first epoch on. As in the authors' code, the size enters as a
mean of squares over all elements, not as the norm that the paper prints.

Cost: `num_steps` forward and backward passes to the pixels over the training set, once.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpoison.core import devices, loops
from jaxpoison.data import check, to_float
from jaxpoison.defenses._ids import NO_ID, with_noise
from jaxpoison.defenses.noise import Kind, random_noise
from jaxpoison.models import Classifier
from jaxpoison.training.hooks import UNCHANGED, Defense, Info

REFERENCE_BATCH = 128  # the authors' objective is a mean over so many images, at a fixed step size


@dataclasses.dataclass(frozen=True)
class FriendsConfig:
    """Settings of FRIENDS; the defaults are those of its authors' code."""

    epoch: int = 5
    """The epoch (finished epochs, from 0) before which friendly noise is made."""
    zeta: float = 16 / 255
    """Largest absolute friendly noise on a pixel, in units of [0, 1]."""
    friendliness: float = 1.0
    """Weight of the size of the noise against the change of the prediction."""
    start: float = 8 / 255
    """Friendly noise starts from U(-start, start)."""
    num_steps: int = 30
    """Steps of SGD with Nesterov momentum 0.9."""
    learning_rate: float = 100.0
    """Step size; a tenth after `num_steps` / 2 steps, a hundredth after 0.7 `num_steps`."""
    random: Kind = "bernoulli"
    """Distribution of the random noise."""
    mu: float = 16 / 255
    """Size of the random noise, in units of [0, 1]; 0 for none."""


class FriendsState(NamedTuple):
    """What FRIENDS remembers.

    Attributes:
      key: PRNG key, for the start of the friendly noise.
      noise: float32 [N, H, W, C], friendly noise; zero before it is made.
    """

    key: jax.Array
    noise: jax.Array


def friends(
    model: Classifier,
    config: FriendsConfig = FriendsConfig(),
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Defense:
    """Returns FRIENDS as a defence.

    The info of the epoch at which the noise is made holds `divergence`: the mean KL divergence
    from the clean to the noisy prediction, and `mean_abs_255`: 255 times the mean absolute noise.

    Args:
      model: the network that is trained.
      config: see `FriendsConfig`.
      batch_size: images whose noise is made at once; None: as in `loops.even_batches`.
      mesh: devices to use; default all.

    Raises:
      ValueError: from here for bad settings, from `init` for a bad training set.
    """
    _check(config)
    mesh = devices.data_mesh() if mesh is None else mesh
    decay = {config.num_steps // 2: 0.1, int(0.7 * config.num_steps): 0.1}
    schedule = optax.piecewise_constant_schedule(config.learning_rate, decay)
    optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)
    random = random_noise(config.mu, config.random)

    def log_prediction(variables, images):
        return jax.nn.log_softmax(jnp.asarray(model.apply(variables, images)))

    def divergence(variables, images, reference, noise):
        """KL from the clean to the noisy prediction, shape [B]."""
        noisy = log_prediction(variables, jnp.clip(images + noise, 0.0, 1.0))
        return jnp.sum(jnp.exp(reference) * (reference - noisy), axis=-1)

    def bounded(noise):
        return jnp.clip(noise, -config.zeta, config.zeta)

    def descend(constants, carry, _):
        variables, images, reference = constants
        images, reference = devices.constrain_examples((images, reference), mesh)

        def objective(noise):
            size = jnp.mean(bounded(noise) ** 2, axis=(1, 2, 3))
            change = divergence(variables, images, reference, bounded(noise))
            return jnp.sum(change - config.friendliness * size) / REFERENCE_BATCH

        noise, momentum = carry
        updates, momentum = optimizer.update(jax.grad(objective)(noise), momentum)
        return (optax.apply_updates(noise, updates), momentum), ()

    run = loops.scan(descend)

    @jax.jit
    def begin(variables, key, images):
        reference = log_prediction(variables, images)
        span = config.start
        noise = jax.random.uniform(key, images.shape, minval=-span, maxval=span)
        return reference, (noise, optimizer.init(noise))

    @jax.jit
    def finish(variables, images, reference, noise):
        noise = bounded(noise)
        return noise, divergence(variables, images, reference, noise)

    def make(key, variables, dataset):
        num_examples = len(dataset.labels)
        size, _ = loops.even_batches(num_examples, batch_size, mesh)
        noises, divergences = [], []
        for first in range(0, num_examples, size):
            rows = jnp.minimum(jnp.arange(first, first + size), num_examples - 1)
            images = to_float(dataset.images[rows])
            reference, carry = begin(variables, jax.random.fold_in(key, first), images)
            (noise, _), _ = run((variables, images, reference), carry, jnp.arange(config.num_steps))
            for made, into in zip(
                finish(variables, images, reference, noise), (noises, divergences), strict=True
            ):
                into.append(made[: num_examples - first])
        return jnp.concatenate(noises), jnp.concatenate(divergences)

    def init(key, dataset, num_epochs):
        check(dataset, model.num_classes)
        if num_epochs <= config.epoch:
            raise ValueError(
                f"FRIENDS would make its noise before epoch {config.epoch} of {num_epochs} epochs, "
                "so never: choose an earlier epoch or train longer"
            )
        noise = jnp.zeros(dataset.images.shape, jnp.float32)
        return devices.replicate(FriendsState(key, noise), mesh)

    def on_epoch(state, epoch, train_state, dataset):
        info = UNCHANGED
        if epoch == config.epoch:
            noise, divergences = make(state.key, train_state.variables, dataset)
            place = jnp.where(dataset.ids >= 0, dataset.ids, NO_ID)
            noise_by_id = state.noise.at[place].set(noise, mode="drop")
            state = state._replace(noise=devices.replicate(noise_by_id, mesh))
            metrics = {
                "divergence": jnp.mean(divergences),
                "mean_abs_255": 255 * jnp.mean(jnp.abs(noise)),
            }
            info = Info(metrics, changed=True)
        if epoch >= config.epoch:
            dataset = with_noise(state.noise, dataset)
        return state, dataset, info

    def on_batch(state, key, train_state, batch):
        return random.on_batch((), key, train_state, batch)

    return Defense(init, on_epoch, on_batch)


def _check(config):
    for name in ("zeta", "start"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is in units of pixels in [0, 1], not {getattr(config, name)}")
    if config.epoch < 0 or config.num_steps < 1:
        raise ValueError(
            f"epoch must be at least 0 and num_steps at least 1, "
            f"not {config.epoch} and {config.num_steps}"
        )
