"""What all tables have in common: which columns, which paths are safe, which labels are classes."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpoison.core.checks import listing
from jaxpoison.data.readers import arrays
from jaxpoison.data.readers.contents import display_name
from jaxpoison.data.readers.folders import LINK, Files
from jaxpoison.data.readers.source import Problem, Source, check_some

IMAGE_COLUMNS = (
    *("image", "img", "image_path", "img_path", "path", "file_name", "filename", "file"),
    *("filepath", "file_path", "image_file", "image_name", "images"),
)
LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "category", "target", "targets", "y"),
    *("class_label", "label_name"),
)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?|nan", re.IGNORECASE)


class Labels(NamedTuple):
    """The labels of a table of N rows.

    Attributes:
        rows: int64 [M], ascending: the rows that have a class.
        labels: int32 [M].
        class_names: K texts.
        reasons: {row: sentence} for the others.
    """

    rows: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    reasons: dict[int, str]


def choose(
    columns: Sequence[str], wanted: str | None, usual: Sequence[str], argument: str, name: str
) -> str:
    """Returns the column to read.

    Args:
        columns: those that the table has.
        wanted: the name that the user gave, if any.
        usual: names to look for, in lower case, the best first.
        argument: which argument gives the name, for messages.
        name: what to call the table in a message.

    Raises:
        ValueError: if it is not there.
    """
    found = listing(map(repr, columns), 20) or "none"
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise ValueError(f"{argument} is {wanted!r}, but {name} has no such column (has: {found})")
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    for candidate in usual:
        if candidate in by_name:
            return by_name[candidate]
    raise ValueError(
        f"{name} has no column of a usual name, such as {listing(usual, 4)} (it has: {found}): "
        f"name it with {argument}"
    )


def classes(values: Sequence[Any], names: Sequence[str] | None, name: str) -> Labels:
    """Returns the class of each row that has one.

    Texts that are all numbers are numbers; whole numbers in floating point are integers. Missing,
    negative and broken numbers, and lists, are no classes.

    Args:
        values: N values as Python has them.
        names: of the numbers 0, 1, ...; None takes the labels themselves.
        name: what to call the labels in a message.

    Raises:
        ValueError: if no row has a class, or class names are not all different.
    """
    are_numbers = all(
        _NUMBER.fullmatch(value.strip()) for value in values if isinstance(value, str)
    )
    known: dict[Any, tuple[Any, str]] = {}
    rows, kept, reasons = [], [], {}
    for row, value in enumerate(values):
        key = (type(value), value) if isinstance(value, str | int | float | bytes) else None
        result = known.get(key)
        if result is None:
            result = _class_of(value, are_numbers, None if names is None else len(names))
            if key is not None:
                known[key] = result
        if result[1]:
            reasons[row] = result[1]
        else:
            rows.append(row)
            kept.append(result[0])
    if not rows:
        first = next(iter(reasons.values()), "There are no rows.")
        raise ValueError(f"{name}: no row has a class. {first}")
    if len({type(value) for value in kept}) > 1:
        kept = [str(value) for value in kept]
    labels, class_names = arrays.as_labels(kept, names, name)
    return Labels(np.array(rows), labels, class_names, reasons)


def _class_of(value: Any, are_numbers: bool, num_classes: int | None) -> tuple[Any, str]:
    """Returns (class, "") or (None, why there is none)."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        value = value.strip()
        if value and are_numbers:
            value = float(value) if not value.lstrip("+-").isdecimal() else int(value)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None, "The row has no label."
    if isinstance(value, float):
        if not math.isfinite(value) or value != int(value):
            return None, f"The label {value:g} is no class."
        value = int(value)
    if isinstance(value, bool):
        return str(value), ""
    if isinstance(value, int):
        if not 0 <= value < 2**63 or (num_classes is not None and value >= num_classes):
            bound = "" if num_classes is None else f" to {num_classes - 1}"
            return None, f"The label {value} is no class; expected numbers from 0{bound}."
        return value, ""
    if isinstance(value, str):
        return value, ""
    return None, f"The label is a {type(value).__name__}, which is no class."


def safe_path(root: Path, follow_links: bool) -> Callable[[Any], tuple[str, str]]:
    """Returns a function from what a table says to (name below `root`, "") or ("", why not).

    A path that leaves `root`, by its name or by a symbolic link, is not opened, nor is one that
    does not exist.

    Args:
        root: the folder that paths are relative to; absolute ones must lie in it.
        follow_links: whether symbolic links are allowed.
    """
    absolute = os.path.abspath(root)
    inside = absolute if absolute.endswith(os.sep) else absolute + os.sep
    linked: dict[str, bool] = {"": False}

    def is_linked(folder: str) -> bool:
        if folder not in linked:
            above = is_linked(os.path.dirname(folder))
            linked[folder] = above or os.path.islink(os.path.join(root, folder))
        return linked[folder]

    def check(text: Any) -> tuple[str, str]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        if not isinstance(text, str) or not text.strip():
            return "", "The row names no image."
        if "\0" in text:
            return "", "The path holds a zero byte."
        name = os.path.normpath(text)
        if os.path.isabs(name):
            if not name.startswith(inside):
                return "", f"The path leads out of {display_name(absolute)}; root can be another."
            name = name[len(inside) :]
        if name.split(os.sep)[0] == "..":
            return "", f"The path leads out of {display_name(absolute)}; root can be another."
        try:
            # The folders above first: a link there would lead the look at the file elsewhere.
            if not follow_links and (is_linked(os.path.dirname(name)) or is_linked(name)):
                return "", LINK
            if os.path.isdir(os.path.join(root, name)):
                return "", "This is a folder."
            os.stat(os.path.join(root, name))
        except FileNotFoundError:
            return "", "The file does not exist."
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return "", f"The path cannot be followed ({reason})."
        return name.replace(os.sep, "/"), ""

    return check


def source_of_paths(
    paths: Sequence[Any],
    values: Sequence[Any],
    *,
    root: Path,
    names: Sequence[str] | None,
    reasons: Mapping[int, str],
    name: str,
    kind: str,
    follow_links: bool,
    max_pixels: int,
) -> Source:
    """Returns the images that the rows of a table name.

    Args:
        paths: N paths as the table has them.
        values: N labels.
        root: see `safe_path`.
        names: see `classes`.
        reasons: {row: sentence} for rows that are broken.
        name: of the table, for messages.
        kind: see `Source`.
        follow_links: see `safe_path`.
        max_pixels: see `decode.decode`.

    Raises:
        ValueError: if no row has an image and a class.
    """
    found = classes(values, names, f"{name}: labels")
    check = safe_path(root, follow_links)
    problems = [
        Problem(row_id(row, paths[row]), reason)
        for row, reason in sorted({**found.reasons, **reasons}.items())
    ]
    files, ids, kept, seen = [], [], [], set()
    for place, row in enumerate(found.rows.tolist()):
        if row in reasons:
            continue
        file, reason = check(paths[row])
        if reason:
            problems.append(Problem(row_id(row, paths[row]), reason))
            continue
        text = display_name(file)
        if text in seen:  # the same image in several rows
            text = f"{text} (row {row})"
        seen.add(text)
        files.append(file)
        ids.append(text)
        kept.append(place)
    check_some(ids, name, problems, f"paths are looked for in {root}, or in root if it is given")
    return Source(
        Files(root, files),
        ids=ids,
        labels=found.labels[kept],
        class_names=found.class_names,
        kind=kind,
        problems=problems,
        max_pixels=max_pixels,
    )


def row_id(row: int, path: Any) -> str:
    """Returns what a problem of a row is called: `row 12 (cat/1.png)`."""
    if isinstance(path, bytes):
        path = path.decode("utf-8", "surrogateescape")
    if isinstance(path, str) and path.strip():
        return f"row {row} ({display_name(path[:300])})"
    return f"row {row}"
