"""The filter itself: flags examples that are nearer to the centroid of another class."""

from collections.abc import Sequence

import jax

from jaxpoison.filters.centroids import Centroids
from jaxpoison.filters.distances import Mahalanobis, Metric, centroid_distances
from jaxpoison.filters.extraction import CharVec
from jaxpoison.filters.result import FilterResult, decide


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
