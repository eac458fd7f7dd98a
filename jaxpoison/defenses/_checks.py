"""Checks that several defenses make of their settings, of the run and of their trusted set."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from jaxpoison.core.settings import check_range
from jaxpoison.data import Dataset, as_dataset, check_trusted


def check_kind(config: Any, kind: type) -> None:
    """Raises a TypeError unless `config` is of the class `kind`."""
    if not isinstance(config, kind):
        raise TypeError(
            f"config is a {type(config).__name__}; expected a {kind.__name__}, such as "
            f"{kind.__name__}()"
        )


def check_choices(config: Any) -> None:
    """Raises a ValueError where a field of a dataclass is none of its `Literal`'s values."""
    for field in dataclasses.fields(config):
        allowed, value = get_args(field.type), getattr(config, field.name)
        if get_origin(field.type) is Literal and value not in allowed:
            raise ValueError(f"{field.name} must be one of {', '.join(allowed)}, not {value!r}")


def check_between(config: Any, name: str, low: float, high: float = float("inf")) -> None:
    """Raises unless the field `name` of a dataclass is a number in (low, high], and finite."""
    check_range(config, name, low, high)
    if getattr(config, name) == low:
        raise ValueError(f"{type(config).__name__}: {name} must be above {low:g}, it is {low:g}")


def check_schedule(config: Any, name: str) -> None:
    """Raises a ValueError unless the field `name` of a dataclass is a tuple of epochs."""
    epochs = getattr(config, name)
    if not isinstance(epochs, tuple) or not all(type(e) is int and e >= 0 for e in epochs):
        raise ValueError(
            f"{name} must name whole epochs, 0 or later, such as (5, 15); got {epochs!r}"
        )


def check_acts(defense: str, epochs: Sequence[int], num_epochs: int) -> None:
    """Raises a ValueError if a run of `num_epochs` epochs has none of `epochs`.

    Args:
      defense: its name, for the message.
      epochs: those before which it acts.
      num_epochs: of the run.
    """
    if not any(epoch < num_epochs for epoch in epochs):
        listing = ", ".join(map(str, epochs[:3])) + (", ..." if len(epochs) > 3 else "")
        raise ValueError(
            f"{defense} acts before epoch {listing} (counted from 0), which a run of {num_epochs} "
            "epochs never reaches: choose earlier epochs or train longer"
        )


def trusted_set(trusted: Any, num_classes: int | None = None) -> Dataset:
    """Returns the trusted set as a `Dataset` without ids.

    Args:
      trusted: what `data.as_dataset` takes.
      num_classes: K; None where it is not known yet.

    Raises:
      TypeError, ValueError: for a bad one.
    """
    trusted = as_dataset(trusted, "trusted set")
    check_trusted(trusted, num_classes, "trusted set")
    return trusted._replace(ids=None)
