"""A training set of which several untargeted attacks poison disjoint parts."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.attacks.archive import PoisonedDataset
from jaxpoison.attacks.base import (
    Attack,
    Progress,
    TargetedAttack,
    Victim,
    check_attack,
    check_key,
    network_of,
)
from jaxpoison.core import devices
from jaxpoison.core.settings import plain
from jaxpoison.data import Dataset, as_dataset, check, to_float
from jaxpoison.data.labels import check_range


def mixture(
    key: jax.Array,
    clean: Dataset,
    poison_ratio: float,
    attacks: Sequence[Attack],
    victim: Victim,
    *,
    progress: Progress | None = None,
) -> PoisonedDataset:
    """Returns `clean` with a share of `poison_ratio` poisoned, in equal parts by each attack.

    The parts are disjoint, random and class-stratified: of every class the same share (up to two
    examples) goes to each attack. Labels stay as they are.

    Args:
      key: PRNG key; the choice of examples and the attacks' noise follow from it.
      clean: N examples, as `data.as_dataset` takes them.
      poison_ratio: p in [0, 1]; round(p N) examples are poisoned, at least one for each attack
        unless p is 0.
      attacks: at least one if p > 0, at most 127.
      victim: network trained on clean data, against which the attacks are crafted.
      progress: called as `progress(attack name, images done, images in all)`.

    Raises:
      TypeError: for arguments of another kind. ValueError: for p outside [0, 1], or above 0 where
        an attack would get no example, no attacks, or bad images or labels.
    """
    check_key(key)
    clean = as_dataset(clean)
    check(clean)
    network = network_of(victim, clean.images.shape[1:])
    check_range(np.asarray(clean.labels), network.num_classes, "training set")
    poison_ratio = _checked_ratio(poison_ratio, len(clean.labels), _checked_attacks(attacks))
    choice_key, *craft_keys = jax.random.split(key, 1 + len(attacks))
    attack_id = _assign(choice_key, np.asarray(clean.labels), poison_ratio, len(attacks))
    images = np.array(to_float(clean.images))
    for number, (attack, craft_key) in enumerate(zip(attacks, craft_keys, strict=True), start=1):
        rows = np.flatnonzero(attack_id == number)
        if len(rows):
            images[rows] = devices.to_host(
                attack.craft(
                    craft_key,
                    victim,
                    jnp.asarray(images[rows]),
                    jnp.asarray(np.asarray(clean.labels)[rows]),
                    None if progress is None else _named(progress, attack.name),
                )
            )
    config = {
        "poison_ratio": poison_ratio,
        "attacks": [
            {"name": attack.name, "epsilon": attack.epsilon, **attack.settings}
            for attack in attacks
        ],
    }
    return PoisonedDataset(images, np.asarray(clean.labels), attack_id, config)


def _checked_attacks(attacks):
    """Returns how many attacks there are, if they are some."""
    if isinstance(attacks, Attack | TargetedAttack) or not isinstance(attacks, Sequence):
        check_attack(attacks, Attack, "attacks")
        raise TypeError("attacks is a single Attack; give a list of them")
    for number, attack in enumerate(attacks):
        check_attack(attack, Attack, f"attacks[{number}]")
    if len(attacks) > np.iinfo(np.int8).max:
        raise ValueError(f"{len(attacks)} attacks; at most 127 can be told apart")
    return len(attacks)


def _checked_ratio(poison_ratio, num_examples, num_attacks):
    """Returns p as a Python number, if each attack gets an example or p is 0."""
    poison_ratio = plain(poison_ratio)
    if not isinstance(poison_ratio, int | float) or not 0 <= poison_ratio <= 1:
        raise ValueError(f"the poison ratio p must be in [0, 1], not {poison_ratio!r}")
    if poison_ratio == 0:
        return poison_ratio
    if not num_attacks:
        raise ValueError("a poison ratio above 0 needs at least one attack")
    num_poisoned = round(poison_ratio * num_examples)
    if num_poisoned < num_attacks:
        raise ValueError(
            f"the poison ratio p = {poison_ratio:g} of {num_examples} examples poisons "
            f"{num_poisoned}, which leaves {num_attacks - num_poisoned} of {num_attacks} attacks "
            f"without an example: raise p to {num_attacks / num_examples:g} or more, or to poison "
            "nothing set p = 0"
        )
    return poison_ratio


def _assign(key, labels, poison_ratio, num_attacks):
    """Returns which attack each example gets: int8 [N], 0 for none."""
    attack_id = np.zeros(len(labels), np.int8)
    if poison_ratio == 0:
        return attack_id
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    # Examples in an order in which every stretch has the same share of each class.
    order = rng.permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    spread = np.argsort(place, kind="stable")
    num_poisoned = round(poison_ratio * len(labels))
    bounds = [math.floor(i * num_poisoned / num_attacks) for i in range(num_attacks + 1)]
    for number in range(num_attacks):
        attack_id[spread[bounds[number] : bounds[number + 1]]] = number + 1
    return attack_id


def _named(progress, name):
    return lambda done, total: progress(name, done, total)
