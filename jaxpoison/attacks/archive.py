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
| `trigger` | text, JSON | of a backdoor only: `{"kind", "target_class"}` |
| `trigger_field` | float32 [H,W,k] | of a backdoor only: see `triggers.Trigger` |
"""

import json
import os
from typing import Any, NamedTuple

import numpy as np

from jaxpoison.attacks.triggers import Trigger, check_trigger
from jaxpoison.core.files import read_npz, replacing
from jaxpoison.core.settings import plain
from jaxpoison.data import Dataset, as_dataset, check
from jaxpoison.data.labels import check_range
from jaxpoison.data.pixels import check_finite, to_uint8

WHAT = "an archive of poisons"
REQUIRED = ("images", "labels", "attack_id", "config")
OF_TARGETS = ("target_images", "target")
OF_TRIGGERS = ("trigger", "trigger_field")


class Target(NamedTuple):
    """What a targeted attack is aimed at.

    Attributes:
      images: uint8 or float32 [V, H, W, C], views of the target.
      label: its true class.
      base_label: the class it should be misclassified as, and the label of the poisons.
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
      trigger: what opens a backdoor; None where there is none.
    """

    images: np.ndarray
    labels: np.ndarray
    attack_id: np.ndarray
    config: dict[str, Any]
    target: Target | None = None
    trigger: Trigger | None = None

    @property
    def attack_names(self) -> tuple[str, ...]:
        """Names of the attacks, in the order of their ids from 1."""
        return tuple(attack["name"] for attack in self.config["attacks"])

    @property
    def is_poisoned(self) -> np.ndarray:
        """bool [N]; only for reporting: no defense may see it."""
        return self.attack_id > 0

    @property
    def dataset(self) -> Dataset:
        """What the defender receives."""
        return Dataset(self.images, self.labels)


def save(path: str | os.PathLike, poisoned: PoisonedDataset, *, as_uint8: bool = False) -> None:
    """Writes an archive; it appears whole or not at all.

    Args:
      path: file to write, `.npz`; `~` stands for the home folder.
      poisoned: the set.
      as_uint8: round pixels to whole numbers of 255, as an image file would.

    Raises:
      TypeError: for anything but a `PoisonedDataset`, or settings that JSON cannot hold.
      ValueError: for images, labels, ids, a target or trigger that `load` would refuse.
      OSError: if the file cannot be written.
    """
    if not isinstance(poisoned, PoisonedDataset):
        raise TypeError(
            f"save takes an attacks.PoisonedDataset, not a {type(poisoned).__name__}: mixture and "
            "poison return them"
        )
    dataset = as_dataset(poisoned.dataset, "poisoned set")
    entries = {
        "images": np.asarray(dataset.images),
        "labels": np.asarray(dataset.labels),
        "attack_id": np.asarray(poisoned.attack_id),
        "config": _as_json(poisoned.config),
    }
    if poisoned.target is not None:
        entries |= _target_entries(poisoned.target)
    if poisoned.trigger is not None:
        entries |= _trigger_entries(poisoned.trigger)
    checked = _checked(entries, None, "poisoned set")
    for name in ("images", "target_images") if as_uint8 else ():
        if name in entries:
            entries[name] = to_uint8(entries[name])
    entries["attack_id"] = checked.attack_id.astype(np.int8)
    with replacing(path) as file:
        np.savez_compressed(file, **entries)  # pyright: ignore[reportArgumentType]


def load(path: str | os.PathLike, *, num_classes: int | None = None) -> PoisonedDataset:
    """Reads an archive.

    Args:
      path: the file; `~` stands for the home folder.
      num_classes: labels must lie in [0, num_classes); None asks only that none is negative.

    Raises:
      FileNotFoundError, IsADirectoryError: if there is no file.
      ValueError: if the file is damaged, lacks an entry, or holds bad images or labels.
    """
    entries = read_npz(path, WHAT, required=REQUIRED, optional=OF_TARGETS + OF_TRIGGERS)
    return _checked(entries, num_classes, str(path))


def _checked(entries, num_classes, name) -> PoisonedDataset:
    """Returns what the entries of an archive hold; raises a ValueError that begins with `name`."""
    config = _config(str(entries["config"]), name)
    num_attacks = len(config["attacks"])
    dataset = Dataset(entries["images"], entries["labels"])
    check(dataset, num_classes, name)
    attack_id = entries["attack_id"]
    if attack_id.shape != dataset.labels.shape or attack_id.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: attack_id is {attack_id.dtype} {attack_id.shape}, "
            f"expected one integer for each of {len(dataset.labels)} images"
        )
    most = min(num_attacks, np.iinfo(np.int8).max)
    if attack_id.min() < 0 or attack_id.max() > most:
        raise ValueError(
            f"{name}: attack_id must be in 0..{most}, found {attack_id.min()}..{attack_id.max()}"
        )
    target = _target(entries, num_classes, name)
    trigger = _trigger(entries, num_classes, name)
    return PoisonedDataset(dataset.images, dataset.labels, attack_id, config, target, trigger)


def _config(text, name):
    """Returns the settings in a JSON text, which list attacks by their names."""
    try:
        config = json.loads(text)
        names = [attack["name"] for attack in config["attacks"]]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{name}: its config is not JSON with a list of attacks and their names"
        ) from error
    if not all(isinstance(attack, str) for attack in names):
        raise ValueError(f"{name}: its config holds attacks whose names are no text: {names}")
    return config


def _as_json(config) -> np.ndarray:
    """Returns settings as JSON text; scalars of NumPy and JAX become numbers."""

    def number(value):
        known = plain(value)
        if known is value:
            raise TypeError(
                f"config holds a {type(value).__name__}, which JSON cannot: make it numbers, text, "
                "lists or dicts"
            )
        return known

    return np.array(json.dumps(config, default=number))


def _target_entries(target) -> dict[str, np.ndarray]:
    """Returns the entries of a target; numbers keep their width, for `_target` to look at."""
    views = as_dataset(Dataset(target.images, np.zeros(len(target.images), np.int32)), "target")
    numbers = [plain(number) for number in target[1:]]
    if not all(isinstance(number, int) and abs(number) < 2**31 for number in numbers):
        raise ValueError(
            f"target: label, base label and id are {numbers}; expected whole numbers below 2^31"
        )
    return {"target_images": np.asarray(views.images), "target": np.array(numbers, np.int32)}


def _target(entries, num_classes, name) -> Target | None:
    """Returns the target in an archive's entries, None if it has none."""
    if not any(entry in entries for entry in OF_TARGETS):
        return None
    if not all(entry in entries for entry in OF_TARGETS):
        raise ValueError(f"{name} holds only one of target and target_images: both are needed")
    views, numbers = entries["target_images"], entries["target"]
    if numbers.shape != (3,) or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: target is {numbers.dtype} {numbers.shape}, expected the three integers "
            "label, base label and id"
        )
    # Before any cast: 2^32 + 3 would become class 3.
    check_range(numbers[:2], num_classes, f"{name}: target")
    check_range(numbers[2:], None, f"{name}: id of the target")
    check(Dataset(views, np.zeros(len(views), np.int32)), name=f"{name}: target")
    if views.shape[1:] != entries["images"].shape[1:]:
        raise ValueError(
            f"{name}: the target's images are {views.shape[1:]}, the set's are "
            f"{entries['images'].shape[1:]}"
        )
    return Target(views, *numbers.tolist())


def _trigger_entries(trigger) -> dict[str, np.ndarray]:
    """Returns the entries of a trigger."""
    about = {"kind": trigger.kind, "target_class": trigger.target_class}
    return {"trigger": _as_json(about), "trigger_field": np.asarray(trigger.field)}


def _trigger(entries, num_classes, name) -> Trigger | None:
    """Returns the trigger in an archive's entries, None if it has none."""
    if not any(entry in entries for entry in OF_TRIGGERS):
        return None
    if not all(entry in entries for entry in OF_TRIGGERS):
        raise ValueError(f"{name} holds only one of trigger and trigger_field: both are needed")
    try:
        about = json.loads(str(entries["trigger"]))
        kind, target_class = about["kind"], about["target_class"]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{name}: its trigger is not JSON with kind and target class") from error
    if isinstance(target_class, bool) or not isinstance(target_class, int):
        raise ValueError(f"{name}: the trigger's target class is {target_class!r}, no class number")
    check_range(np.array([target_class]), num_classes, f"{name}: target class of the trigger")
    field = entries["trigger_field"]
    trigger = Trigger(kind, field, target_class)
    check_trigger(trigger, entries["images"].shape[1:], f"{name}: trigger")
    check_finite(field[None], f"{name}: field of the trigger")
    if kind == "overlay" and not (field.min() >= 0 and field.max() <= 1):
        raise ValueError(f"{name}: an overlay's pixels and opacity must lie in [0, 1]")
    return trigger
