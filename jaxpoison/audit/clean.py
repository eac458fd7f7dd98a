"""A copy of the data without what an audit flagged; the data itself is never changed."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from jaxpoison.audit import decisions, findings
from jaxpoison.audit.records import Report


class Source(Protocol):
    """What is needed of the data (`data.readers`)."""

    ids: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]

    def path(self, row: int) -> Path | None:
        """Returns the file that holds one image alone, or None."""
        ...

    def fingerprint(self) -> str:
        """Returns what tells whether the data changed."""
        ...


class Cleaned(NamedTuple):
    """What was written.

    Attributes:
      folder: where.
      kept: how many images are kept.
      left_out: how many are not: flagged and not overruled, or unreadable.
      copied: whether the images were copied; otherwise their ids are in kept.txt, one a line.
    """

    folder: Path
    kept: int
    left_out: int
    copied: bool


def clean(
    report_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    source: Source,
    decided: decisions.Decisions | None = None,
) -> Cleaned:
    """Writes what an audit did not flag, or a person overruled, into a new folder.

    Class folders are copied byte for byte under their names. For arrays, archives, and tables
    whose files do not lie in folders of their classes, `out` gets kept.txt, a list of ids. `out`
    appears whole or not at all; links out of the data are never followed.

    Args:
      report_folder: folder of a report, or its findings.json.
      out: a folder that is not there or empty, outside of the data.
      source: the data that was audited, opened in the same way.
      decided: decisions on the findings, next to those that the report has.

    Raises:
      FileNotFoundError: if there is no report.
      FileExistsError: if there is something in `out`.
      ValueError: if the data changed since the audit, `out` lies in the data or around it, a file
        is a link out of the data, or the report is damaged.
      OSError: if a file cannot be read or written; a full disk included.
    """
    report = findings.read(report_folder)
    if decided is not None:
        report = decisions.merge(report, decided)
    if source.fingerprint() != report.data.fingerprint:
        raise ValueError(
            f"the data is not what {os.fspath(report_folder)} is about: it changed since the "
            "audit, or was opened in another way. Repeat the audit"
        )
    rows = _kept(report, source)
    place = Path(out).expanduser().resolve()
    names = _names(source, rows)
    _check_out(place, [Path(report.data.source).expanduser(), *_roots(names)])
    place.parent.mkdir(parents=True, exist_ok=True)
    # Next to its place, so that a rename is all that is left to do.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{place.name[:100]}-", dir=place.parent))
    try:
        unfinished.chmod(0o777 & ~_umask())
        if names is None:
            lines = (f"{findings.one_line(source.ids[row])}\n" for row in rows)
            (unfinished / "kept.txt").write_text("".join(lines), "utf-8", newline="\n")
        else:
            _copy(names, unfinished)
        _rename(unfinished, place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Cleaned(place, len(rows), len(source.ids) - len(rows), names is not None)


def _kept(report: Report, source: Source) -> list[int]:
    """Returns the rows of what stays."""
    dropped = {finding.id for finding in report.findings if finding.open}
    unknown = dropped.difference(source.ids)
    if unknown:
        raise ValueError(
            f"the report flags {ascii(min(unknown))[:80]}, which the data does not have; it was "
            "made of other data, or changed by hand"
        )
    dropped |= {problem.id for problem in report.problems}
    return [row for row, id_ in enumerate(source.ids) if id_ not in dropped]


def _names(source: Source, rows: Sequence[int]) -> list[tuple[Path, Path]] | None:
    """Returns (root, path below it) of files that lie in folders of their classes, or None.

    An id is the path below the root, with escapes for what cannot be printed.
    """
    names = []
    for row in rows:
        id_, path = source.ids[row], source.path(row)
        if path is None:
            return None
        depth = id_.count("/") + 1
        name = Path(*path.parts[-depth:])
        class_name = source.class_names[int(source.labels[row])]
        in_class = class_name in id_.split("/")[:-1] or len(source.class_names) == 1
        # A table may name its files by absolute paths, or by paths that climb out of its folder.
        is_below = not name.is_absolute() and ".." not in name.parts
        if not in_class or not is_below or not (name.as_posix() == id_ or "\\" in id_):
            return None
        names.append((Path(*path.parts[:-depth]), name))
    return names


def _roots(names: list[tuple[Path, Path]] | None) -> Iterator[Path]:
    """Yields each folder that files lie below, once."""
    yield from dict.fromkeys(root for root, _ in names or ())


def _check_out(place: Path, data: Sequence[Path]) -> None:
    """Raises unless `place` can be made into a new folder that has nothing to do with the data."""
    for folder in data:
        folder = folder.resolve()
        if folder.exists() and (place.is_relative_to(folder) or folder.is_relative_to(place)):
            raise ValueError(
                f"out is {place}, which lies in the data, {folder}, or around it: choose another "
                "folder, since the data is never changed"
            )
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{place} is a file: choose another folder for out")
    if place.exists() and any(place.iterdir()):
        raise FileExistsError(f"{place} is not empty: choose another folder for out")


def _copy(names: Sequence[tuple[Path, Path]], target: Path) -> None:
    """Copies files byte for byte, with their times of change."""
    roots = {root: root.resolve() for root, _ in names}
    for root, name in names:
        file = (root / name).resolve(strict=True)
        if not file.is_relative_to(roots[root]):
            raise ValueError(
                f"{str(root / name)!a} is a link out of the data, to {str(file)!a}; "
                "links out are never followed: put the image itself into its place"
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
        shutil.copystat(file, target / name)


def _rename(unfinished: Path, place: Path) -> None:
    """Moves a folder to where nothing or an empty folder is."""
    try:
        unfinished.rename(place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(f"{place} was filled in the meantime") from error
        raise


def _umask() -> int:
    """Returns what a new folder's permissions leave out."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
