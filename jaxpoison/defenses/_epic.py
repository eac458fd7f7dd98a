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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpoison.core import devices, loops
from jaxpoison.data import check, to_float
from jaxpoison.defenses._ids import NO_ID, for_rows
from jaxpoison.models import Classifier
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


class EpicState(NamedTuple):
    """What EPIC remembers.

    Attributes:
      key: PRNG key, which settles where rounding takes a medoid away.
      kept: bool [N], examples not dropped.
    """

    key: jax.Array
    kept: jax.Array


def epic(
    model: Classifier,
    config: EpicConfig = EpicConfig(),
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Defense:
    """Returns EPIC as a defence.

    The info of a selection holds `dropped`: how many examples were dropped so far, and `chosen`:
    which. A class is compared with itself in one matrix, of n_c^2 float32.

    Args:
      model: the network that is trained.
      config: see `EpicConfig`.
      batch_size: images in one pass for the logits; None: as in `loops.even_batches`.
      mesh: devices to use; default all.

    Raises:
      ValueError: from here for bad settings, from `init` for a bad training set.
    """
    _check(config)
    mesh = devices.data_mesh() if mesh is None else mesh

    def logits_of(variables, images):
        return jnp.asarray(model.apply(variables, to_float(images)))

    logits = loops.map_batches(logits_of, batch_size=batch_size, mesh=mesh)

    @jax.jit
    def isolated(logits, labels, members, valid, budgets):
        proxies = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1])

        def of_class(arguments):
            rows, valid, budget = arguments
            similarity = similarities(proxies[rows], valid)
            medoids = facility_location(similarity, valid, budget)
            return alone(similarity, medoids) & valid

        flags = lax.map(of_class, (members, valid, budgets))
        return jnp.zeros(labels.shape, bool).at[members].max(flags)

    def init(key, dataset, num_epochs):
        check(dataset, model.num_classes)
        if num_epochs <= config.start:
            raise ValueError(
                f"EPIC would begin before epoch start = {config.start} of {num_epochs} epochs, so "
                "never: choose an earlier start or train longer"
            )
        kept = jnp.ones(len(dataset.labels), bool)
        return devices.replicate(EpicState(key, kept), mesh)

    def on_epoch(state, epoch, train_state, dataset):
        info = UNCHANGED
        if config.start <= epoch <= config.last and epoch % config.every == 0:
            labels = np.asarray(dataset.labels)
            members, valid = class_members(labels, model.num_classes)
            budgets = medoid_budgets(
                jax.random.fold_in(state.key, epoch), valid.sum(axis=1), config.fraction
            )
            outputs = logits(train_state.variables, dataset.images)
            dropped = isolated(outputs, dataset.labels, members, valid, budgets)
            lost = jnp.where(dropped & (dataset.ids >= 0), dataset.ids, NO_ID)
            state = state._replace(kept=state.kept.at[lost].set(False, mode="drop"))
            gone = np.flatnonzero(~devices.to_host(state.kept))
            info = Info({"dropped": len(gone)}, gone, changed=True)
        kept = devices.to_host(for_rows(state.kept, dataset.ids, missing=True))
        return state, select(dataset, kept), info

    return Defense(init, on_epoch)


def similarities(proxies: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns exp(-||a_i - a_j|| / K), float32 [n, n], of proxies [n, K]; 0 where not `valid`."""
    squares = sum((column[:, None] - column[None, :]) ** 2 for column in proxies.T)
    similarity = jnp.exp(-jnp.sqrt(squares) / proxies.shape[1])
    return jnp.where(valid[:, None] & valid[None, :], similarity, 0.0)


def facility_location(similarity: jax.Array, valid: jax.Array, budget: jax.Array) -> jax.Array:
    """Returns the greedy maximiser S of sum_i max_{j in S} similarity_ij, bool [n].

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

    start = jnp.zeros(num_examples, bool), jnp.zeros(num_examples), jnp.sum(similarity, axis=0)
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


def _check(config):
    if not 0 < config.fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], not {config.fraction}")
    if config.every < 1 or config.start < 0:
        raise ValueError(
            f"every must be at least 1 and start at least 0, not {config.every} and {config.start}"
        )
