"""Settings as plain values: what JSON can hold, and what can be a key of a cache."""

import dataclasses
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Returns `value` with NumPy and JAX scalars as Python numbers, and lists as tuples."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(map(plain, value))
    is_scalar = hasattr(value, "dtype") and getattr(value, "shape", None) == ()
    return np.asarray(value).item() if is_scalar else value


def settle(settings: Any) -> None:
    """Makes the fields of a frozen dataclass plain; for its `__post_init__`."""
    for field in dataclasses.fields(settings):
        object.__setattr__(settings, field.name, plain(getattr(settings, field.name)))


def check_range(
    settings: Any, name: str, low: float, high: float = float("inf"), *, whole: bool = False
) -> None:
    """Raises unless the field `name` of `settings` is a number in [low, high].

    Args:
      settings: a dataclass, named in the message.
      name: of the field.
      low: the least allowed value.
      high: the largest.
      whole: whether it must be a whole number, of the type int.

    Raises:
      TypeError: if it is not a number, or not whole. ValueError: if it is out of range or NaN.
    """
    value, owner = getattr(settings, name), type(settings).__name__
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "a whole number" if whole else "a number"
        raise TypeError(f"{owner}: {name} must be {expected}, got {value!r}")
    if not low <= value <= high or value == float("inf"):
        limits = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{owner}: {name} must be {limits} and finite, got {value!r}")
