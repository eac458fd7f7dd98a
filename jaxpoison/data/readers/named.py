"""The data sets that are found by name, CIFAR-10 and MNIST, in a folder or an .npz file."""

import os
from pathlib import Path

from jaxpoison.data import catalogue
from jaxpoison.data.dataset import Original, Splits, split
from jaxpoison.data.readers import npz, tfds

NUM_VALIDATION = 1_000


class MissingDataError(FileNotFoundError):
    """A data set is on none of the paths where it was looked for."""


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None, seed: int = 0) -> Splits:
    """Returns a data set, its training part split into training and validation.

    The validation set takes 1,000 images of the official training set (see `dataset.split`), so
    "cifar10" gives 49,000 / 1,000 / 10,000 images and "mnist" gives 59,000 / 1,000 / 10,000.

    Args:
        name: "cifar10" or "mnist".
        data_dir: see `read`.
        seed: of the split.

    Raises:
        MissingDataError: if the data are not there; the message tells how to get them.
        ValueError: for an unknown name or unusable files.
    """
    facts = catalogue.entry(name)
    original = read(name, data_dir=data_dir)
    num_train = len(original.train.labels)
    if num_train <= NUM_VALIDATION:
        raise ValueError(
            f"{original.source}: holds {num_train} training images; more than {NUM_VALIDATION} "
            "are needed, since that many are set apart for validation"
        )
    train, validation = split(original.train, NUM_VALIDATION, seed)
    return Splits(
        train=train,
        validation=validation,
        test=original.test,
        num_classes=facts.num_classes,
        class_names=facts.class_names,
        name=name,
        source=original.source,
    )


def read(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Original:
    """Returns the official training and test set of a data set.

    CIFAR-10 comes in its original order. TFDS shuffles MNIST and keeps no trace of the original
    order, so MNIST comes in the order of the records, or of the .npz file.

    Args:
        name: "cifar10" or "mnist".
        data_dir: an .npz file; or a folder that holds `<name>.npz`, which goes first, or the
            TFDS folder `<name>/<version>`. By default $TFDS_DATA_DIR, else
            ~/tensorflow_datasets. An .npz file holds train_images, train_labels, test_images and
            test_labels; images are uint8 [N, H, W, C], or [N, H, W] if gray.

    Raises:
        MissingDataError: if the data are not there; the message tells how to get them.
        IsADirectoryError, NotADirectoryError: for a folder in the place of a file, or a file in
            that of a folder.
        ValueError: for an unknown name or unusable files.
        ImportError: for a TFDS folder, if TFDS is not installed.
    """
    facts = catalogue.entry(name)
    root = tfds.default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    archive = root if root.suffix == ".npz" else root / f"{name}.npz"
    if archive.exists():
        return npz.read(archive, facts)
    if root.is_file():
        raise NotADirectoryError(
            f"{root} is a file; expected an .npz file or a folder. From the original archives, "
            f"python -m jaxpoison.data.prepare {name} --archives {root.parent} makes such a folder"
        )
    folder = root / name
    version = tfds.newest_version(folder)
    if version is None:
        raise MissingDataError(_missing(name, facts, root, archive, folder))
    return tfds.read(version, facts)


def _missing(name: str, facts: catalogue.Entry, root: Path, archive: Path, folder: Path) -> str:
    looked = [str(archive)]
    if archive != root:
        looked.append(f"{folder}{os.sep}<version>{os.sep}dataset_info.json (array_record)")
    target = root.parent if archive == root else root
    return (
        f"{facts.title} was not found. Looked for {' and '.join(looked)}. Three ways to get it:\n"
        f"  with a network:  python -m jaxpoison.data.prepare {name} --data-dir {target}\n"
        f"  from the original archives in a folder DIR:  python -m jaxpoison.data.prepare {name} "
        f"--data-dir {target} --archives DIR\n"
        "  from an .npz file with train_images, train_labels, test_images and test_labels:  "
        "pass its path as data_dir\n"
        "Or try the library on the real images that ship with it, which need nothing: "
        f'jaxpoison.data.load_embedded("{name}")'
    )
