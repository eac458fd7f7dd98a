"""JSON files of a run: written whole, read with the path in the error, and what they can hold."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpoison.core.files import write_text


def plain(value: Any, name: str = "settings") -> Any:
    """Returns settings with Python's own numbers in place of NumPy's and JAX's.

    Args:
      value: a dataclass, mapping, list, tuple, number, text, path or None, nested as one likes.
      name: of the settings, for the error.

    Returns:
      The same structure: dataclasses stay dataclasses. What is not a value that JSON can hold is
      found here, before any work is done.

    Raises:
      ValueError: for a value that JSON cannot hold, or NaN; names the setting.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        changes = {each: plain(getattr(value, each), _within(name, each)) for each in fields}
        return dataclasses.replace(value, **changes)
    if isinstance(value, Mapping):
        return {str(key): plain(entry, _within(name, key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [plain(entry, f"{name}[{index}]") for index, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    if isinstance(value, np.generic | np.ndarray | jax.Array) and np.ndim(value) == 0:
        value = np.asarray(value).item()
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} is NaN: give a number")
    if value is None or isinstance(value, bool | int | float | str | os.PathLike):
        return value
    raise ValueError(
        f"{name} is of type {type(value).__name__}, which a run's config.json cannot hold: give a "
        "number, a text, None, or a tuple of these"
    )


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON; the file appears whole or not at all.

    NumPy's and JAX's scalars and arrays become numbers and lists, paths become texts.

    Raises:
      TypeError: for any other value that JSON cannot hold.
    """
    write_text(path, json.dumps(value, indent=1, default=_default) + "\n")


def read_json(path: Path, remedy: str = "delete it") -> Any:
    """Returns the content of a JSON file.

    Args:
      path: the file.
      remedy: what to do where it cannot be read, for the error.

    Raises:
      ValueError: if the file is damaged; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error


def remove(folder: Path) -> None:
    """Removes a folder and what is in it; one that is not there is none the worse."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _within(name, part):
    return str(part) if name == "settings" else f"{name}.{part}"


def _default(value):
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be written as JSON")
