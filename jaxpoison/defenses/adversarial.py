"""Adversarial training against poisons: ATDA (Tao et al. 2021, arXiv 2102.04716) with FAT.

The network is trained on adversarial examples of the current network only. Friendly adversarial
training (FAT, Zhang et al. 2020, arXiv 2002.11242) takes, among the points of the ball that are
misclassified, one of small loss: projected gradient ascent that stops, for each example by itself,
`tau` steps after the prediction first goes wrong.

Cost: `num_steps` forward and backward passes to the pixels more, at every step of training.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxpoison.core import loops
from jaxpoison.models import Classifier
from jaxpoison.training.hooks import Defense, Info


@dataclasses.dataclass(frozen=True)
class FatConfig:
    """Settings of friendly adversarial training."""

    epsilon: float = 0.25
    """Radius of the ball, in units of [0, 1]. HINT's paper gives 0.25 against untargeted attacks
    and 0.062 against targeted ones, and no norm; its clean accuracies are possible in L2 only."""
    norm: Literal["l2", "linf"] = "l2"
    """The norm of the ball."""
    num_steps: int = 10
    """Most steps of ascent."""
    tau_epochs: tuple[int, ...] = (33, 60)
    """Epochs (from 0) before which tau grows by one, from 0: FAT's 50 and 90 of 120, for 80."""
    jitter: float = 0.001
    """Standard deviation of the normal noise added at each step."""


def adversarial_training(model: Classifier, config: FatConfig = FatConfig()) -> Defense:
    """Returns friendly adversarial training as a defence.

    Steps are epsilon / 5 along the normalised gradient (L2), or 0.007 / 0.031 epsilon along its
    signs (L-infinity), from a random start; the network is in evaluation mode meanwhile. Pixels
    stay in [0, 1]. The batch is moved after augmentation.

    Args:
      model: the network that is trained.
      config: see `FatConfig`.

    Raises:
      ValueError: for bad settings.
    """
    _check(config)
    ball = _L2(config.epsilon) if config.norm == "l2" else _Linf(config.epsilon)

    def on_epoch(state, epoch, train_state, dataset):
        tau = sum(epoch >= start for start in config.tau_epochs)
        return jnp.full_like(state, tau), dataset, Info({"tau": float(tau)})

    def on_batch(state, key, train_state, batch):
        images, labels = batch.images, batch.labels
        variables = jax.lax.stop_gradient(train_state.variables)

        def losses(x):
            logits = jnp.asarray(model.apply(variables, x))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.sum(losses), jnp.argmax(logits, axis=-1) != labels

        def step(carry, step_key):
            x, patience, active = carry
            gradient, wrong = jax.grad(losses, has_aux=True)(x)
            active = active & ~(wrong & (patience == 0))
            patience = jnp.where(wrong, patience - 1, patience)
            noise = config.jitter * jax.random.normal(step_key, x.shape)
            moved = images + ball.project(x + ball.step(gradient) + noise - images)
            x = jnp.where(active[:, None, None, None], jnp.clip(moved, 0.0, 1.0), x)
            return (x, patience, active), ()

        start_key, steps_key = jax.random.split(key)
        start = jnp.clip(images + ball.random(start_key, images.shape), 0.0, 1.0)
        carry = start, jnp.full(labels.shape, state), jnp.ones(labels.shape, bool)
        (x, _, _), _ = loops.inner_scan(step, carry, jax.random.split(steps_key, config.num_steps))
        return batch._replace(images=x)

    return Defense(lambda key, dataset, num_epochs: jnp.zeros((), jnp.int32), on_epoch, on_batch)


class _L2:
    """The Euclidean ball over all pixels and channels of an image."""

    def __init__(self, epsilon):
        self.epsilon = epsilon

    def random(self, key, shape):
        return self.epsilon * _unit(jax.random.normal(key, shape))

    def step(self, gradient):
        return self.epsilon / 5 * _unit(gradient)

    def project(self, change):
        size = _norms(change)
        return change * jnp.minimum(1.0, self.epsilon / jnp.maximum(size, 1e-12))


class _Linf:
    """The cube."""

    def __init__(self, epsilon):
        self.epsilon = epsilon

    def random(self, key, shape):
        return jax.random.uniform(key, shape, minval=-self.epsilon, maxval=self.epsilon)

    def step(self, gradient):
        return 0.007 / 0.031 * self.epsilon * jnp.sign(gradient)

    def project(self, change):
        return jnp.clip(change, -self.epsilon, self.epsilon)


def _norms(images):
    return jnp.sqrt(jnp.sum(images**2, axis=(1, 2, 3), keepdims=True))


def _unit(images):
    return images / jnp.maximum(_norms(images), 1e-12)


def _check(config):
    if not config.epsilon > 0:
        raise ValueError(f"epsilon must be positive, not {config.epsilon}")
    if config.norm not in ("l2", "linf"):
        raise ValueError(f"norm must be l2 or linf, not {config.norm!r}")
    if config.num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {config.num_steps}")
