"""The archive of an attack's trials: poisons alone, since all trials share the clean images."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxpoison.attacks import PoisonedDataset, Target, Trials
from jaxpoison.core.files import replacing
from jaxpoison.data import Dataset


def save(path: Path, poisoned: list[PoisonedDataset], trials: Trials) -> None:
    """Writes images uint8 [T, P, H, W, C], their rows and targets; whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(
            file,
            images=np.stack([one.images[one.is_poisoned] for one in poisoned]),
            config=np.array(json.dumps([one.config for one in poisoned])),
            **trials._asdict(),
        )


def load(path: Path, train: Dataset, trials: Trials) -> list[PoisonedDataset]:
    """Returns the training sets of `trials` from an archive.

    Raises:
      ValueError: if the archive is damaged or of other trials.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            entries = {name: archive[name] for name in archive.files}
        images, configs = entries["images"], json.loads(str(entries["config"]))
    except Exception as error:  # zipfile, zlib, json and numpy raise many kinds
        raise ValueError(f"{path} is not readable ({error!r}): delete it to craft again") from error
    for name, array in trials._asdict().items():
        if name not in entries or not np.array_equal(array, entries[name]):
            raise ValueError(f"{path} holds other trials ({name} differ): delete it to craft again")
    return restored(train, trials, images, configs)


def restored(
    train: Dataset, trials: Trials, images: np.ndarray, configs: list[dict[str, Any]]
) -> list[PoisonedDataset]:
    """Returns one training set for each trial, with `images` at its rows.

    Args:
      train: N clean images.
      trials: T of them, with P rows each.
      images: uint8 [T, P, H, W, C].
      configs: how each trial was crafted; one without attacks is clean.
    """
    sets = []
    for trial, (rows, config) in enumerate(zip(trials.rows, configs, strict=True)):
        poisoned, attack_id = np.array(train.images), np.zeros(len(train.labels), np.int8)
        poisoned[rows] = images[trial]
        attack_id[rows] = len(config["attacks"])
        numbers = (trials.target_labels, trials.base_labels, trials.target_ids)
        target = Target(trials.targets[trial], *(int(array[trial]) for array in numbers))
        sets.append(PoisonedDataset(poisoned, train.labels, attack_id, config, target))
    return sets


def clean(train: Dataset, trials: Trials) -> list[PoisonedDataset]:
    """Returns the clean training set, once for the target of each trial."""
    images = train.images[trials.rows]
    return restored(train, trials, images, [{"attacks": []}] * len(images))
