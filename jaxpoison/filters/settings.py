"""The settings of the characteristic-vector filter."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxpoison.filters.centroids import Estimator, Variance
from jaxpoison.filters.distances import Metric
from jaxpoison.filters.extraction import Stats

Reference = Literal["dataset", "trusted"]
_CHOICES = {
    "stats": Stats,
    "metric": Metric,
    "centroids": Reference,
    "estimator": Estimator,
    "variance": Variance,
}
_BOUNDS = {"beta": (0, 1), "margin": (-math.inf, math.inf), "tau": (0, math.inf)}
_COUNTS = ("min_class_size", "batch_size")


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """How characteristic vectors become a verdict; hashable, and in a form that JSON can hold.

    Attributes:
      centroids: "dataset" (paper) or "trusted".
      metric: "cosine" (paper), "l2", "z" or "maha", see `centroid_distances`.
      gamma: weights of the layers, see `layer_weights`; or "fisher", from trusted examples.
      beta: share of the means in each layer's weight; the rest is the variances'.
      margin: flag where the own class is further than the nearest other one by more than this.
      stats: "input" or "self", see `extract_charvec`.
      estimator: of the centroids, see `fit_centroids`. All but "mean" hold all vectors in memory.
      variance: "pooled" or "mean", see `fit_centroids`.
      exclude_self: compare each example with its class without it (`centroids="dataset"`).
      tau: pulls trusted centroids towards those of the data as if it held tau examples a class.
      min_class_size: smallest class of the data from which a centroid is computed.
      batch_size: examples in one forward pass.

    Raises:
      TypeError: for values of another kind. ValueError: for values out of range.
    """

    centroids: Reference = "dataset"
    metric: Metric = "cosine"
    gamma: str | Sequence[float] = "uniform"
    beta: float = 0.5
    margin: float = 0.0
    stats: Stats = "input"
    estimator: Estimator = "mean"
    variance: Variance = "pooled"
    exclude_self: bool = False
    tau: float = 0.0
    min_class_size: int = 2
    batch_size: int = 256

    def __post_init__(self):
        for name, choice in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(choice):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choice))}, not {value!r}"
                )
        for name, (low, high) in _BOUNDS.items():
            value = self._keep(name, float)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must be in [{low}, {high}] and finite, not {value}")
        for name in _COUNTS:
            if self._keep(name, int) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        self._keep("exclude_self", bool)
        if not isinstance(self.gamma, str):
            gamma = np.asarray(self.gamma)
            if gamma.ndim != 1 or gamma.dtype.kind not in "iuf":
                raise TypeError(
                    f"gamma must be the name of a rule or a number for each layer, not "
                    f"{self.gamma!r}"
                )
            object.__setattr__(self, "gamma", tuple(gamma.tolist()))
        trusted = self.centroids == "trusted"
        if not trusted and (self.gamma == "fisher" or self.tau > 0):
            raise ValueError(
                'gamma="fisher" and tau > 0 are for centroids="trusted": on the data itself an '
                "attacker would choose the weights"
            )
        if self.exclude_self and (trusted or self.estimator != "mean" or self.min_class_size < 2):
            raise ValueError(
                'exclude_self=True is for centroids="dataset" with estimator="mean", of at least '
                "2 examples a class"
            )

    def replace(self, **changes: Any) -> "FilterSettings":
        """Returns these settings with some changed.

        Raises:
          TypeError: for an unknown name.
        """
        names = [field.name for field in dataclasses.fields(self)]
        unknown = changes.keys() - set(names)
        if unknown:
            raise TypeError(
                f"unknown settings: {', '.join(sorted(unknown))}; there are {', '.join(names)}"
            )
        return dataclasses.replace(self, **changes)

    def _keep(self, name, kind):
        """Turns scalars of NumPy and JAX into Python's, which can be hashed and written to JSON."""
        value = getattr(self, name)
        array = np.asarray(value)
        numbers = "b" if kind is bool else "iuf"
        if array.ndim or array.dtype.kind not in numbers:
            expected = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
            raise TypeError(f"{name} must be {expected}, not {value!r}")
        if kind is int and not (np.isfinite(array) and array == np.floor(array)):
            raise ValueError(f"{name} must be a whole number, not {value}")
        object.__setattr__(self, name, kind(array.item()))
        return getattr(self, name)


PAPER = FilterSettings()  # of arXiv 2403.13523, which does not give gamma and beta
