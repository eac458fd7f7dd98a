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
import os
from typing import Any, NamedTuple

import numpy as np

from jaxpoison.core.files import replacing
from jaxpoison.data import Dataset, check
from jaxpoison.data.pixels import to_uint8


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
    with replacing(path) as file:
        np.savez_compressed(
            file,
            images=images,
            labels=np.asarray(poisoned.labels, np.int32),
            attack_id=np.asarray(poisoned.attack_id, np.int8),
            config=np.array(json.dumps(poisoned.config)),
            **target,
        )


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
    return PoisonedDataset(
        dataset.images, dataset.labels, attack_id, config, _target(entries, num_classes, str(path))
    )


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
