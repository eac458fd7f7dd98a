"""What a remedy is worth, by training with it and without it: a small network, several seeds.

All trainings take the same number of steps on arrays of the same shape, so they are one compiled
step. What is removed is never drawn: a removal changes the order of the images, nothing else.

Accuracy cannot show everything. A backdoor leaves it as it is, and so do a few poisons that aim at
one image: that a removal gains no accuracy does not make what was flagged harmless.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import models, solvers
from jaxpoison.audit.trained import RECIPE, epoch_program
from jaxpoison.core import devices
from jaxpoison.core.checks import check_count
from jaxpoison.core.files import check_writable, read_npz, replacing
from jaxpoison.data import Dataset, check, check_alike
from jaxpoison.defenses.squeezing import LUMA, compress
from jaxpoison.evaluation.statistics import crossed_mean
from jaxpoison.network import Network, as_network, predict, shared
from jaxpoison.training import init_state
from jaxpoison.training import recipe as recipes

WIDTHS = (16, 32, 64)
BATCH_SIZE = 64
# One cycle over all steps, however many: the clock of the optimizer counts them.
ONE_CYCLE = dataclasses.replace(RECIPE, epochs=1, batch_size=BATCH_SIZE)
EPOCHS, FEWEST_STEPS = 5, 150
MOST_IMAGES, MOST_HELD_OUT = 10_000, 2_000
HELD_OUT_SHARE = 0.2
LEVEL = 0.95


class Row(NamedTuple):
    """One way to train, measured.

    Attributes:
      name: `as_is`, `without:<removal>`, `random:<removal>`, `jpeg`, `gray` or `recommended`.
      title: for people.
      accuracy: in [0, 1], mean over seeds and held-out images.
      mean: gain of accuracy over training on the data as they are, paired by seed and image.
      low: lower end of its interval; together, all intervals hold with 95%.
      high: upper end.
      n: number of held-out images.
      note: what to know about this row; may be empty.
    """

    name: str
    title: str
    accuracy: float
    mean: float
    low: float
    high: float
    n: int
    note: str = ""


class Worth(NamedTuple):
    """All rows, and what follows from them.

    Attributes:
      rows: the first one is the data as they are.
      action: name of the row whose lower end is highest, if that is above 0, else "nothing".
      reason: a sentence with the figures.
      notes: sentences on how it was measured.
    """

    rows: tuple[Row, ...]
    action: str
    reason: str
    notes: tuple[str, ...]


class _Way(NamedTuple):
    """One way to train: which rows are drawn, what is done to pixels, whether trusted ones help."""

    name: str
    title: str
    keep: np.ndarray
    squeeze: str = ""
    adds_trusted: bool = False
    note: str = ""


class _Work(NamedTuple):
    """The images of all trainings: `train` [N], and `held_out` [T] to measure on."""

    train: Dataset
    held_out: Dataset
    is_trusted: bool
    num_classes: int
    num_steps: int


def worth(
    images: np.ndarray,
    labels: np.ndarray,
    trusted: Dataset | None,
    removals: Mapping[str, np.ndarray],
    *,
    num_classes: int,
    seed: int = 0,
    num_seeds: int | None = None,
    epochs: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Worth:
    """Trains with each remedy and without, and returns what each gains on held-out images.

    The remedies: leave out what each of `removals` flags (next to as many left out at random), all
    images through JPEG of quality 10 or in gray (arXiv 2301.13838), and with trusted images those
    as half of each batch (`defenses.recommended`), where one half of them is trained on and the
    other half measured on, in turns.

    Args:
      images: uint8 [N, S, S, 3] in 0..255, S at least 16; 10,000 are drawn if there are more.
      labels: int32 [N], in [0, K).
      trusted: images of the same size whose labels are right (a `Dataset`, or anything with its
        `images` and `labels`), to measure on; up to 2,000 are. None holds out a fifth of the images
        that no removal flags, which favors removals a little.
      removals: {name: bool [N]}, True for the images to leave out.
      num_classes: K, at least 2.
      seed: of the first training, and of what is drawn.
      num_seeds: trainings for each remedy, at least 2; None for 3, of at most 1,000 images 5.
      epochs: passes over the images; None for 5, of small sets for 150 batches of 64.
      folder: where to keep `worth.npz`, from which an interrupted run resumes; None for nowhere.
      progress: called after each training as `progress(finished, all)`.

    Raises:
      ValueError: for images, labels or masks that do not fit, or fewer than two classes or seeds.
      DivergedError: if a training's loss is not finite.
    """
    work, masks, notes = _prepared(images, labels, trusted, removals, num_classes, seed, epochs)
    if num_seeds is None:
        num_seeds = 5 if len(work.train.labels) <= 1_000 else 3
    check_count(num_seeds=num_seeds)
    if num_seeds < 2:
        raise ValueError("num_seeds is 1; an interval needs at least 2")
    ways, skipped = _ways(work, masks, seed)
    seeds = [seed + index for index in range(num_seeds)]
    hits = _measured(work, ways, seeds, folder, progress)
    rows = _rows(ways, hits)
    return Worth(rows, *_decision(rows, work), (*notes, *skipped, _how(work, num_seeds)))


def _prepared(images, labels, trusted, removals, num_classes, seed, epochs):
    """Returns (`_Work`, masks of its rows, notes)."""
    check_count(num_classes=num_classes)
    if num_classes == 1:
        raise ValueError("num_classes is 1: there is nothing to learn; expected at least 2 classes")
    dataset = _checked(images, labels, num_classes, "training set")
    masks = {name: np.asarray(mask) for name, mask in removals.items()}
    for name, mask in masks.items():
        if mask.dtype != bool or mask.shape != dataset.labels.shape:
            raise ValueError(
                f"removals[{name!r}] is {mask.dtype} {mask.shape}; expected bool "
                f"({len(dataset.labels)},), True for the images to leave out"
            )
    rng, notes = np.random.default_rng(seed), []
    rows = rng.permutation(len(dataset.labels))
    if trusted is None:
        flagged = np.any([*masks.values(), np.zeros(len(rows), bool)], axis=0)
        candidates = rows[~flagged[rows]]
        num_held_out = min(int(HELD_OUT_SHARE * len(candidates)), MOST_HELD_OUT)
        held_out = dataset.take(candidates[:num_held_out])
        rows = np.setdiff1d(rows, candidates[:num_held_out])
        rows = rng.permutation(rows)
        notes.append(
            f"No trusted images were given: accuracy is that on {num_held_out:,} images that "
            "nothing flagged, which were held out. That favors removals a little."
        )
    else:
        whole = _checked(trusted.images, trusted.labels, num_classes, "trusted set")
        check_alike(whole, dataset, num_classes)
        held_out = whole.take(rng.permutation(len(whole.labels))[:MOST_HELD_OUT])
        known, found = set(_digests(whole.images)), _digests(dataset.images)
        rows = rows[[found[row] not in known for row in rows]]
        if len(rows) < len(dataset.labels):
            notes.append(
                f"{len(dataset.labels) - len(rows):,} images are among the trusted ones as well: "
                "they were not trained on."
            )
    if len(rows) > MOST_IMAGES:
        notes.append(f"Trained on {MOST_IMAGES:,} of {len(rows):,} images, drawn at random.")
        rows = rows[:MOST_IMAGES]
    if len(rows) < 2 or len(held_out.labels) < 2:
        raise ValueError(
            f"{len(rows)} images to train on and {len(held_out.labels)} to measure on; expected at "
            "least 2 of each"
        )
    rows = np.sort(rows)
    if epochs is None:
        num_steps = steps_for(len(rows))
    else:
        check_count(epochs=epochs)
        num_steps = max(1, epochs * len(rows) // BATCH_SIZE)
    work = _Work(dataset.take(rows), held_out, trusted is not None, num_classes, num_steps)
    return work, {name: mask[rows] for name, mask in masks.items()}, notes


def _checked(images, labels, num_classes, name):
    """Returns a set of 8-bit color images, checked."""
    dataset = Dataset(np.asarray(images), np.asarray(labels, np.int32))
    check(dataset, num_classes, name)
    if dataset.images.dtype != np.uint8 or dataset.images.shape[-1] != 3:
        raise ValueError(
            f"{name}: images are {dataset.images.dtype} {dataset.images.shape}; expected uint8 "
            "[N, S, S, 3], as Evidence has them"
        )
    return dataset


def _digests(images):
    """Returns a digest of each image."""
    return [hashlib.blake2b(x.tobytes(), digest_size=16).digest() for x in images]


def _ways(work, masks, seed):
    """Returns (ways to train, the data as they are first; why others are left out)."""
    num_images = len(work.train.labels)
    everything = np.ones(num_images, bool)
    rng = np.random.default_rng([seed, 1])
    ways, skipped = [_Way("as_is", "As it is", everything)], []
    for name, mask in masks.items():
        count = int(mask.sum())
        if count == 0:
            skipped.append(f"'{name}' flagged nothing here, so its removal was not tried.")
            continue
        if count == num_images:
            skipped.append(f"'{name}' flagged every image, so its removal was not tried.")
            continue
        at_random = everything.copy()
        at_random[rng.permutation(num_images)[:count]] = False
        ways += [
            _Way(f"without:{name}", f"Without the {count:,} images that '{name}' flags", ~mask),
            _Way(f"random:{name}", f"Without {count:,} images at random", at_random),
        ]
    ways.append(_Way("jpeg", "All images through JPEG, quality 10", everything, "jpeg"))
    if (work.train.images != work.train.images[..., :1]).any():
        ways.append(_Way("gray", "All images in gray", everything, "gray"))
    if work.is_trusted:
        note = "Half of the trusted images were trained on, the other half measured on, in turns."
        ways.append(
            _Way(
                "recommended", "Trusted images as half of each batch, twice as many steps",
                everything, adds_trusted=True, note=note,
            )
        )  # fmt: skip
    return ways, skipped


def _measured(work, ways, seeds, folder, progress):
    """Returns {way: float64 [seeds, T]}: 1 for a hit, 0 for a miss, NaN for images trained on."""
    kept = _Kept(folder, work)
    hits, finished = {}, 0
    images: dict[str, Any] = {}
    for way in ways:
        hits[way.name] = np.full((len(seeds), len(work.held_out.labels)), np.nan)
        for index, seed in enumerate(seeds):
            entry = _entry(way, index, seed)
            half = _half(work.held_out.labels, index) if way.adds_trusted else None
            if entry not in kept.entries:
                if way.squeeze not in images:
                    images = {way.squeeze: _squeezed(work, way.squeeze)}
                kept.add(entry, _hits(work, images[way.squeeze], way.keep, half, seed))
            hits[way.name][index] = kept.entries[entry]
            if half is not None:
                hits[way.name][index, half] = np.nan
            finished += 1
            if progress is not None:
                progress(finished, len(ways) * len(seeds))
    return hits


def _entry(way, index, seed):
    """Returns under which name a training is kept; which half it leaves out goes by its index."""
    what = f"{way.squeeze} {way.adds_trusted and index % 2} {seed}".encode()
    return hashlib.sha256(what + way.keep.tobytes()).hexdigest()[:32]


def _hits(work, images, keep, half, seed):
    """Returns which held-out images a network is right about, bool [T], trained on `images`."""
    batches = drawn(keep, work.num_steps * BATCH_SIZE, seed).reshape(work.num_steps, -1)
    if half is not None:
        batches = batches.reshape(2 * work.num_steps, -1)
        trusted = len(keep) + drawn(half, batches.size, seed)
        batches = np.concatenate([batches, trusted.reshape(batches.shape)], axis=1)
    labels = np.concatenate([work.train.labels, work.held_out.labels])
    network, variables = fitted(
        Dataset(images, labels), batches, work.num_classes, seed=seed, part=work.num_steps
    )
    said = predict(network, variables, work.held_out.images, mesh=one_device())
    return np.asarray(said) == work.held_out.labels


def fitted(
    dataset: Dataset, batches: np.ndarray, num_classes: int, *, seed: int, part: int
) -> tuple[Network, Any]:
    """Trains a small network on the batches in order; returns it with its variables.

    Args:
      dataset: images uint8 [N, S, S, 3], labels int32 [N].
      batches: rows of the set, int [steps, B].
      num_classes: K.
      seed: of initial weights and augmentation.
      part: steps in one call of the compiled loop, of which `steps` is a multiple.

    Raises:
      DivergedError: if the training's loss is not finite.
    """
    network = as_network(models.fast_cnn(widths=WIDTHS, num_classes=num_classes))
    mesh = one_device()
    optimizer, run = shared(epoch_program, network, ONE_CYCLE, mesh)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    state = init_state(network, optimizer, init_key, dataset.images.shape[1:])
    state = state._replace(opt_state=recipes.at_epoch(state.opt_state, 0, len(batches)))
    state = devices.replicate(jax.tree.map(jnp.array, state), mesh)
    constants = devices.replicate((dataset, (), data_key), mesh)
    for steps in np.split(batches.astype(np.int32), len(batches) // part):
        state, told = run(constants, state, steps)
        if not np.isfinite(np.asarray(told["loss"])).all():
            raise solvers.DivergedError(f"the training loss is not finite with seed {seed}")
    return network, state.variables


def steps_for(num_images: int) -> int:
    """Returns how many steps a small network takes: 5 passes, of small sets 150 batches of 64."""
    return max(FEWEST_STEPS, EPOCHS * num_images // BATCH_SIZE)


def one_device() -> jax.sharding.Mesh:
    """Returns the mesh of one device: such batches are too small to share."""
    return devices.data_mesh(jax.local_devices()[:1])


def drawn(keep: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns the rows that training draws: passes in random order, without what is left out.

    With the same seed the others come in the same order, whatever is left out.

    Args:
      keep: bool [N], at least one of them True.
      count: how many to draw.
      seed: of the order.

    Returns:
      int [count].
    """
    rng, passes, total = np.random.default_rng([seed, 2]), [], 0
    while total < count:
        order = rng.permutation(len(keep))
        passes.append(order[keep[order]])
        total += len(passes[-1])
    return np.concatenate(passes)[:count]


def _half(labels, index):
    """Returns every second image of each class, bool [T]: the other ones for the next index."""
    half = np.zeros(len(labels), bool)
    half[np.argsort(labels, kind="stable")[index % 2 :: 2]] = True
    return half


def _squeezed(work, how):
    """Returns what is trained on, uint8 [N + T, S, S, 3]: the images, then the held-out ones."""
    images = np.concatenate([work.train.images, work.held_out.images])
    if how == "jpeg":
        return compress(images, 10)
    if how == "gray":
        luma = np.round(images @ np.asarray(LUMA, np.float32)).astype(np.uint8)
        return np.repeat(luma[..., None], 3, axis=-1)
    return images


class _Kept:
    """What was measured, in `worth.npz`, where a folder is given; read only for the same work."""

    def __init__(self, folder, work):
        digest = hashlib.sha256(repr((WIDTHS, ONE_CYCLE, work.num_steps)).encode())
        for array in (*work.train[:2], *work.held_out[:2]):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        self.identity = np.frombuffer(digest.digest(), np.uint8)
        self.path = None if folder is None else check_writable(folder) / "worth.npz"
        self.entries: dict[str, np.ndarray] = {}
        if self.path is not None and self.path.exists():
            found = read_npz(self.path, "results of earlier trainings", required=("identity",))
            if np.array_equal(found.pop("identity"), self.identity):
                self.entries = found

    def add(self, entry, hits):
        self.entries[entry] = hits
        if self.path is not None:
            with replacing(self.path) as file:
                np.savez(file, identity=self.identity, **self.entries)  # pyright: ignore


def _rows(ways, hits):
    """Returns the rows; the intervals of all that may be recommended hold together."""
    candidates = sum(not way.name.startswith("random:") for way in ways[1:])
    level = 1 - (1 - LEVEL) / max(1, candidates)
    pooled = _seed_variance(np.stack([np.nanmean(hits[way.name], axis=1) for way in ways]))
    rows = []
    for way in ways:
        own = hits[way.name]
        mean, low, high = crossed_mean(own - hits["as_is"], level, pooled=pooled)
        if way.name == "as_is":
            low = high = mean
        accuracy = float(np.nanmean(own))
        rows.append(Row(way.name, way.title, accuracy, mean, low, high, own.shape[1], way.note))
    return tuple(rows)


def _seed_variance(accuracies):
    """Returns the variance over seeds of a gain, and its degrees of freedom; from [ways, seeds].

    Seeds are blocks: what a seed does to all ways alike is no part of a gain. What is left is
    pooled over the ways.
    """
    if len(accuracies) < 2:
        return None
    means = accuracies.mean(axis=1, keepdims=True) + accuracies.mean(axis=0) - accuracies.mean()
    freedom = (accuracies.shape[0] - 1) * (accuracies.shape[1] - 1)
    return 2 * float(((accuracies - means) ** 2).sum()) / freedom, float(freedom)


def _decision(rows, work):
    """Returns (action, reason)."""
    on = f"{len(work.held_out.labels):,} {'trusted' if work.is_trusted else 'held-out'} images"
    others = [row for row in rows[1:] if not row.name.startswith("random:")]
    if not others:
        return "nothing", "Nothing was tried."
    best = max(others, key=lambda row: row.low)
    figures = (
        f"{100 * best.mean:+.1f} points of accuracy on {on} "
        f"({100 * best.low:+.1f} to {100 * best.high:+.1f})"
    )
    if best.low <= 0:
        return "nothing", (
            f"No remedy gains accuracy for sure; the best, '{best.title}', changed it by {figures}."
        )
    at_random = [row for row in rows if row.name == best.name.replace("without:", "random:", 1)]
    beside = ""
    if best.name.startswith("without:"):
        beside = f"; as many removed at random: {100 * at_random[0].mean:+.1f}"
    return best.name, f"'{best.title}' gains {figures}{beside}."


def _how(work, num_seeds):
    """Returns a sentence on how all was measured."""
    return (
        f"Each row is {num_seeds} trainings of a small network on {len(work.train.labels):,} "
        f"images, {work.num_steps:,} batches of {BATCH_SIZE}. Gains are paired by seed and image; "
        f"the intervals are over both, and hold with {LEVEL:.0%} for all rows together. Accuracy "
        "cannot show a backdoor, nor poisons that aim at one image."
    )
