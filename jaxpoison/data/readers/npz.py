"""CIFAR-10 and MNIST from an .npz file of four arrays."""

from pathlib import Path

import numpy as np

from jaxpoison.core.files import read_npz
from jaxpoison.data import catalogue
from jaxpoison.data.dataset import Dataset, Original, check
from jaxpoison.data.labels import as_class_numbers

ENTRIES = tuple(f"{part}_{kind}" for part in ("train", "test") for kind in ("images", "labels"))


def read(path: Path, facts: catalogue.Entry) -> Original:
    """Returns the sets in an .npz file with the entries `ENTRIES`; others are not read.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is damaged, lacks an entry, or holds what is no image or label of the
            data set; the message names file and entry.
    """
    most_images = catalogue.MOST_COPIES * (facts.num_train + facts.num_test)
    arrays = read_npz(
        path,
        "an .npz file of images and labels",
        required=ENTRIES,
        optional=(),
        max_bytes=most_images * (facts.image_bytes + 8),
    )
    train, test = (
        _dataset(arrays[f"{part}_images"], arrays[f"{part}_labels"], f"{path} {part}", facts)
        for part in ("train", "test")
    )
    return Original(train, test, f"{facts.title} from {path.name}")


def _dataset(images: np.ndarray, labels: np.ndarray, name: str, facts: catalogue.Entry) -> Dataset:
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != facts.image_shape:
        raise ValueError(
            f"{name}_images are {images.dtype} {images.shape}; expected uint8 "
            f"[N, {', '.join(map(str, facts.image_shape))}]"
        )
    dataset = Dataset(images, as_class_numbers(labels, facts.num_classes, f"{name}_labels"))
    check(dataset, facts.num_classes, name)
    return dataset
