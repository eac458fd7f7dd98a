"""Folders of images: one folder for each class, or the parts train, val and test with such folders.

No symbolic link is followed unless asked for; a link to a folder that holds it is never followed.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpoison.core.checks import listing
from jaxpoison.data.readers.contents import EXTENSIONS, OTHER_EXTENSIONS, Content, display_name
from jaxpoison.data.readers.source import Problem, Source, check_some, file_state

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
_MOST_DEPTH = 64
LINK = "This is a symbolic link, which is not followed unless asked for (follow_links)."


class Files:
    """Images that are files below one folder; see `source.Images`."""

    def __init__(self, root: Path, names: list[str]):
        self._root, self._names = root, names

    def contents(self) -> Iterator[Content]:
        """Yields the paths."""
        return (self._root / name for name in self._names)

    def content(self, row: int) -> Content:
        """Returns the path."""
        return self._root / self._names[row]

    def path(self, row: int) -> Path | None:
        """Returns the path."""
        return self._root / self._names[row]

    def fingerprint(self) -> Iterator[bytes]:
        """Yields sizes and times of change."""
        return (file_state(self._root / name) for name in self._names)


class _Found(NamedTuple):
    """What a folder holds, names below the root."""

    images: list[str]
    folders: list[str]


def open_folder(root: Path, split: str | None, *, follow_links: bool, max_pixels: int) -> Source:
    """Returns the images below a folder: the first level of folders are the classes.

    Deeper folders belong to the class. Hidden files and folders and files that are no images are
    ignored. A folder of images without folders is one class of that name.

    Args:
        root: the folder.
        split: the part to read, where the folders are train, val and test.
        follow_links: whether to follow symbolic links.
        max_pixels: see `decode.decode`.

    Raises:
        ValueError: if there is no image, if `split` is missing or not there, or if a flat folder
            comes with a table.
        PermissionError: if the folder may not be read.
    """
    walk = _Walk(root, follow_links)
    try:
        top = walk.look("")
    except PermissionError as error:
        raise PermissionError(f"{root} may not be read; change its permissions") from error
    start = _part(root, top, split)
    if start:
        top = walk.look(start)
    if top.images and not top.folders:
        _check_no_table(root / start)
        name = os.path.basename(os.path.abspath(root / start)) or "images"
        by_class = [(name, top.images)]
    else:
        walk.problems += [
            Problem(display_name(name), "The image lies outside of the class folders.")
            for name in top.images
        ]
        by_class = []
        for folder in sorted(top.folders):
            images = sorted(walk.images_below(folder))
            if images:
                by_class.append((os.path.basename(folder), images))
            else:
                walk.problems.append(
                    Problem(display_name(folder) + "/", "The folder holds no images.")
                )
    names = [name for _, images in by_class for name in images]
    ids = [display_name(name) for name in names]
    kinds = ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
    check_some(
        ids,
        str(root / start),
        walk.problems,
        f"expected a folder for each class with images in it ({kinds})",
    )
    return Source(
        Files(root, names),
        ids=ids,
        labels=np.repeat(
            np.arange(len(by_class), dtype=np.int32), [len(images) for _, images in by_class]
        ),
        class_names=[display_name(name) for name, _ in by_class],
        kind="class folders" if top.folders else "a folder of images without classes",
        problems=walk.problems,
        max_pixels=max_pixels,
    )


class _Walk:
    """Looks through folders and collects problems."""

    def __init__(self, root: Path, follow_links: bool):
        self._root, self._follow_links = root, follow_links
        self.problems: list[Problem] = []

    def look(self, folder: str) -> _Found:
        """Returns what one folder holds; OSError if it may not be read."""
        images, folders = [], []
        with os.scandir(self._root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                extension = os.path.splitext(entry.name)[1].lower()
                try:
                    is_link, is_folder = entry.is_symlink(), entry.is_dir()
                except OSError as error:  # a link to itself
                    self._add(name, f"The link cannot be followed ({error.strerror}).")
                    continue
                if is_link and not self._follow_links:
                    if is_folder or extension in EXTENSIONS:
                        self._add(name, LINK)
                elif is_folder:
                    folders.append(name)
                elif extension in EXTENSIONS:
                    images.append(name)
                elif extension in OTHER_EXTENSIONS:
                    self._add(name, f"{extension[1:].upper()} is not read; save it as PNG.")
        return _Found(images, folders)

    def images_below(self, folder: str) -> Iterator[str]:
        """Yields the images in a folder and all folders below it."""
        above_all = (_key(self._root), _key(self._root / os.path.dirname(folder)))
        stack: list[tuple[str, tuple[tuple[int, int], ...]]] = [(folder, above_all)]
        while stack:
            name, above = stack.pop()
            try:
                key = _key(self._root / name)
                if key in above or len(above) >= _MOST_DEPTH:
                    self._add(name, "The folder lies within itself, by a link, or too deep.", "/")
                    continue
                found = self.look(name)
            except OSError as error:
                self._add(name, f"The folder cannot be read ({error.strerror}).", "/")
                continue
            yield from found.images
            stack += [(below, (*above, key)) for below in found.folders]

    def _add(self, name: str, reason: str, end: str = "") -> None:
        self.problems.append(Problem(display_name(name) + end, reason))


def _key(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _part(root: Path, top: _Found, split: str | None) -> str:
    """Returns the folder of the part to read, "" if there are no parts."""
    by_part = {
        part: folder
        for part, names in PARTS.items()
        for folder in top.folders
        if folder.lower() in names
    }
    has_parts = "train" in by_part and len(by_part) > 1
    has_parts |= bool(by_part) and len(by_part) == len(top.folders)
    if split is not None:
        if split in top.folders:
            return split
        wanted = next((part for part, names in PARTS.items() if split.lower() in names), None)
        if wanted in by_part:
            return by_part[wanted]
        raise ValueError(
            f"split is {split!r}, but {root} has no such folder (it has: "
            f"{listing(map(display_name, sorted(top.folders))) or 'no folders'})"
        )
    if has_parts and len(by_part) > 1:
        folders = sorted(by_part.values())
        raise ValueError(
            f"{root} holds several parts of a data set, {listing(folders)}: choose one with "
            f"split, such as split={by_part.get('train', folders[0])!r}"
        )
    return next(iter(by_part.values())) if has_parts else ""


def _check_no_table(folder: Path) -> None:
    """Raises a ValueError if labels seem to lie in a table next to the images."""
    tables = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith((".csv", ".tsv", ".parquet"))
    )
    if tables:
        raise ValueError(
            f"{folder} holds images without class folders, and {listing(map(repr, tables), 3)}: "
            f"open the table instead, {folder / tables[0]}, or move it elsewhere if it does not "
            "hold the labels"
        )
