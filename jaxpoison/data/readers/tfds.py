"""CIFAR-10 and MNIST from folders of tensorflow-datasets (TFDS), without TensorFlow.

TFDS reads its array_record folders without TensorFlow, but writes them only with it;
`jaxpoison.data.prepare` writes them without. TFDS, array_record and Pillow are imported when a
folder is read. Nothing here uses the network.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxpoison.core.extras import require
from jaxpoison.data import catalogue
from jaxpoison.data.dataset import Dataset, Original, check
from jaxpoison.data.labels import as_class_numbers

# Keys under which features.json names classes of Python; TFDS imports the modules they are in.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_TRUSTED_PREFIX = "tensorflow_datasets."


def default_data_dir() -> Path:
    """Returns $TFDS_DATA_DIR if set, else ~/tensorflow_datasets, the default of TFDS."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def is_array_record(info: Path) -> bool:
    """Returns whether a dataset_info.json describes array_record files, which need no TensorFlow.

    Raises:
        ValueError: if the file is damaged.
    """
    # Early versions of TFDS name no format; they knew only TFRecord, which needs TensorFlow.
    return _read_json(info).get("fileFormat") == "array_record"


def newest_version(folder: Path) -> Path | None:
    """Returns the newest `folder/<version>` in array_record format, or None."""
    versions = []
    for info in folder.glob("*/dataset_info.json"):
        numbers = info.parent.name.split(".")
        # TFDS writes into "incomplete.*" folders first; those are no versions.
        if all(number.isdigit() for number in numbers) and is_array_record(info):
            versions.append((tuple(map(int, numbers)), info.parent))
    return max(versions)[1] if versions else None


def read(folder: Path, facts: catalogue.Entry) -> Original:
    """Returns the sets in `<name>/<version>`, a folder in array_record format.

    Raises:
        ImportError: if TFDS is missing; the message names the extra.
        ValueError: if the folder is damaged, not of this data set, or names code outside of TFDS.
    """
    tfds = import_tfds(f", or pass an .npz file as data_dir (reading {folder})")
    check_features(folder)
    try:
        # From the folder, not by name: any version that was prepared will do.
        builder = tfds.builder_from_directory(folder)
        sources = [builder.as_data_source(split=part) for part in ("train", "test")]
    except Exception as error:  # protobuf, json and TFDS raise many kinds for damaged files
        raise damaged(f"{facts.title} in {folder}", error) from error
    train, test = (
        _read_records(source, f"{facts.title} {part} set in {folder}", facts, official)
        for source, part, official in zip(
            sources, ("train", "test"), (facts.num_train, facts.num_test), strict=True
        )
    )
    source = f"{facts.title} from tensorflow-datasets ({folder.parent.name} {folder.name})"
    return Original(train, test, source)


def import_tfds(otherwise: str = "") -> Any:
    """Returns the module tensorflow_datasets, after all that it needs to read images.

    Raises:
        ImportError: if something is missing; the message names the extra.
    """
    # TFDS imports these when it needs them, and names them less clearly.
    for module in ("PIL.Image", "importlib_resources", "array_record.python"):
        require(module, extra="tfds", otherwise=otherwise)
    return require("tensorflow_datasets", extra="tfds", otherwise=otherwise)


def check_features(folder: Path) -> None:
    """Raises a ValueError if features.json has TFDS import anything that is not its own."""
    path = folder / "features.json"
    for name in _class_names(_read_json(path)):
        if not (isinstance(name, str) and name.startswith(_TRUSTED_PREFIX)):
            raise ValueError(
                f"{path} names the Python class {name!s:.200}, which tensorflow-datasets would "
                f"import; expected classes in {_TRUSTED_PREFIX}*. Delete the folder and prepare "
                "it again"
            )


def _class_names(features: Any) -> Iterator[Any]:
    """Yields all names of classes in a features.json, those in JSON within its texts included."""
    found = [features]
    while found:
        value = found.pop()
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(ValueError):
                found.append(json.loads(value))
        elif isinstance(value, list):
            found += value
        elif isinstance(value, dict):
            # A feature that is itself called "type" is a dict, and is looked into like any other.
            yield from (
                value[key]
                for key in _CLASS_KEYS
                if value.get(key) is not None and not isinstance(value[key], dict)
            )
            found += value.values()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise damaged(str(path), error) from error
    if not isinstance(value, dict):
        raise damaged(str(path), TypeError(f"a {type(value).__name__}, not an object"))
    return value


def _read_records(records: Any, name: str, facts: catalogue.Entry, official: int) -> Dataset:
    """Returns all records of a TFDS data source, sorted by id where they have one."""
    if len(records) > catalogue.MOST_COPIES * official:
        raise ValueError(
            f"{name}: claims {len(records):,} images, officially {official:,}; delete the folder "
            "and prepare it again"
        )
    try:
        # All at once: one read for each record takes twice as long.
        examples = records.__getitems__(range(len(records)))
        if examples and "id" in examples[0]:
            examples.sort(key=lambda example: int(example["id"].decode().rsplit("_", 1)[1]))
        images = np.stack([example["image"] for example in examples])
        labels = np.array([example["label"] for example in examples])
    except Exception as error:  # array_record and Pillow raise many types for damaged files
        raise damaged(name, error) from error
    if images.dtype != np.uint8 or images.shape[1:] != facts.image_shape:
        raise ValueError(
            f"{name}: images are {images.dtype} {images.shape[1:]}, officially uint8 "
            f"{facts.image_shape}; delete the folder and prepare it again"
        )
    dataset = Dataset(images, as_class_numbers(labels, facts.num_classes, name))
    check(dataset, facts.num_classes, name)
    return dataset


def damaged(what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{what} is not what TFDS writes and cannot be read ({type(error).__name__}: {error}); "
        "delete the folder and prepare it again"
    )
