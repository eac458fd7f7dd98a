"""Parquet: tables of paths, or with the images inside, in one file or several."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxpoison.core.checks import listing
from jaxpoison.data.readers import arrow, columns
from jaxpoison.data.readers.contents import Content, Unreadable
from jaxpoison.data.readers.folders import PARTS
from jaxpoison.data.readers.source import Source, file_state

_ROWS_AT_ONCE = 64
_MOST_CACHED_BYTES = 1 << 28


class ParquetImages:
    """Images in a column of Parquet files; see `source.Images`. Row groups are read in parts."""

    def __init__(
        self,
        files: list[Path],
        groups: list[list[int]],
        column: str,
        rows: np.ndarray,
        root: Path,
        follow_links: bool,
    ):
        """Takes the number of rows of each group of each file, and which rows of all are images."""
        self._files, self._column, self._rows = files, column, rows
        self._root, self._check = root, columns.safe_path(root, follow_links)
        self._groups = [(file, g) for file, sizes in enumerate(groups) for g in range(len(sizes))]
        sizes = [size for sizes in groups for size in sizes]
        self._last: tuple[int, Any] = (-1, None)
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def contents(self) -> Iterator[Content]:
        """Yields the images group by group; of a damaged group, those before the damage."""
        for number in range(len(self._groups)):
            first, end = np.searchsorted(self._rows, self._starts[number : number + 2])
            wanted = (self._rows[first:end] - self._starts[number]).tolist()
            yield from self._contents_of(number, wanted)

    def _contents_of(self, number: int, wanted: list[int]) -> Iterator[Content]:
        """Yields the images at these places in a group, ascending."""
        given = start = 0
        try:
            for values in self._values(number):
                while given < len(wanted) and wanted[given] < start + len(values):
                    cell = values[wanted[given] - start].as_py()
                    given += 1
                    yield arrow.as_content(cell, self._root, self._check)
                start += len(values)
                if given == len(wanted):
                    return
            reason = "it ends early"
        except Exception as error:  # pyarrow raises many kinds for damaged files
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        for _ in wanted[given:]:
            yield Unreadable(f"The file is damaged here ({reason}).")

    def _values(self, number: int) -> Iterator[Any]:
        """Yields the column of a group in parts, as arrays of pyarrow."""
        file, group = self._groups[number]
        with _opened(self._files[file]) as opened:
            for batch in opened.iter_batches(
                _ROWS_AT_ONCE, row_groups=[group], columns=[self._column], use_threads=False
            ):
                yield batch.column(0)

    def content(self, row: int) -> Content:
        """Returns one image; small groups are kept for the next call."""
        place = int(self._rows[row])
        number = int(np.searchsorted(self._starts, place, "right")) - 1
        place -= int(self._starts[number])
        values = self._cached(number)
        if values is None or place >= len(values):
            return next(self._contents_of(number, [place]))
        return arrow.as_content(values[place].as_py(), self._root, self._check)

    def _cached(self, number: int) -> Any:
        """Returns the column of a small group, the last of which is kept; None for others."""
        if self._last[0] != number:
            values = None
            file, group = self._groups[number]
            # Damage is for `contents_of` to name.
            with contextlib.suppress(Exception), _opened(self._files[file]) as opened:
                if opened.metadata.row_group(group).total_byte_size <= _MOST_CACHED_BYTES:
                    values = opened.read_row_group(group, columns=[self._column]).column(0)
            self._last = (number, values)
        return self._last[1]

    def path(self, row: int) -> Path | None:
        """Returns None: no file holds this image alone."""
        return None

    def fingerprint(self) -> Iterator[bytes]:
        """Yields size and time of change of the files."""
        yield self._column.encode()
        yield from map(file_state, self._files)


def open_parquet(
    path: Path,
    root: Path,
    split: str | None,
    *,
    image_column: str | None,
    label_column: str | None,
    follow_links: bool,
    max_pixels: int,
) -> Source:
    """Returns the images in a Parquet file, or in all Parquet files of a folder.

    Args:
        path: the file; or a folder with files in it, in `data` or in folders named after parts.
        root: the folder that paths are relative to.
        split: the part, where the names of files or folders start with train, val or test.
        image_column, label_column: names of columns, or None for the usual ones.
        follow_links: see `columns.safe_path`.
        max_pixels: see `decode.decode`.

    Raises:
        ImportError: if pyarrow is missing.
        ValueError: if a file is damaged, files differ in their columns, a column is missing or of
            another kind, no row has a class, or `split` is missing or not there.
    """
    arrow.import_pyarrow()
    files = _part(path, parquet_files(path), split) if path.is_dir() else [path]
    if split is not None and not path.is_dir():
        raise ValueError(f"split is {split!r}, but {path} is one file; give split for folders only")
    with _opened(files[0]) as opened:
        schema = opened.schema_arrow
    found = arrow.find_columns(
        schema, arrow.features_of(schema), image_column, label_column, str(path)
    )
    wanted = [found.label] if found.has_bytes else [found.image, found.label]
    groups, cells = [], {name: [] for name in wanted}
    for file in files:
        sizes, table = _read(file, schema, found, wanted)
        groups.append(sizes)
        for name in wanted:
            cells[name] += table.column(name).to_pylist()
    return arrow.source_of(
        found,
        cells.__getitem__,
        functools.partial(ParquetImages, files, groups, found.image),
        name=str(path),
        kinds=("Parquet with images inside", "a Parquet table of paths"),
        root=root,
        follow_links=follow_links,
        max_pixels=max_pixels,
    )


def parquet_files(folder: Path) -> list[Path]:
    """Returns the Parquet files in a folder, in its `data` and in folders named after parts."""
    inner = {"data", *(name for names in PARTS.values() for name in names)}
    folders = [folder, *(f for f in sorted(folder.iterdir()) if f.name in inner and f.is_dir())]
    return sorted(
        file
        for place in folders
        for file in place.iterdir()
        if file.suffix.lower() == ".parquet" and not file.name.startswith(".") and file.is_file()
    )


def _part(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Returns the files of one part."""
    by_part: dict[str, list[Path]] = {}
    for file in files:
        word = file.stem.split("-")[0].lower()
        if file.parent.name.lower() not in ("data", folder.name.lower()):
            word = file.parent.name.lower()
        part = next((part for part, names in PARTS.items() if word in names), "")
        by_part.setdefault(part, []).append(file)
    if split is not None:
        part = next((part for part, names in PARTS.items() if split.lower() in names), split)
        if part and part in by_part:
            return by_part[part]
        raise ValueError(
            f"split is {split!r}, but {folder} has no such files (it has: "
            f"{listing(file.name for file in files)})"
        )
    if len(by_part) > 1:
        raise ValueError(
            f"{folder} holds several parts of a data set, {listing(filter(None, by_part))}: choose "
            f"one with split, such as split={next(filter(None, by_part))!r}"
        )
    return files


def _read(
    file: Path, schema: Any, found: arrow.Columns, wanted: list[str]
) -> tuple[list[int], Any]:
    """Returns the rows of each group, and the table of the small columns."""
    with _opened(file) as opened:
        for name in (found.image, found.label):
            kind = schema.field(name).type
            if (
                name not in opened.schema_arrow.names
                or opened.schema_arrow.field(name).type != kind
            ):
                raise ValueError(f"{file}: column {name!r} is missing or not {kind}, unlike others")
        metadata = opened.metadata
        if metadata.num_rows > file.stat().st_size:
            raise ValueError(f"{file} claims {metadata.num_rows:,} rows, more than it has bytes")
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        table = opened.read(columns=wanted, use_threads=False)
        if len(table) != sum(sizes):
            raise ValueError(f"{file} is damaged: it holds {len(table):,} of {sum(sizes):,} rows")
        return sizes, table


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Gives an open file of pyarrow; what it raises becomes a ValueError that names the file."""
    parquet = arrow.import_pyarrow("pyarrow.parquet")
    errors = arrow.import_pyarrow().ArrowException
    try:
        # Without read-ahead: whole columns of images would be held in memory.
        with parquet.ParquetFile(file, pre_buffer=False) as opened:
            yield opened
    except PermissionError as error:
        raise PermissionError(f"{file} may not be read; change its permissions") from error
    except (errors, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{file} is no Parquet file or damaged ({reason})") from error
