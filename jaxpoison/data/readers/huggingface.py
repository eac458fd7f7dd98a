"""Folders that `save_to_disk` of Hugging Face's datasets has written: Arrow files, mapped."""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxpoison.core.checks import listing
from jaxpoison.data.readers import arrow, columns
from jaxpoison.data.readers.contents import Content, Unreadable
from jaxpoison.data.readers.folders import PARTS
from jaxpoison.data.readers.source import Source, file_state


class ArrowImages:
    """Images in a column of mapped Arrow tables; see `source.Images`."""

    def __init__(
        self, files: list[Path], column: Any, rows: np.ndarray, root: Path, follow_links: bool
    ):
        """Takes a chunked array of pyarrow, and which of its rows are images."""
        self._files, self._column, self._rows = files, column, rows
        self._root, self._check = root, columns.safe_path(root, follow_links)

    def contents(self) -> Iterator[Content]:
        """Yields the images."""
        return map(self.content, range(len(self._rows)))

    def content(self, row: int) -> Content:
        """Returns one image."""
        try:
            cell = self._column[int(self._rows[row])].as_py()
        except Exception as error:  # pyarrow raises many kinds for damaged files
            return Unreadable(f"The row is damaged ({type(error).__name__}).")
        return arrow.as_content(cell, self._root, self._check)

    def path(self, row: int) -> Path | None:
        """Returns None: no file holds this image alone."""
        return None

    def fingerprint(self) -> Iterator[bytes]:
        """Yields size and time of change of the files."""
        return map(file_state, self._files)


def is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` seems to have written a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(
    folder: Path,
    split: str | None,
    *,
    image_column: str | None,
    label_column: str | None,
    follow_links: bool,
    max_pixels: int,
) -> Source:
    """Returns the images in a folder written by `Dataset.save_to_disk` or `DatasetDict`'s.

    Args:
        folder: with state.json, or with dataset_dict.json and such folders.
        split: the part of a dictionary of data sets.
        image_column, label_column: names of columns, or None for the usual ones.
        follow_links: see `columns.safe_path`.
        max_pixels: see `decode.decode`.

    Raises:
        ImportError: if pyarrow is missing.
        ValueError: if something is damaged, a column is missing or of another kind, no row has a
            class, or `split` is missing or not there.
    """
    arrow.import_pyarrow()
    folder = _part(folder, split)
    state = _read_json(folder / "state.json")
    files = _data_files(folder, state)
    pa = arrow.import_pyarrow()
    tables = [_table(file) for file in files]
    info = folder / "dataset_info.json"
    features = _read_json(info).get("features") if info.is_file() else None
    found = arrow.find_columns(tables[0].schema, features, image_column, label_column, str(folder))
    try:
        table = pa.concat_tables([part.select([found.image, found.label]) for part in tables])
        # Everything: what offsets say is not believed, since they lead into memory.
        table.validate(full=True)
    except (pa.ArrowException, KeyError) as error:
        raise _damaged(folder, error) from error
    return arrow.source_of(
        found,
        lambda name: table.column(name).to_pylist(),
        functools.partial(ArrowImages, files, table.column(found.image)),
        name=str(folder),
        kinds=("a Hugging Face data set on disk", "a Hugging Face data set of paths"),
        root=folder,
        follow_links=follow_links,
        max_pixels=max_pixels,
    )


def _part(folder: Path, split: str | None) -> Path:
    """Returns the folder of one data set."""
    index = folder / "dataset_dict.json"
    if not index.is_file():
        if split is not None:
            raise ValueError(f"split is {split!r}, but {folder} holds one data set without parts")
        return folder
    parts = _read_json(index).get("splits")
    if not (isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts)):
        raise _damaged(index, TypeError("it lists no splits"))
    if split is None and len(parts) > 1:
        raise ValueError(
            f"{folder} holds several parts of a data set, {listing(parts)}: choose one with split, "
            f"such as split={parts[0]!r}"
        )
    wanted = parts[0] if split is None else split
    if wanted not in parts:
        words = next((names for names in PARTS.values() if wanted.lower() in names), ())
        same = [part for part in parts if part.lower() in words]
        if not same:
            raise ValueError(
                f"split is {split!r}, but {folder} has no such part (it has: {listing(parts)})"
            )
        wanted = same[0]
    return folder / _inside(wanted, index)


def _data_files(folder: Path, state: dict[str, Any]) -> list[Path]:
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder} was saved with a selection of rows, by an old version of datasets; save it "
            "again after flatten_indices()"
        )
    entries = state.get("_data_files")
    try:
        names = [entry["filename"] for entry in entries]  # pyright: ignore[reportOptionalIterable]
    except (TypeError, KeyError) as error:
        raise _damaged(folder / "state.json", error) from error
    if not names:
        raise ValueError(f"{folder} holds no rows")
    files = [folder / _inside(name, folder / "state.json") for name in names]
    for file in files:
        if not file.is_file():
            raise _damaged(file, FileNotFoundError("it is no regular file"))
    return files


def _inside(name: Any, source: Path) -> str:
    """Returns the name of a file next to `source`; ValueError if it leads anywhere else."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{source} names {str(name)[:100]!r}, which is not a file next to it")
    return name


def _table(file: Path) -> Any:
    """Returns the mapped table in an Arrow file, which is a stream as datasets writes it."""
    pa = arrow.import_pyarrow()
    ipc = arrow.import_pyarrow("pyarrow.ipc")
    try:
        with contextlib.closing(pa.memory_map(str(file))) as mapped:
            # Views of the file stay valid after it is closed.
            if mapped.read(6) == b"ARROW1":
                return ipc.open_file(mapped).read_all()
            mapped.seek(0)
            return ipc.open_stream(mapped).read_all()
    except PermissionError as error:
        raise PermissionError(f"{file} may not be read; change its permissions") from error
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise FileNotFoundError("it is no regular file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise _damaged(path, error) from error
    if not isinstance(value, dict):
        raise _damaged(path, TypeError(f"a {type(value).__name__}, not an object"))
    return value


def _damaged(what: Path, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return ValueError(
        f"{what} is not what save_to_disk writes, or damaged ({type(error).__name__}: {reason})"
    )
