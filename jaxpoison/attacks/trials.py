"""Targeted attacks with clean labels: poisons of one class that make a victim misclassify a target.

A trial is one target x^t, the class b that it should be misclassified as, and P examples of class b
that become poisons: |x_j - x_j^b| <= epsilon for each pixel, in [0, 1], labels unchanged. Trials
are drawn before anything is crafted, are crafted many at once, and end as one `PoisonedDataset`
each, already in 8-bit pixels: what is judged is what an archive or an image file holds.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import solvers
from jaxpoison.attacks.archive import PoisonedDataset, Target
from jaxpoison.attacks.base import (
    Progress,
    TargetedAttack,
    Trials,
    Victim,
    check_attack,
    check_key,
    networks_of,
)
from jaxpoison.core.settings import plain
from jaxpoison.data import Dataset, as_dataset, check
from jaxpoison.data.labels import check_range
from jaxpoison.data.pixels import quantize, to_uint8, to_unit


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
      train: the victim's training set, clean; as `data.as_dataset` takes it.
      candidates: images that targets are drawn from, usually the test set.
      num_trials: T, at least one.
      num_poisons: P, poisons of a trial; the share p of a base class of n is P / n.
      base_class: the class that all targets should be misclassified as, or int [len(candidates)],
        one for each candidate; by default one of the classes of `train`, other than the target's
        and with P examples, at random for each trial.
      target_class: true class of all targets; by default any but `base_class`.
      target_ids: indices into `candidates` that may be targets, e.g. those that the victim gets
        right before the attack; by default all.

    Raises:
      TypeError, ValueError: for bad images or labels, or where there are not enough targets or
        bases.
    """
    check_key(key)
    train, candidates = as_dataset(train), as_dataset(candidates, "candidates")
    check(train)
    check(candidates, name="candidates")
    num_trials = _count("num_trials", num_trials)
    num_poisons = _count("num_poisons", num_poisons)
    labels, true = np.asarray(train.labels), np.asarray(candidates.labels)
    wanted = None if base_class is None else _for_each(base_class, len(true))
    pool = _pool(true, wanted, target_class, target_ids)
    if len(pool) < num_trials:
        raise ValueError(
            f"only {len(pool)} candidates may be targets, fewer than the {num_trials} trials: "
            "allow more of them, or ask for fewer trials"
        )
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    ids = rng.permutation(pool)[:num_trials]
    base_labels, rows = [], []
    for target in ids:
        goal = None if wanted is None else int(wanted[target])
        allowed = _possible_bases(labels, num_poisons, int(true[target]), goal)
        base_labels.append(rng.choice(allowed))
        rows.append(rng.permutation(np.flatnonzero(labels == base_labels[-1]))[:num_poisons])
    return Trials(
        targets=np.asarray(candidates.images)[ids][:, None],
        target_labels=true[ids].astype(np.int32),
        target_ids=ids.astype(np.int32),
        base_labels=np.array(base_labels, np.int32),
        rows=np.sort(np.array(rows, np.int32), axis=1),
    )


def _count(name: str, value: Any) -> int:
    """Returns a whole number of at least 1; NumPy's and JAX's integers are taken as well."""
    value = plain(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return operator.index(value)


def _pool(true, wanted, target_class, target_ids):
    """Returns the candidates that may be targets, int [M].

    Args:
      true: int32 [N], the candidates' classes.
      wanted: int [N], what each should be misclassified as, or None.
      target_class: as of `draw_trials`.
      target_ids: as of `draw_trials`.
    """
    pool = np.arange(len(true)) if target_ids is None else np.unique(np.asarray(target_ids))
    if len(pool) and not (
        np.issubdtype(pool.dtype, np.integer) and 0 <= pool[0] <= pool[-1] < len(true)
    ):
        raise ValueError(f"target_ids must be indices in 0..{len(true) - 1}")
    if target_class is not None:
        target_class = _class("target_class", target_class)
        of_class = true == target_class
        if not of_class.any():
            raise ValueError(f"target_class: class {target_class} does not occur in the candidates")
        if wanted is not None and np.all(wanted[of_class] == target_class):
            raise ValueError(
                f"base_class and target_class are both {target_class}: they must differ"
            )
        pool = pool[of_class[pool]]
    return pool if wanted is None else pool[true[pool] != wanted[pool]]


def _class(name, value):
    value = plain(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a class number, got {value!r}")
    return operator.index(value)


def _for_each(base_class: int | np.ndarray, number: int) -> np.ndarray:
    """Returns the class that each candidate should be misclassified as, int [number]."""
    classes = np.asarray(base_class)
    if not np.issubdtype(classes.dtype, np.integer) or classes.shape not in ((), (number,)):
        raise ValueError(
            f"base_class must be a class, or one for each of the {number} candidates; got "
            f"{classes.dtype} {list(classes.shape)}"
        )
    return np.broadcast_to(classes, number)


def _possible_bases(labels, num_poisons, target_class, base_class):
    """Returns the classes that a target's poisons can come from, int [M], M >= 1.

    Args:
      labels: int32 [N], of the training set.
      num_poisons: P.
      target_class: true class of the target.
      base_class: the class that is wanted, or None for any but the target's.
    """
    if base_class is not None:
        found = int(np.sum(labels == base_class))
        if not found:
            raise ValueError(
                f"base_class: class {base_class} does not occur in the training set (its labels "
                f"are {labels.min()} to {labels.max()})"
            )
        if found < num_poisons:
            raise ValueError(
                f"class {base_class} has {found} examples, fewer than the {num_poisons} poisons; "
                "lower num_poisons"
            )
        return np.array([base_class])
    classes, counts = np.unique(labels, return_counts=True)
    others = classes != target_class
    if not others.any():
        raise ValueError(
            f"the training set holds class {target_class} only, that of a target: no other class "
            "can be its base"
        )
    if counts[others].max() < num_poisons:
        raise ValueError(
            f"no class other than {target_class}, that of a target, has {num_poisons} examples; "
            f"the largest has {counts[others].max()}: lower num_poisons"
        )
    return classes[others & (counts >= num_poisons)]


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

    A trial's poisons follow from `key` and the id of its target, whatever is crafted with it.

    Args:
      key: PRNG key.
      train: the victim's training set, clean.
      trials: what to craft, from `draw_trials` or your own.
      attack: how.
      substitutes: networks that the attacker holds, at least one.
      progress: called as `progress(attack name, poisons done, poisons in all)`.

    Returns:
      T sets: images uint8 [N, H, W, C] with the poisons in place of their bases, and the target
      as `.target`. `config["objective"]` holds the first and the last value of what was minimized.

    Raises:
      TypeError: for an attack without a target, or arguments of another kind.
      ValueError: for bad images, labels or trials, a network that does not fit them, or no network.
      DivergedError: if the objective or a poison is not finite.
    """
    check_key(key)
    check_attack(attack, TargetedAttack)
    train = as_dataset(train)
    _check_trials(train, trials, substitutes)
    shipped = to_uint8(train.images)
    bases = to_unit(train.images)[trials.rows]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(trials.target_ids))
    crafted = attack.craft(
        keys,
        substitutes,
        jnp.asarray(bases),
        jnp.asarray(trials.base_labels, jnp.int32),
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
        labels = np.asarray(train.labels)
        sets.append(PoisonedDataset(poisoned, labels, attack_id, config, target))
    return sets


def _check_trials(train: Dataset, trials: Trials, substitutes: Sequence[Victim]) -> None:
    """Raises an error that names what in `trials` cannot be crafted on `train`, if anything."""
    if not isinstance(trials, Trials):
        raise TypeError(
            f"trials are a {type(trials).__name__}; expected attacks.Trials, from draw_trials"
        )
    check(train)
    networks = networks_of(substitutes, np.shape(train.images)[1:])
    known = [network.num_classes for network in networks if network.num_classes is not None]
    num_classes = min(known, default=None)
    check_range(np.asarray(train.labels), num_classes, "training set")
    num_trials = len(trials.rows)
    shape = np.shape(trials.targets)
    if np.ndim(trials.rows) != 2 or 0 in np.shape(trials.rows):
        raise ValueError(f"trials.rows has shape {np.shape(trials.rows)}; expected [T, P]")
    if len(shape) != 5 or shape[0] != num_trials or shape[2:] != np.shape(train.images)[1:]:
        raise ValueError(
            f"trials.targets has shape {shape}; expected [T, V, H, W, C] with T = {num_trials} and "
            f"images of {np.shape(train.images)[1:]} as in the training set"
        )
    for name in ("target_labels", "target_ids", "base_labels", "rows"):
        found = np.asarray(getattr(trials, name))
        if found.dtype.kind not in "iu":
            raise ValueError(f"trials.{name} are {found.dtype}; expected integers")
        if name != "rows" and found.shape != (num_trials,):
            raise ValueError(f"trials.{name} has shape {found.shape}; expected ({num_trials},)")
    check_range(np.asarray(trials.target_ids), None, "trials.target_ids")
    check_range(np.asarray(trials.target_labels), num_classes, "trials.target_labels")
    views = np.asarray(trials.targets).reshape(-1, *shape[2:])
    check(Dataset(views, np.zeros(len(views), np.int32)), name="targets")
    rows = np.asarray(trials.rows)
    if rows.min() < 0 or rows.max() >= len(train.labels):
        raise ValueError(
            f"trials.rows must be rows of the training set, 0..{len(train.labels) - 1}"
        )
    for trial in range(num_trials):
        _check_trial(trial, trials, np.asarray(train.labels))


def _check_trial(number, trials, labels):
    """Raises a ValueError unless the poisons of a trial come from its base class."""
    rows = np.asarray(trials.rows)[number]
    if len(np.unique(rows)) < len(rows):
        raise ValueError(f"trial {number}: a row of the training set is named twice")
    base = trials.base_labels[number]
    found = np.unique(labels[rows])
    if list(found) != [base]:
        raise ValueError(
            f"trial {number}: its poisons have labels {found.tolist()}, its base class is "
            f"{base}; clean-label poisons come from the base class"
        )
    if base == trials.target_labels[number]:
        raise ValueError(f"trial {number}: the target is of the base class {base} already")
