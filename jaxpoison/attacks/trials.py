"""Targeted attacks with clean labels: poisons of one class that have a target taken for it.

A trial is one target x^t, the class b that it is to be taken for, and P examples of class b that
become poisons: |x_j - x_j^b| <= epsilon for each pixel, in [0, 1], labels unchanged. Trials are
drawn before anything is crafted, are crafted many at once, and end as one `PoisonedDataset` each,
already in 8-bit pixels: what is judged is what an archive or an image file holds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import solvers
from jaxpoison.attacks.archive import PoisonedDataset, Target
from jaxpoison.attacks.base import Progress, TargetedAttack, Victim
from jaxpoison.data import Dataset, check
from jaxpoison.data.pixels import quantize, to_uint8, to_unit


class Trials(NamedTuple):
    """T trials of a targeted attack.

    Attributes:
      targets: uint8 or float32 [T, V, H, W, C]: V views of each target, usually one.
      target_labels: int32 [T], the true classes of the targets.
      target_ids: int32 [T], where the targets stand in the set they were drawn from.
      base_labels: int32 [T], the classes that the targets are to be taken for.
      rows: int32 [T, P], the rows of the training set that become poisons, of class `base_labels`.
    """

    targets: np.ndarray
    target_labels: np.ndarray
    target_ids: np.ndarray
    base_labels: np.ndarray
    rows: np.ndarray


def draw_trials(
    key: jax.Array,
    train: Dataset,
    candidates: Dataset,
    *,
    num_trials: int,
    num_poisons: int,
    base_class: int | np.ndarray | None = None,
    target_class: int | None = None,
    target_ids: Sequence[int] | np.ndarray | None = None,
) -> Trials:
    """Returns trials with distinct targets, and poisons drawn at random from the base class.

    The set-up of Aghakhani et al. (arXiv 2005.00191) and of the filter's paper (arXiv 2403.13523)
    is base class 8 (ship), target class 6 (frog).

    Args:
      key: PRNG key.
      train: the victim's training set, clean.
      candidates: images that targets are drawn from, usually the test set.
      num_trials: T, at least one.
      num_poisons: P, poisons of a trial; the share p of a base class of n is P / n.
      base_class: the class that all targets are to be taken for, or int [len(candidates)], one for
        each candidate; by default one of the classes of `train`, other than the target's and with P
        examples, at random for each trial.
      target_class: true class of all targets; by default any but `base_class`.
      target_ids: indices into `candidates` that may be targets, e.g. those that the victim gets
        right before the attack; by default all.

    Raises:
      ValueError: for bad images or labels, or where there are not enough targets or bases.
    """
    check(train)
    check(candidates, name="candidates")
    _check_positive("num_trials", num_trials)
    _check_positive("num_poisons", num_poisons)
    if base_class is not None and np.ndim(base_class) == 0 and base_class == target_class:
        raise ValueError(f"base_class and target_class are both {base_class}: they must differ")
    labels, true = np.asarray(train.labels), np.asarray(candidates.labels)
    wanted = None if base_class is None else _for_each(base_class, len(true))
    pool = np.arange(len(true)) if target_ids is None else np.unique(np.asarray(target_ids))
    if len(pool) and not (
        np.issubdtype(pool.dtype, np.integer) and 0 <= pool[0] <= pool[-1] < len(true)
    ):
        raise ValueError(f"target_ids must be indices in 0..{len(true) - 1}")
    if target_class is not None:
        pool = pool[true[pool] == target_class]
    if wanted is not None:
        pool = pool[true[pool] != wanted[pool]]
    if len(pool) < num_trials:
        raise ValueError(
            f"only {len(pool)} candidates may be targets, fewer than the {num_trials} trials: "
            "allow more of them, or ask for fewer trials"
        )
    classes, counts = np.unique(labels, return_counts=True)
    bases = classes[counts >= num_poisons]
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    ids = rng.permutation(pool)[:num_trials]
    base_labels, rows = [], []
    for target in ids:
        allowed = bases[bases != true[target] if wanted is None else bases == wanted[target]]
        if not len(allowed):
            raise ValueError(
                f"{'no class' if wanted is None else f'class {wanted[target]}'} has the "
                f"{num_poisons} examples that shall become poisons (targets of class "
                f"{true[target]}); ask for fewer poisons"
            )
        base_labels.append(rng.choice(allowed))
        rows.append(rng.permutation(np.flatnonzero(labels == base_labels[-1]))[:num_poisons])
    return Trials(
        targets=np.asarray(candidates.images)[ids][:, None],
        target_labels=true[ids].astype(np.int32),
        target_ids=ids.astype(np.int32),
        base_labels=np.array(base_labels, np.int32),
        rows=np.sort(np.array(rows, np.int32), axis=1),
    )


def _for_each(base_class: int | np.ndarray, number: int) -> np.ndarray:
    """Returns the class that each candidate is to be taken for, int [number]."""
    classes = np.asarray(base_class)
    if not np.issubdtype(classes.dtype, np.integer) or classes.shape not in ((), (number,)):
        raise ValueError(
            f"base_class must be a class, or one for each of the {number} candidates; got "
            f"{classes.dtype} {list(classes.shape)}"
        )
    return np.broadcast_to(classes, number)


def poison(
    key: jax.Array,
    train: Dataset,
    trials: Trials,
    attack: TargetedAttack,
    substitutes: Sequence[Victim],
    *,
    progress: Progress | None = None,
) -> list[PoisonedDataset]:
    """Returns the poisoned training set of each trial, in 8-bit pixels.

    A trial's poisons follow from `key` and the id of its target, whatever is crafted beside it.

    Args:
      key: PRNG key.
      train: the victim's training set, clean.
      trials: what to craft, from `draw_trials` or your own.
      attack: how.
      substitutes: networks that the attacker holds, at least one.
      progress: called as `progress(attack name, poisons done, poisons in all)`.

    Returns:
      T sets: images uint8 [N, H, W, C] with the poisons in place of their bases, and the target
      as `.target`. `config["objective"]` holds the first and the last value of what was minimised.

    Raises:
      ValueError: for bad images, labels or trials, a network that does not fit them, or no network.
      DivergedError: if the objective or a poison is not finite.
    """
    _check_trials(train, trials, substitutes)
    shipped = to_uint8(train.images)
    bases = to_unit(train.images)[trials.rows]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(trials.target_ids))
    crafted = attack.craft(
        keys,
        substitutes,
        jnp.asarray(bases),
        jnp.asarray(trials.base_labels),
        jnp.asarray(to_unit(trials.targets)),
        None if progress is None else lambda done, total: progress(attack.name, done, total),
    )
    images, objective = np.asarray(crafted.images), np.asarray(crafted.objective)
    sums = images.sum(axis=(1, 2, 3, 4)) + objective.sum(axis=0)
    bad = np.flatnonzero(~np.isfinite(sums))
    if len(bad):
        raise solvers.DivergedError(
            f"{attack.name} diverged in {len(bad)} of {len(sums)} trials, the first is trial "
            f"{bad[0]}: try a smaller step or learning rate"
        )
    exported = quantize(images, bases, attack.epsilon)
    settings = {"name": attack.name, "epsilon": attack.epsilon, **attack.settings}
    sets = []
    for trial, rows in enumerate(trials.rows):
        poisoned = shipped.copy()
        poisoned[rows] = exported[trial]
        attack_id = np.zeros(len(poisoned), np.int8)
        attack_id[rows] = 1
        target = Target(
            images=to_uint8(trials.targets[trial]),
            label=int(trials.target_labels[trial]),
            base_label=int(trials.base_labels[trial]),
            target_id=int(trials.target_ids[trial]),
        )
        config = {
            "attacks": [settings],
            "num_substitutes": len(substitutes),
            "objective": [float(objective[0, trial]), float(objective[-1, trial])],
        }
        labels = np.asarray(train.labels, np.int32)
        sets.append(PoisonedDataset(poisoned, labels, attack_id, config, target))
    return sets


def _check_trials(train: Dataset, trials: Trials, substitutes: Sequence[Victim]) -> None:
    """Raises a ValueError that says why `trials` cannot be crafted on `train`, if they cannot."""
    if not substitutes:
        raise ValueError("crafting needs at least one substitute network")
    num_classes = min(substitute.model.num_classes for substitute in substitutes)
    check(train, num_classes)
    num_trials = len(trials.rows)
    shape = np.shape(trials.targets)
    if np.ndim(trials.rows) != 2 or 0 in np.shape(trials.rows):
        raise ValueError(f"trials.rows has shape {np.shape(trials.rows)}; expected [T, P]")
    if len(shape) != 5 or shape[0] != num_trials or shape[2:] != np.shape(train.images)[1:]:
        raise ValueError(
            f"trials.targets has shape {shape}; expected [T, V, H, W, C] with T = {num_trials} and "
            f"images of {np.shape(train.images)[1:]} as in the training set"
        )
    for name in ("target_labels", "target_ids", "base_labels"):
        found = np.shape(getattr(trials, name))
        if found != (num_trials,):
            raise ValueError(f"trials.{name} has shape {found}; expected ({num_trials},)")
    views = np.asarray(trials.targets).reshape(-1, *shape[2:])
    check(
        Dataset(views, np.repeat(np.asarray(trials.target_labels), shape[1])),
        num_classes,
        "targets",
    )
    rows = np.asarray(trials.rows)
    if rows.min() < 0 or rows.max() >= len(train.labels):
        raise ValueError(
            f"trials.rows must be rows of the training set, 0..{len(train.labels) - 1}"
        )
    for trial in range(num_trials):
        if len(np.unique(rows[trial])) < rows.shape[1]:
            raise ValueError(f"trial {trial}: a row of the training set is named twice")
        base = trials.base_labels[trial]
        found = np.unique(np.asarray(train.labels)[rows[trial]])
        if list(found) != [base]:
            raise ValueError(
                f"trial {trial}: its poisons have labels {found.tolist()}, its base class is "
                f"{base}; clean-label poisons come from the base class"
            )
        if base == trials.target_labels[trial]:
            raise ValueError(f"trial {trial}: the target is of the base class {base} already")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
