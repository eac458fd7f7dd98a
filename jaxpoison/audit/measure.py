"""One pass over the images: everything about them that does not need a network trained on them.

Arrays lie in the cache folder and grow row by row, so memory is that of a batch, and a pass that
was killed goes on where it stood.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from jaxpoison.audit import witness
from jaxpoison.audit.evidence import SIZE, Evidence
from jaxpoison.core.files import write_text
from jaxpoison.data.readers.source import Problem, Source

LARGE = witness.SIZE
"""Height and width at which larger images are shown to the foreign witness."""
BATCH = 256
"""Images read at a time."""


class Embedding(NamedTuple):
    """A witness: what turns images into vectors of unit length.

    Attributes:
      name: for the cache; another name is another witness.
      embed: uint8 [B, S, S, 3] -> float32 [B, D].
      apply: the same, before any whitening, of float images in [0, 1]: for gradients.
    """

    name: str
    embed: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[jax.Array], jax.Array]

    def then(self, white: witness.Whitening) -> "Embedding":
        """Returns the witness whose vectors are whitened; `apply` stays as it is."""
        embed = self.embed
        return self._replace(embed=lambda images: white(embed(images)))


def foreign() -> Embedding:
    """Returns EfficientNet-Lite0, which the data under audit cannot have poisoned."""
    variables = witness.lite0_variables()
    return Embedding(
        "efficientnet-lite0",
        witness.embed,
        lambda images: witness.lite0_features(variables, images),
    )


def side(source: Source) -> int:
    """Returns S of the images that the embedding sees: 96, or 32 where the images are no larger."""
    sizes = []
    for row in np.linspace(0, len(source.ids) - 1, 9).astype(int):
        try:
            sizes.append(max(source.image(int(row)).shape[:2]))
        except ValueError:
            continue
    return LARGE if sizes and np.median(sizes) > LARGE / 2 else SIZE


def measure(
    source: Source,
    embedding: Embedding,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Evidence, tuple[Problem, ...], np.ndarray]:
    """Returns (evidence of the images that can be read, what cannot be read, rows in the source).

    Args:
      source: the images.
      embedding: the foreign witness.
      folder: of this pass alone; made if missing. A pass that was interrupted continues here.
      progress: called with (images done, images).

    Raises:
      ValueError: if no image at all can be read; the message gives the first reasons.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = side(source)
    dimension = embedding.embed(np.zeros((0, size, size, 3), np.uint8)).shape[1]
    store = _Store(folder, len(source.ids), dimension)
    done = int(np.count_nonzero(store.state))
    todo = np.flatnonzero(np.asarray(store.state) == _TODO)
    for batch in source.batches(size, BATCH, rows=todo):
        rows = batch.rows
        small = shrink(batch.images, SIZE)
        store.arrays["images"][rows] = small
        store.arrays["digests"][rows] = batch.digests
        store.arrays["hashes"][rows] = perceptual_hashes(small)
        store.arrays["sizes"][rows] = batch.sizes
        store.arrays["embedding"][rows] = embedding.embed(batch.images)
        store.finish(rows)
        done += len(rows)
        if progress is not None:
            progress(done, len(source.ids))
    problems = store.problems(source)
    rows = np.flatnonzero(np.asarray(store.state) == _DONE)
    if not len(rows):
        first = "; ".join(f"{p.id}: {p.reason}" for p in problems[:3]) or "the set is empty"
        raise ValueError(f"none of {len(source.ids)} images can be read ({first})")
    return store.evidence(source, rows), problems, rows


_TODO, _DONE = 0, 1


class _Store:
    """The arrays of a pass, as .npy files that are mapped into memory, and which rows are done."""

    def __init__(self, folder, num_rows, dimension):
        self.folder = folder
        shapes = {
            "images": (np.uint8, (SIZE, SIZE, 3)),
            "digests": (np.uint8, (32,)),
            "hashes": (np.uint64, (2,)),
            "sizes": (np.int32, (2,)),
            "embedding": (np.float32, (dimension,)),
        }
        self.arrays = {
            name: self._open(name, dtype, (num_rows, *shape))
            for name, (dtype, shape) in shapes.items()
        }
        self.state = self._open("state", np.uint8, (num_rows,))

    def _open(self, name, dtype, shape):
        path = self.folder / f"{name}.npy"
        if path.exists():
            there = np.load(path, mmap_mode="r+", allow_pickle=False)
            if there.dtype == dtype and there.shape == shape:
                return there
        if name != "state":
            (self.folder / "state.npy").unlink(missing_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)

    def finish(self, rows):
        """Marks rows as done, once what is in them is on disk."""
        for array in self.arrays.values():
            array.flush()
        self.state[rows] = _DONE
        self.state.flush()

    def problems(self, source):
        """Returns all problems, those of an interrupted pass included."""
        path = self.folder / "problems.json"
        known = {}
        if path.exists():
            known = {line["id"]: line["reason"] for line in json.loads(path.read_text())}
        known |= {problem.id: problem.reason for problem in source.problems}
        write_text(path, json.dumps([{"id": id, "reason": known[id]} for id in known]))
        return tuple(Problem(id, reason) for id, reason in known.items())

    def evidence(self, source, rows):
        whole = len(rows) == len(self.state)
        arrays: dict[str, Any] = {name: x if whole else x[rows] for name, x in self.arrays.items()}
        return Evidence(
            ids=np.asarray(source.ids)[rows],
            labels=np.asarray(source.labels, np.int32)[rows],
            class_names=tuple(source.class_names),
            **arrays,
        )


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """Returns uint8 [B, size, size, 3], each pixel the mean of what it covers (Pillow's box)."""
    if images.shape[1:3] == (size, size):
        return images
    return np.stack(
        [
            np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
            for image in images
        ]
    )


def perceptual_hashes(images: np.ndarray) -> np.ndarray:
    """Returns difference hashes: which of two neighboring areas is brighter.

    Args:
      images: uint8 [B, S, S, 3].

    Returns:
      uint64 [B, 2]: 64 bits from left to right, over 8 rows of 9 areas, and 64 from top to bottom,
      over 9 rows of 8.
    """
    gray = images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    many, few = (_areas(n, images.shape[1]) for n in (9, 8))
    wide = np.einsum("ih,bhw,jw->bij", few, gray, many)
    tall = np.einsum("ih,bhw,jw->bij", many, gray, few)
    bits = np.stack([np.diff(wide, axis=2) > 0, np.diff(tall, axis=1) > 0], 1)
    return np.packbits(bits.reshape(len(images), 2, 64), axis=-1).view(">u8")[..., 0].astype("u8")


@functools.cache
def _areas(number, size):
    """Returns float32 [number, size]: means over equal parts of a line of `size` pixels."""
    edges = np.linspace(0, size, number + 1)
    left, right = np.arange(size), np.arange(size) + 1
    overlap = np.minimum(right, edges[1:, None]) - np.maximum(left, edges[:-1, None])
    return (np.maximum(overlap, 0) * number / size).astype(np.float32)
