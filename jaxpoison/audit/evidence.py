"""What is measured once about every image, and what all checks read.

A row is an image that could be read, in the order of `Evidence.ids`.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

SIZE = 32
"""Height and width of the small images that are kept."""


class Training(NamedTuple):
    """A network trained on the data under audit: the witness that this data can have poisoned.

    E epochs, N rows, K classes.

    Attributes:
      margins: float32 [E, N], logit of the given label minus the largest other logit, after each
        epoch and without augmentation. Negative where the network disagrees with the label.
      losses: float32 [E, N], cross-entropy with the given label, after each epoch.
      probabilities: float32 [N, K], softmax, averaged over epochs.
      features: float32 [N, F], what the linear head sees, after the last epoch.
      vectors: float32 [N, M], means and variances of the channels at every BatchNorm layer
        (arXiv 2403.13523), after the last epoch.
      layers: int32 [M], the layer of each column of `vectors`, counted from 0 at the input.
    """

    margins: np.ndarray
    losses: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray
    vectors: np.ndarray
    layers: np.ndarray


class HeldOut(NamedTuple):
    """What a network learned from one half of the data, on images that it has not seen.

    Attributes:
      accuracy: of the labels of the other half, in [0, 1].
      tested: number of images in that half.
      trusted: of trusted images, in [0, 1].
      num_trusted: number of these.
    """

    accuracy: float
    tested: int
    trusted: float
    num_trusted: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Evidence:
    """N images with their labels, in the terms that checks read. Arrays may be memory-mapped."""

    ids: np.ndarray
    """Text [N], unique: the path below the audited folder, or the row."""
    labels: np.ndarray
    """int32 [N], in [0, K)."""
    class_names: tuple[str, ...]
    """Names of the K classes."""
    images: np.ndarray
    """uint8 [N, S, S, 3], resized to S = 32; gray images have three equal channels."""
    digests: np.ndarray
    """uint8 [N, 32]: SHA-256 of size and decoded pixels; equal for copies of any file format."""
    hashes: np.ndarray
    """uint64 [N, 2]: perceptual hashes, horizontal and vertical differences of 9x8 gray pixels."""
    sizes: np.ndarray
    """int32 [N, 2]: height and width as decoded."""
    embedding: np.ndarray
    """float32 [N, D], rows of unit length: a network that this data cannot have poisoned."""
    trained: Training | None = None
    """The second witness; None where nothing was trained."""
    trusted: "Evidence | None" = None
    """The same of images whose labels are known to be right; same classes, same witnesses."""
    held_out: HeldOut | None = None
    """Of a network trained on half of the data; None without trusted images or training."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)
