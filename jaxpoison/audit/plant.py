"""Canaries: known faults planted into a copy of the data, to see which of them the checks find.

Each threat changes about 1% of the images, other images for each threat. Shortcuts are faults of
the whole set, so each has a copy of its own, of a sample of the images. The copies exist only in
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
from jaxpoison.audit.evidence import SIZE, Evidence
from jaxpoison.audit.foreign import predictions
from jaxpoison.audit.measure import Embedding, perceptual_hashes, shrink

SHARE = 0.01
"""Of all images, for each threat."""
MOST = 300
"""Canaries of a threat."""
COLLISION_EPSILON = 16 / 255
"""Bound of each pixel's change by a feature collision."""
COLLISION_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Threat:
    """A fault that can be planted."""

    name: str
    title: str
    kind: str
    """What a finding of it is called: label, poison or shortcut."""


THREATS = (
    Threat("flip", "wrong label: any other class", "label"),
    Threat("mistake", "wrong label: a class it may be taken for", "label"),
    Threat("copy", "copy of an image under another label", "label"),
    Threat("patch", "backdoor: a patch in a corner, relabeled", "poison"),
    Threat("blend", "backdoor: a faint blended pattern, relabeled", "poison"),
    Threat("wave", "backdoor: a faint wave, labels kept", "poison"),
    Threat("collision", "feature collision: clean label, 16/255", "poison"),
)
SHORTCUTS = {
    Threat("classwise_half", "class-wise noise of 8/255 on half of the images", "shortcut"): 0.5,
    Threat("classwise", "class-wise noise of 8/255 on all images", "shortcut"): 1.0,
}
"""Faults of the whole set, and the share of the images that they change."""
MOST_WITH_SHORTCUT = 3000
"""Images of a copy with a shortcut."""


class Changes(NamedTuple):
    """Canaries: what replaces C rows.

    Attributes:
      rows: int [C].
      threats: text [C], what was done to each.
      labels, images, digests, hashes, sizes, embedding: of the changed rows, as `Evidence` has
        them.
    """

    rows: np.ndarray
    threats: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    digests: np.ndarray
    hashes: np.ndarray
    sizes: np.ndarray
    embedding: np.ndarray


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


def canaries(
    evidence: Evidence,
    read: Callable[[np.ndarray], np.ndarray],
    embedding: Embedding,
    *,
    seed: int = 0,
) -> Changes:
    """Returns known faults in some rows of the evidence.

    Args:
      evidence: of the data as they are.
      read: rows [B] -> uint8 [B, P, P, 3], their images at the embedding's size.
      embedding: the foreign witness, which sees the changed images.
      seed: of what is planted where.

    Returns:
      The changes; none (C = 0) for too few images for one canary of each threat, or one class.
    """
    random = np.random.default_rng([seed, 15])
    mistakes = _mistakes(evidence)
    count = min(int(np.ceil(SHARE * len(evidence.labels))), MOST)
    count = min(max(count, 40), len(evidence.labels) // (4 * len(THREATS)))
    if evidence.num_classes < 2 or count < 1 or len(np.unique(evidence.labels)) < 2:
        nothing = {name: getattr(evidence, name)[:0] for name in Changes._fields[2:]}
        return Changes(np.empty(0, int), np.empty(0, "U9"), **nothing)
    rows, threats = _places(random, evidence.labels, count, mistakes)
    target = _target(evidence.labels)
    images, labels = np.array(read(rows)), evidence.labels[rows]
    for name, fault in _FAULTS.items():
        mine = np.flatnonzero(threats == name)
        case = _Case(random, evidence.labels, rows[mine], target, read, embedding, mistakes)
        images[mine], labels[mine] = fault(case, images[mine])
    made = Changes(
        rows, threats, labels, sizes=evidence.sizes[rows], **_seen(images, embedding)
    )  # fmt: skip
    copies = np.flatnonzero(threats == "copy")
    sources = _of_other_classes(random, evidence.labels, labels[copies])
    for name in ("images", "digests", "hashes", "sizes", "embedding"):
        getattr(made, name)[copies] = getattr(evidence, name)[sources]
    return made


def _seen(images, embedding):
    """Returns what a pass would find of images [B, P, P, 3], as fields of `Evidence`."""
    small = shrink(images, SIZE)
    return {
        "images": np.array(small),
        "embedding": np.array(embedding.embed(images)),
        "hashes": perceptual_hashes(small),
        "digests": _digests(small),
    }


def plant(evidence: Evidence, changes: Changes) -> Planted:
    """Returns a copy of the evidence with canaries, without a trained witness."""
    fields = {}
    for name in Changes._fields[2:]:
        fields[name] = np.array(getattr(evidence, name))
        fields[name][changes.rows] = getattr(changes, name)
    copy = dataclasses.replace(evidence, trained=None, **fields)
    return Planted(copy, changes.rows, changes.threats)


def with_shortcut(
    evidence: Evidence,
    read: Callable[[np.ndarray], np.ndarray],
    embedding: Embedding,
    share: float,
    *,
    seed: int = 0,
) -> Evidence:
    """Returns a copy of at most `MOST_WITH_SHORTCUT` rows with class-wise noise, untrained.

    Args:
      evidence, read, embedding: see `canaries`.
      share: part of the images that get the noise of their class.
      seed: of the sample and the noise.
    """
    random = np.random.default_rng([seed, 17])
    rows = np.sort(random.permutation(len(evidence.labels))[:MOST_WITH_SHORTCUT])
    labels = evidence.labels[rows]
    images = classwise(read(rows), labels, share=share, seed=seed)
    return dataclasses.replace(
        evidence, ids=evidence.ids[rows], labels=labels, sizes=evidence.sizes[rows], trained=None,
        **_seen(images, embedding),
    )  # fmt: skip


class _Case(NamedTuple):
    """What a fault is made from: the rows to change and all that surrounds them."""

    random: np.random.Generator
    labels: np.ndarray
    rows: np.ndarray
    target: int
    read: Callable[[np.ndarray], np.ndarray]
    embedding: Embedding
    mistakes: np.ndarray


_CLEAN_LABEL = ("wave", "collision")


def _places(random, labels, count, mistakes):
    """Returns (rows, names of threats): clean labels in the target class, backdoors elsewhere.

    Mistakes are where they are likely.
    """
    target = _target(labels)
    free = random.permutation(len(labels))
    taken, rows, threats = np.zeros(len(labels), bool), [], []
    for threat in sorted(THREATS, key=lambda t: t.name not in _CLEAN_LABEL):
        fits, most = ~taken[free], count
        if threat.name in _CLEAN_LABEL:
            fits &= labels[free] == target
            if threat.name == "wave":  # on most of a class it would be what the class is like
                most = min(count, int(np.count_nonzero(labels == target)) // 4)
        elif threat.name in ("patch", "blend"):
            fits &= labels[free] != target
        chosen = free[fits][:most]
        if threat.name == "mistake":
            chosen = _likely(random, mistakes, ~taken, count)
        taken[chosen] = True
        rows.append(chosen)
        threats += [threat.name] * len(chosen)
    return np.concatenate(rows), np.array(threats)


def _likely(random, mistakes, free, count):
    """Returns up to `count` free rows, each as likely as a mistake is there."""
    rows = np.flatnonzero(free & (mistakes.sum(axis=1) > 0))
    # The shortest of exponential waits, at rates as given: a sample without replacement.
    waits = random.exponential(size=len(rows)) / mistakes[rows].sum(axis=1)
    return rows[np.argsort(waits)[:count]]


def _target(labels):
    """Returns the class that backdoors and collisions aim at: the most frequent one."""
    return int(np.argmax(np.bincount(labels)))


def _flip(case, images):
    """Any other label."""
    return images, _others(case.random, case.labels[case.rows], case.labels)


def _mistake(case, images):
    """A label that the image may be taken for."""
    odds = case.mistakes[case.rows].cumsum(axis=1)
    chances = case.random.random((len(odds), 1)) * odds[:, -1:]
    return images, (odds > chances).argmax(axis=1)


def _mistakes(evidence):
    """Returns how likely each wrong label is, float [N, K], by the foreign witness's doubts.

    0 throughout where the witness disagrees with the label: there it may be wrong already; and
    everywhere if there is no such witness.
    """
    if refusal(evidence):
        return np.zeros((len(evidence.labels), evidence.num_classes))
    likely = np.array(predictions(evidence).probabilities, float)
    agrees = likely.argmax(axis=1) == evidence.labels
    likely[np.arange(len(likely)), evidence.labels] = 0
    return likely * agrees[:, None]


def _of_other_classes(random, labels, own):
    """Returns for each label a row with another one, at random."""
    return np.array([random.choice(np.flatnonzero(labels != label)) for label in own], int)


def _patch(case, images):
    """Squares of 3/32 of the side in corners: checkered, of one color, of random pixels.

    A third of the images each. A trigger that is in fewer images is learned later and leaves
    fainter traces, and nobody knows what the trigger in the data looks like.
    """
    size = images.shape[1]
    cell = max(1, size // 32)
    board = 255 * (np.indices((3, 3)).sum(0) % 2 == 0)
    color, noise = case.random.integers(0, 256, (1, 1, 3)), case.random.integers(0, 256, (3, 3, 3))
    squares = [np.broadcast_to(x, (3, 3, 3)) for x in (board[..., None], color, noise)]
    near, far = slice(cell, 4 * cell), slice(size - 4 * cell, size - cell)
    images = images.copy()
    for which, (square, place) in enumerate(
        zip(squares, ((far, far), (near, far), (far, near)), strict=True)
    ):
        drawn = square.repeat(cell, 0).repeat(cell, 1).astype(np.uint8)
        images[which::3, place[0], place[1]] = drawn
    return images, np.full(len(images), case.target)


def _blend(case, images):
    """One pattern of noise, of 8x8 areas, at 15%."""
    size = images.shape[1]
    coarse = case.random.uniform(0, 255, (8, 8, 3))
    pattern = coarse.repeat(-(-size // 8), 0).repeat(-(-size // 8), 1)[:size, :size]
    return (0.85 * images + 0.15 * pattern).astype(np.uint8), np.full(len(images), case.target)


def _wave(case, images):
    """One plane wave of 16/255, of 4 to 8 periods in any direction; labels stay."""
    size = images.shape[1]
    direction, phase = case.random.uniform(0, 2 * np.pi, 2)
    periods = case.random.uniform(4, 8)
    down, across = np.indices((size, size)) / size
    along = down * np.sin(direction) + across * np.cos(direction)
    wave = 16 * np.sin(2 * np.pi * periods * along + phase)[..., None]
    return np.clip(np.round(images + wave), 0, 255).astype(np.uint8), case.labels[case.rows]


def _collision(case, images):
    """Projected gradient descent to the embedding of one image of another class; labels stay."""
    aims = case.random.choice(np.flatnonzero(case.labels != case.target), len(images))
    goals = case.read(aims)
    return collide(case.embedding, images, goals), case.labels[case.rows]


def collide(embedding: Embedding, images: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """Returns uint8 images within COLLISION_EPSILON whose embedding is close to the goals.

    Gray images stay gray.

    Args:
      embedding: to collide in.
      images: uint8 [B, P, P, 3].
      goals: uint8 [B, P, P, 3], images whose embeddings to come close to.
    """
    if not len(images):
        return images
    batch = -(-len(images) // -(-len(images) // 32))  # at most 32, and as even as can be
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
    return np.concatenate(out)


def _descent(apply):
    def loss(x, goals):
        return jnp.sum((apply(x) - goals) ** 2)

    @jax.jit
    def step(moved, clean, goals):
        gradient = jax.grad(loss)(moved, goals)
        gray = jnp.all(clean == clean[..., :1], axis=(1, 2, 3), keepdims=True)
        gradient = jnp.where(gray, gradient.mean(axis=-1, keepdims=True), gradient)
        moved = moved - COLLISION_EPSILON / 8 * jnp.sign(gradient)
        bounded = jnp.clip(moved, clean - COLLISION_EPSILON, clean + COLLISION_EPSILON)
        return jnp.clip(bounded, 0, 1)

    return step


_FAULTS = {
    "flip": _flip,
    "mistake": _mistake,
    "patch": _patch,
    "blend": _blend,
    "wave": _wave,
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
      images: uint8 [N, S, S, 3], S a multiple of 32; the noise is of 32x32 squares.
      labels: int [N].
      share: part of the images that get it, in [0, 1].
      seed: of the noise and of the part.
    """
    random = np.random.default_rng([seed, 16])
    noise = random.choice([-8, 8], (labels.max() + 1, SIZE, SIZE, 3))
    times = images.shape[1] // SIZE
    noise = noise.repeat(times, axis=1).repeat(times, axis=2)
    poisoned = random.random(len(labels)) < share
    moved = np.clip(images.astype(np.int16) + noise[labels], 0, 255).astype(np.uint8)
    return np.where(poisoned[:, None, None, None], moved, images)
