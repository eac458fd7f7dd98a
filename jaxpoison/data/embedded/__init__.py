"""Real images inside the package: a lossless slice of CIFAR-10 and of MNIST.

Enough to try every part of the library without a network or a download; not enough to
reproduce published numbers. Each part of a data set is one sheet, `<name>-<part>.webp`, on which
the images stand in rows of `COLUMNS`; `<name>-labels.npz` holds their labels and their indices in
the full set. `make.py` writes the files, README.md describes where the images come from.
"""

import importlib.resources
import io

import numpy as np

from jaxpoison.data import catalogue
from jaxpoison.data.dataset import Dataset, Splits, split

COLUMNS = 50
NUM_VALIDATION = 500


def load_embedded(name: str, *, seed: int = 0) -> Splits:
    """Returns the slice of a data set that ships with the package.

    "cifar10" gives 2,500 / 500 / 1,000 images, "mnist" gives 5,000 / 500 / 2,000. Training and
    validation images are a class-balanced part of the official training set, split at random
    (see `dataset.split`); test images are a class-balanced part of the official test set.

    Args:
        name: "cifar10" or "mnist".
        seed: of the split.

    Raises:
        ValueError: for an unknown name.
    """
    facts = catalogue.entry(name)
    pool, _ = read_part(name, "train")
    test, _ = read_part(name, "test")
    train, validation = split(pool, NUM_VALIDATION, seed)
    return Splits(
        train=train,
        validation=validation,
        test=test,
        num_classes=facts.num_classes,
        class_names=facts.class_names,
        name=name,
        source=f"embedded slice of {facts.title}",
    )


def read_part(name: str, part: str) -> tuple[Dataset, np.ndarray]:
    """Returns the embedded images of one official set and their indices in it.

    Args:
        name: "cifar10" or "mnist".
        part: "train" or "test".

    Returns:
        The images, uint8 [N, H, W, C], with labels int32 [N], and indices int32 [N] into the
        full set as `readers.read` gives it from a TFDS folder.
    """
    # Pillow is imported here for the sake of machines that use .npz files only.
    from PIL import Image

    facts = catalogue.entry(name)
    files = importlib.resources.files(__name__)
    with np.load(
        io.BytesIO((files / f"{name}-labels.npz").read_bytes()), allow_pickle=False
    ) as archive:
        labels = archive[f"{part}_labels"].astype(np.int32)
        indices = archive[f"{part}_indices"].astype(np.int32)
    height, width, channels = facts.image_shape
    mode = "L" if channels == 1 else "RGB"
    with Image.open(io.BytesIO((files / f"{name}-{part}.webp").read_bytes())) as sheet:
        pixels = np.asarray(sheet.convert(mode))
    grid = pixels.reshape(-1, height, COLUMNS, width, channels)
    images = np.ascontiguousarray(grid.swapaxes(1, 2)).reshape(-1, *facts.image_shape)
    return Dataset(images, labels), indices
