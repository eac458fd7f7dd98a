"""Labeled images on the host: their types, their checks and their split.

Images are NumPy arrays, uint8 in 0..255 or float32 in [0, 1], shaped [N, H, W, C]; labels are
int32 [N]. `as_dataset` makes this of what a user holds, `check` looks at every value of it.
"""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.data import labels as labels_
from jaxpoison.data import pixels


class Dataset(NamedTuple):
    """Images and their labels.

    Attributes:
        images: uint8 [N, H, W, C] in 0..255, or float32 [N, H, W, C] in [0, 1].
        labels: int32 [N], each in [0, number of classes).
        ids: int32 [N], the row of each example in the set as collected, -1 for examples that a
            defense has added. None if unknown; training then numbers the rows itself.
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


class Original(NamedTuple):
    """The official training and test set of a data set, not yet split.

    Attributes:
        train: images uint8 [N, H, W, C] and labels int32 [N].
        test: the same for the test set.
        source: one line for people: where the images come from.
    """

    train: Dataset
    test: Dataset
    source: str


def split(pool: Dataset, num_validation: int, seed: int) -> tuple[Dataset, Dataset]:
    """Returns (train, validation): `pool` in random order, cut in two.

    The permutation is uniform and not stratified, as in the released HINT code: the first
    N - num_validation examples of it are for training, the others for validation.

    Args:
        pool: N labeled images, or what `as_dataset` takes.
        num_validation: size of the validation set, 1 to N - 1.
        seed: of the permutation; the same seed gives the same split.

    Raises:
        TypeError, ValueError: as `as_dataset`; ValueError also if either part would be empty.
    """
    pool = as_dataset(pool, "pool")
    num_validation, num_examples = operator.index(num_validation), len(pool.labels)
    if not 0 < num_validation < num_examples:
        raise ValueError(
            f"cannot keep {num_validation} of {num_examples} examples for validation: both parts "
            f"need at least one; choose num_validation between 1 and {num_examples - 1}"
        )
    order = np.random.default_rng(seed).permutation(num_examples)
    train, validation = np.split(order, [num_examples - num_validation])
    return pool.take(train), pool.take(validation)


def as_dataset(value: Any, name: str = "training set") -> Dataset:
    """Returns `value` as a `Dataset` of the right types, or raises.

    Conversions lose nothing: labels as in `labels.as_class_numbers`; lists and stacks of images of
    one size to one array; floating point in [0, 1] to float32. Arrays that are right already are
    not copied. The values themselves are checked by `check`.

    Args:
        value: a `Dataset`, a pair (images, labels), with ids a triple, or a set that knows its
            `dataset`, such as a `PoisonedDataset`. Arrays may be of NumPy, JAX or anything else
            that NumPy reads.
        name: what to call the data set in a message.

    Raises:
        TypeError: for anything else.
        ValueError: for images of mixed sizes, masked or missing values, labels that are no class
            numbers, or pixels that no conversion keeps.
    """
    given: Any = getattr(value, "dataset", value)
    if type(given) in (tuple, list) and len(given) in (2, 3):
        given = Dataset(*given)
    _check_kind(given, name)
    images: Any = _as_images(given.images, name)
    labels = given.labels
    if not (_is_array(labels) and labels.dtype == np.int32 and labels.ndim == 1):
        labels = labels_.as_class_numbers(labels, None, name)
    if isinstance(given, Dataset):
        return given._replace(images=images, labels=labels)
    return Dataset(images, labels)


def check(dataset: Dataset, num_classes: int | None = None, name: str = "training set") -> None:
    """Raises an error that explains what is wrong with `dataset`, if anything is.

    Args:
        dataset: see `Dataset` for what is allowed.
        num_classes: labels must lie in [0, num_classes); None asks only that none is negative.
        name: what to call the data set in the message.

    Raises:
        TypeError: for anything but a data set of arrays.
        ValueError: wrong rank, layout, dtype or length, no examples, labels out of range, or
            pixels that are not finite or outside [0, 1].
    """
    _check_kind(dataset, name)
    for part in ("images", "labels"):
        if not _is_array(getattr(dataset, part)):
            raise TypeError(
                f"{name}: {part} are a {type(getattr(dataset, part)).__name__}; expected an array. "
                "data.as_dataset(...) converts them"
            )
    images, labels = np.asarray(dataset.images), np.asarray(dataset.labels)
    check_layout(images, name)
    check_image_dtype(images, name)
    if labels.dtype != np.int32 or labels.ndim != 1:
        # Raises for what no conversion can save, with a reason of its own.
        if len(labels):
            labels_.as_class_numbers(labels, num_classes, name)
        raise ValueError(
            f"{name}: labels are {labels.dtype} of shape {labels.shape}; expected int32 [N], one "
            "class number for each image. Use data.labels.as_class_numbers(labels)"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{name}: {len(images)} images but {len(labels)} labels; give one label to each image"
        )
    if images.size == 0:
        raise ValueError(
            f"{name}: is empty (images {images.shape}); at least one image of one pixel is needed"
        )
    labels_.check_range(labels, num_classes, name)
    ids = getattr(dataset, "ids", None)
    if ids is not None and not (_is_array(ids) and ids.shape == labels.shape):
        raise ValueError(
            f"{name}: ids have shape {np.shape(ids)}; expected an array {labels.shape}, one id for "
            "each image, or None"
        )
    if images.dtype == np.float32:
        pixels.check_range(images, name)


def check_trusted(
    dataset: Dataset, num_classes: int | None = None, name: str = "validation set"
) -> None:
    """As `check`, and raises a ValueError for a validation set that holds a single class.

    A gradient of one class alone pulls every prediction towards that class, so the influence
    measured against it tells little about what helps or harms the model.

    Args:
        dataset: the trusted examples.
        num_classes: see `check`.
        name: what to call the data set in the message.

    Raises:
        TypeError, ValueError: as `check`; ValueError also if fewer than two classes are present.
    """
    check(dataset, num_classes, name)
    present = np.unique(dataset.labels)
    if len(present) < 2:
        raise ValueError(
            f"{name}: a one-class validation set (all {len(dataset.labels)} labels are "
            f"{present[0]}); add trusted examples of the other classes"
        )


def check_alike(trusted: Dataset, train: Dataset, num_classes: int | None = None) -> None:
    """Raises a ValueError unless a network for `train` can be given the images of `trusted`.

    Args:
        trusted: the trusted examples, checked by `check_trusted`.
        train: the training set, checked by `check`.
        num_classes: of the network. Where it is not known the largest label of `train` bounds those
            of `trusted`: a network need not have an output for a class that nothing is trained on.

    Raises:
        ValueError: if image sizes differ, or trusted labels go beyond the network's.
    """
    if trusted.images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"trusted images are {trusted.images.shape[1:]}, training images "
            f"{train.images.shape[1:]}; give both the same size and channels"
        )
    bound = int(np.max(train.labels)) + 1 if num_classes is None else num_classes
    labels_.check_range(np.asarray(trusted.labels), bound, "trusted set")


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array) and not isinstance(value, np.ma.MaskedArray)


def _check_kind(value: Any, name: str) -> None:
    """Raises a TypeError in plain words unless `value` has images and labels."""
    if hasattr(value, "images") and hasattr(value, "labels"):
        return
    advice = "give data.Dataset(images, labels), or the pair (images, labels)"
    if isinstance(value, Splits):
        advice = "give one of its parts, such as splits.train"
    elif _is_array(value):
        advice = f"labels are missing: {advice}"
    raise TypeError(f"{name} is a {type(value).__name__}; {advice}")


def _as_images(images: Any, name: str) -> np.ndarray | jax.Array:
    """Returns images as one array of uint8 or float32 where that is possible without loss."""
    if np.ma.is_masked(images):
        raise ValueError(f"{name}: images are masked; fill the mask, or leave these images out")
    if not _is_array(images) or images.dtype == np.object_:
        images = _stacked(images, name)
    if images.ndim != 4 or images.dtype in (np.uint8, np.float32):
        return images
    if jnp.issubdtype(images.dtype, jnp.floating) and images.size:
        pixels.check_range(np.asarray(images), name)  # before the cast, which would round
        return images.astype(np.float32)
    return images


def _stacked(images: Any, name: str) -> np.ndarray:
    """Returns a list of images, or anything that NumPy reads, as one array."""
    if isinstance(images, list | tuple) or getattr(images, "dtype", 0) == np.object_:
        if not len(images):
            raise ValueError(f"{name}: is empty; at least one image is needed")
        arrays = [_read(image, name) for image in images]
        first = arrays[0]
        for index, array in enumerate(arrays):
            if array.shape != first.shape or array.dtype != first.dtype:
                raise ValueError(
                    f"{name}: images of mixed sizes or types: image 0 is {first.dtype} "
                    f"{first.shape}, image {index} is {array.dtype} {array.shape}; resize or crop "
                    "all to one size"
                )
        return np.stack(arrays)
    return _read(images, name)


def _read(images: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(images)
    except Exception as error:  # what an object's own conversion raises: tensors on devices do
        raise TypeError(
            f"{name}: images of type {type(images).__name__} cannot be read as an array; convert "
            "them to NumPy"
        ) from error
    if array.dtype == np.object_ or not array.ndim:
        raise TypeError(
            f"{name}: images are of type {type(images).__name__}; expected one array "
            "[N, H, W, C], or a list of images of one size"
        )
    return array


def check_layout(images: np.ndarray, name: str) -> None:
    """Raises a ValueError unless images look like [N, H, W, C]; `name` is for the message."""
    shape = images.shape
    if images.dtype == np.object_:
        _stacked(images, name)
    if images.ndim != 4:
        advice = "Reshape them, one image each"
        if images.ndim == 3 and shape[-1] in (1, 3):
            advice = "Add an axis to a single image (images[None])"
        elif images.ndim == 3:
            advice = "Add a channel axis to gray images (images[..., None])"
        elif images.ndim == 2:
            advice = "Rows of pixels need images.reshape(-1, H, W, C)"
        raise ValueError(f"{name}: images have shape {shape}; expected [N, H, W, C]. {advice}")
    if shape[1] in (1, 3) and shape[3] not in (1, 3) and shape[2] > 1:
        raise ValueError(
            f"{name}: images look like [N, C, H, W]; use images.transpose(0, 2, 3, 1); their shape "
            f"is {shape}"
        )


def check_image_dtype(images: np.ndarray, name: str) -> None:
    """Raises a ValueError with advice that keeps the pixels' meaning, or without advice."""
    if images.dtype in (np.uint8, np.float32):
        return
    advice = ""
    if images.size and jnp.issubdtype(images.dtype, jnp.floating):
        low, high = float(images.min()), float(images.max())
        advice = "Use images.astype(np.float32)"
        if not (np.isfinite(low) and np.isfinite(high)):
            advice = "Some pixels are NaN or infinite: remove or repair these images"
        elif low < 0 or high > 1:
            advice = f"These lie in [{low:g}, {high:g}]: divide 0..255 images by np.float32(255)"
    elif images.dtype == bool:
        advice = "Use images.astype(np.float32)"
    elif images.size and images.dtype.kind in "iu":
        low, high = images.min(), images.max()
        if low < 0:
            advice = f"These lie in {low}..{high}: scale them to [0, 1] as they are meant"
        elif high <= 1:
            advice = "If 1 is white, make them float32; if 255 is, uint8"
        elif high <= 255:
            advice = "They lie in 0..255: use images.astype(np.uint8)"
        else:
            advice = (
                f"They reach {high}: divide by the value of white, for instance "
                f"(images / {2 ** int(high).bit_length() - 1}).astype(np.float32)"
            )
    raise ValueError(
        f"{name}: images are {images.dtype}; expected uint8 in 0..255 or float32 in [0, 1]. "
        f"{advice or 'Convert them to pixels'}"
    )
