"""Anti-backdoor learning (Li et al. 2021, arXiv 2110.11571): unlearn what was learned first.

A trigger is easier than a class, so poisons soon have the lowest loss. With finished epochs t:

    t < turn    mean of sign(l_i - gamma) l_i      local gradient ascent (LGA): no loss falls far
                                               below gamma, but those of the easiest examples
    t = turn    the `ratio` n examples of lowest loss are isolated
    t >= turn   training on all others
    at the end  ascent of the mean loss of the isolated ones: unlearns what they have in common

The last two are the authors' code; their eq. 3 adds both losses instead. A step of LGA has one more
forward pass: the signs follow from the losses of the batch.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison.core import devices, loops
from jaxpoison.core.settings import check_range, settle
from jaxpoison.data import Dataset, check, to_float
from jaxpoison.defenses._checks import check_acts, check_between, check_kind
from jaxpoison.defenses._ids import for_rows
from jaxpoison.network import Network, as_network, logits, shared
from jaxpoison.training.hooks import UNCHANGED, Defense, Info, select

MOMENTUM = 0.9  # of the ascent


@dataclasses.dataclass(frozen=True)
class AblConfig:
    """Settings of anti-backdoor learning; the defaults are the paper's for CIFAR-10."""

    turn: int = 20
    """Epoch (finished epochs) before which examples are isolated; at least 1."""
    gamma: float = 0.5
    """The loss that LGA holds examples at, in nats; 0 for plain training."""
    ratio: float = 0.01
    """Share of the examples that are isolated, in (0, 1)."""
    unlearning_epochs: int = 5
    """Passes of the ascent over the isolated examples; 0 for none."""
    unlearning_rate: float = 5e-4
    """Its learning rate."""
    unlearning_batch: int = 128
    """Examples in a step of it, if so many are isolated."""

    def __post_init__(self):
        settle(self)
        check_range(self, "turn", 1, whole=True)
        check_range(self, "gamma", 0)
        check_between(self, "ratio", 0, 1)
        check_range(self, "unlearning_epochs", 0, whole=True)
        check_between(self, "unlearning_rate", 0)
        check_range(self, "unlearning_batch", 1, whole=True)


class AblState(NamedTuple):
    """What anti-backdoor learning remembers.

    Attributes:
      key: PRNG key, of the order of the ascent.
      is_local: bool [], whether LGA is on.
      isolated: bool [N], by id.
      examples: images and labels of the isolated examples, [M], M = max(1, round(ratio N)); of the
        first ones before the turn.
    """

    key: jax.Array
    is_local: jax.Array
    isolated: jax.Array
    examples: Dataset


def anti_backdoor(
    model: Any, config: AblConfig = AblConfig(), *, mesh: jax.sharding.Mesh | None = None
) -> Defense:
    """Returns anti-backdoor learning as a defense.

    The info of the turn holds `chosen`, the ids of the isolated examples. The recipe should not
    smooth labels, and its loss is logged with its signs while LGA is on.

    Args:
      model: the network that is trained, a `Network` or what `network.as_network` takes.
      config: see `AblConfig`.
      mesh: devices to use; default all.

    Raises:
      TypeError: for arguments of another kind. ValueError: from `init` for a bad training set, or
        a run that ends before the turn.
    """
    check_kind(config, AblConfig)
    network = as_network(model).without_variables()
    run = Run(network, config, devices.data_mesh() if mesh is None else mesh)
    return Defense(
        functools.partial(init, run),
        functools.partial(on_epoch, run),
        LocalAscent(network, config.gamma),
        functools.partial(finish, run),
    )


class Run(NamedTuple):
    """What anti-backdoor learning is told once.

    Attributes:
      network: that is trained.
      config: see `AblConfig`.
      mesh: devices to use.
    """

    network: Network
    config: AblConfig
    mesh: jax.sharding.Mesh


def init(run: Run, key: jax.Array, dataset: Dataset, num_epochs: int) -> AblState:
    """Returns the state before the first epoch; see `training.hooks.InitFn`."""
    check(dataset, run.network.for_images(dataset.images.shape[1:]).num_classes)
    check_acts("Anti-backdoor learning", (run.config.turn,), num_epochs)
    num_examples = len(dataset.labels)
    first = dataset.take(slice(max(1, round(run.config.ratio * num_examples))))._replace(ids=None)
    state = AblState(key, jnp.array(True), jnp.zeros(num_examples, bool), first)
    return devices.replicate(state, run.mesh)


def on_epoch(
    run: Run, state: AblState, epoch: int, train_state: Any, dataset: Dataset
) -> tuple[AblState, Dataset, Info]:
    """Isolates examples before the turn, and leaves them out; see `training.hooks.EpochFn`."""
    if epoch < run.config.turn:
        return state, dataset, UNCHANGED
    info = UNCHANGED
    if epoch == run.config.turn:
        rows = lowest(run, train_state.variables, dataset, len(state.examples.labels))
        ids = devices.to_host(dataset.ids)[rows]
        isolated = np.zeros(len(state.isolated), bool)
        isolated[ids] = True
        host = jax.tree.map(devices.to_host, dataset._replace(ids=None))
        state = state._replace(
            is_local=jnp.array(False), isolated=jnp.asarray(isolated), examples=host.take(rows)
        )
        info = Info({"isolated": len(rows)}, ids, changed=True)
    gone = devices.to_host(for_rows(state.isolated, dataset.ids, missing=False))
    return state, select(dataset, ~gone), info


def lowest(run: Run, variables: Any, dataset: Dataset, count: int) -> np.ndarray:
    """Returns the rows of the `count` examples of lowest loss, int [count], lowest first.

    In evaluation mode, without augmentation. Examples that a defense has added come last.
    """
    outputs = logits(run.network, variables, dataset.images, mesh=run.mesh)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.asarray(dataset.labels))
    losses = jnp.where(jnp.asarray(dataset.ids) >= 0, losses, jnp.inf)
    return np.argsort(devices.to_host(losses), kind="stable")[:count]


@dataclasses.dataclass(frozen=True)
class LocalAscent:
    """Signs the labels of a batch, so that the loss becomes sign(l - gamma) l; a `BatchFn`.

    Attributes:
      network: that is trained.
      gamma: see `AblConfig`.
    """

    network: Network
    gamma: float

    def __call__(
        self, state: AblState, key: jax.Array, train_state: Any, batch: Dataset
    ) -> Dataset:
        def signs():
            outputs, _ = self.network.train_logits(
                train_state.variables, batch.images, rngs={"dropout": key}
            )
            return jnp.sign(losses_of(outputs, batch.labels) - self.gamma)

        sign = jax.lax.cond(
            state.is_local, signs, lambda: jnp.ones(len(batch.labels), batch.images.dtype)
        )
        shares = batch.labels
        if shares.ndim == 1:
            said = jax.eval_shape(self.network.logits, train_state.variables, batch.images)
            shares = jax.nn.one_hot(shares, said.shape[1], dtype=batch.images.dtype)
        return batch._replace(labels=sign[:, None] * shares)


def losses_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each example, [B]; labels int [B], or shares [B, K]."""
    if labels.ndim == 2:
        return optax.softmax_cross_entropy(logits, labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def finish(run: Run, state: AblState, train_state: Any) -> Any:
    """Unlearns the isolated examples; see `training.hooks.FinishFn`."""
    config, count = run.config, len(state.examples.labels)
    if not config.unlearning_epochs:
        return train_state
    batch_size = min(config.unlearning_batch, count)
    keys = jax.random.split(state.key, config.unlearning_epochs)
    order = np.concatenate([np.asarray(jax.random.permutation(key, count)) for key in keys])
    order = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    ascend = shared(_ascent, run.network, config.unlearning_rate)
    # Copies: the loop donates what it carries.
    variables = jax.tree.map(jnp.array, (train_state.params, train_state.batch_stats))
    carry = (*variables, _optimizer(config.unlearning_rate).init(train_state.params))
    carry, constants = devices.replicate((carry, state.examples), run.mesh)
    (params, batch_stats, _), _ = ascend(constants, carry, order.astype(np.int32))
    return train_state._replace(params=params, batch_stats=batch_stats)


def _optimizer(learning_rate):
    return optax.sgd(learning_rate, momentum=MOMENTUM)


def _ascent(network, learning_rate):
    """Returns the loop of the ascent; for `network.shared`."""
    optimizer = _optimizer(learning_rate)

    def step(examples, carry, rows):
        params, batch_stats, opt_state = carry

        def negative_loss(params):
            outputs, updates = network.train_logits(
                {"params": params, "batch_stats": batch_stats}, to_float(examples.images[rows])
            )
            losses = losses_of(outputs, examples.labels[rows])
            return -jnp.mean(losses), updates["batch_stats"]

        (loss, stats), gradient = jax.value_and_grad(negative_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), stats, opt_state), -loss

    return loops.scan(step)
