"""EPIC: drop the examples that no other resembles (Yang et al. 2022, arXiv 2208.10190).

Poisons that make one picture go wrong need gradients that ordinary examples lack. Every few epochs:

    a_i    = softmax(f(x_i)) - onehot(y_i)               the gradient to the logits
    sim_ij = exp(-||a_i - a_j|| / K)                     among the examples of one class, K logits
    S      = the `fraction` n examples of greatest F(S) = sum_i max_{j in S} sim_ij, greedily

Each example belongs to the medoid in S that it resembles most, and medoids that stand alone are
dropped for good. Medoids are chosen among all examples of the class every time, dropped ones
included.

Cost of a selection: one forward pass over the training set, and n^2 / classes similarities. The
greedy choice is exact; a step updates the gains by the rows whose best medoid has changed.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpoison.core import devices
from jaxpoison.core.settings import check_range, settle
from jaxpoison.data import Dataset, check
from jaxpoison.defenses._checks import check_acts, check_between, check_kind
from jaxpoison.defenses._ids import NO_ID, for_rows
from jaxpoison.network import Network, as_network, logits
from jaxpoison.training.hooks import UNCHANGED, Defense, Info, select

ROWS_AT_ONCE = 64  # of the similarities, when gains are updated


@dataclasses.dataclass(frozen=True)
class EpicConfig:
    """Settings of EPIC; the defaults are HINT's for CIFAR-10 (MNIST: `start=5, every=2`)."""

    fraction: float = 0.1
    """Medoids as a share of the training set, in (0, 1]."""
    start: int = 10
    """First epoch (finished epochs, from 0) before which examples may be dropped."""
    every: int = 4
    """They are, before epochs that this divides."""
    last: int = 70
    """Last such epoch: that of the recipe's last milestone."""

    def __post_init__(self):
        settle(self)
        check_between(self, "fraction", 0, 1)
        check_range(self, "start", 0, whole=True)
        check_range(self, "every", 1, whole=True)
        check_range(self, "last", 0, whole=True)
        if not self.epochs:
            raise ValueError(
                f"no epoch from start = {self.start} to last = {self.last} divides by every = "
                f"{self.every}, so EPIC would never act"
            )

    @property
    def epochs(self) -> range:
        """The epochs before which examples may be dropped."""
        return range(-(-self.start // self.every) * self.every, self.last + 1, self.every)


class EpicState(NamedTuple):
    """What EPIC remembers.

    Attributes:
      key: PRNG key, which settles where rounding takes a medoid away.
      kept: bool [N], examples not dropped.
    """

    key: jax.Array
    kept: jax.Array


def epic(
    model: Any,
    config: EpicConfig = EpicConfig(),
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Defense:
    """Returns EPIC as a defense.

    The info of a selection holds `dropped`: how many examples were dropped so far, and `chosen`:
    which. A class is compared with itself in one matrix, of n_c^2 float32.

    Args:
      model: the network that is trained, a `Network` or what `network.as_network` takes.
      config: see `EpicConfig`.
      batch_size: images in one pass for the logits; None: as in `loops.even_batches`.
      mesh: devices to use; default all.

    Raises:
      TypeError: for arguments of another kind. ValueError: from `init` for a bad training set, or
        a run that ends before the first selection.
    """
    check_kind(config, EpicConfig)
    mesh = devices.data_mesh() if mesh is None else mesh
    run = Run(as_network(model), config, batch_size, mesh)
    return Defense(functools.partial(init, run), functools.partial(on_epoch, run))


class Run(NamedTuple):
    """What EPIC is told once.

    Attributes:
      network: that is trained.
      config: see `EpicConfig`.
      batch_size: images in one pass.
      mesh: devices to use.
    """

    network: Network
    config: EpicConfig
    batch_size: int | None
    mesh: jax.sharding.Mesh


def init(run: Run, key: jax.Array, dataset: Dataset, num_epochs: int) -> EpicState:
    """Returns the state before the first epoch; see `training.hooks.InitFn`."""
    check(dataset)
    check(dataset, run.network.for_images(dataset.images.shape[1:]).num_classes)
    check_acts("EPIC", run.config.epochs, num_epochs)
    kept = jnp.ones(len(dataset.labels), bool)
    return devices.replicate(EpicState(key, kept), run.mesh)


def on_epoch(
    run: Run, state: EpicState, epoch: int, train_state: Any, dataset: Dataset
) -> tuple[EpicState, Dataset, Info]:
    """Drops examples before the epochs of `config.epochs`; see `training.hooks.EpochFn`."""
    info = UNCHANGED
    if epoch in run.config.epochs:
        key = jax.random.fold_in(state.key, epoch)
        dropped = selection(run, key, train_state.variables, dataset)
        lost = jnp.where(dropped & (dataset.ids >= 0), dataset.ids, NO_ID)
        state = state._replace(kept=state.kept.at[lost].set(False, mode="drop"))
        gone = np.flatnonzero(~devices.to_host(state.kept))
        info = Info({"dropped": len(gone)}, gone, changed=True)
    kept = devices.to_host(for_rows(state.kept, dataset.ids, missing=True))
    return state, select(dataset, kept), info


def selection(run: Run, key: jax.Array, variables: Any, dataset: Dataset) -> jax.Array:
    """Returns which examples no other resembles, bool [N]."""
    outputs = logits(
        run.network, variables, dataset.images, batch_size=run.batch_size, mesh=run.mesh
    )
    members, valid = class_members(np.asarray(dataset.labels), outputs.shape[1])
    budgets = medoid_budgets(key, valid.sum(axis=1), run.config.fraction)
    return isolated(outputs, dataset.labels, members, valid, budgets)


@jax.jit
def isolated(
    logits: jax.Array, labels: jax.Array, members: jax.Array, valid: jax.Array, budgets: jax.Array
) -> jax.Array:
    """Returns which examples are medoids without followers in their class, bool [N].

    Args:
      logits: float32 [N, K].
      labels: int32 [N].
      members: rows of each class, int32 [K, largest class]; see `class_members`.
      valid: which of them are meant, bool of the same shape.
      budgets: medoids of each class, int32 [K].
    """
    proxies = jax.nn.softmax(logits)
    proxies -= jax.nn.one_hot(labels, logits.shape[-1], dtype=proxies.dtype)
    flags = lax.map(functools.partial(isolated_in_class, proxies), (members, valid, budgets))
    return jnp.zeros(labels.shape, bool).at[members].max(flags)


def isolated_in_class(proxies: jax.Array, of_class: Any) -> jax.Array:
    """Returns which members of a class are medoids without followers, bool [n].

    Args:
      proxies: a_i of all examples, float32 [N, K].
      of_class: (rows, valid, budget) of the class, [n], [n] and [].
    """
    rows, valid, budget = of_class
    similarity = similarities(proxies[rows], valid)
    medoids = facility_location(similarity, valid, budget)
    return alone(similarity, medoids) & valid


def similarities(proxies: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns exp(-||a_i - a_j|| / K), float32 [n, n], of proxies [n, K]; 0 where not `valid`."""
    squares = sum((column[:, None] - column[None, :]) ** 2 for column in proxies.T)
    similarity = jnp.exp(-jnp.sqrt(squares) / proxies.shape[1])
    return jnp.where(valid[:, None] & valid[None, :], similarity, 0.0)


def facility_location(similarity: jax.Array, valid: jax.Array, budget: jax.Array) -> jax.Array:
    """Returns the greedy maximizer S of sum_i max_{j in S} similarity_ij, bool [n].

    Args:
      similarity: float32 [n, n], not negative.
      valid: bool [n]; others are not chosen.
      budget: |S|, int32; at most the number of valid examples.
    """
    num_examples = len(similarity)
    rows_at_once = min(ROWS_AT_ONCE, num_examples)

    def choose(_, state):
        chosen, best, gains = state
        medoid = jnp.argmax(jnp.where(valid & ~chosen, gains, -jnp.inf))
        better = jnp.maximum(best, similarity[:, medoid])

        def lower(carry):
            gains, changed = carry
            (rows,) = jnp.nonzero(changed, size=rows_at_once, fill_value=num_examples)
            block = similarity.at[rows].get(mode="fill", fill_value=0.0)
            before, after = (x.at[rows].get(mode="fill", fill_value=0.0) for x in (best, better))
            lost = jnp.maximum(block - before[:, None], 0) - jnp.maximum(block - after[:, None], 0)
            return gains - jnp.sum(lost, axis=0), changed.at[rows].set(False, mode="drop")

        gains, _ = lax.while_loop(lambda carry: carry[1].any(), lower, (gains, better > best))
        return chosen.at[medoid].set(True), better, gains

    gains = jnp.sum(similarity, axis=0)
    start = jnp.zeros(num_examples, bool), jnp.zeros_like(gains), gains
    return lax.fori_loop(0, budget, choose, start)[0]


def alone(similarity: jax.Array, medoids: jax.Array) -> jax.Array:
    """Returns which examples are medoids that no other example resembles most, bool [n]."""
    nearest = jnp.argmax(jnp.where(medoids[None, :], similarity, -1.0), axis=1)
    in_set = jnp.diagonal(similarity) > 0  # examples that fill up the matrix resemble nothing
    sizes = jnp.zeros(len(similarity), jnp.int32).at[nearest].add(in_set)
    return sizes[nearest] == 1


def class_members(labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of each class, int32 [K, largest class], and which of them are meant.

    The first row of a class fills it up; a class without examples is not meant at all.
    """
    rows = [np.flatnonzero(labels == label) for label in range(num_classes)]
    width = max(map(len, rows))
    members = np.zeros((num_classes, width), np.int32)
    for label, own in enumerate(rows):
        members[label, : len(own)] = own
    return members, np.arange(width) < np.array([len(own) for own in rows])[:, None]


def medoid_budgets(key: jax.Array, sizes: np.ndarray, fraction: float) -> jax.Array:
    """Returns the medoids of each class, ceil(fraction n_c) less what makes their sum int(f n).

    The classes that lose one are drawn at random, as in the authors' code.
    """
    budgets = np.ceil(fraction * sizes - 1e-9).astype(np.int32)
    excess = int(budgets.sum()) - max(1, int(fraction * sizes.sum() + 1e-9))
    order = jax.random.permutation(key, np.flatnonzero(budgets > 1))
    return jnp.asarray(budgets).at[order[: max(excess, 0)]].add(-1)
