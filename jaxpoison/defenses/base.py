"""What a defence is: three pure functions, composed like gradient transformations.

A defence sees the training set as it was collected and the current model, before every epoch and
in every step. It never sees which examples are poisoned.
"""

from typing import Any, NamedTuple, Protocol

import jax

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
    """Returns the batch to train on. Traced into the training step, after augmentation."""

    def __call__(
        self, state: State, key: jax.Array, train_state: Any, batch: Dataset
    ) -> Dataset: ...


class Defense(NamedTuple):
    """A defence; write your own by giving these three functions.

    Attributes:
      init: state before the first epoch.
      on_epoch: the training set of one epoch.
      on_batch: the batch of one step.
    """

    init: InitFn
    on_epoch: EpochFn
    on_batch: BatchFn


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

    A defence that drops examples must come after those that hold state per example, or keep what
    it drops fixed from its first epoch on.
    """

    def init(key, dataset):
        return tuple(
            defense.init(jax.random.fold_in(key, index), dataset)
            for index, defense in enumerate(defenses)
        )

    def on_epoch(state, epoch, train_state, dataset):
        states, infos = [], {}
        for defense, part in zip(defenses, state, strict=True):
            part, dataset, info = defense.on_epoch(part, epoch, train_state, dataset)
            states.append(part)
            infos.update(info)
        return tuple(states), dataset, infos

    def on_batch(state, key, train_state, batch):
        for index, (defense, part) in enumerate(zip(defenses, state, strict=True)):
            batch = defense.on_batch(part, jax.random.fold_in(key, index), train_state, batch)
        return batch

    return Defense(init, on_epoch, on_batch)
