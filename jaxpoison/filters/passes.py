"""The compiled passes over a data set that the filter is made of, a batch at a time.

Each has two forms: over images, with the network in the loop, and over vectors that were extracted
before. Compiled functions are shared by filters of the same network and settings.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpoison.core import loops
from jaxpoison.filters.centroids import Centroids, Estimator, Variance, fit_centroids
from jaxpoison.filters.distances import Metric, centroid_distances
from jaxpoison.filters.extraction import CharVec, Predicate, Stats, extract_charvec


class Extractor(NamedTuple):
    """A network and how it is run; hashable where its parts are.

    Attributes:
      module, predicate, stats: see `extract_charvec`.
      preprocess: applied to each batch first, or None.
      apply_kwargs: (name, value) of further arguments of `module.apply`.
    """

    module: nn.Module
    predicate: Predicate
    stats: Stats
    preprocess: Callable[[Any], Any] | None
    apply_kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, variables: Any, x: Any) -> CharVec:
        return extract_charvec(
            self.module,
            variables,
            x if self.preprocess is None else self.preprocess(x),
            predicate=self.predicate,
            stats=self.stats,
            **dict(self.apply_kwargs),
        )


class Comparison(NamedTuple):
    """How vectors become centroids and distances; see `fit_centroids`, `centroid_distances`."""

    estimator: Estimator
    variance: Variance
    metric: Metric
    beta: float
    exclude_self: bool


class Passes(NamedTuple):
    """Functions over all examples; arrays are placed by the caller.

    Attributes:
      vectors: `vectors(variables, x) -> CharVec` of one batch, pure.
      extract: `extract(variables, x) -> (CharVec, finite)`, finite bool [N].
      accumulate: `accumulate(variables, centroids, (x, labels)) -> (centroids, finite)`, the
        centroids of these examples and those before; sums only, so memory does not grow with N.
      compare: `compare((variables, centroids, gamma, covariance), (x, labels)) -> (distances
        [N, K], finite)`.
    """

    vectors: Callable[[Any, Any], CharVec]
    extract: Callable[[Any, Any], tuple[CharVec, jax.Array]]
    accumulate: Callable[[Any, Centroids, Any], tuple[Centroids, jax.Array]]
    compare: Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def passes(
    extractor: Extractor | None, comparison: Comparison, batch_size: int, mesh: jax.sharding.Mesh
) -> Passes:
    """Returns the passes over images, or with `extractor=None` over vectors (`x` is a CharVec)."""
    try:
        return _shared(extractor, comparison, batch_size, mesh)
    except TypeError:  # a part, such as apply_kwargs={"rngs": {...}}, cannot be hashed
        return _shared.__wrapped__(extractor, comparison, batch_size, mesh)


@functools.lru_cache(maxsize=16)
def _shared(extractor, comparison, batch_size, mesh):
    def vectors(variables, x):
        return x if extractor is None else extractor(variables, x)

    def extract(variables, x):
        charvec = vectors(variables, x)
        return charvec, _finite(charvec)

    def accumulate(variables, centroids, batch, present):
        x, labels = batch
        charvec = vectors(variables, x)
        added = fit_centroids(
            charvec,
            labels,
            len(centroids.count),
            weights=present,
            estimator=comparison.estimator,
            variance=comparison.variance,
        )
        return centroids + added, _finite(charvec)

    def compare(constants, batch):
        variables, centroids, gamma, covariance = constants
        x, labels = batch
        charvec = vectors(variables, x)
        distances = centroid_distances(
            charvec,
            centroids,
            metric=comparison.metric if covariance is None else covariance,
            gamma=gamma,
            beta=comparison.beta,
            left_out=labels if comparison.exclude_self else None,
        )
        return distances, _finite(charvec)

    return Passes(
        vectors,
        loops.map_batches(extract, batch_size=batch_size, mesh=mesh),
        loops.fold_batches(accumulate, batch_size=batch_size, mesh=mesh),
        loops.map_batches(compare, batch_size=batch_size, mesh=mesh),
    )


def _finite(charvec):
    arrays = [jnp.isfinite(array).all(axis=1) for block in charvec.blocks for array in block]
    return jnp.stack(arrays).all(axis=0)
