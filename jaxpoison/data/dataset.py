"""Labelled images on the host: their types, their checks and their split.

Images are numpy arrays, uint8 in 0..255 or float32 in [0, 1], shaped [N, H, W, C]; labels are
int32 [N]. Nothing here touches a device except `to_float`, which is meant to run under `jit`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Dataset(NamedTuple):
    """Images and their labels.

    Attributes:
        images: uint8 [N, H, W, C] in 0..255, or float32 [N, H, W, C] in [0, 1].
        labels: int32 [N], each in [0, number of classes).
        ids: int32 [N], the row of each example in the set as collected, -1 for examples that a
            defense has added. None where nobody keeps count; training numbers the rows itself.
    """

    images: Any
    labels: Any
    ids: Any = None

    def take(self, rows: slice | np.ndarray) -> "Dataset":
        """Returns these examples, in this order."""
        return jax.tree.map(lambda array: array[rows], self)


class Splits(NamedTuple):
    """A data set as an experiment uses it.

    Attributes:
        train: what may be poisoned and is trained on.
        validation: small and trusted.
        test: touched only to report accuracy.
        num_classes: number of labels.
        class_names: one name for each label, in the order of the labels.
        name: short name, such as "cifar10".
        source: one line for people: where the images come from.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    num_classes: int
    class_names: tuple[str, ...]
    name: str
    source: str


def split(pool: Dataset, num_validation: int, seed: int) -> tuple[Dataset, Dataset]:
    """Returns (train, validation): `pool` in random order, cut in two.

    The permutation is uniform and not stratified, as in the released HINT code: the first
    N - num_validation examples of it are for training, the others for validation.

    Args:
        pool: N labelled images.
        num_validation: size of the validation set, 1 to N - 1.
        seed: of the permutation; the same seed gives the same split.

    Raises:
        ValueError: if either part would be empty.
    """
    num_examples = len(pool.labels)
    if not 0 < num_validation < num_examples:
        raise ValueError(
            f"cannot keep {num_validation} of {num_examples} examples for validation: both parts "
            f"need at least one; choose num_validation between 1 and {num_examples - 1}"
        )
    order = np.random.default_rng(seed).permutation(num_examples)
    train, validation = np.split(order, [num_examples - num_validation])
    return pool.take(train), pool.take(validation)


def check(dataset: Dataset, num_classes: int | None = None, name: str = "training set") -> None:
    """Raises a ValueError that says what is wrong with `dataset`, if something is.

    Args:
        dataset: see `Dataset` for what is allowed.
        num_classes: labels must lie in [0, num_classes); None asks only that none is negative.
        name: what to call the data set in the message.

    Raises:
        ValueError: wrong rank, dtype or length, no examples, labels out of range, or pixels
            that are not finite or outside [0, 1].
    """
    images, labels = np.asarray(dataset.images), np.asarray(dataset.labels)
    if images.ndim != 4:
        raise ValueError(
            f"{name}: images have shape {images.shape}; expected [N, H, W, C]. "
            "Add a channel axis to grey images (images[..., None])"
        )
    if images.dtype not in (np.uint8, np.float32):
        raise ValueError(
            f"{name}: images are {images.dtype}; expected uint8 in 0..255 or float32 in [0, 1]. "
            "Convert them with images.astype(...)"
        )
    if labels.ndim != 1:
        raise ValueError(
            f"{name}: labels have shape {labels.shape}; expected [N], one class number for each "
            "image. Turn one-hot labels into numbers with labels.argmax(-1)"
        )
    if labels.dtype != np.int32:
        raise ValueError(
            f"{name}: labels are {labels.dtype}; expected int32. "
            "Convert them with labels.astype(np.int32)"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{name}: {len(images)} images but {len(labels)} labels; give one label to each image"
        )
    if images.size == 0:
        raise ValueError(
            f"{name}: is empty (images {images.shape}); at least one image of one pixel is needed"
        )
    _check_labels(labels, num_classes, name)
    if images.dtype == np.float32:
        _check_pixels(images, name)


def check_trusted(
    dataset: Dataset, num_classes: int | None = None, name: str = "validation set"
) -> None:
    """As `check`, and raises a ValueError for a validation set that holds a single class.

    A gradient of one class alone pulls every prediction towards that class, so the influence
    measured against it says little about what helps or harms the model.

    Args:
        dataset: the trusted examples.
        num_classes: see `check`.
        name: what to call the data set in the message.

    Raises:
        ValueError: as `check`, or if fewer than two classes are present.
    """
    check(dataset, num_classes, name)
    present = np.unique(dataset.labels)
    if len(present) < 2:
        raise ValueError(
            f"{name}: a one-class validation set (all {len(dataset.labels)} labels are "
            f"{present[0]}); add trusted examples of the other classes"
        )


def to_float(images: ArrayLike) -> jax.Array:
    """Returns float32 images in [0, 1]: uint8 divided by 255, float32 as it is.

    XLA may multiply by 1/255 instead, so the last bit can differ from numpy's division.

    Args:
        images: uint8 in 0..255 or float32 in [0, 1], any shape.

    Raises:
        ValueError: for any other dtype.
    """
    images = jnp.asarray(images)
    if images.dtype == jnp.float32:
        return images
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    raise ValueError(f"images are {images.dtype}; expected uint8 or float32")


def _check_labels(labels: np.ndarray, num_classes: int | None, name: str) -> None:
    upper = np.inf if num_classes is None else num_classes
    wrong = (labels < 0) | (labels >= upper)
    if wrong.any():
        first = int(wrong.argmax())
        allowed = "0, 1, 2, ..." if num_classes is None else f"0 to {num_classes - 1}"
        raise ValueError(
            f"{name}: {wrong.sum()} labels out of range, the first is label {labels[first]} of "
            f"example {first}; expected {allowed}. Renumber the classes or correct num_classes"
        )


def _check_pixels(images: np.ndarray, name: str) -> None:
    low, high = images.min(), images.max()
    # min and max pass a NaN on, so two passes over the pixels answer both questions.
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = ~np.isfinite(images).all(axis=(1, 2, 3))
        raise ValueError(
            f"{name}: {bad.sum()} images hold NaN or infinite pixels, the first is image "
            f"{int(bad.argmax())}; remove or repair them"
        )
    if low < 0 or high > 1:
        raise ValueError(
            f"{name}: float pixels lie in [{low:g}, {high:g}]; expected [0, 1]. Divide 0..255 "
            "images by 255, and leave normalisation to the model"
        )
