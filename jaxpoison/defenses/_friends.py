"""FRIENDS: friendly noise and random noise (Liu et al. 2022, arXiv 2208.10224).

Friendly noise is as large as it can be without moving the prediction of the current model:

    minimize over e:   KL(p(x) || p(clip(x + e, 0, 1))) - friendliness * mean(e^2),   |e| <= zeta

by SGD with momentum, once, before one epoch. It is then part of the training set, and random noise
is redrawn at every step from the first epoch on. As in the authors' code, the size enters as a
mean of squares over all elements, not as the norm that the paper prints.

Cost: `num_steps` forward and backward passes to the pixels over the training set, once.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpoison.core import devices, loops
from jaxpoison.core.settings import check_range, settle
from jaxpoison.data import Dataset, check, to_float
from jaxpoison.defenses._checks import check_acts, check_choices, check_kind
from jaxpoison.defenses._ids import NO_ID, with_noise
from jaxpoison.defenses.noise import Kind, RandomNoise
from jaxpoison.network import Network, as_network, shared
from jaxpoison.training.hooks import UNCHANGED, Defense, Info

REFERENCE_BATCH = 128  # the authors' objective is a mean over that many, at a fixed step size


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

    def __post_init__(self):
        settle(self)
        check_choices(self)
        check_range(self, "epoch", 0, whole=True)
        check_range(self, "num_steps", 1, whole=True)
        for name in ("zeta", "start", "mu"):
            check_range(self, name, 0, 1)
        for name in ("friendliness", "learning_rate"):
            check_range(self, name, 0)


class FriendsState(NamedTuple):
    """What FRIENDS remembers.

    Attributes:
      key: PRNG key, for the start of the friendly noise.
      noise: float32 [N, H, W, C], friendly noise; zero before it is made.
    """

    key: jax.Array
    noise: jax.Array


def friends(
    model: Any,
    config: FriendsConfig = FriendsConfig(),
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Defense:
    """Returns FRIENDS as a defense.

    The info of the epoch at which the noise is made holds `divergence`: the mean KL divergence
    from the clean to the noisy prediction, and `mean_abs_255`: 255 times the mean absolute noise.

    Args:
      model: the network that is trained, a `Network` or what `network.as_network` takes.
      config: see `FriendsConfig`.
      batch_size: images whose noise is made at once; None: as in `loops.even_batches`.
      mesh: devices to use; default all.

    Raises:
      ValueError: from here for bad settings, from `init` for a bad training set.
    """
    check_kind(config, FriendsConfig)
    mesh = devices.data_mesh() if mesh is None else mesh
    run = Run(as_network(model), config, batch_size, mesh)
    fresh = RandomNoise(config.mu, config.random)
    return Defense(functools.partial(init, run), functools.partial(on_epoch, run), fresh)


class Run(NamedTuple):
    """What FRIENDS is told once.

    Attributes:
      network: that is trained.
      config: see `FriendsConfig`.
      batch_size: images whose noise is made at once.
      mesh: devices to use.
    """

    network: Network
    config: FriendsConfig
    batch_size: int | None
    mesh: jax.sharding.Mesh


def init(run: Run, key: jax.Array, dataset: Dataset, num_epochs: int) -> FriendsState:
    """Returns the state before the first epoch; see `training.hooks.InitFn`."""
    check(dataset)
    check(dataset, run.network.for_images(dataset.images.shape[1:]).num_classes)
    check_acts("FRIENDS", (run.config.epoch,), num_epochs)
    noise = jnp.zeros(dataset.images.shape, jnp.float32)
    return devices.replicate(FriendsState(key, noise), run.mesh)


def on_epoch(
    run: Run, state: FriendsState, epoch: int, train_state: Any, dataset: Dataset
) -> tuple[FriendsState, Dataset, Info]:
    """Makes the friendly noise before its epoch, and adds it from then on; see `hooks.EpochFn`."""
    info = UNCHANGED
    if epoch == run.config.epoch:
        noise, divergences = friendly_noise(run, state.key, train_state.variables, dataset)
        place = jnp.where(dataset.ids >= 0, dataset.ids, NO_ID)
        noise_by_id = state.noise.at[place].set(noise, mode="drop")
        state = state._replace(noise=devices.replicate(noise_by_id, run.mesh))
        metrics = {
            "divergence": jnp.mean(divergences),
            "mean_abs_255": 255 * jnp.mean(jnp.abs(noise)),
        }
        info = Info(metrics, changed=True)
    if epoch >= run.config.epoch:
        dataset = with_noise(state.noise, dataset)
    return state, dataset, info


def friendly_noise(
    run: Run, key: jax.Array, variables: Any, dataset: Dataset
) -> tuple[jax.Array, jax.Array]:
    """Returns (noise, its KL divergence) of every example, float32 [N, H, W, C] and [N]."""
    network, config = run.network.without_variables(), run.config
    descend = shared(descent, network, config, run.mesh)
    num_examples = len(dataset.labels)
    size, _ = loops.even_batches(num_examples, run.batch_size, run.mesh)
    made = []
    for first in range(0, num_examples, size):
        rows = jnp.minimum(jnp.arange(first, first + size), num_examples - 1)
        images = to_float(dataset.images[rows])
        key_of_batch = jax.random.fold_in(key, first)
        reference, carry = begin(network, config, variables, key_of_batch, images)
        steps = jnp.arange(config.num_steps)
        (noise, _), _ = descend((variables, images, reference), carry, steps)
        made.append(finish(network, config, variables, images, reference, noise))
    noises, divergences = (
        jnp.concatenate(parts)[:num_examples] for parts in zip(*made, strict=True)
    )
    return noises, divergences


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(
    network: Network, config: FriendsConfig, variables: Any, key: jax.Array, images: jax.Array
) -> tuple[jax.Array, Any]:
    """Returns the clean log-probabilities [B, K], and (noise, momentum) before the first step."""
    span = config.start
    noise = jax.random.uniform(key, images.shape, images.dtype, minval=-span, maxval=span)
    return log_prediction(network, variables, images), (noise, optimizer(config).init(noise))


def descent(network: Network, config: FriendsConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns the loop over steps; see `loops.scan`."""
    return loops.scan(functools.partial(descend, network, config, mesh))


def descend(
    network: Network,
    config: FriendsConfig,
    mesh: jax.sharding.Mesh,
    constants: Any,
    carry: Any,
    _: Any,
) -> tuple[Any, tuple[()]]:
    """Takes one step of SGD; a `loops.Step`.

    Args:
      network: that is trained.
      config: see `FriendsConfig`.
      mesh: devices that the batch is spread over.
      constants: variables, images [B, H, W, C] in [0, 1], their clean log-probabilities [B, K].
      carry: noise [B, H, W, C], before it is bounded, and the optimizer's state.
    """
    variables, images, reference = constants
    images, reference = devices.constrain_examples((images, reference), mesh)

    def loss(noise):
        return objective(network, config, variables, images, reference, noise)

    noise, momentum = carry
    updates, momentum = optimizer(config).update(jax.grad(loss)(noise), momentum)
    return (optax.apply_updates(noise, updates), momentum), ()


@functools.partial(jax.jit, static_argnums=(0, 1))
def finish(
    network: Network,
    config: FriendsConfig,
    variables: Any,
    images: jax.Array,
    reference: jax.Array,
    noise: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the bounded noise, and its divergence [B]."""
    noise = bounded(config, noise)
    return noise, divergence(network, variables, images, reference, noise)


def objective(
    network: Network,
    config: FriendsConfig,
    variables: Any,
    images: jax.Array,
    reference: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """Returns what is minimized: the divergence less the size, over the authors' batch."""
    noise = bounded(config, noise)
    size = jnp.mean(noise**2, axis=(1, 2, 3))
    change = divergence(network, variables, images, reference, noise)
    return jnp.sum(change - config.friendliness * size) / REFERENCE_BATCH


def divergence(
    network: Network, variables: Any, images: jax.Array, reference: jax.Array, noise: jax.Array
) -> jax.Array:
    """Returns KL from the clean to the noisy prediction, shape [B]."""
    noisy = log_prediction(network, variables, jnp.clip(images + noise, 0.0, 1.0))
    return jnp.sum(jnp.exp(reference) * (reference - noisy), axis=-1)


def log_prediction(network: Network, variables: Any, images: jax.Array) -> jax.Array:
    """Returns log-probabilities, [B, K]."""
    return jax.nn.log_softmax(network.logits(variables, images))


def bounded(config: FriendsConfig, noise: jax.Array) -> jax.Array:
    """Returns the noise within +-zeta."""
    return jnp.clip(noise, -config.zeta, config.zeta)


def optimizer(config: FriendsConfig) -> optax.GradientTransformation:
    """Returns the authors' SGD."""
    decay = {config.num_steps // 2: 0.1, int(0.7 * config.num_steps): 0.1}
    schedule = optax.piecewise_constant_schedule(config.learning_rate, decay)
    return optax.sgd(schedule, momentum=0.9, nesterov=True)
