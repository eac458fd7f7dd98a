"""Checks of arguments that many rooms share; each names the argument and the value found."""

from typing import Any

import numpy as np
from jax import core


def check_positive(**values: Any) -> None:
    for name, value in values.items():
        # Traced values (a damping to differentiate by) cannot be looked at.
        if not isinstance(value, core.Tracer) and not np.all(np.asarray(value) > 0):
            raise ValueError(f"{name} must be positive, got {value}")


def check_count(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
