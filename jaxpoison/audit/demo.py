"""Data for `jaxpoison demo`: the embedded images with faults that are known, and what was found."""

from typing import NamedTuple

import numpy as np

from jaxpoison import runs
from jaxpoison.audit._audit import Audit, Settings
from jaxpoison.data import Splits
from jaxpoison.data.readers import Source

SETTINGS = Settings(worth=False, epochs=4)
"""What takes minutes is left out: retraining, and three quarters of the epochs for as many images,
without which as many of these faults are found."""
_TRUSTED_A_CLASS = 5


class Planted(NamedTuple):
    """Faults in the demo's data.

    Attributes:
      rows: int [P], the images with a fault.
      names: text [P], which fault: `wrong label`, `backdoor` or `copy`.
    """

    rows: np.ndarray
    names: np.ndarray


def data(splits: Splits) -> tuple[Source, tuple[np.ndarray, np.ndarray], Planted]:
    """Returns (training images with faults, trusted images and labels, the faults).

    3% of the labels are changed at random; 2% of the images get a checkered patch in a corner and
    the label of the first class; 1% are replaced by copies of images of other classes.

    Args:
      splits: of uint8 images of 32x32 in 10 classes.
    """
    random = np.random.default_rng(0)
    images, labels = np.array(splits.train.images), np.array(splits.train.labels)
    clean = labels.copy()
    count = len(labels)
    order = random.permutation(np.flatnonzero(labels != 0))
    wrong, rest = np.split(order, [round(0.03 * count)])
    patched, rest = np.split(rest, [round(0.02 * count)])
    copied = rest[: round(0.01 * count)]
    labels[wrong] = (labels[wrong] + random.integers(1, 10, len(wrong))) % 10
    board = np.indices((3, 3)).sum(0) % 2 == 0
    images[patched, -4:-1, 2:5] = np.where(board, 255, 0)[..., None]
    labels[patched] = 0
    for row in copied:
        images[row] = images[random.choice(np.flatnonzero(clean != clean[row]))]
    held = splits.validation
    first = np.concatenate(
        [np.flatnonzero(held.labels == label)[:_TRUSTED_A_CLASS] for label in range(10)]
    )
    names = ["wrong label"] * len(wrong) + ["backdoor"] * len(patched) + ["copy"] * len(copied)
    source = Source.from_arrays(images, labels, class_names=splits.class_names)
    return (
        source,
        (np.asarray(held.images)[first], np.asarray(held.labels)[first]),
        Planted(np.concatenate([wrong, patched, copied]), np.array(names)),
    )


def table(result: Audit, planted: Planted) -> str:
    """Returns what was found of each planted fault, for a terminal."""
    flagged = np.zeros(len(result.source), bool)
    flagged[result.source_rows[result.flagged]] = True
    groups = {name: planted.rows[planted.names == name] for name in dict.fromkeys(planted.names)}
    groups["others"] = np.setdiff1d(np.arange(len(flagged)), planted.rows)
    lines = [
        [name, f"{np.count_nonzero(flagged[rows]):,}", f"of {len(rows):,}"]
        for name, rows in groups.items()
    ]
    title = "Of the faults that the demo put into the data, the audit flagged:"
    return f"{title}\n{runs.columns(lines, right=(1,))}"
