"""A training set of which several untargeted attacks poison disjoint parts."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.attacks.archive import PoisonedDataset
from jaxpoison.attacks.base import Attack, Progress, Victim
from jaxpoison.core import devices
from jaxpoison.data import Dataset, check, to_float


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
      clean: N examples.
      poison_ratio: p in [0, 1]; round(p N) examples are poisoned.
      attacks: at least one if p > 0.
      victim: network trained on clean data, against which the attacks are crafted.
      progress: called as `progress(attack name, images done, images in all)`.

    Raises:
      ValueError: for p outside [0, 1], no attacks, or bad images or labels.
    """
    check(clean, victim.model.num_classes)
    if not 0 <= poison_ratio <= 1:
        raise ValueError(f"the poison ratio p must be in [0, 1], not {poison_ratio}")
    if poison_ratio > 0 and not attacks:
        raise ValueError("a poison ratio above 0 needs at least one attack")
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
                    jnp.asarray(clean.labels[rows]),
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
    return PoisonedDataset(images, np.asarray(clean.labels, np.int32), attack_id, config)


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
