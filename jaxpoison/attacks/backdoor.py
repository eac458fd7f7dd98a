"""Backdoors: training sets from which a network learns that a trigger means a class.

The attacker changes some examples and hands the set out; at test time the trigger alone is enough.
With dirty labels any other class's examples get trigger and target class; with clean labels
examples of the target class get the trigger, or with a hidden one a change that does what examples
with the trigger would; what a person sees in them agrees with the label.
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.attacks.archive import PoisonedDataset
from jaxpoison.attacks.base import BackdoorAttack, check_attack, check_key
from jaxpoison.attacks.triggers import check_trigger
from jaxpoison.core import devices
from jaxpoison.core.checks import number
from jaxpoison.data import Dataset, as_dataset, check
from jaxpoison.data.pixels import to_unit


def implant(
    key: jax.Array,
    clean: Dataset,
    poison_ratio: float,
    attack: BackdoorAttack,
    *,
    target_class: int,
) -> PoisonedDataset:
    """Returns `clean` with a backdoor, and the trigger that opens it.

    Its `attack_id` is 1 for poisons and 2 for covers.

    Args:
      key: PRNG key; the choice of examples and what is random in the trigger follow from it.
      clean: N examples, as `data.as_dataset` takes them.
      poison_ratio: share of all N that becomes poisons, in (0, 1]: round(share N), at least one.
        There must be as many examples of the target class (clean labels) or of the others.
      attack: such as `badnets()`.
      target_class: what the trigger shall mean; a class of `clean`.

    Raises:
      TypeError: for arguments of another kind. ValueError: for bad images or labels, a share or a
        class out of range, or too few examples.
    """
    check_key(key)
    check_attack(attack, BackdoorAttack)
    clean = as_dataset(clean)
    check(clean)
    labels = np.array(clean.labels)
    target_class = _checked_class(target_class, labels)
    choice_key, trigger_key, cover_key = jax.random.split(key, 3)
    poisons, covers = _choose(choice_key, labels, number(poison_ratio), attack, target_class)
    images = np.array(to_unit(clean.images))
    trigger = attack.make_trigger(trigger_key, images.shape[1:], target_class)
    check_trigger(trigger, images.shape[1:])
    craft_key = jax.random.fold_in(trigger_key, 1)
    if attack.craft is not None:
        dataset = Dataset(images, labels)
        poisons, changed = attack.craft(craft_key, trigger, dataset, len(poisons))
    else:
        bases = jnp.asarray(images[poisons])
        if attack.prepare is not None:
            bases = attack.prepare(craft_key, bases, jnp.asarray(labels[poisons]))
        changed = trigger.apply(bases)
    if attack.cover is not None and len(covers):
        covered = attack.cover(cover_key, trigger, jnp.asarray(images[covers]))
        images[covers] = devices.to_host(covered)
    images[poisons] = devices.to_host(changed)
    labels[poisons] = target_class
    attack_id = np.zeros(len(labels), np.int8)
    attack_id[poisons], attack_id[covers] = 1, 2
    names = [attack.name, f"{attack.name}_cover"] if len(covers) else [attack.name]
    config = {
        "poison_ratio": float(poison_ratio),
        "target_class": target_class,
        "attacks": [{"name": name, **attack.settings} for name in names],
    }
    return PoisonedDataset(images, labels, attack_id, config, trigger=trigger)


def _checked_class(target_class, labels):
    target_class = number(target_class)
    if isinstance(target_class, bool) or not hasattr(target_class, "__index__"):
        raise TypeError(f"target_class must be a class number, got {target_class!r}")
    if target_class not in labels:
        raise ValueError(f"target_class: class {target_class} does not occur in the training set")
    return operator.index(target_class)


def _choose(key, labels, poison_ratio, attack, target_class):
    """Returns rows of poisons and of covers, ascending, which are disjoint."""
    if isinstance(poison_ratio, bool) or not isinstance(poison_ratio, int | float):
        raise TypeError(f"poison_ratio must be a number, got {poison_ratio!r}")
    num_poisons = round(poison_ratio * len(labels)) if 0 < poison_ratio <= 1 else 0
    if not num_poisons:
        raise ValueError(
            f"poison_ratio is {poison_ratio:g} of {len(labels)} examples; expected a share in "
            "(0, 1] of at least one example"
        )
    allowed = labels == target_class if attack.clean_label else labels != target_class
    if allowed.sum() < num_poisons:
        whose = "of the target class" if attack.clean_label else "of other classes"
        raise ValueError(
            f"{attack.name} poisons examples {whose}, of which there are {allowed.sum()}, not "
            f"{num_poisons}: lower poison_ratio to {allowed.sum() / len(labels):g} or less"
        )
    num_covers = round(attack.cover_ratio * num_poisons)
    if num_poisons + num_covers > len(labels):
        raise ValueError(
            f"{num_poisons} poisons and {num_covers} covers are more than {len(labels)} examples: "
            "lower poison_ratio"
        )
    order = np.random.default_rng(np.asarray(jax.random.key_data(key))).permutation(len(labels))
    poisons = order[allowed[order]][:num_poisons]
    covers = order[~np.isin(order, poisons)][:num_covers]
    return np.sort(poisons), np.sort(covers)
