"""Labeled images as they lie on a disk: what their labels are, and one pass over their pixels."""

import collections
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from jaxpoison.core.checks import check_count, listing
from jaxpoison.data.readers import arrays
from jaxpoison.data.readers.contents import MAX_PIXELS, Content, display_name

if TYPE_CHECKING:
    from jaxpoison.data.readers import decode

# What one thread is given at a time: for small images one by one would take longer than decoding.
_CHUNK_IMAGES = 32
_CHUNK_BYTES = 8_000_000
_MOST_THREADS = 8


class Problem(NamedTuple):
    """Something that could not be read.

    Attributes:
        id: as in `Source.ids`; a folder ends in `/`.
        reason: one sentence.
    """

    id: str
    reason: str


class Batch(NamedTuple):
    """Consecutive images of a pass, b of them.

    Attributes:
        rows: int64 [b], ascending, into `Source.ids`.
        images: uint8 [b, S, S, 3].
        digests: uint8 [b, 32], SHA-256 of size and decoded pixels; see `decode.Decoded`.
        sizes: int32 [b, 2], height and width as decoded.
    """

    rows: np.ndarray
    images: np.ndarray
    digests: np.ndarray
    sizes: np.ndarray


class Images(Protocol):
    """Where the images of a source are."""

    def contents(self) -> Iterator[Content]:
        """Yields all images in order, one pass. Never raises for a single image."""
        ...

    def content(self, row: int) -> Content:
        """Returns one image."""
        ...

    def path(self, row: int) -> Path | None:
        """Returns the file that holds this image alone, or None."""
        ...

    def fingerprint(self) -> Iterator[bytes]:
        """Yields bytes that change when the images do."""
        ...


class Source:
    """N labeled images in K classes, read from the disk in passes; `open_source` makes one.

    Attributes:
        ids: N distinct strings: the path below the opened folder, with `/`, or `row 12`, from 0;
            always printable.
        labels: int32 [N] in [0, K).
        class_names: K distinct strings.
        readable: bool [N], False for images that a pass could not read.
        sizes: int32 [N, 2], height and width, 0 until a pass has read the image.
        kind: what was opened, for people, such as "class folders".
    """

    def __init__(
        self,
        images: Images,
        *,
        ids: Sequence[str],
        labels: np.ndarray,
        class_names: Sequence[str],
        kind: str,
        problems: Sequence[Problem] = (),
        max_pixels: int = MAX_PIXELS,
    ):
        self._images = images
        self._max_pixels = max_pixels
        self._problems = list(problems)
        self.ids = tuple(ids)
        self.labels = labels
        self.class_names = tuple(class_names)
        self.kind = kind
        self.readable = np.ones(len(self.ids), bool)
        self.sizes = np.zeros((len(self.ids), 2), np.int32)

    @classmethod
    def from_arrays(
        cls,
        images: Any,
        labels: Any,
        ids: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "Source":
        """Returns a source of arrays in memory, or memory-mapped; nothing is copied.

        Args:
            images: uint8 in 0..255 or floating point in [0, 1], [N, H, W, C] with C of 1, 3 or 4
                (RGBA, put over white), or [N, H, W]. A few images with pixels that are NaN or out
                of range become problems in a pass.
            labels: N integers, texts, or one-hot rows; see `labels.encode`.
            ids: N different texts; `row 0`, `row 1`, ... by default.
            class_names: K different texts; then labels are integers in [0, K). By default the
                labels themselves.

        Raises:
            TypeError: for anything but an array.
            ValueError: for channels first, other dtypes, floats mostly out of range, labels that
                are missing or negative, or lengths that differ.
        """
        pixels = arrays.as_images(images, "images")
        numbers, names = arrays.as_labels(labels, class_names, "labels")
        check_lengths(len(pixels), len(numbers), "labels")
        if ids is not None:
            ids = tuple(map(display_name, map(str, ids)))
            check_lengths(len(pixels), len(ids), "ids")
            if len(set(ids)) < len(ids):
                raise ValueError(f"ids: {len(ids) - len(set(ids))} of {len(ids)} occur twice")
        return cls(
            arrays.ArrayImages(pixels),
            ids=row_ids(len(pixels)) if ids is None else ids,
            labels=numbers,
            class_names=names,
            kind="arrays",
        )

    def __len__(self) -> int:
        """N, the images that can no longer be read included."""
        return len(self.ids)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What could not be read so far: at opening, and in passes."""
        return tuple(self._problems)

    def batches(
        self, size: int, batch_size: int, *, rows: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """One pass over all images that can be read, in order.

        Each image is decoded once, by a few threads; memory is that of some batches. An image that
        turns out unreadable is left out, and added to `problems`.

        Args:
            size: S, the side of the images; they are resized with antialiasing, aspect not kept.
            batch_size: images in each batch; the last has what is left.
            rows: int, those to read, in any order; None for all.

        Raises:
            ValueError: unless both are positive.
        """
        check_count(size=size, batch_size=batch_size)
        wanted = self.readable.copy()
        if rows is not None:
            wanted[:] = False
            wanted[rows] = self.readable[rows]
        return self._batches(size, batch_size, wanted)

    def _batches(self, size: int, batch_size: int, wanted: np.ndarray) -> Iterator[Batch]:
        decoded = self._decoded(size, wanted)
        while block := list(itertools.islice(decoded, batch_size)):
            rows = np.array([row for row, _ in block])
            batch = Batch(
                rows,
                np.stack([image.pixels for _, image in block]),
                np.frombuffer(b"".join(image.digest for _, image in block), np.uint8).reshape(
                    len(block), 32
                ),
                np.array([image.size for _, image in block], np.int32),
            )
            self.sizes[rows] = batch.sizes
            yield batch

    def _decoded(self, size: int, wanted: np.ndarray) -> Iterator[tuple[int, "decode.Decoded"]]:
        """Yields (row, image) in order; images that cannot be read become problems."""
        from jaxpoison.data.readers import decode  # Pillow, which importing this room leaves alone

        def work(chunk: list[tuple[int, Content]]) -> list[decode.Decoded | str]:
            return [decode.decode_or_say(item, size, self._max_pixels) for _, item in chunk]

        num_threads = min(_MOST_THREADS, os.cpu_count() or 1)
        waiting: collections.deque[tuple[list, Future]] = collections.deque()
        with ThreadPoolExecutor(num_threads, "decode") as pool:
            try:
                chunks = self._chunks(wanted)
                while True:
                    for chunk in itertools.islice(chunks, 2 * num_threads - len(waiting)):
                        waiting.append((chunk, pool.submit(work, chunk)))
                    if not waiting:
                        return
                    chunk, future = waiting.popleft()
                    for (row, _), image in zip(chunk, future.result(), strict=True):
                        if isinstance(image, str):
                            self.readable[row] = False
                            self._problems.append(Problem(self.ids[row], image))
                        else:
                            yield row, image
            finally:
                for _, future in waiting:
                    future.cancel()

    def _chunks(self, wanted: np.ndarray) -> Iterator[list[tuple[int, Content]]]:
        chunk, num_bytes = [], 0
        for row, content in enumerate(self._images.contents()):
            if not wanted[row]:
                continue
            chunk.append((row, content))
            num_bytes += len(content) if isinstance(content, bytes) else 0
            if len(chunk) == _CHUNK_IMAGES or num_bytes > _CHUNK_BYTES:
                yield chunk
                chunk, num_bytes = [], 0
        if chunk:
            yield chunk

    def image(self, row: int, most: int | None = None) -> np.ndarray:
        """Returns one image, uint8 [H, W, 3], upright and with its aspect.

        Args:
            row: in [0, N).
            most: the longer side is at most this long; None for full size.

        Raises:
            IndexError: for a row that does not exist.
            Unreadable: a ValueError, if it cannot be read.
        """
        if not 0 <= row < len(self.ids):
            raise IndexError(f"row {row}; there are rows 0 to {len(self.ids) - 1}")
        from jaxpoison.data.readers import decode  # Pillow, which importing this room leaves alone

        return decode.decode_whole(self._images.content(row), most, self._max_pixels)

    def path(self, row: int) -> Path | None:
        """Returns the file that holds this image alone, or None, as for rows of an array."""
        return self._images.path(row)

    def fingerprint(self) -> str:
        """Returns the key of a cache: equal if names, labels and images are.

        SHA-256 over ids, labels and class names, and over sizes and times of change of files, or
        the bytes of arrays in memory. Where the folder lies does not matter.
        """
        state = hashlib.sha256(f"source 1 {self._max_pixels} {len(self.ids)}".encode())
        for text in (*self.class_names, *self.ids):
            state.update(text.encode() + b"\0")
        state.update(np.ascontiguousarray(self.labels).tobytes())
        for part in self._images.fingerprint():
            state.update(part)
        return state.hexdigest()

    def __repr__(self) -> str:
        return f"Source({len(self.ids):,} images, {listing(self.class_names, 3)}: {self.kind})"


def row_ids(num_rows: int) -> tuple[str, ...]:
    """Returns `row 0`, `row 1`, ..."""
    return tuple(f"row {row}" for row in range(num_rows))


def check_lengths(num_images: int, num_others: int, name: str) -> None:
    """Raises a ValueError unless there is one of the others for each image."""
    if num_images != num_others:
        raise ValueError(f"{num_images:,} images but {num_others:,} {name}; give one to each image")


def check_some(ids: Sequence[str], name: str, problems: Sequence[Problem], advice: str) -> None:
    """Raises a ValueError with the first problems if a source would have no image."""
    if ids:
        return
    found = listing((f"{p.id or 'here'}: {p.reason.rstrip('.')}" for p in problems), 3, "; ")
    found = f" What was left out: {found}." if problems else ""
    raise ValueError(f"{name} holds no image that can be read; {advice}.{found}")


def file_state(path: str | os.PathLike[str]) -> bytes:
    """Returns size and time of change of a file, for fingerprints; empty if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return b""
    return f"{status.st_size} {status.st_mtime_ns};".encode()
