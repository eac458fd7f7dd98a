"""Filters by the centroids of classes in feature space."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from jaxpoison.core import devices
from jaxpoison.filters.distances import Metric
from jaxpoison.filters.extraction import Block, CharVec
from jaxpoison.filters.features import (
    TINY,
    check_share,
    checked,
    class_means,
    over_rows,
    squared_distances,
    verdict,
)
from jaxpoison.filters.inputs import trusted_chunks, where
from jaxpoison.filters.nearest import make_reference
from jaxpoison.filters.passes import no_examples, passes
from jaxpoison.filters.result import FilterResult, decide, top_of_each_class
from jaxpoison.filters.settings import FilterSettings

_BATCH = 1024  # examples whose sums are taken at a time


def l2_centroid(
    features: Any, y: Any, *, share: float = 0.05, rule: Literal["sphere", "slab"] = "sphere"
) -> FilterResult:
    """Flags, in each class, the given share of examples furthest from its centroid.

    Steinhardt et al. 2017 (arXiv 1706.03691) with centroids of the data. The score is
    |f - c_y| ("sphere") or |(f - c_y) . (c_y - c')| / |c_y - c'| ("slab"), where c' is the nearest
    other centroid. At least one example of each class stays.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      share: of each class, in [0, 1]; sweep 0.01, 0.05, 0.1, 0.3.
      rule: "sphere" or "slab".

    Raises:
      ValueError: for bad features, labels, share or rule.
    """
    check_share("share", share)
    if rule not in ("sphere", "slab"):
        raise ValueError(f'rule must be "sphere" or "slab", not {rule!r}')
    features, labels, classes = checked(features, y)
    centers = class_means(features, labels, len(classes))
    around = features - centers[labels]
    if rule == "sphere":
        score = np.linalg.norm(around, axis=1)
    else:
        nearest = np.asarray(over_rows(_nearest_other)(centers, len(centers)))
        normal = centers - centers[nearest]
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), TINY)
        score = np.abs(np.sum(around * normal[labels], axis=1))
    settings = {"filter": "l2_centroid", "share": share, "rule": rule}
    flagged = top_of_each_class(score, labels, float(share))
    return verdict(y, flagged, score, labels, classes, settings)


def feature_centroid(
    features: Any, y: Any, *, trusted: Any = None, metric: Metric = "l2", margin: float = 0.0
) -> FilterResult:
    """Flags examples that are nearer to the centroid of another class, in features alone.

    The control: what characteristic vectors find beyond this is due to them.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      trusted: (features, labels) of clean examples of all classes, for their centroids; default
        the data itself.
      metric: "l2", "cosine" or "z", see `centroid_distances`.
      margin: see `nearest_centroid_filter`.

    Raises:
      TypeError: for trusted features without labels.
      ValueError: for bad features, labels or metric, or if trusted examples lack a class.
    """
    allowed = tuple(name for name in get_args(Metric) if name != "maha")
    if metric not in allowed:
        raise ValueError(f"metric must be one of {', '.join(allowed)}, not {metric!r}")
    margin = float(margin)
    if not np.isfinite(margin):
        raise ValueError(f"margin must be finite, not {margin}")
    features, labels, classes = checked(features, y)
    reference, reference_labels = features, labels
    if trusted is not None:
        ((known_features, positions, known, _),) = trusted_chunks(trusted)
        reference, reference_labels, known = checked(
            known_features, known[positions], "trusted features"
        )
        if reference.shape[1] != features.shape[1]:
            raise ValueError(
                f"trusted features have {reference.shape[1]} columns, the others "
                f"{features.shape[1]}: take both from the same layer"
            )
        if not np.isin(classes, known).all():
            raise ValueError(
                f"there are no trusted features of the labels {np.setdiff1d(classes, known)}: add "
                "some of every class"
            )
        labels, classes = where(classes, known)[labels], known
    result = decide(
        _distances(features, reference, reference_labels, len(classes), metric),
        jnp.asarray(labels),
        margin=margin,
        settings=(),
    )
    settings = {
        "filter": "feature_centroid",
        "trusted": trusted is not None,
        "metric": metric,
        "margin": margin,
    }
    return verdict(
        y,
        result.is_poison,
        result.score,
        labels,
        classes,
        settings,
        result.real_label,
        result.distances,
    )


def _distances(features, reference, reference_labels, num_classes, metric):
    """Returns the distances to all centroids, [N, K]; besides them, memory is linear in N and K."""
    settings, mesh = FilterSettings(metric=metric, batch_size=_BATCH), devices.data_mesh()
    run = passes(None, settings, mesh)
    x, known = (_vectors(array) for array in (features, reference))
    none = no_examples(run, settings, None, known, num_classes)
    none, known, reference_labels, x = devices.replicate((none, known, reference_labels, x), mesh)
    centroids, _ = run.accumulate(None, none, (known, reference_labels))
    labels = devices.replicate(np.zeros(len(features), np.int32), mesh)
    return run.compare((None, make_reference(centroids, settings)), (x, labels))[0]


def _vectors(features):
    return CharVec((Block(features, np.zeros_like(features)),), ("features",), (1,))


def _nearest_other(centers, rows):
    distances = squared_distances(centers, rows)
    return jnp.argmin(distances.at[jnp.arange(len(rows)), rows].set(jnp.inf), axis=1)
