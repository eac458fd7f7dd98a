"""Settings of `transfer_filter.py`, and the images and attacks that follow from them."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from common import registry

from jaxpoison import models, runs, training
from jaxpoison.attacks import TargetedAttack
from jaxpoison.core import devices
from jaxpoison.data import Dataset, embedded, readers
from jaxpoison.defenses import HintConfig
from jaxpoison.training import Recipe

NETWORKS = {
    "resnet18": models.resnet18,
    "resnet50": models.resnet50,
    "mobilenet_v2": models.mobilenet_v2,
    "densenet121": models.densenet121,
    "cifar10-48k": models.fast_cnn,
    "narrow": functools.partial(models.resnet18, width=16, blocks=(1, 1, 1)),
    "tiny": functools.partial(models.resnet18, width=8, blocks=(1, 1, 1)),
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """Images of each class, in the order of the official training set."""

    pretraining: int = 4800
    """Of these the extractor learns."""
    train: int = 50
    """The set that the head is trained on, poisons included."""
    trusted: int = 100
    """Known to be clean. The filter sees five of them, HINT all."""
    targets: int = 50
    """Candidates for targets: those that a head trained on clean images gets right."""


@dataclasses.dataclass(frozen=True)
class Crafting:
    """How long poisons are crafted. The victim's head sees no augmentation, nor do they."""

    fc_steps: int = 120
    """Of feature collision."""
    cp_steps: int = 1200
    """Of convex polytope."""
    bp_steps: int = 1200
    """Of bullseye polytope."""
    gm_steps: int = 250
    """Of gradient matching on the head."""
    gm_restarts: int = 8
    """Random starts of gradient matching, of which the best is kept."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run; the same settings in the same folder continue it."""

    run_dir: Path
    """Folder for everything."""
    pretraining: Recipe = dataclasses.field(default_factory=Recipe)
    """How the extractor is trained."""
    data: Literal["embedded", "full"] = "full"
    """The small slice inside the package, or the whole of CIFAR-10 (see --data-dir)."""
    data_dir: str | None = None
    """Folder of tensorflow-datasets, or an .npz; default $TFDS_DATA_DIR."""
    parts: Parts = dataclasses.field(default_factory=Parts)
    """How the training images are divided."""
    test_examples: int | None = None
    """Judge accuracy on the first so many test images; default all."""
    networks: tuple[str, ...] = ("resnet18", "resnet50", "mobilenet_v2", "densenet121")
    """Extractors; each is attacked as a white box. "narrow" and "tiny" are small ResNets;
    "cifar10-48k" is not trained but loaded, `models.load_pretrained`."""
    attacks: tuple[str, ...] = ("fc", "bp", "gm")
    """Feature collision, convex polytope, bullseye polytope, gradient matching."""
    crafting: Crafting = dataclasses.field(default_factory=Crafting)
    """How long poisons are crafted."""
    epsilons_255: tuple[float, ...] = (8.0, 16.0)
    """Budgets: largest changes of a pixel, in units of 1/255."""
    shares: tuple[float, ...] = (0.1, 0.24, 0.5, 0.8)
    """Shares p of the base class that are poisons."""
    num_targets: int = 30
    """Trials of each attack, budget and share: always the same targets."""
    base_class: int | None = 8
    """The class that targets shall be misclassified as (8: ship); none: any class."""
    target_class: int | None = 6
    """What targets are (6: frog); none: any class."""
    min_success: float = 0.6
    """An attack counts where at least this share of its trials succeeds without a defense."""
    trusted_per_class: int = 5
    """Images of each class that the filter may trust."""
    hint: HintConfig = dataclasses.field(default_factory=HintConfig)
    """Settings of HINT; its epochs are those of the head, 60."""
    hint_attacks: tuple[str, ...] = ("fc", "bp")
    """Attacks on which HINT is tried, at the largest budget."""
    hint_share: float = 0.5
    """Share p at which HINT is tried."""
    seed: int = 0
    """Initial weights, trials, noise."""
    checkpoint_every: int = 1
    """Epochs from one checkpoint to the next."""


class Sets(NamedTuple):
    """The images of a run."""

    pretraining: Dataset
    train: Dataset
    trusted: Dataset
    targets: Dataset
    test: Dataset
    source: str


def read(folder: Path) -> Config:
    """Returns the settings of the run in `folder`.

    Raises:
      ValueError: if there is none.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no run: make one with transfer_filter.py first")
    nested = {
        "pretraining": Recipe, "parts": Parts, "crafting": Crafting, "hint": HintConfig
    }  # fmt: skip

    def restored(settings: dict[str, Any]) -> dict[str, Any]:
        return {
            name: nested[name](**restored(value)) if isinstance(value, dict)
            else tuple(value) if isinstance(value, list)
            else value
            for name, value in settings.items()
        }  # fmt: skip

    settings = runs.read_json(path, "write it again with transfer_filter.py in a new folder")
    return Config(**{**restored(settings), "run_dir": folder})


def require_sensible(config: Config) -> None:
    """Raises ValueError for settings that would fail only after work was done."""
    unknown = set(config.networks) - set(NETWORKS)
    if unknown or not config.networks:
        raise ValueError(f"networks must be some of {', '.join(NETWORKS)}, not {config.networks}")
    for name in ("attacks", "epsilons_255", "shares"):
        if not getattr(config, name):
            raise ValueError(f"name at least one of {name}")
    registry.check_names("attacks", config.attacks, registry.TRANSFER)
    for share in config.shares:
        if not 0 < share <= 1 or round(share * config.parts.train) < 1:
            raise ValueError(
                f"a share p must be in (0, 1] and at least one of the {config.parts.train} images "
                f"of a class, not {share}"
            )
    if config.hint_attacks and config.hint_share not in config.shares:
        raise ValueError(f"hint_share must be one of the shares {config.shares}")
    if set(config.hint_attacks) - set(config.attacks):
        raise ValueError(f"hint_attacks must be some of the attacks {config.attacks}")
    if max(config.hint.schedule, default=0) >= training.HEAD.epochs:
        raise ValueError(f"HINT's schedule goes beyond the {training.HEAD.epochs} epochs of a head")
    if not 1 <= config.trusted_per_class <= config.parts.trusted:
        raise ValueError(
            f"trusted_per_class must be between 1 and {config.parts.trusted}, the trusted images "
            f"of a class, not {config.trusted_per_class}"
        )
    devices.check_divisible(config.pretraining.batch_size, devices.data_mesh())
    for attack, epsilon in itertools.product(config.attacks, config.epsilons_255):
        attack_of(config, attack, epsilon)


def load(config: Config) -> Sets:
    """Returns the images, each class divided in the order of the official training set."""
    if config.data == "embedded":
        pool, test = (embedded.read_part("cifar10", part)[0] for part in ("train", "test"))
        source = "embedded slice of CIFAR-10"
    else:
        pool, test, source = readers.read("cifar10", data_dir=config.data_dir)
    sizes = dataclasses.astuple(config.parts)
    members = [np.flatnonzero(pool.labels == label) for label in np.unique(pool.labels)]
    smallest = min(map(len, members))
    if min(sizes) < 1 or sum(sizes) > smallest:
        raise ValueError(
            f"the parts of a class are {config.parts}: each must hold at least one image, and all "
            f"together at most the {smallest} that there are"
        )
    ends = np.cumsum((0, *sizes))
    rows = [
        np.concatenate([mine[first:last] for mine in members])
        for first, last in itertools.pairwise(ends)
    ]
    pretraining, train, trusted, targets = (
        Dataset(pool.images[part], pool.labels[part]) for part in rows
    )
    test = test.take(slice(config.test_examples))
    return Sets(pretraining, train, trusted, targets, test, source)


def attack_of(config: Config, name: str, epsilon_255: float) -> TargetedAttack:
    """Returns an attack with the configured number of steps."""
    return registry.TRANSFER[name].make(epsilon_255 / 255, config.crafting)


def first_of_each_class(dataset: Dataset, number: int) -> Dataset:
    """Returns the first `number` examples of each class."""
    rows = [np.flatnonzero(dataset.labels == label)[:number] for label in np.unique(dataset.labels)]
    return dataset.take(np.concatenate(rows))
