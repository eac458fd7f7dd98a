"""Checks of arguments that many rooms share; each names the argument and the value found."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from jaxpoison.core.programs import is_visible


def number(value: Any) -> Any:
    """Returns a NumPy or JAX scalar as a Python number; other values as they are, tracers too."""
    is_scalar = hasattr(value, "dtype") and getattr(value, "shape", None) == ()
    return np.asarray(value).item() if is_scalar and not isinstance(value, core.Tracer) else value


def check_positive(**values: Any) -> None:
    """Raises unless each value is a positive, finite number; traced ones cannot be looked at."""
    for name, value in values.items():
        if isinstance(value, core.Tracer):
            continue
        if isinstance(value, bool) or np.ndim(value) or np.asarray(value).dtype.kind not in "iuf":
            raise TypeError(f"{name} must be one number, got {shortened(repr(value))}")
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_count(**values: Any) -> None:
    """Raises unless each value is a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be a whole number, got {shortened(repr(value))}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_no_nan(**trees: Any) -> None:
    """Raises ValueError for the first NaN or infinity, outside `jit`.

    -inf is let through: it masks out classes and attention.
    """
    for name, tree in trees.items():
        if not is_visible(tree):
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) or not np.size(leaf):
                continue
            xp = jnp if isinstance(leaf, jax.Array) else np
            if bool(xp.max(leaf) < np.inf):  # False for NaN; makes no array of booleans
                continue
            values = np.asarray(leaf, np.float64)
            place = tuple(map(int, np.argwhere(~(values < np.inf))[0]))
            found = float(values[place])
            at = f" at index {place}" if place else ""
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must be finite, got {found}{at}: "
                "find where it comes from, and mend or leave out that example"
            )


def listing(items: Iterable[str], most: int = 8, separator: str = ", ") -> str:
    """Returns the items joined, the first `most` of them, each shortened."""
    items = list(items)
    more = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return separator.join([shortened(item) for item in items[:most]] + more)


def shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
