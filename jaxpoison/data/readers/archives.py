"""Readers of the original CIFAR-10 and MNIST archives, with checks that name what is wrong.

CIFAR-10 (binary version) is a row of records of one label byte and 3 x 32 x 32 pixel bytes, the
red plane first. MNIST is in IDX format: a big-endian header, then one byte for each value.
"""

import gzip
import io
import math
import os
import tarfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxpoison.data import catalogue
from jaxpoison.data.dataset import Dataset

CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_FILES = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_RECORD_BYTES = 1 + 3 * 32 * 32
# What is read at most, unpacked: the official files hold a fraction of it.
_MOST_IMAGES = catalogue.MOST_COPIES * 10_000
_MOST_CIFAR10_BYTES = _MOST_IMAGES * _RECORD_BYTES
_MOST_MNIST_BYTES = catalogue.MOST_COPIES * (16 + 60_000 * 28 * 28)
# IDX magic numbers: 0x08 means unsigned bytes, the last byte is the number of axes.
_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801


def find(name: str, folder: str | os.PathLike[str]) -> list[Path]:
    """Returns the paths of the original files of a data set in `folder`.

    Args:
        name: "cifar10" or "mnist".
        folder: holds cifar-10-binary.tar.gz or its unpacked cifar-10-batches-bin (or is that
            folder), or the four MNIST files, with or without ".gz"; `~` stands for home.

    Returns:
        One archive or folder for CIFAR-10; for MNIST four files, in the order of `MNIST_FILES`.

    Raises:
        FileNotFoundError: if something is missing; the message lists it.
        NotADirectoryError: if `folder` is a file.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; give the folder that holds it")
    if name == "cifar10":
        some_file = CIFAR10_FILES["test"][0]
        candidates = [folder / CIFAR10_ARCHIVE, folder / CIFAR10_FOLDER / some_file]
        candidates.append(folder / some_file)
        for path in candidates:
            if path.is_file():
                return [path if path.name == CIFAR10_ARCHIVE else path.parent]
        raise FileNotFoundError(
            f"{folder} holds neither {CIFAR10_ARCHIVE} nor a folder {CIFAR10_FOLDER} with "
            f"{some_file}"
        )
    wanted = [stem for stems in MNIST_FILES.values() for stem in stems]
    paths, missing = [], []
    for stem in wanted:
        found = [path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()]
        paths += found[:1]
        missing += [] if found else [f"{stem}(.gz)"]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    return paths


def read(name: str, paths: Sequence[Path]) -> tuple[Dataset, Dataset]:
    """Returns the training and the test set in the original files, after checking their structure.

    Images are uint8 [N, H, W, C] and labels int32 [N], in the original order. A number of images
    other than the official one gives a warning, not an error.

    Args:
        name: "cifar10" or "mnist".
        paths: as `find` returns them.

    Raises:
        ValueError: if a file is damaged or not what its name says.
    """
    facts = catalogue.entry(name)
    train, test = _read_cifar10(paths[0]) if name == "cifar10" else _read_mnist(paths)
    for part, dataset, official in (
        ("training", train, facts.num_train),
        ("test", test, facts.num_test),
    ):
        if len(dataset.labels) != official:
            warnings.warn(
                f"{facts.title} {part} set: {len(dataset.labels)} images in {paths[0].parent}, "
                f"officially {official}; going on with what is there",
                stacklevel=2,
            )
    return train, test


def _read_cifar10(path: Path) -> tuple[Dataset, Dataset]:
    read_bytes = _folder_reader(path) if path.is_dir() else _tar_reader(path)

    def read_part(part: str) -> Dataset:
        batches = [_parse_cifar10(read_bytes(f), f"{path}: {f}") for f in CIFAR10_FILES[part]]
        images, labels = zip(*batches, strict=True)
        return Dataset(np.concatenate(images), np.concatenate(labels))

    return read_part("train"), read_part("test")


def _folder_reader(path: Path) -> Callable[[str], bytes]:
    """Returns a function from the name of a CIFAR-10 file to its bytes in the folder."""
    files = [file for files in CIFAR10_FILES.values() for file in files]
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return lambda file: _read_at_most(_MOST_CIFAR10_BYTES, path / file)


def _tar_reader(path: Path) -> Callable[[str], bytes]:
    """Returns a function from the name of a CIFAR-10 file to its bytes in the archive."""
    wanted = {file for files in CIFAR10_FILES.values() for file in files}
    contents = {}
    with path.open("rb") as packed, _unpacked(packed) as stream:
        try:
            # As a stream, in one pass, and into memory: nothing that the archive names is written
            # anywhere, and no link in it is followed.
            bounded = _Bounded(stream, len(wanted) * _MOST_CIFAR10_BYTES)
            with tarfile.open(fileobj=bounded, mode="r|") as archive:
                for member in archive:
                    file = Path(member.name).name
                    if file not in wanted or not member.isreg():
                        continue
                    if member.size > _MOST_CIFAR10_BYTES:
                        raise ValueError(f"{member.name} unpacks to {member.size:,} bytes")
                    unpacked = archive.extractfile(member)
                    contents[file] = unpacked.read() if unpacked else b""
        except Exception as error:  # tarfile and zlib raise many kinds for a damaged archive
            raise ValueError(
                f"{path} is damaged or no tar archive of CIFAR-10 ({error}); fetch it again"
            ) from error
    missing = sorted(wanted - contents.keys())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; is it the binary version?")
    return contents.__getitem__


class _Bounded(io.RawIOBase):
    """A stream that raises a ValueError instead of giving more than `most` bytes."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, most: int):
        self._stream, self._left = stream, most

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise ValueError("it unpacks to more than the data set can hold")
        return content


def _parse_cifar10(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [N, 32, 32, 3] and labels int32 [N] of one CIFAR-10 file."""
    if not data or len(data) % _RECORD_BYTES:
        raise ValueError(
            f"{name}: {len(data)} bytes are not a whole number of records of {_RECORD_BYTES} "
            "bytes; the file is damaged or not the binary version"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, _RECORD_BYTES)
    labels = _checked_labels(records[:, 0], name)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _read_mnist(paths: Sequence[Path]) -> tuple[Dataset, Dataset]:
    train_images, train_labels, test_images, test_labels = paths
    return _read_idx_pair(train_images, train_labels), _read_idx_pair(test_images, test_labels)


def _read_idx_pair(images_path: Path, labels_path: Path) -> Dataset:
    images = _parse_idx(
        _read_at_most(_MOST_MNIST_BYTES, images_path), _IDX_IMAGES, str(images_path)
    )
    labels = _parse_idx(
        _read_at_most(_MOST_MNIST_BYTES, labels_path), _IDX_LABELS, str(labels_path)
    )
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path}: images of {images.shape[1:]} pixels, not (28, 28)")
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images, but {labels_path} {len(labels)} labels"
        )
    return Dataset(images[..., None], _checked_labels(labels, str(labels_path)))


def _unpacked(file: BinaryIO) -> BinaryIO | gzip.GzipFile:
    """Returns the content of an open file, without gzip if there is any."""
    # By content: some mirrors and browsers unpack a file without renaming it.
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.open(file) if is_gzip else file


def _read_at_most(most: int, path: Path) -> bytes:
    """Returns the bytes of a file, without gzip; ValueError if they are damaged or too many."""
    with path.open("rb") as file, _unpacked(file) as stream:
        try:
            return _Bounded(stream, most).read()
        except Exception as error:  # gzip and zlib raise several kinds for a damaged file
            raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


def _parse_idx(data: bytes, magic: int, name: str) -> np.ndarray:
    """Returns the uint8 array in an IDX file, with as many axes as `magic` says."""
    num_axes = magic & 0xFF
    header_bytes = 4 * (1 + num_axes)
    if len(data) < header_bytes or int.from_bytes(data[:4], "big") != magic:
        raise ValueError(
            f"{name} does not start with the IDX magic number {magic:#010x}; it is not an MNIST "
            f"{'image' if num_axes == 3 else 'label'} file"
        )
    shape = tuple(np.frombuffer(data[4:header_bytes], ">u4").tolist())
    values = np.frombuffer(data, np.uint8, offset=header_bytes)
    if not values.size or values.size != math.prod(shape):
        raise ValueError(
            f"{name}: its header says {shape}, but {values.size} bytes follow; it is damaged"
        )
    return values.reshape(shape)


def _checked_labels(labels: np.ndarray, name: str) -> np.ndarray:
    if labels.max() > 9:
        raise ValueError(f"{name}: holds label {labels.max()}; labels are 0 to 9")
    return labels.astype(np.int32)
