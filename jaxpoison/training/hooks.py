"""What training calls: a defense is four pure functions, composed like gradient transformations.

A defense sees the training set as it was collected and the current network, before every epoch and
in every step. It never sees which examples are poisoned. Every example has an id, its row in the
set as collected, so a defense finds its own examples in whatever set another one has left.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxpoison.data import Dataset

State = Any  # a pytree of arrays: what must survive from epoch to epoch (and in checkpoints)
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Info(NamedTuple):
    """What a defense did before an epoch.

    Attributes:
      metrics: scalars to log, by name.
      chosen: ids of the examples that were singled out, int [M]; None where the question was not
        asked.
      changed: whether the data set of this epoch differs from that of the epoch before.
    """

    metrics: Mapping[str, Any] = NOTHING
    chosen: Any = None
    changed: bool = False


UNCHANGED = Info()


class InitFn(Protocol):
    """Returns the state before the first epoch.

    `dataset` is the set as collected, with ids; the run takes `num_epochs` epochs. Raises
    ValueError if the set cannot be defended, or the defense would never act in such a run.
    """

    def __call__(self, key: jax.Array, dataset: Dataset, num_epochs: int) -> State: ...


class EpochFn(Protocol):
    """Returns `(state, dataset, info)` for one epoch.

    Called before each epoch, outside `jit`. `dataset` is the set as collected, at every epoch (in a
    chain, what the defenses before have made of it): the returned one may have other images,
    labels or examples, and is used for this epoch alone. Examples that a defense adds have the id
    -1. State and data set may be made anywhere: training places copies of them on all devices.
    Arrays of `train_state` may be kept.
    """

    def __call__(
        self, state: State, epoch: int, train_state: Any, dataset: Dataset
    ) -> tuple[State, Dataset, Info]: ...


class BatchFn(Protocol):
    """Returns the batch to train on. Traced into the training step, after augmentation.

    Its labels may also be the shares of each class, float32 [B, K] with rows that sum to 1, or to
    the weight of the example's loss where that is another, -1 for ascent.
    """

    def __call__(
        self, state: State, key: jax.Array, train_state: Any, batch: Dataset
    ) -> Dataset: ...


class FinishFn(Protocol):
    """Returns the training state that is the result, from that after the last epoch.

    Called once, outside `jit`, before the last accuracy is measured and the last checkpoint saved.
    """

    def __call__(self, state: State, train_state: Any) -> Any: ...


def no_state(key, dataset, num_epochs):
    """The `InitFn` of a defense that remembers nothing."""
    return ()


def keep_epoch(state, epoch, train_state, dataset):
    """The `EpochFn` that changes nothing."""
    return state, dataset, UNCHANGED


def keep_batch(state, key, train_state, batch):
    """The `BatchFn` that changes nothing."""
    return batch


def keep_result(state, train_state):
    """The `FinishFn` that changes nothing."""
    return train_state


class Defense(NamedTuple):
    """A defense; write your own by giving the functions that you need.

    Attributes:
      init: state before the first epoch.
      on_epoch: the training set of one epoch.
      on_batch: the batch of one step.
      finish: what is done to the network after the last epoch.
    """

    init: InitFn = no_state
    on_epoch: EpochFn = keep_epoch
    on_batch: BatchFn = keep_batch
    finish: FinishFn = keep_result


def none() -> Defense:
    """Returns the defense that does nothing."""
    return Defense()


def chain(*defenses: Defense) -> Defense:
    """Returns the defenses applied one after another, each to what the one before returned.

    Each is initialized with the whole set and finds its examples by their ids, so one that drops or
    adds examples may stand anywhere. Of several that single examples out, the last is reported.
    """

    def init(key, dataset, num_epochs):
        return tuple(
            defense.init(jax.random.fold_in(key, index), dataset, num_epochs)
            for index, defense in enumerate(defenses)
        )

    def on_epoch(state, epoch, train_state, dataset):
        states, metrics, chosen, changed = [], {}, None, False
        for defense, part in zip(defenses, state, strict=True):
            part, dataset, info = defense.on_epoch(part, epoch, train_state, dataset)
            states.append(part)
            metrics |= info.metrics
            chosen = chosen if info.chosen is None else info.chosen
            changed = changed or info.changed
        return tuple(states), dataset, Info(metrics, chosen, changed)

    def finish(state, train_state):
        for defense, part in zip(defenses, state, strict=True):
            train_state = defense.finish(part, train_state)
        return train_state

    return Defense(
        init,
        on_epoch,
        # So that a chain of defenses without a hook has none either: loops ask.
        keep_batch
        if all(d.on_batch is keep_batch for d in defenses)
        else _ChainedBatch(tuple(d.on_batch for d in defenses)),
        keep_result if all(d.finish is keep_result for d in defenses) else finish,
    )


@dataclasses.dataclass(frozen=True)
class _ChainedBatch:
    """The hooks of a chain's parts, one after another; equal for equal hooks, so compiled once."""

    hooks: tuple[BatchFn, ...]

    def __call__(self, state, key, train_state, batch):
        for index, (on_batch, part) in enumerate(zip(self.hooks, state, strict=True)):
            batch = on_batch(part, jax.random.fold_in(key, index), train_state, batch)
        return batch


def checked(defense: Any) -> Defense:
    """Returns `defense`; for the door of a loop.

    Raises:
      TypeError: if it is no `Defense`, or its `init` does not take what a loop gives to it.
    """
    if not isinstance(defense, Defense):
        what = defense.__name__ if callable(defense) else type(defense).__name__
        raise TypeError(
            f"defense is {what}; expected a training.hooks.Defense, such as defenses.recommended("
            "trusted) returns"
        )
    try:
        inspect.signature(defense.init).bind(None, None, 1)
    except TypeError as error:
        raise TypeError(
            f"the defense's init does not fit ({error}); expected init(key, dataset, num_epochs)"
        ) from error
    return defense


def checked_info(info: Any) -> Info:
    """Returns `info`, what an `on_epoch` has returned last.

    Raises:
      TypeError: if it is no `Info`.
    """
    if not isinstance(info, Info):
        raise TypeError(
            f"the defense's on_epoch returned a {type(info).__name__} as info; expected "
            "training.hooks.Info(metrics={...}, chosen=ids or None, changed=True or False)"
        )
    return info


def with_ids(dataset: Dataset) -> Dataset:
    """Returns the set as collected: the id of each example is its row, int32 [N]."""
    return dataset._replace(ids=np.arange(len(dataset.labels), dtype=np.int32))


def select(dataset: Dataset, keep: np.ndarray) -> Dataset:
    """Returns the examples for which `keep`, bool [N], is True, in their order."""
    return dataset if keep.all() else dataset.take(np.flatnonzero(keep))
