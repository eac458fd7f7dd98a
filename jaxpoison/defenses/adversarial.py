"""Adversarial training against poisons: ATDA (Tao et al. 2021, arXiv 2102.04716) with FAT.

The network is trained on adversarial examples of the current network only. Friendly adversarial
training (FAT, Zhang et al. 2020, arXiv 2002.11242) takes, among the points of the ball that are
misclassified, one of small loss: projected gradient ascent that stops, for each example by itself,
`tau` steps after the prediction first goes wrong.

Cost: `num_steps` forward and backward passes to the pixels more, at every step of training.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpoison.core import loops
from jaxpoison.core.settings import check_range, settle
from jaxpoison.data import Dataset, balls, check
from jaxpoison.defenses._checks import check_between, check_choices, check_kind, check_schedule
from jaxpoison.network import Network, as_network
from jaxpoison.training.hooks import Defense, Info

STEPS = {"l2": 1 / 5, "linf": 0.007 / 0.031}
"""Size of a step over epsilon."""


@dataclasses.dataclass(frozen=True)
class FatConfig:
    """Settings of friendly adversarial training."""

    epsilon: float = 0.25
    """Radius of the ball, in units of [0, 1]. HINT's paper gives 0.25 against untargeted attacks
    and 0.062 against targeted ones, and no norm; its clean accuracies are possible in L2 only."""
    norm: balls.Norm = "l2"
    """The norm of the ball."""
    num_steps: int = 10
    """Most steps of ascent."""
    tau_epochs: tuple[int, ...] = (33, 60)
    """Epochs (from 0) before which tau grows by one, from 0: FAT's 50 and 90 of 120, for 80."""
    jitter: float = 0.001
    """Standard deviation of the normal noise added at each step."""

    def __post_init__(self):
        settle(self)
        check_choices(self)
        check_between(self, "epsilon", 0)
        check_range(self, "num_steps", 1, whole=True)
        check_schedule(self, "tau_epochs")
        check_range(self, "jitter", 0)


def adversarial_training(model: Any, config: FatConfig = FatConfig()) -> Defense:
    """Returns friendly adversarial training as a defense.

    Steps are epsilon / 5 along the normalized gradient (L2), or 0.007 / 0.031 epsilon along its
    signs (L-infinity), from a random start; the network is in evaluation mode meanwhile. Pixels
    stay in [0, 1]. The batch is moved after augmentation.

    Args:
      model: the network that is trained, a `Network` or what `network.as_network` takes.
      config: see `FatConfig`.

    Raises:
      TypeError: for arguments of another kind. ValueError: from `init` for a bad training set.
    """
    check_kind(config, FatConfig)
    network = as_network(model).without_variables()
    on_epoch = functools.partial(_on_epoch, config)
    return Defense(functools.partial(_init, network), on_epoch, FriendlyAscent(network, config))


def _init(network, key, dataset, num_epochs):
    check(dataset, network.num_classes)
    return jnp.zeros((), jnp.int32)


def _on_epoch(config, state, epoch, train_state, dataset):
    tau = sum(epoch >= start for start in config.tau_epochs)
    return jnp.full_like(state, tau), dataset, Info({"tau": float(tau)})


@dataclasses.dataclass(frozen=True)
class FriendlyAscent:
    """Moves a batch to friendly adversarial examples; a `BatchFn` whose state is tau, int32 [].

    Attributes:
      network: that is trained.
      config: see `FatConfig`.
    """

    network: Network
    config: FatConfig

    def __call__(self, state: Any, key: jax.Array, train_state: Any, batch: Dataset) -> Dataset:
        images = batch.images
        epsilon, norm = self.config.epsilon, self.config.norm
        start_key, steps_key = jax.random.split(key)
        start = images + balls.random_change(start_key, images, epsilon, norm)
        start = jnp.clip(start, 0.0, 1.0)
        everywhere = jnp.full(len(images), state), jnp.ones(len(images), bool)
        variables = jax.lax.stop_gradient(train_state.variables)
        step = functools.partial(ascend, self.network, self.config, variables, batch)
        steps = jax.random.split(steps_key, self.config.num_steps)
        (x, _, _), _ = loops.inner_scan(step, (start, *everywhere), steps)
        return batch._replace(images=x)


def ascend(
    network: Network, config: FatConfig, variables: Any, batch: Dataset, carry: Any, key: jax.Array
) -> tuple[Any, tuple[()]]:
    """Takes one step of ascent; of `loops.inner_scan`.

    Args:
      network: that is trained.
      config: see `FatConfig`.
      variables: of the network.
      batch: the images [B, H, W, C] about which the ball lies, and their labels.
      carry: the moved images, the patience left of each [B], and which still move, bool [B].
      key: PRNG key of the step.
    """
    x, patience, active = carry
    losses = functools.partial(loss_and_misses, network, variables, batch.labels)
    gradient, wrong = jax.grad(losses, has_aux=True)(x)
    active = active & ~(wrong & (patience == 0))
    patience = jnp.where(wrong, patience - 1, patience)
    noise = config.jitter * jax.random.normal(key, x.shape, x.dtype)
    step = STEPS[config.norm] * config.epsilon * balls.steepest(gradient, config.norm)
    change = balls.project(x + step + noise - batch.images, config.epsilon, config.norm)
    moved = batch.images + change
    x = jnp.where(active[:, None, None, None], jnp.clip(moved, 0.0, 1.0), x)
    return (x, patience, active), ()


def loss_and_misses(
    network: Network, variables: Any, labels: jax.Array, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the cross-entropies, and which images are misclassified, bool [B]."""
    logits = network.logits(variables, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses), jnp.argmax(logits, axis=-1) != labels
