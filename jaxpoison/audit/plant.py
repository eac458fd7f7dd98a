"""Canaries: known faults planted into a copy of the data, to see which of them the checks find.

Each threat changes about 1% of the images, other images for each threat. The copy exists only in
memory and in the cache; the data are never touched.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.audit.checks.foreign import refusal
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.foreign import predictions
from jaxpoison.audit.measure import SIZE, Embedding, perceptual_hashes, shrink

SHARE = 0.01
"""Of all images, for each threat."""
MOST = 300
"""Canaries of a threat."""
COLLISION_EPSILON = 16 / 255
"""Bound of each pixel's change by a feature collision."""
COLLISION_STEPS = 20
ANYHOW = 1 / 3
"""Part of the wrong labels that is any other class, on any image.

The others are mistakes as people make them: a class that the image may be taken for, on images that
may be taken for it. Labels at random alone are easier to see than what people get wrong, and mistakes
alone are too much like honest images that are ambiguous. With a third, the estimated share of wrong
labels came closest on 5,000 images of CIFAR-10 with labels of people (CIFAR-10N: `aggregate` 9.1%
wrong, `random1` 17.9%), and hardly any was flagged on clean ones.
"""


@dataclasses.dataclass(frozen=True)
class Threat:
    """A fault that can be planted."""

    name: str
    title: str
    kind: str
    """What a finding of it is called: copy, label or poison."""


THREATS = (
    Threat("flip", "wrong label: any, or of a similar class", "label"),
    Threat("copy", "copy of an image under another label", "label"),
    Threat("patch", "backdoor: a patch in a corner, relabeled", "poison"),
    Threat("blend", "backdoor: a faint blended pattern, relabeled", "poison"),
    Threat("collision", "feature collision: clean label, 16/255", "poison"),
)


class Planted(NamedTuple):
    """A copy with canaries.

    Attributes:
      evidence: of the copy, without a trained witness.
      rows: int [C], the changed rows.
      threats: text [C], what was done to each.
    """

    evidence: Evidence
    rows: np.ndarray
    threats: np.ndarray


def plant(
    evidence: Evidence,
    read: Callable[[np.ndarray], np.ndarray],
    embedding: Embedding,
    *,
    seed: int = 0,
) -> Planted:
    """Returns a copy of the evidence in which some rows have known faults.

    Args:
      evidence: of the data as they are.
      read: rows [B] -> uint8 [B, P, P, 3], their images at the embedding's size.
      embedding: the foreign witness, which sees the changed images.
      seed: of what is planted where.

    Returns:
      The copy; without canaries if there are fewer than 20 images, or one class.
    """
    random = np.random.default_rng([seed, 15])
    mistakes = None if refusal(evidence) else _mistakes(evidence)
    count = min(int(np.ceil(SHARE * len(evidence.labels))), MOST)
    count = min(max(count, 40), len(evidence.labels) // (4 * len(THREATS)))
    if evidence.num_classes < 2 or count < 1 or len(np.unique(evidence.labels)) < 2:
        return Planted(evidence, np.empty(0, int), np.empty(0, "U9"))
    labels = np.array(evidence.labels)
    rows, threats = _places(random, labels, count, mistakes)
    target = _target(labels)
    images = np.array(read(rows))
    for name, fault in _FAULTS.items():
        mine = np.flatnonzero(threats == name)
        case = _Case(random, evidence.labels, rows[mine], target, read, embedding, mistakes)
        images[mine], labels[rows[mine]] = fault(case, images[mine])
    small = shrink(images, SIZE)
    values = {
        "images": small,
        "embedding": embedding.embed(images),
        "hashes": perceptual_hashes(small),
        "digests": _digests(small),
        "sizes": evidence.sizes[rows],
    }
    copies = np.flatnonzero(threats == "copy")
    sources = _of_other_classes(random, evidence.labels, evidence.labels[rows[copies]])
    fields = {}
    for name, value in values.items():
        field = getattr(evidence, name)
        fields[name] = np.array(field)
        fields[name][rows] = value
        fields[name][rows[copies]] = field[sources]
    changed = dataclasses.replace(evidence, labels=labels, trained=None, **fields)
    return Planted(changed, rows, threats)


class _Case(NamedTuple):
    """What a fault is made from: the rows to change and all that surrounds them."""

    random: np.random.Generator
    labels: np.ndarray
    rows: np.ndarray
    target: int
    read: Callable[[np.ndarray], np.ndarray]
    embedding: Embedding
    mistakes: np.ndarray | None


def _places(random, labels, count, mistakes):
    """Returns (rows, names of threats): collisions in the target class, backdoors elsewhere.

    Of wrong labels come those at random first, and then mistakes, where they are likely.
    """
    target = _target(labels)
    free = random.permutation(len(labels))
    taken, rows, threats = np.zeros(len(labels), bool), [], []
    for threat in sorted(THREATS, key=lambda t: t.name != "collision"):
        fits, most = np.ones(len(free), bool), count
        if threat.name == "collision":
            fits = labels[free] == target
        elif threat.name in ("patch", "blend"):
            fits = labels[free] != target
        elif threat.name == "flip" and mistakes is not None:
            most = round(count * ANYHOW)
        chosen = free[fits & ~taken[free]][:most]
        if most < count:
            chosen = np.concatenate(
                [chosen, _likely(random, mistakes, taken, chosen, count - most)]
            )
        taken[chosen] = True
        rows.append(chosen)
        threats += [threat.name] * len(chosen)
    return np.concatenate(rows), np.array(threats)


def _likely(random, mistakes, taken, chosen, count):
    """Returns up to `count` other rows, each as likely as a mistake is there."""
    free = ~taken
    free[chosen] = False
    rows = np.flatnonzero(free & (mistakes.sum(axis=1) > 0))
    # The shortest of exponential waits, at rates as given: a sample without replacement.
    waits = random.exponential(size=len(rows)) / mistakes[rows].sum(axis=1)
    return rows[np.argsort(waits)[:count]]


def _target(labels):
    """Returns the class that backdoors and collisions aim at: the most frequent one."""
    return int(np.argmax(np.bincount(labels)))


def _flip(case, images):
    """Any other label for the first part of the rows; for the rest what each may be taken for."""
    labels = _others(case.random, case.labels[case.rows], case.labels)
    if case.mistakes is not None:
        odds = case.mistakes[case.rows].cumsum(axis=1)
        drawn = (odds > case.random.random((len(odds), 1)) * odds[:, -1:]).argmax(axis=1)
        likely = odds[:, -1] > 0
        likely[: round(len(labels) * ANYHOW)] = False
        labels = np.where(likely, drawn, labels)
    return images, labels


def _mistakes(evidence):
    """Returns how likely each wrong label is, float [N, K], by the foreign witness's doubts.

    0 throughout where the witness disagrees with the label: there it may be wrong already.
    """
    likely = np.array(predictions(evidence).probabilities, float)
    agrees = likely.argmax(axis=1) == evidence.labels
    likely[np.arange(len(likely)), evidence.labels] = 0
    return likely * agrees[:, None]


def _of_other_classes(random, labels, own):
    """Returns for each label a row with another one, at random."""
    return np.array([random.choice(np.flatnonzero(labels != label)) for label in own], int)


def _patch(case, images):
    """A checkered square of 3/32 of the side, in the lower right corner."""
    size = images.shape[1]
    cell = max(1, size // 32)
    board = np.indices((3, 3)).sum(0) % 2 == 0
    square = np.kron(board, np.ones((cell, cell), bool))[..., None]
    side = len(square)
    images = images.copy()
    images[:, size - side - cell : size - cell, size - side - cell : size - cell] = 255 * square
    return images, np.full(len(images), case.target)


def _blend(case, images):
    """One pattern of noise, of 8x8 areas, at 15%."""
    size = images.shape[1]
    coarse = case.random.uniform(0, 255, (8, 8, 3))
    pattern = coarse.repeat(-(-size // 8), 0).repeat(-(-size // 8), 1)[:size, :size]
    return (0.85 * images + 0.15 * pattern).astype(np.uint8), np.full(len(images), case.target)


def _collision(case, images):
    """Projected gradient descent to the embedding of one image of another class; labels stay."""
    aims = case.random.choice(np.flatnonzero(case.labels != case.target), len(images))
    goals = case.read(aims)
    return collide(case.embedding, images, goals), case.labels[case.rows]


def collide(embedding: Embedding, images: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """Returns uint8 images within COLLISION_EPSILON whose embedding is close to the goals.

    Args:
      embedding: to collide in.
      images: uint8 [B, P, P, 3].
      goals: uint8 [B, P, P, 3], images whose embeddings to come close to.
    """
    batch = 32
    step, apply = _descent(embedding.apply), jax.jit(embedding.apply)
    out = []
    for start in range(0, len(images), batch):
        part, goal = images[start : start + batch], goals[start : start + batch]
        missing = batch - len(part)
        part, goal = (np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in (part, goal))
        moved = clean = jnp.asarray(part, jnp.float32) / 255
        aim = apply(jnp.asarray(goal, jnp.float32) / 255)
        for _ in range(COLLISION_STEPS):
            moved = step(moved, clean, aim)
        rounded = np.round(255 * np.asarray(moved)).astype(np.uint8)
        out.append(rounded[: batch - missing])
    return np.concatenate(out) if out else images


def _descent(apply):
    def loss(x, goals):
        return jnp.sum((apply(x) - goals) ** 2)

    @jax.jit
    def step(moved, clean, goals):
        gradient = jax.grad(loss)(moved, goals)
        moved = moved - COLLISION_EPSILON / 8 * jnp.sign(gradient)
        bounded = jnp.clip(moved, clean - COLLISION_EPSILON, clean + COLLISION_EPSILON)
        return jnp.clip(bounded, 0, 1)

    return step


_FAULTS = {
    "flip": _flip,
    "patch": _patch,
    "blend": _blend,
    "collision": _collision,
}


def _others(random, own, labels):
    """Returns for each label another one that occurs in the data, at random."""
    present = np.unique(labels)
    place = np.searchsorted(present, own)
    return present[(place + random.integers(1, len(present), len(own))) % len(present)]


def _digests(images):
    return np.stack([np.frombuffer(hashlib.sha256(x.tobytes()).digest(), "u1") for x in images])


def classwise(
    images: np.ndarray, labels: np.ndarray, *, share: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Returns images with noise of 8/255 that is the same for all images of a class.

    Args:
      images: uint8 [N, S, S, 3].
      labels: int [N].
      share: part of the images that get it, in [0, 1].
      seed: of the noise and of the part.
    """
    random = np.random.default_rng([seed, 16])
    noise = random.choice([-8, 8], (labels.max() + 1, *images.shape[1:]))
    poisoned = random.random(len(labels)) < share
    moved = np.clip(images.astype(np.int16) + noise[labels], 0, 255).astype(np.uint8)
    return np.where(poisoned[:, None, None, None], moved, images)
