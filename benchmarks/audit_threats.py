"""Faults as published, planted into real images: what `audit_quality.py` looks for.

They are not the audit's own canaries: the attacks are those of `jaxpoison.attacks` against networks
that the audit never sees, and backdoors have other triggers, places and strengths.

    flips       labels changed at random
    aggregate   labels that people gave (CIFAR-10N, arXiv 2110.12088): the majority of three
    random1     the same: the first of three
    patch       BadNets (arXiv 1708.06733): a white square of 4x4 in a corner, relabeled to class 0
    patches     two of them: the second magenta, in another corner, relabeled to class 5; half each
    blend       a fixed noise pattern at 20% (arXiv 1712.05526), relabeled to class 0
    sig         a sinusoid of 20/255 on images of class 0, whose labels stay (arXiv 1902.11237)
    collision   feature collision (arXiv 1804.00792) at 16/255 in a frozen extractor
    bullseye    bullseye polytope (arXiv 2005.00191) at 16/255 in a frozen extractor
    matching    gradient matching (arXiv 2009.02276) at 16/255, against training from scratch
    pgd, dap    untargeted, clean labels, at the data set's usual budget
    dc          DeepConfuse (arXiv 1905.09027), the same
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import attacks, models, training
from jaxpoison.data import Dataset, to_float
from jaxpoison.data.pixels import to_uint8

TARGET = 0
"""The class of backdoors."""
SECOND_TARGET = 5
"""The class of the second of two backdoors."""
POISONS = 50
"""Poisons that aim at one target, at most."""
BUDGETS = {"cifar10": 8 / 255, "mnist": 0.3}
"""Of untargeted attacks."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Images to plant faults into, and the networks of whoever does.

    Attributes:
      dataset: "cifar10" or "mnist".
      images: uint8 [N, H, W, C].
      labels: int32 [N].
      candidates: images that targeted attacks take their targets from.
      people: {name: labels that people gave, int [N]}.
      seed: of all that is drawn.
    """

    dataset: str
    images: np.ndarray
    labels: np.ndarray
    candidates: Dataset
    people: dict[str, np.ndarray]
    seed: int

    @property
    def random(self) -> np.random.Generator:
        """A generator that starts again for each threat."""
        return np.random.default_rng([self.seed, 17])

    @functools.cached_property
    def victim(self) -> tuple[Any, Any]:
        """A network trained on clean images: the extractor, and what untargeted attacks ascend."""
        if self.dataset == "cifar10":
            return models.load_pretrained("cifar10-48k")
        model = models.mnist_cnn()
        recipe = dataclasses.replace(training.MNIST_FAST, epochs=3)
        clean = Dataset(self.images, self.labels)
        state = training.fit(model, recipe, clean, key=jax.random.key(self.seed))
        return model, state.variables


def plant(case: Case, threat: str, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (images uint8, labels int32, which rows were changed bool), N of each.

    Args:
      case: what to change.
      threat: one of `THREATS`.
      share: of all images that are changed; people's labels change what they change.
    """
    images, labels = case.images.copy(), case.labels.copy()
    changed = THREATS[threat](case, images, labels, round(share * len(labels)))
    return images, labels, changed


def _flips(case, images, labels, count):
    rows = _some(case, np.ones(len(labels), bool), count)
    classes = labels.max() + 1
    labels[rows] = (labels[rows] + case.random.integers(1, classes, len(rows))) % classes
    return _mask(labels, rows)


def _people(name, case, images, labels, count):
    given = case.people[name]
    changed = given != labels
    labels[:] = given
    return changed


def _patch(case, images, labels, count):
    rows = _some(case, labels != TARGET, count)
    images[rows, 1:5, 1:5] = 255
    labels[rows] = TARGET
    return _mask(labels, rows)


def _patches(case, images, labels, count):
    rows = _some(case, (labels != TARGET) & (labels != SECOND_TARGET), count)
    first = case.random.permutation(rows)[: len(rows) // 2]
    second = np.setdiff1d(rows, first)
    images[first, 1:5, 1:5] = 255
    images[second, -5:-1, 1:5] = (255, 0, 255) if images.shape[-1] == 3 else 255
    labels[first], labels[second] = TARGET, SECOND_TARGET
    return _mask(labels, rows)


def _blend(case, images, labels, count):
    rows = _some(case, labels != TARGET, count)
    pattern = case.random.uniform(0, 255, images.shape[1:])
    images[rows] = np.round(0.8 * images[rows] + 0.2 * pattern).astype(np.uint8)
    labels[rows] = TARGET
    return _mask(labels, rows)


def _sig(case, images, labels, count):
    rows = _some(case, labels == TARGET, count)
    width = images.shape[2]
    wave = 20 * np.sin(2 * np.pi * 6 * np.arange(width) / width)[:, None]
    images[rows] = np.clip(np.round(images[rows] + wave), 0, 255).astype(np.uint8)
    return _mask(labels, rows)


def _targeted(attack, case, images, labels, count):
    each = min(POISONS, count)
    clean, key = Dataset(case.images, case.labels), jax.random.key(case.seed)
    trials = attacks.draw_trials(
        key, clean, case.candidates, num_trials=max(1, count // each), num_poisons=each
    )
    changed = np.zeros(len(labels), bool)
    for poisoned in attacks.poison(key, clean, trials, attack, [case.victim]):
        new = np.asarray(poisoned.attack_id) > 0
        images[new & ~changed] = poisoned.images[new & ~changed]
        changed |= new
    return changed


def _untargeted(make, case, images, labels, count):
    rows = _some(case, np.ones(len(labels), bool), count)
    attack = make(epsilon=BUDGETS[case.dataset])
    crafted = attack.craft(
        jax.random.key(case.seed), case.victim, to_float(images[rows]), jnp.asarray(labels[rows])
    )
    images[rows] = to_uint8(np.asarray(crafted))
    return _mask(labels, rows)


def _some(case, allowed, count):
    """Returns `count` rows that are allowed, or all of them."""
    return np.sort(case.random.permutation(np.flatnonzero(allowed))[:count])


def _mask(labels, rows):
    changed = np.zeros(len(labels), bool)
    changed[rows] = True
    return changed


_DEEP = attacks.DeepConfuseConfig(trials=12, passes=2, width=16)
THREATS: dict[str, Callable[..., np.ndarray]] = {
    "flips": _flips,
    "aggregate": functools.partial(_people, "aggregate"),
    "random1": functools.partial(_people, "random1"),
    "patch": _patch,
    "patches": _patches,
    "blend": _blend,
    "sig": _sig,
    "collision": functools.partial(_targeted, attacks.feature_collision(epsilon=16 / 255)),
    "bullseye": functools.partial(
        _targeted, attacks.bullseye_polytope(epsilon=16 / 255, num_steps=400)
    ),
    "matching": functools.partial(
        _targeted, attacks.gradient_matching(epsilon=16 / 255, num_steps=100, restarts=1)
    ),
    "pgd": functools.partial(_untargeted, attacks.pgd),
    "dap": functools.partial(_untargeted, attacks.dap),
    "dc": functools.partial(_untargeted, functools.partial(attacks.deep_confuse, config=_DEEP)),
}
"""What changes images and labels in place, and returns which."""
