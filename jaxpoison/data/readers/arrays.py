"""Arrays of images as the images of a source, and labels of any kind as class numbers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpoison.core.checks import listing
from jaxpoison.data import labels as labels_
from jaxpoison.data.dataset import check_image_dtype, check_layout
from jaxpoison.data.readers.contents import Content, display_name

_SAMPLE = 256
_BLOCK_BYTES = 1 << 24


class ArrayImages:
    """Images that are rows of one array; see `source.Images`."""

    def __init__(self, images: np.ndarray, state: bytes = b""):
        """Takes images as `as_images` returns them; `state` stands for their bytes if given."""
        self._images, self._state = images, state

    def contents(self) -> Iterator[Content]:
        """Yields views of the array."""
        return iter(self._images)

    def content(self, row: int) -> Content:
        """Returns a view of the array."""
        return self._images[row]

    def path(self, row: int) -> Path | None:
        """Returns None: no file holds this image alone."""
        return None

    def fingerprint(self) -> Iterator[bytes]:
        """Yields the shape, and the state of the file or else all bytes."""
        yield f"{self._images.shape} {self._images.dtype}".encode() + self._state
        if not self._state:
            rows = max(1, _BLOCK_BYTES // max(1, self._images[:1].nbytes))
            for start in range(0, len(self._images), rows):
                yield self._images[start : start + rows].tobytes()


def as_images(images: Any, name: str) -> np.ndarray:
    """Returns images as one array [N, H, W, C], uint8 or floating point, without a copy.

    Args:
        images: see `Source.from_arrays`.
        name: what to call them in a message.

    Raises:
        TypeError: for what NumPy cannot read as one array of numbers.
        ValueError: for another layout or dtype, or floats that are mostly out of [0, 1].
    """
    try:
        images = images if isinstance(images, np.ndarray) else np.asarray(images)
    except Exception as error:  # what an object's own conversion raises: tensors on devices do
        raise TypeError(
            f"{name} of type {type(images).__name__} cannot be read as one array; convert them to "
            "NumPy, all of one size"
        ) from error
    if images.dtype == np.object_ or np.ma.is_masked(images):
        raise TypeError(
            f"{name} are objects or masked; expected one array of numbers [N, H, W, C], all images "
            "of one size. Images of mixed sizes can be read from a folder"
        )
    if images.ndim == 3 and images.shape[2] not in (1, 3):
        images = images[..., None]
    check_layout(images, name)
    if not images.size:
        raise ValueError(f"{name} are empty, of shape {images.shape}; at least one is needed")
    if images.shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{name} have {images.shape[3]} channels, shape {images.shape}; expected 1 (gray), 3 "
            "(RGB) or 4 (RGBA), last: [N, H, W, C]"
        )
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        check_image_dtype(images, name)
    rows = np.unique(np.linspace(0, len(images) - 1, min(_SAMPLE, len(images)), dtype=int))
    sample = np.asarray(images[rows]).reshape(len(rows), -1)
    # The comparison is False for NaN as well.
    good = np.all((sample >= 0) & (sample <= 1), axis=1)
    if good.mean() < 0.5:
        raise ValueError(
            f"{name}: float pixels lie in [{np.nanmin(sample):g}, {np.nanmax(sample):g}] in "
            f"{np.sum(~good)} of {len(rows)} images looked at; expected [0, 1]. Divide 0..255 "
            "images by 255, undo a normalization, and remove NaN"
        )
    return images


def as_labels(
    labels: Any, class_names: Sequence[Any] | None, name: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns labels as int32 [N] in [0, K), and the names of the K classes.

    Args:
        labels: integers, texts, or one-hot rows; see `labels.encode`.
        class_names: names of the numbers 0, 1, ...; None takes the labels themselves. Integers
            then stay as they are unless more than half of the numbers below the largest are unused.
        name: what to call the labels in a message.

    Raises:
        ValueError: see `labels.encode`; for negative integers, labels beyond `class_names`, and
            names that are not all different texts.
    """
    numbers, classes = labels_.encode(labels, name)
    if class_names is not None:
        names = tuple(display_name(str(text)) for text in class_names)
        _check_names(names, name)
        if classes.dtype.kind in "US":
            position = {text: number for number, text in enumerate(names)}
            texts = _texts(classes)
            if set(texts) <= set(names):
                return np.array([position[text] for text in texts], np.int32)[numbers], names
            unknown = sorted(set(texts) - set(names))
            raise ValueError(
                f"{name}: labels {listing(map(repr, unknown), 3)} are none of the class names "
                f"{listing(map(repr, names), 3)}"
            )
        labels_.check_range(classes, len(names), name)
        return classes.astype(np.int32)[numbers], names
    if classes.dtype.kind == "b":
        return numbers, tuple(map(str, classes.tolist()))
    if classes.dtype.kind in "US":
        names = _texts(classes)
        _check_names(names, name)
        return numbers, names
    labels_.check_range(classes[:1], None, name)
    largest = int(classes[-1])
    if largest < 2 * len(classes) + 10:
        return classes.astype(np.int32)[numbers], tuple(map(str, range(largest + 1)))
    return numbers, tuple(map(str, classes.tolist()))


def _texts(classes: np.ndarray) -> tuple[str, ...]:
    return tuple(
        display_name(c.decode("utf-8", "surrogateescape") if isinstance(c, bytes) else c)
        for c in classes.tolist()
    )


def _check_names(names: tuple[str, ...], name: str) -> None:
    if len(set(names)) < len(names):
        raise ValueError(
            f"{name}: class names are not all different: {listing(map(repr, sorted(names)))}"
        )
