"""What a defence is: three pure functions, composed like gradient transformations.

A defence sees the training set as it was collected and the current model, before every epoch and
in every step. It never sees which examples are poisoned.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxpoison.core import devices
from jaxpoison.data import Dataset

State = Any  # a pytree of arrays: what must survive from epoch to epoch (and in checkpoints)
Info = dict[str, jax.Array | float]


class InitFn(Protocol):
    """Returns the state before the first epoch. Raises ValueError if the set cannot be defended."""

    def __call__(self, key: jax.Array, dataset: Dataset) -> State: ...


class EpochFn(Protocol):
    """Returns `(state, dataset, info)` for one epoch.

    Called before each epoch, outside `jit`. `dataset` is the set as collected, at every epoch: the
    returned one may have other images, labels or fewer examples, and is used for this epoch alone.
    State and data set may be made anywhere: training places copies of them on all devices.
    `info` is empty where nothing changed; scalars in it are logged, `info["chosen"]`
    (bool [N], over the set as collected) says which examples were singled out.
    """

    def __call__(
        self, state: State, epoch: int, train_state: Any, dataset: Dataset
    ) -> tuple[State, Dataset, Info]: ...


class BatchFn(Protocol):
    """Returns the batch to train on. Traced into the training step, after augmentation.

    Its labels may also be the shares of each class, float32 [B, K] with rows that sum to 1.
    """

    def __call__(
        self, state: State, key: jax.Array, train_state: Any, batch: Dataset
    ) -> Dataset: ...


class KeepFn(Protocol):
    """Returns which examples of the set the whole run uses, bool [N] on the host.

    Decided in `init` once and for all, so that what comes later in a chain can count on it.
    """

    def __call__(self, state: State, num_examples: int) -> np.ndarray: ...


class FinishFn(Protocol):
    """Returns the training state that is the result, from that after the last epoch.

    Called once, outside `jit`, before the last accuracy is measured and the last checkpoint saved.
    """

    def __call__(self, state: State, train_state: Any) -> Any: ...


def keep_all(state, num_examples):
    """The `KeepFn` of a defence that has not decided to drop anything for good."""
    return np.ones(num_examples, bool)


def keep_result(state, train_state):
    """The `FinishFn` that changes nothing."""
    return train_state


def same_size(num_examples):
    """The `size` of a defence that adds no examples."""
    return num_examples


class Defense(NamedTuple):
    """A defence; write your own by giving the first three functions.

    Attributes:
      init: state before the first epoch.
      on_epoch: the training set of one epoch.
      on_batch: the batch of one step.
      keep: which examples `on_epoch` returns at every epoch, if `init` decides that.
      finish: what is done to the network after the last epoch.
      size: how many examples `on_epoch` returns at most, of a set of so many.
    """

    init: InitFn
    on_epoch: EpochFn
    on_batch: BatchFn
    keep: KeepFn = keep_all
    finish: FinishFn = keep_result
    size: Callable[[int], int] = same_size


def keep_epoch(state, epoch, train_state, dataset):
    """The `EpochFn` that changes nothing."""
    return state, dataset, {}


def keep_batch(state, key, train_state, batch):
    """The `BatchFn` that changes nothing."""
    return batch


def none() -> Defense:
    """Returns the defence that does nothing."""
    return Defense(lambda key, dataset: (), keep_epoch, keep_batch)


def chain(*defenses: Defense) -> Defense:
    """Returns the defences applied one after another, each to what the one before returned.

    A defence that drops or adds examples must come after those that hold state per example, unless
    it drops them in `init` and says so by `keep`: those after it are then given the smaller set
    from the start, and what they tell of examples is told of the set as collected.
    """

    def init(key, dataset):
        states = []
        for index, defense in enumerate(defenses):
            states.append(defense.init(jax.random.fold_in(key, index), dataset))
            dataset = select(dataset, defense.keep(states[-1], len(dataset.labels)))
        return tuple(states)

    def on_epoch(state, epoch, train_state, dataset):
        states, infos = [], {}
        num_examples = len(dataset.labels)
        rows = np.arange(num_examples)  # of the set as collected, which are still there
        for defense, part in zip(defenses, state, strict=True):
            part, dataset, info = defense.on_epoch(part, epoch, train_state, dataset)
            if "chosen" in info and len(rows) < num_examples:
                chosen = np.zeros(num_examples, bool)
                chosen[rows] = devices.to_host(info["chosen"])
                info = {**info, "chosen": chosen}
            rows = rows[defense.keep(part, len(rows))]
            states.append(part)
            infos.update(info)
        return tuple(states), dataset, infos

    def on_batch(state, key, train_state, batch):
        for index, (defense, part) in enumerate(zip(defenses, state, strict=True)):
            batch = defense.on_batch(part, jax.random.fold_in(key, index), train_state, batch)
        return batch

    def keep(state, num_examples):
        rows = np.arange(num_examples)
        for defense, part in zip(defenses, state, strict=True):
            rows = rows[defense.keep(part, len(rows))]
        return np.isin(np.arange(num_examples), rows)

    def finish(state, train_state):
        for defense, part in zip(defenses, state, strict=True):
            train_state = defense.finish(part, train_state)
        return train_state

    def size(num_examples):
        for defense in defenses:
            num_examples = defense.size(num_examples)
        return num_examples

    return Defense(init, on_epoch, on_batch, keep, finish, size)


def select(dataset: Dataset, keep: np.ndarray) -> Dataset:
    """Returns the examples for which `keep`, bool [N], is True, in their order."""
    if keep.all():
        return dataset
    rows = np.flatnonzero(keep)
    return jax.tree.map(lambda array: array[rows], dataset)
