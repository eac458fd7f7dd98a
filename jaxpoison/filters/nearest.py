"""The filter itself, as pure functions: centroids, distances, decision.

`filter_vectors` is all of it on characteristic vectors that were extracted before;
`CharacteristicVectorFilter` does the same a batch at a time, with the network in the loop.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxpoison.filters.centroids import Centroids, fit_centroids, shrink
from jaxpoison.filters.distances import (
    Mahalanobis,
    Metric,
    centroid_distances,
    fisher_weights,
    fit_mahalanobis,
    layer_weights,
)
from jaxpoison.filters.extraction import CharVec
from jaxpoison.filters.result import FilterResult, decide
from jaxpoison.filters.settings import PAPER, FilterSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reference:
    """What examples are compared with; a pytree.

    Attributes:
      centroids: of K classes.
      gamma: weights of the layers, float32 [l], sum 1.
      covariance: where the metric is "maha", else None.
    """

    centroids: Centroids
    gamma: jax.Array
    covariance: Mahalanobis | None


def make_reference(
    centroids: Centroids,
    settings: FilterSettings = PAPER,
    *,
    vectors: tuple[CharVec, jax.Array] | None = None,
    dataset: Centroids | None = None,
) -> Reference:
    """Returns weights and covariance with the centroids; may be put under `jit`.

    Args:
      centroids: of the data or of trusted examples, as `settings.centroids` tells.
      settings: of the filter, static under `jit`.
      vectors: the vectors and labels of the centroids, for metric "maha".
      dataset: centroids of the data and the same classes, for tau > 0.

    Raises:
      ValueError: for settings that do not fit the layers.
    """
    gamma = fisher_weights(centroids) if settings.gamma == "fisher" else settings.gamma
    gamma = layer_weights(gamma, len(centroids.paths))
    covariance = None
    if settings.metric == "maha":
        if vectors is None:
            raise ValueError('metric="maha" needs the vectors themselves')
        covariance = fit_mahalanobis(*vectors, centroids, gamma=gamma, beta=settings.beta)
    if settings.tau > 0:
        if dataset is None:
            raise ValueError("tau > 0 needs the centroids of the data as well")
        centroids = shrink(centroids, dataset, settings.tau)
    return Reference(centroids, gamma, covariance)


def reference_distances(
    charvec: CharVec, labels: jax.Array, reference: Reference, settings: FilterSettings = PAPER
) -> jax.Array:
    """Returns the distances to all classes, float32 [N, K]; `labels` int32 [N] in [0, K)."""
    covariance = reference.covariance
    return centroid_distances(
        charvec,
        reference.centroids,
        metric=settings.metric if covariance is None else covariance,
        gamma=reference.gamma,
        beta=settings.beta,
        left_out=labels if settings.exclude_self else None,
    )


def filter_vectors(
    charvec: CharVec,
    labels: jax.Array,
    num_classes: int,
    *,
    trusted: tuple[CharVec, jax.Array] | None = None,
    settings: FilterSettings = PAPER,
) -> FilterResult:
    """Returns the verdict on vectors that were extracted before.

    May be put under `jit`, `vmap` and `lax.map`, with `num_classes` and `settings` static. What
    needs a look at values, such as classes that are too small, is left to the caller.

    Args:
      charvec: N examples.
      labels: int32 [N], in [0, K).
      num_classes: K.
      trusted: vectors and labels of clean examples of all classes, for `centroids="trusted"`.
      settings: of the filter; `stats`, `min_class_size` and `batch_size` have no part in this.

    Raises:
      ValueError: for settings that do not fit the layers or the presence of trusted examples.
    """
    if (trusted is None) != (settings.centroids == "dataset"):
        raise ValueError(
            f'settings.centroids is "{settings.centroids}", but trusted examples were '
            f"{'not ' if trusted is None else ''}given"
        )

    def fit(charvec, labels):
        return fit_centroids(
            charvec, labels, num_classes, estimator=settings.estimator, variance=settings.variance
        )

    known = (charvec, labels) if trusted is None else trusted
    dataset = fit(charvec, labels) if settings.tau > 0 else None
    reference = make_reference(fit(*known), settings, vectors=known, dataset=dataset)
    distances = reference_distances(charvec, labels, reference, settings)
    told: dict[str, Any] = {"filter": "characteristic_vectors", **dataclasses.asdict(settings)}
    return decide(distances, labels, margin=settings.margin, settings=tuple(told.items()))


def nearest_centroid_filter(
    charvec: CharVec,
    labels: jax.Array,
    centroids: Centroids,
    *,
    metric: Metric | Mahalanobis = "cosine",
    gamma: str | Sequence[float] | jax.Array = "uniform",
    beta: float = 0.5,
    margin: float = 0.0,
    exclude_self: bool = False,
) -> FilterResult:
    """Returns which examples are nearer to another class than to their own; may be put under `jit`.

    Args:
      charvec: N examples.
      labels: int32 [N], in [0, K).
      centroids: K classes. From the examples themselves as in the paper, where poisons move them
        (see `detectable_shift`), or from trusted examples.
      metric: see `centroid_distances`.
      gamma: see `layer_weights`.
      beta: share of the means in each layer's weight.
      margin: how much nearer the other class must be.
      exclude_self: compare each example with its class without it. For centroids of these very
        examples; matters in classes of ten and less.

    Raises:
      ValueError: for unknown settings, other layers, or a single class.
    """
    distances = centroid_distances(
        charvec,
        centroids,
        metric=metric,
        gamma=gamma,
        beta=beta,
        left_out=labels if exclude_self else None,
    )
    settings = (
        ("filter", "characteristic_vectors"),
        ("metric", metric if isinstance(metric, str) else "maha"),
        ("gamma", gamma if isinstance(gamma, str) else "array"),
        ("beta", beta),
        ("margin", margin),
        ("exclude_self", exclude_self),
        ("estimator", centroids.estimator),
        ("variance", centroids.variance),
    )
    return decide(distances, labels, margin=margin, settings=settings)
