"""Writes a tensorflow-datasets folder of CIFAR-10 or MNIST without TensorFlow.

    python -m jaxpoison.data.prepare cifar10 --data-dir ~/tensorflow_datasets
    python -m jaxpoison.data.prepare mnist --data-dir DIR --archives FOLDER_WITH_ORIGINAL_FILES

The first form downloads the original archives with the downloader of tensorflow-datasets (TFDS),
which checks their SHA-256; the second takes them from disk. Less than half a minute each.

TFDS itself needs TensorFlow for two steps: to read the original files and to encode images as
PNG. Both are replaced while the folder is written, and put back afterwards. The folder is an
ordinary one: `tfds.data_source`, and TFDS with TensorFlow, read it.
"""

import argparse
import contextlib
import io
import os
import sys
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from jaxpoison.core.files import check_writable
from jaxpoison.data import catalogue
from jaxpoison.data.dataset import Dataset
from jaxpoison.data.readers import archives
from jaxpoison.data.readers.tfds import default_data_dir, import_tfds, is_array_record

PROBE_SECONDS = 15.0


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    archives_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the TFDS folder of a data set, unless it is there, and returns its path.

    Args:
        name: "cifar10" or "mnist".
        data_dir: where TFDS keeps its data; by default $TFDS_DATA_DIR, else
            ~/tensorflow_datasets.
        archives_dir: folder with the original files (see `archives.find`); None downloads them.

    Returns:
        `data_dir/<name>/<version>`.

    Raises:
        FileNotFoundError: if original files are missing.
        ValueError: for an unknown name, damaged original files, or a wrong checksum.
        ConnectionError: if the server with the original files cannot be reached.
        NotADirectoryError: if `archives_dir` is a file.
        OSError: if `data_dir` cannot be written, a full disk included; the message names it.
        ImportError: if a package is missing.
    """
    catalogue.entry(name)
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    tfds, builder_class, url_fn = _import_builder(name)
    folder = root / name / str(builder_class.VERSION)
    if folder.exists():
        info = folder / "dataset_info.json"
        if info.is_file() and is_array_record(info):
            return folder
        raise ValueError(
            f"{folder} exists, but is incomplete or not in array_record format; delete it, or "
            "choose another --data-dir"
        )
    check_writable(root)
    # Archives are read before any work starts, so that damaged files leave nothing behind.
    originals = None
    if archives_dir is not None:
        originals = archives.read(name, archives.find(name, archives_dir))

    def read_fn(builder: Any, download_manager: Any) -> tuple[Dataset, Dataset]:
        if originals is not None:
            return originals
        # `download` checks size and SHA-256; only `extract` would need TensorFlow. One by one,
        # because after a failure TFDS's other threads would go on trying for minutes.
        downloaded = [Path(download_manager.download(url)) for url in url_fn(builder)]
        return archives.read(name, downloaded)

    builder = builder_class(data_dir=root, file_format="array_record")
    if originals is None:
        _check_reachable(url_fn(builder)[0])
    config = tfds.download.DownloadConfig(
        try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
    )
    with (
        _naming(folder),
        _without_tensorflow(builder_class, read_fn),
        _readable_download_errors(tfds),
    ):
        builder.download_and_prepare(download_config=config)
    return folder


def _import_builder(name: str) -> tuple[Any, Any, Callable[[Any], list[str]]]:
    """Returns TFDS, its builder class, and a function from a builder to its URLs."""
    tfds = import_tfds(f" (preparing {name})")
    from tensorflow_datasets.image_classification import cifar, mnist

    if name == "cifar10":
        return tfds, cifar.Cifar10, lambda builder: [builder._cifar_info.url]
    files = [f"{stem}.gz" for stems in archives.MNIST_FILES.values() for stem in stems]
    return (
        tfds,
        mnist.MNIST,
        lambda builder: [urllib.parse.urljoin(builder.URL, file) for file in files],
    )


@contextlib.contextmanager
def _without_tensorflow(
    builder_class: Any, read_fn: Callable[[Any, Any], tuple[Dataset, Dataset]]
) -> Iterator[None]:
    """Replaces the two steps of TFDS that need TensorFlow, for the time of the context.

    Args:
        builder_class: of TFDS.
        read_fn: from a builder and a download manager to the training and the test set.
    """
    from tensorflow_datasets.core.features import image_feature

    def split_generators(builder: Any, download_manager: Any) -> dict[str, Iterator[Any]]:
        train, test = read_fn(builder, download_manager)
        if builder.name == "cifar10":
            # TFDS takes the names from a file in the archive; MNIST has none.
            builder.info.features["label"].names = list(catalogue.entry("cifar10").class_names)
        with_id = "id" in builder.info.features
        return {
            part: _examples(dataset, f"{part}_" if with_id else None)
            for part, dataset in (("train", train), ("test", test))
        }

    with (
        mock.patch.object(builder_class, "_split_generators", split_generators),
        mock.patch.object(image_feature._ImageEncoder, "_encode_image", _encode_png),
    ):
        yield


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turns failures to write into `folder`, such as a full disk, into OSErrors that name it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    except RuntimeError as error:
        # What array_record raises, with the file it was writing.
        if str(folder.parent) not in str(error):
            raise
        raise OSError(f"cannot write {folder}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _readable_download_errors(tfds: Any) -> Iterator[None]:
    from tensorflow_datasets.core.download import download_manager

    try:
        yield
    except tfds.download.DownloadError as error:
        raise ConnectionError(f"the download failed: {error}") from error
    except download_manager.NonMatchingChecksumError as error:
        raise ValueError(
            f"a downloaded file is not the published one. {error}\nFetch the archives by hand and "
            "use --archives"
        ) from error


def _examples(dataset: Dataset, id_prefix: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (key, example) as the builders of TFDS do; the key decides the shuffled order."""
    for index, (image, label) in enumerate(zip(dataset.images, dataset.labels, strict=True)):
        example = {"image": image, "label": int(label)}
        if id_prefix is not None:
            example["id"] = f"{id_prefix}{index:05d}"
        yield index, example


def _encode_png(encoder: Any, image: np.ndarray) -> bytes:
    """Returns uint8 [H, W, C] as PNG, in place of `tf.image.encode_png`."""
    from PIL import Image

    del encoder
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
        buffer, format="PNG", optimize=True
    )
    return buffer.getvalue()


def _check_reachable(url: str) -> None:
    """Raises a ConnectionError soon if no server answers; TFDS would retry for minutes."""
    import requests

    failures: list[Exception | None] = []

    def probe() -> None:
        try:
            # requests rather than a socket, because it knows about proxies. Any answer will do.
            requests.head(url, timeout=PROBE_SECONDS)
            failures.append(None)
        except requests.RequestException as error:
            failures.append(error)

    # In a thread, because no timeout of requests covers the look-up of the host name.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    reason = failures[0] if failures else f"no answer within {PROBE_SECONDS:g} s"
    if reason is not None:
        raise ConnectionError(
            f"cannot reach {url} ({reason}). Without a network, fetch the original files "
            "elsewhere and pass their folder with --archives"
        )


def main(
    arguments: Sequence[str] | None = None, prog: str = "python -m jaxpoison.data.prepare"
) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a tensorflow-datasets folder without TensorFlow.",
    )
    parser.add_argument("name", choices=sorted(catalogue.ENTRIES))
    parser.add_argument(
        "--data-dir", help="where to write (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"
    )
    parser.add_argument(
        "--archives",
        metavar="DIR",
        help=f"folder with {archives.CIFAR10_ARCHIVE} or {archives.CIFAR10_FOLDER}/, or with the "
        "four MNIST *-ubyte(.gz) files; without it they are downloaded",
    )
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            folder = prepare(options.name, options.data_dir, archives_dir=options.archives)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.name} is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
