"""CIFAR-10 and MNIST from tensorflow-datasets or from an .npz file.

tensorflow-datasets (TFDS) reads its array_record folders without TensorFlow, but writes them
only with it; `jaxpoison.data.prepare` writes them without. Nothing here uses the network.
TFDS, array_record and Pillow are imported when a folder is read, so a machine without them can
still use an .npz file.
"""

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpoison.data import catalogue
from jaxpoison.data.dataset import Dataset, Splits, check, split

NUM_VALIDATION = 1_000


class MissingDataError(FileNotFoundError):
    """A data set is on none of the paths where it was looked for."""


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


def load(name: str, *, data_dir: str | os.PathLike[str] | None = None, seed: int = 0) -> Splits:
    """Returns a data set, its training part split into training and validation.

    The validation set takes 1,000 images of the official training set (see `dataset.split`), so
    "cifar10" gives 49,000 / 1,000 / 10,000 images and "mnist" gives 59,000 / 1,000 / 10,000.

    Args:
        name: "cifar10" or "mnist".
        data_dir: see `read`.
        seed: of the split.

    Raises:
        MissingDataError: if the data are not there; the message says how to get them.
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
            test_labels; images are uint8 [N, H, W, C], or [N, H, W] if grey.

    Raises:
        MissingDataError: if the data are not there; the message says how to get them.
        ValueError: for an unknown name or unusable files.
    """
    facts = catalogue.entry(name)
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    archive = root if root.suffix == ".npz" else root / f"{name}.npz"
    folder = root / name
    if archive.is_file():
        return _read_npz(archive, facts)
    version = _newest_version(folder)
    if version is None:
        raise MissingDataError(_missing(name, facts, root, archive, folder))
    return _read_tfds(version, facts)


def default_data_dir() -> Path:
    """Returns $TFDS_DATA_DIR if set, else ~/tensorflow_datasets, the default of TFDS."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def is_array_record(info: Path) -> bool:
    """Returns whether a dataset_info.json describes array_record files, which need no TensorFlow.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        # Early versions of TFDS name no format; they knew only TFRecord, which needs TensorFlow.
        return json.loads(info.read_text()).get("fileFormat") == "array_record"
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{info} is not what TFDS writes ({error}); delete the folder {info.parent} and "
            "prepare it again"
        ) from error


def _newest_version(folder: Path) -> Path | None:
    """Returns the newest `folder/<version>` in array_record format, or None."""
    versions = []
    for info in folder.glob("*/dataset_info.json"):
        numbers = info.parent.name.split(".")
        # TFDS writes into "incomplete.*" folders first; those are no versions.
        if all(number.isdigit() for number in numbers) and is_array_record(info):
            versions.append((tuple(map(int, numbers)), info.parent))
    return max(versions)[1] if versions else None


def _read_tfds(folder: Path, facts: catalogue.Entry) -> Original:
    try:
        import PIL.Image  # noqa: F401  (TFDS decodes with it, and names it less clearly)
        import tensorflow_datasets as tfds
        from array_record.python import array_record_data_source  # noqa: F401  (the same)
    except ImportError as error:
        raise ImportError(
            f"reading {folder} needs tensorflow-datasets, array_record and pillow ({error}). "
            "Install them with `pip install tensorflow-datasets array_record pillow`, or pass an "
            ".npz file as data_dir (see jaxpoison.data.load)"
        ) from error
    # From the folder, not by name: any version that was prepared will do.
    builder: Any = tfds.builder_from_directory(folder)
    train, test = (
        _read_records(
            builder.as_data_source(split=part), f"{facts.title} {part} set in {folder}", facts
        )
        for part in ("train", "test")
    )
    source = f"{facts.title} from tensorflow-datasets ({folder.parent.name} {folder.name})"
    return Original(train, test, source)


def _read_records(records: Any, name: str, facts: catalogue.Entry) -> Dataset:
    """Returns all records of a TFDS data source, sorted by id where they have one."""
    try:
        # All at once: one read for each record takes twice as long.
        examples = records.__getitems__(range(len(records)))
    except Exception as error:  # array_record and Pillow raise many types for damaged files
        raise ValueError(
            f"{name}: cannot be read ({type(error).__name__}: {error}); a file may be damaged: "
            "delete the folder and prepare it again"
        ) from error
    if examples and "id" in examples[0]:
        examples.sort(key=lambda example: int(example["id"].decode().rsplit("_", 1)[1]))
    dataset = Dataset(
        np.stack([example["image"] for example in examples]),
        np.array([example["label"] for example in examples], np.int32),
    )
    check(dataset, facts.num_classes, name)
    return dataset


def _read_npz(path: Path, facts: catalogue.Entry) -> Original:
    needed = [f"{part}_{kind}" for part in ("train", "test") for kind in ("images", "labels")]
    try:
        # Opened here, since np.load leaves a damaged file open.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one bare array, as .npy files do")
            names = archive.files
            missing = [key for key in needed if key not in names]
            arrays = {} if missing else {key: archive[key] for key in needed}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from error
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it must hold {', '.join(needed)} "
            f"(it holds {', '.join(names) or 'none of them'})"
        )
    train, test = (
        _from_arrays(arrays[f"{part}_images"], arrays[f"{part}_labels"], f"{path} {part}", facts)
        for part in ("train", "test")
    )
    return Original(train, test, f"{facts.title} from {path.name}")


def _from_arrays(
    images: np.ndarray, labels: np.ndarray, name: str, facts: catalogue.Entry
) -> Dataset:
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != facts.image_shape:
        raise ValueError(
            f"{name}_images are {images.dtype} {images.shape}; expected uint8 "
            f"[N, {', '.join(map(str, facts.image_shape))}]"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}_labels are {labels.dtype}; expected integers")
    # Compared before the cast, which would wrap a huge label around.
    if labels.size and not 0 <= labels.min() <= labels.max() < facts.num_classes:
        raise ValueError(
            f"{name}_labels lie in {labels.min()}..{labels.max()}; "
            f"expected 0..{facts.num_classes - 1}"
        )
    dataset = Dataset(images, labels.astype(np.int32))
    check(dataset, facts.num_classes, name)
    return dataset


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
