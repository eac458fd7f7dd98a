"""JSON from anywhere, read into frozen dataclasses: every field is checked, nothing is trusted.

A dataclass's annotations are the schema. A field whose name JSON spells differently has
`metadata={"json": name}`.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from jaxpoison.core import files

_Record = TypeVar("_Record")
_PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_MOST_DEPTH = 32


def load(path: str | os.PathLike[str], what: str, max_bytes: int) -> dict[str, Any]:
    """Returns the JSON object in a file of at most `max_bytes` bytes.

    Args:
      path: the file; `~` stands for the home folder.
      what: what it should be, for messages, such as "the findings of an audit".
      max_bytes: the largest file that is read.

    Raises:
      FileNotFoundError, IsADirectoryError: if there is no file.
      ValueError: if it is too large, not UTF-8, not JSON (cut off, say), names a field twice,
        holds NaN or an infinity, or is no object. The message names the file.
    """
    path = files.check_is_file(path, what)
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path} is larger than the {max_bytes:,} bytes that {what} can need")
    try:
        value = json.loads(
            content.decode(), object_pairs_hook=_without_twins, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError(f"{path} cannot be read as {what}: it is nested too deeply") from None
    except ValueError as error:  # of UTF-8, of JSON, of numbers with too many digits
        raise ValueError(
            f"{path} cannot be read as {what}: it is no JSON or damaged ({error})"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} cannot be read as {what}: expected an object, found {_seen(value)}"
        )
    return value


def parse(record: type[_Record], value: Any, where: str) -> _Record:
    """Returns the dataclass `record` made of what JSON held.

    Args:
      record: the dataclass; its own `__post_init__` checks ranges.
      value: what `json.loads` returned.
      where: what `value` is, for messages.

    Raises:
      ValueError: for a field that is missing, unknown, of the wrong type or out of range.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {_seen(value)}")
    fields = _fields(record)
    unknown = [name for name in value if name not in fields]
    missing = [name for name in fields if name not in value]
    if unknown or missing:
        wrong = "unknown" if unknown else "missing"
        raise ValueError(
            f"{where}: {wrong} field {_seen((unknown or missing)[0])}; expected {', '.join(fields)}"
        )
    arguments = {
        own_name: _value(kind, value[name], f"{where}: {name}")
        for name, (own_name, kind) in fields.items()
    }
    try:
        return record(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def plain(value: Any) -> Any:
    """Returns a dataclass as what `json.dumps` writes and `parse` reads."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            name: plain(getattr(value, own_name))
            for name, (own_name, _) in _fields(type(value)).items()
        }
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value


def check_text(owner: str, most: int, **texts: str | None) -> None:
    """Raises unless each text has at most `most` characters, all of which UTF-8 can hold.

    Raises:
      TypeError: if it is no text. ValueError: if it is too long or holds a lone surrogate.
    """
    for name, text in texts.items():
        if text is None:
            continue
        if not isinstance(text, str):
            raise TypeError(f"{owner}: {name} must be text, got {_seen(text)}")
        if len(text) > most:
            raise ValueError(f"{owner}: {name} has {len(text):,} characters, more than {most:,}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{owner}: {name} has a character that UTF-8 cannot hold, {_seen(text)}; escape "
                "the bytes of a file's name that cannot be decoded"
            ) from error


def check_choice(owner: str, choices: Iterable[Any], **values: Any) -> None:
    """Raises ValueError unless each value is one of `choices`."""
    choices = tuple(choices)
    for name, value in values.items():
        if value not in choices:
            listed = ", ".join(map(repr, choices[:12])) + (", ..." if len(choices) > 12 else "")
            raise ValueError(f"{owner}: {name} must be one of {listed}; got {_seen(value)}")


def check_json(owner: str, name: str, value: Any, depth: int = 0) -> None:
    """Raises TypeError or ValueError unless `value` is what JSON can hold, not nested deeply."""
    if depth > _MOST_DEPTH:
        raise ValueError(f"{owner}: {name} is nested more than {_MOST_DEPTH} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            check_text(owner, 1000, **{name: key})
            check_json(owner, name, item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_json(owner, name, item, depth + 1)
    elif isinstance(value, str):
        check_text(owner, 100_000, **{name: value})
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{owner}: {name} holds {value}, which JSON has not")
    elif value is not None and not isinstance(value, bool | int):
        raise TypeError(f"{owner}: {name} holds {_seen(value)}, which JSON has not")


@functools.cache
def _fields(record: type) -> dict[str, tuple[str, Any]]:
    """Returns {name in JSON: (name of the field, its type)}."""
    hints = typing.get_type_hints(record)
    return {
        field.metadata.get("json", field.name): (field.name, hints[field.name])
        for field in dataclasses.fields(record)
    }


def _value(kind: Any, value: Any, where: str) -> Any:
    """Returns `value` as the annotation `kind` has it; ValueError if it is of another type."""
    if kind is Any:
        return value
    if kind in _PLAIN:
        allowed = (int, float) if kind is float else (kind,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{where}: expected {_PLAIN[kind]}, found {_seen(value)}")
        # JSON does not tell 1.0 from 1, and a whole number may be larger than any float.
        return _float(value, where) if kind is float else value
    if dataclasses.is_dataclass(kind):
        return parse(typing.cast(Any, kind), value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    reader = _COMPOUND[origin]
    return reader(arguments, value, where)


def _float(value: float, where: str) -> float:
    """Returns a finite float."""
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):  # 1e999 is JSON
        raise ValueError(f"{where}: expected a finite number, found one that is too large")
    return value


def _choice(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in arguments):
        listed = ", ".join(map(repr, arguments))
        raise ValueError(f"{where}: expected one of {listed}; found {_seen(value)}")
    return value


def _optional(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    return None if value is None else _value(arguments[0], value, where)


def _list(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, found {_seen(value)}")
    return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))


def _mapping(arguments: tuple[Any, ...], value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {_seen(value)}")
    return {
        name: _value(arguments[1], item, f"{where}[{_seen(name)}]") for name, item in value.items()
    }


_COMPOUND: dict[Any, Callable[[tuple[Any, ...], Any, str], Any]] = {
    typing.Literal: _choice,
    types.UnionType: _optional,
    typing.Union: _optional,
    tuple: _list,
    dict: _mapping,
}


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object's fields; ValueError if two have one name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twin, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"two fields are named {_seen(twin)}")
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _seen(value: Any) -> str:
    """Returns a short description of a value found."""
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of very many digits"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
