"""What is fixed about each data set that the package can find by name."""

import math
from typing import NamedTuple

# A file that claims more than this multiple of the official number of images is not read.
MOST_COPIES = 4


class Entry(NamedTuple):
    """Facts about one data set.

    Attributes:
        title: the name to print.
        image_shape: (H, W, C).
        class_names: one name for each label, in the order of the labels.
        num_train: images in the official training set.
        num_test: images in the official test set.
    """

    title: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    num_train: int
    num_test: int

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def image_bytes(self) -> int:
        """Bytes of one uint8 image."""
        return math.prod(self.image_shape)


ENTRIES = {
    "cifar10": Entry(
        title="CIFAR-10",
        image_shape=(32, 32, 3),
        class_names=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        num_train=50_000,
        num_test=10_000,
    ),
    "mnist": Entry(
        title="MNIST",
        image_shape=(28, 28, 1),
        class_names=tuple("0123456789"),
        num_train=60_000,
        num_test=10_000,
    ),
}


def entry(name: str) -> Entry:
    """Returns the facts about data set `name`.

    Raises:
        ValueError: if the name is unknown; the message lists the known ones.
    """
    if name not in ENTRIES:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(ENTRIES)}")
    return ENTRIES[name]
