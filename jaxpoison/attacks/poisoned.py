"""A poisoned training set, which of its examples is poisoned by what, and its archive.

An archive is one `.npz` without pickled objects:

| entry | type | content |
|---|---|---|
| `images` | float32 [N,H,W,C], or uint8 if saved so | pixels in [0,1], or 0..255 |
| `labels` | int32 [N] | the labels as published with the images |
| `attack_id` | int8 [N] | 0 = clean, k = the k-th of the attack names |
| `config` | text, JSON | `{"attacks": [{"name", "epsilon", ...}], ...}` and what the caller added |
| `target_images` | as `images` [V,H,W,C] | of a targeted attack only: views of the target |
| `target` | int32 [3] | of a targeted attack only: label, base label and id of the target |
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import parallel
from jaxpoison.attacks.untargeted import Attack, Victim
from jaxpoison.data import Dataset, check, to_float

Progress = Callable[[str, int, int], None]


class Target(NamedTuple):
    """What a targeted attack is aimed at.

    Attributes:
      images: uint8 or float32 [V, H, W, C], views of the target.
      label: its true class.
      base_label: the class it is to be taken for, and the label of the poisons.
      target_id: where it stands in the set it was drawn from.
    """

    images: np.ndarray
    label: int
    base_label: int
    target_id: int


class PoisonedDataset(NamedTuple):
    """A training set as an attacker hands it out, with the truth about it.

    Attributes:
      images: float32 [N, H, W, C] in [0, 1] (or uint8, from an archive saved so).
      labels: int32 [N].
      attack_id: int8 [N]; 0 where clean, k where poisoned by `attack_names[k - 1]`.
      config: JSON-able settings that made it; `config["attacks"]` lists the attacks.
      target: what a targeted attack is aimed at; None for an untargeted one.
    """

    images: np.ndarray
    labels: np.ndarray
    attack_id: np.ndarray
    config: dict[str, Any]
    target: Target | None = None

    @property
    def attack_names(self) -> tuple[str, ...]:
        """Names of the attacks, in the order of their ids from 1."""
        return tuple(attack["name"] for attack in self.config["attacks"])

    @property
    def is_poisoned(self) -> np.ndarray:
        """bool [N]; only for reporting: no defence may see it."""
        return self.attack_id > 0

    @property
    def dataset(self) -> Dataset:
        """What the defender receives."""
        return Dataset(self.images, self.labels)


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
            images[rows] = parallel.to_host(
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


def save(path: str | os.PathLike, poisoned: PoisonedDataset, *, as_uint8: bool = False) -> None:
    """Writes an archive; it appears whole or not at all.

    Args:
      path: file to write, `.npz`.
      poisoned: the set.
      as_uint8: round pixels to whole numbers of 255, as an image file would.
    """
    images = to_uint8(poisoned.images) if as_uint8 else np.asarray(poisoned.images)
    target = {}
    if poisoned.target is not None:
        views, *numbers = poisoned.target
        target["target_images"] = to_uint8(views) if as_uint8 else np.asarray(views)
        target["target"] = np.array(numbers, np.int32)
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        np.savez_compressed(
            file,
            images=images,
            labels=np.asarray(poisoned.labels, np.int32),
            attack_id=np.asarray(poisoned.attack_id, np.int8),
            config=np.array(json.dumps(poisoned.config)),
            **target,
        )
    unfinished.replace(path)


def load(path: str | os.PathLike, *, num_classes: int | None = None) -> PoisonedDataset:
    """Reads an archive.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the file is damaged, lacks an entry, or holds bad images or labels.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                entries = {name: archive[name] for name in archive.files}
        except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
            raise ValueError(f"{path} is not a readable archive of poisons: {error}") from error
    missing = {"images", "labels", "attack_id", "config"} - entries.keys()
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: not an archive of poisons")
    try:
        config = json.loads(str(entries["config"]))
        num_attacks = len([attack["name"] for attack in config["attacks"]])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its config is not JSON with a list of attacks and their names"
        ) from error
    attack_id = entries["attack_id"]
    dataset = Dataset(entries["images"], entries["labels"])
    check(dataset, num_classes, str(path))
    if attack_id.shape != dataset.labels.shape or not np.issubdtype(attack_id.dtype, np.integer):
        raise ValueError(
            f"{path}: attack_id is {attack_id.dtype} {attack_id.shape}, "
            f"expected one integer for each of {len(dataset.labels)} images"
        )
    if attack_id.min() < 0 or attack_id.max() > num_attacks:
        raise ValueError(f"{path}: attack_id must be in 0..{num_attacks}")
    return PoisonedDataset(*dataset, attack_id, config, _target(entries, num_classes, str(path)))


def _target(entries, num_classes, path):
    """Returns the target in an archive's entries, None if it has none."""
    if "target" not in entries and "target_images" not in entries:
        return None
    if "target" not in entries or "target_images" not in entries:
        raise ValueError(f"{path} holds only one of target and target_images: both are needed")
    views, numbers = entries["target_images"], entries["target"]
    if numbers.shape != (3,) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"{path}: target is {numbers.dtype} {numbers.shape}, expected the three integers "
            "label, base label and id"
        )
    for label in numbers[:2]:
        labels = np.full(len(views), label, np.int32)
        check(Dataset(views, labels), num_classes, f"{path}: target")
    if views.shape[1:] != entries["images"].shape[1:]:
        raise ValueError(
            f"{path}: the target's images are {views.shape[1:]}, the set's are "
            f"{entries['images'].shape[1:]}"
        )
    return Target(views, *numbers.tolist())


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Returns images in 0..255: float ones times 255 and rounded, uint8 ones as they are."""
    images = np.asarray(images)
    return images if images.dtype == np.uint8 else np.round(images * 255).astype(np.uint8)


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
