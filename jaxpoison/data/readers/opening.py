"""What a path holds, and which reader it is for."""

import os
from pathlib import Path
from typing import Any

from jaxpoison.core.checks import check_count
from jaxpoison.data.readers import folders, huggingface, packed, parquet, records, tables
from jaxpoison.data.readers.contents import EXTENSIONS, MAX_PIXELS
from jaxpoison.data.readers.source import Source

_READ = (
    "a folder with a folder of images for each class, an .npz file, a .csv or .parquet table, or a "
    "folder of tensorflow-datasets, of Hugging Face (save_to_disk) or of Parquet files"
)


def open_source(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    root: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Returns the labeled images in a file or folder. Nothing is written, and nothing unpickled.

    Files that cannot be read are `Source.problems`, not errors.

    Args:
        path: one of

            - a folder with a folder for each class: PNG, JPEG, WebP, BMP, GIF (first frame) and
              TIFF, known by their extension;
            - a folder with such folders named train, val or test;
            - a folder of images without classes, which is one class;
            - an .npz file of images and labels (x and y, x_train and y_train, ...);
            - a .csv, .tsv or .parquet table of paths and labels, or Parquet with the images inside;
            - a folder of Parquet files;
            - a folder that `save_to_disk` of Hugging Face's datasets has written;
            - a folder of tensorflow-datasets in array_record format.

            `~` stands for the home folder.
        split: the part to read, such as "train"; needed only where there are several.
        root: for tables, the folder that paths are relative to; by default that of the table.
        image_column, label_column: for tables, where the names are not the usual ones.
        follow_links: whether symbolic links are followed; otherwise they are problems.
        max_pixels: images with more pixels are not decoded, and are problems.

    Raises:
        FileNotFoundError: if there is nothing.
        PermissionError: if it may not be read.
        ValueError: for a path that is none of these, is damaged as a whole, has no readable image,
            lacks a column, or where `split` is needed; the message says what was found.
        TypeError: for a split that is not a string.
        ImportError: for Parquet, Hugging Face or tensorflow-datasets, if the extra is missing.
    """
    check_count(max_pixels=max_pixels)
    if split is not None and not isinstance(split, str):
        raise TypeError(f"split must be the name of a part, such as 'train', got {split!r}")
    if not os.fspath(path):
        raise ValueError(f"path is empty; expected {_READ}")
    place = Path(path).expanduser()
    try:
        kind = _kind(place)
        _check_options(place, kind, root, image_column, label_column)
        return _open(place, kind, split, root, image_column, label_column, follow_links, max_pixels)
    except PermissionError as error:
        if str(place) in str(error.args[0]):  # one of ours
            raise
        raise PermissionError(f"{place} may not be read; change its permissions") from error


def _open(
    place: Path,
    kind: str,
    split: str | None,
    root: str | os.PathLike[str] | None,
    image_column: str | None,
    label_column: str | None,
    follow_links: bool,
    max_pixels: int,
) -> Source:
    links: Any = {"follow_links": follow_links, "max_pixels": max_pixels}
    named: Any = {"image_column": image_column, "label_column": label_column}
    if kind == "images":
        return folders.open_folder(place, split, **links)
    if kind == "npz":
        return packed.open_npz(place, split, max_pixels=max_pixels)
    if kind == "tfds":
        found = records.find(place) or place
        return records.open_records(found, split, **named, max_pixels=max_pixels)
    if kind == "huggingface":
        return huggingface.open_saved(place, split, **named, **links)
    below = (place if place.is_dir() else place.parent) if root is None else Path(root).expanduser()
    if not below.is_dir():
        raise ValueError(f"root is {str(root)!r}, which is no folder")
    if kind == "parquet":
        return parquet.open_parquet(place, below, split, **named, **links)
    if split is not None:
        raise ValueError(f"split is {split!r}, but {place} is one table without parts")
    return tables.open_csv(place, below, **named, **links)


def _check_options(
    place: Path,
    kind: str,
    root: str | os.PathLike[str] | None,
    image_column: str | None,
    label_column: str | None,
) -> None:
    """Raises a ValueError for an option that the reader of this kind has no use for."""
    given = {"root": root, "image_column": image_column, "label_column": label_column}
    takes = {
        "images": (),
        "npz": (),
        "tfds": ("image_column", "label_column"),
        "huggingface": ("image_column", "label_column"),
    }.get(kind, tuple(given))
    for name, value in given.items():
        if value is not None and name not in takes:
            raise ValueError(f"{name} is {str(value)!r}, but {place} is no table: leave it out")


def _kind(place: Path) -> str:
    """Returns the name of the reader, or raises for what none can read."""
    if os.path.isdir(place):
        if huggingface.is_saved(place):
            return "huggingface"
        if records.find(place) is not None:
            return "tfds"
        return "parquet" if parquet.parquet_files(place) else "images"
    if not os.path.exists(place):  # False, unlike Path's, for names that are too long
        what = "is a link that leads nowhere" if os.path.islink(place) else "does not exist"
        raise FileNotFoundError(f"{place} {what}; expected {_READ}")
    if not place.is_file():  # a pipe would be waited for, a device read forever
        raise ValueError(f"{place} is no regular file; expected {_READ}")
    extension = place.suffix.lower()
    if extension == ".npz":
        return "npz"
    if extension in (".csv", ".tsv"):
        return "csv"
    if extension == ".parquet":
        return "parquet"
    advice = f"expected {_READ}"
    if extension in EXTENSIONS:
        advice = f"this is one image: give its folder, {place.parent}"
    elif extension in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".xz", ".bz2", ".zst"):
        advice = f"unpack it first; then {advice}"
    raise ValueError(f"{place} is not of a kind that is read: {advice}")
