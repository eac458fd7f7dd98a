"""The filters that characteristic vectors are compared with, on features of the last layer.

All take features [N, d] of a frozen network and the labels, and return a `FilterResult`. What only
the attacker knows (how many poisons there are) is an argument with a default that is not taken
from there, and is told in `FilterResult.config`: name it wherever a number is printed.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.core import devices, loops
from jaxpoison.filters.centroids import fit_centroids
from jaxpoison.filters.distances import Metric
from jaxpoison.filters.extraction import Block, CharVec
from jaxpoison.filters.nearest import nearest_centroid_filter
from jaxpoison.filters.result import FilterResult, encode_labels, with_classes

_EXACT = jax.lax.Precision.HIGHEST
_TINY = jnp.finfo(jnp.float32).tiny
_BATCH = 256  # rows of an N x N matrix that are held at a time


def deep_knn(
    features: Any, y: Any, *, k: int | None = None, exclude_self: bool = True
) -> FilterResult:
    """Flags examples whose label is not among the most frequent ones of their k neighbours.

    Peri et al. 2020 (arXiv 1909.13374): Euclidean distance, plurality vote, ties keep. The score
    is (votes of the strongest other label - votes of the own) / k, distances are 1 - votes / k.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      k: neighbours; default 2 * (largest class) - 1, at most N - 1. It matters: sweep it.
      exclude_self: whether an example is not its own neighbour.

    Raises:
      ValueError: for bad features, labels or k.
    """
    features, labels, classes = _checked(features, y)
    most = len(labels) - exclude_self
    if k is None:
        k = min(2 * int(np.bincount(labels).max()) - 1, most)
    if not 1 <= k <= most:
        raise ValueError(f"k must be between 1 and {most} for {len(labels)} examples, not {k}")
    votes = _over_rows(_knn_votes, k=k, exclude_self=exclude_self)(
        (features, jax.nn.one_hot(labels, len(classes))), len(labels)
    )
    own = jnp.arange(len(classes)) == labels[:, None]
    score = jnp.max(jnp.where(own, -1, votes), axis=1) - jnp.sum(jnp.where(own, votes, 0), axis=1)
    # The own label first, so that a tie is its.
    real = jnp.where(score > 0, jnp.argmax(votes, axis=1), labels)
    settings = {"filter": "deep_knn", "k": k, "exclude_self": exclude_self}
    return _result(score > 0, score / k, labels, classes, settings, real, 1 - votes / k)


def spectral_signatures(
    features: Any, y: Any, *, poison_share: float = 0.1, centered: bool = True
) -> FilterResult:
    """Flags the 1.5 * poison_share * n_y examples of a class furthest along its main direction.

    Tran et al. 2018 (arXiv 1811.00636): with v the top right singular vector of the centred
    features of a class, the score is ((f - mean) . v)^2. Of each class at least one example stays,
    so a share of 2/3 or more leaves exactly one.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      poison_share: share of a class that is taken for poisoned. The truth is oracle knowledge;
        .1 is not.
      centered: False projects f itself on v, as the authors' released code does.

    Raises:
      ValueError: for bad features, labels or share.
    """
    _check_share("poison_share", poison_share)
    features, labels, classes = _checked(features, y)
    score = _spectral_scores(features, labels, len(classes), centered)
    settings = {"filter": "spectral_signatures", "poison_share": poison_share, "centered": centered}
    flagged = _top_of_each_class(score, labels, 1.5 * poison_share)
    return _result(flagged, score, labels, classes, settings)


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
      share: of each class, in [0, 1]; sweep .01, .05, .1, .3.
      rule: "sphere" or "slab".

    Raises:
      ValueError: for bad features, labels, share or rule.
    """
    _check_share("share", share)
    if rule not in ("sphere", "slab"):
        raise ValueError(f'rule must be "sphere" or "slab", not {rule!r}')
    features, labels, classes = _checked(features, y)
    score = _centroid_scores(features, labels, len(classes), rule == "slab")
    settings = {"filter": "l2_centroid", "share": share, "rule": rule}
    return _result(_top_of_each_class(score, labels, share), score, labels, classes, settings)


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
      ValueError: for bad features, labels or metric, or if trusted examples lack a class.
    """
    features, labels, classes = _checked(features, y)
    reference, reference_labels = features, labels
    if trusted is not None:
        reference, positions, known = _checked(*trusted)
        if not np.isin(classes, known).all():
            raise ValueError(
                f"there are no trusted features of the labels {np.setdiff1d(classes, known)}: add "
                "some of every class"
            )
        labels = np.searchsorted(known, classes)[labels]
        reference_labels, classes = positions, known
    result = _feature_verdict(
        features, labels, reference, reference_labels, len(classes), metric, margin
    )
    settings = {
        "filter": "feature_centroid",
        "trusted": trusted is not None,
        "metric": metric,
        "margin": margin,
    }
    return _result(
        result.is_poison,
        result.score,
        labels,
        classes,
        settings,
        result.real_label,
        result.distances,
    )


def activation_clustering(
    features: Any,
    y: Any,
    *,
    num_components: int = 10,
    max_relative_size: float = 1.0,
    min_silhouette: float = -1.0,
) -> FilterResult:
    """Flags the smaller of two clusters of each class.

    Chen et al. 2018 (arXiv 1811.03728): principal components of a class (the authors took
    independent ones), then 2-means. The start is the sign of the first component, so nothing is
    random. The score is how much nearer an example is to the smaller cluster's centre.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      num_components: of each class, at most d.
      max_relative_size: flag only where the smaller cluster holds less than this share of the
        class; 1 flags in every class, clean ones too, .35 is common.
      min_silhouette: flag only where the mean silhouette of the class is above this; -1 in every
        class, .1 is common.

    Raises:
      ValueError: for bad features, labels or number of components.
    """
    features, labels, classes = _checked(features, y)
    if not 1 <= num_components <= features.shape[1]:
        raise ValueError(
            f"num_components must be between 1 and {features.shape[1]}, the width of the features, "
            f"not {num_components}"
        )
    reduced, score = _clusters(features, labels, len(classes), num_components)
    smaller = score > 0
    members = jax.nn.one_hot(labels, len(classes), axis=0)
    counts = jnp.sum(members, axis=1)
    suspect = jnp.matmul(members, smaller) / counts < max_relative_size
    if min_silhouette > -1:
        silhouettes = _over_rows(_silhouettes)((reduced, labels, smaller), len(labels))
        suspect &= jnp.matmul(members, silhouettes) / counts > min_silhouette
    settings = {
        "filter": "activation_clustering",
        "num_components": num_components,
        "max_relative_size": max_relative_size,
        "min_silhouette": min_silhouette,
    }
    return _result(smaller & suspect[labels], score, labels, classes, settings)


def confident_learning(features: Any, y: Any, *, num_folds: int = 5, seed: int = 0) -> FilterResult:
    """Flags what cleanlab calls label issues, by out-of-fold predictions of a linear head.

    Northcutt et al. 2021 (arXiv 1911.00068): `cleanlab.filter.find_label_issues`. The score is the
    largest probability of another label less that of the own. Poisons with clean labels are
    meant to fit, so little should be expected of this.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      num_folds: of the cross-validation; every class needs as many examples.
      seed: of the folds.

    Raises:
      ImportError: without cleanlab and scikit-learn (`pip install "jaxpoison[experiments]"`).
      ValueError: for bad features or labels, or a class smaller than the number of folds.
    """
    try:
        from cleanlab.filter import find_label_issues
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            'confident learning needs cleanlab: pip install "jaxpoison[experiments]"'
        ) from error
    features, labels, classes = _checked(features, y)
    smallest = int(np.bincount(labels).min())
    if not 2 <= num_folds <= smallest:
        raise ValueError(
            f"num_folds must be between 2 and the size of the smallest class, {smallest}, "
            f"not {num_folds}"
        )
    probabilities = np.asarray(
        cross_val_predict(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
            features,
            labels,
            cv=StratifiedKFold(num_folds, shuffle=True, random_state=seed),
            method="predict_proba",
        )
    )
    flagged = find_label_issues(labels, probabilities, n_jobs=1)
    own = np.arange(len(classes)) == labels[:, None]
    score = np.where(own, -np.inf, probabilities).max(1) - probabilities[own]
    settings = {"filter": "confident_learning", "num_folds": num_folds, "seed": seed}
    return _result(
        flagged,
        score.astype(np.float32),
        labels,
        classes,
        settings,
        probabilities.argmax(1),
        (1 - probabilities).astype(np.float32),
    )


def _checked(features, y):
    """Returns features float32 [N, d], labels int32 [N] in 0..K-1 and the K >= 2 classes."""
    labels, classes = encode_labels(y)
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(
            f"features have shape {features.shape}; expected [N, d] for {len(labels)} labels. "
            "Flatten or average activations of a convolution first"
        )
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the features of {len(bad)} examples are not finite, the first at indices "
            f"{bad[:10].tolist()}: remove these examples or repair them"
        )
    if len(classes) < 2:
        raise ValueError(f"all labels are {classes[0]!s}; filters compare classes, so give two")
    return features, labels, classes


def _check_share(name, share):
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be in [0, 1], not {share}")


def _result(flagged, score, labels, classes, settings, real=None, distances=None):
    settings = tuple(settings.items())
    places = np.arange(len(classes))
    result = FilterResult(flagged, score, labels, places, real, distances, settings)
    return with_classes(result, classes)


@functools.cache
def _over_rows(fn, **static):
    """Returns `run(constants, N)`: `fn(constants, rows [B])` for all N rows, B at a time."""
    mesh = devices.data_mesh()
    rows = loops.map_batches(functools.partial(fn, **static), batch_size=_BATCH, mesh=mesh)

    def run(constants, num_rows):
        return rows(*devices.replicate((constants, jnp.arange(num_rows)), mesh))

    return run


def _squared_distances(features, rows):
    # Around the mean: far from it, the difference of squares would cancel.
    features = features - jnp.mean(features, axis=0)
    square = jnp.sum(jnp.square(features), axis=1)
    products = jnp.matmul(features[rows], features.T, precision=_EXACT)
    return jnp.maximum(square[rows][:, None] - 2 * products + square, 0)


def _knn_votes(constants, rows, *, k, exclude_self):
    features, members = constants
    distances = _squared_distances(features, rows)
    if exclude_self:
        distances = distances.at[jnp.arange(len(rows)), rows].set(jnp.inf)
    _, nearest = jax.lax.top_k(-distances, k)
    return jnp.sum(members[nearest], axis=1)


def _silhouettes(constants, rows):
    """Returns each example's silhouette between the two clusters of its class; 0 if alone."""
    reduced, labels, smaller = constants
    distances = jnp.sqrt(_squared_distances(reduced, rows))
    same_class = labels == labels[rows][:, None]
    same = same_class & (smaller == smaller[rows][:, None])
    other = same_class & ~same
    size = jnp.sum(same, axis=1)
    inside = jnp.sum(distances * same, axis=1) / jnp.maximum(size - 1, 1)
    outside = jnp.sum(distances * other, axis=1) / jnp.maximum(jnp.sum(other, axis=1), 1)
    value = (outside - inside) / jnp.maximum(jnp.maximum(inside, outside), _TINY)
    return jnp.where((size > 1) & jnp.any(other, axis=1), value, 0)


def _class_means(features, labels, num_classes):
    members = jax.nn.one_hot(labels, num_classes, axis=0)
    weights = members / jnp.sum(members, axis=1, keepdims=True)
    return jnp.matmul(weights, features, precision=_EXACT)


def _directions(features, labels, num_classes, num_components):
    """Returns features around their class mean [N, d], and main directions [K, d, components]."""
    centered = features - _class_means(features, labels, num_classes)[labels]

    def one_class(number):
        mine = jnp.where((labels == number)[:, None], centered, 0)
        _, vectors = jnp.linalg.eigh(jnp.matmul(mine.T, mine, precision=_EXACT))
        return vectors[:, : -num_components - 1 : -1]

    return centered, jax.lax.map(one_class, jnp.arange(num_classes))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _spectral_scores(features, labels, num_classes, centered):
    around, directions = _directions(features, labels, num_classes, 1)
    projected = around if centered else features
    return jnp.square(jnp.sum(projected * directions[labels, :, 0], axis=1))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _centroid_scores(features, labels, num_classes, slab):
    centers = _class_means(features, labels, num_classes)
    around = features - centers[labels]
    if not slab:
        return jnp.linalg.norm(around, axis=1)
    between = centers[:, None] - centers
    distance = jnp.linalg.norm(between, axis=-1) + jnp.diag(jnp.full(num_classes, jnp.inf))
    normal = between[jnp.arange(num_classes), jnp.argmin(distance, axis=1)]
    normal /= jnp.maximum(jnp.linalg.norm(normal, axis=1, keepdims=True), _TINY)
    return jnp.abs(jnp.sum(around * normal[labels], axis=1))


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _feature_verdict(features, labels, reference, reference_labels, num_classes, metric, margin):
    def vector(features):
        return CharVec((Block(features, jnp.zeros_like(features)),), ("features",), (1,))

    centroids = fit_centroids(vector(reference), reference_labels, num_classes)
    return nearest_centroid_filter(
        vector(features), labels, centroids, metric=metric, margin=margin
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _clusters(features, labels, num_classes, num_components):
    """Returns class-wise principal components [N, c] and how much nearer the smaller cluster is."""
    around, directions = _directions(features, labels, num_classes, num_components)
    reduced = jnp.einsum("nd,ndc->nc", around, directions[labels], precision=_EXACT)

    def one_class(number):
        mine = labels == number

        def distances(second):
            """Returns squared distances [N, 2] to the centres of both clusters."""
            members = jnp.stack([mine & ~second, mine & second]).astype(jnp.float32)
            sizes = jnp.sum(members, axis=1, keepdims=True)
            centers = jnp.matmul(members / jnp.maximum(sizes, 1), reduced, precision=_EXACT)
            return jnp.sum(jnp.square(reduced[:, None] - centers), axis=-1)

        def assign(state):
            steps, _, second = state
            squares = distances(second)
            return steps + 1, second, mine & (squares[:, 1] < squares[:, 0])

        def moving(state):
            steps, last, second = state
            return (steps == 0) | ((steps < 300) & jnp.any(last != second))

        start = mine & (reduced[:, 0] > 0)
        second = jax.lax.while_loop(moving, assign, (0, start, start))[2]
        first_is_smaller = jnp.sum(mine & ~second) < jnp.sum(second)
        squares = distances(second)
        margin = squares[:, 0] - squares[:, 1]
        return jnp.where(mine, jnp.where(first_is_smaller, -margin, margin), 0)

    return reduced, jnp.sum(jax.lax.map(one_class, jnp.arange(num_classes)), axis=0)


def _top_of_each_class(score, labels, share):
    """Returns the floor(share * n_y) highest scores of each class, bool [N], but never all."""
    score, labels = np.asarray(score), np.asarray(labels)
    counts = np.bincount(labels)
    # Products such as .15 * 20 may land just below the integer that is meant.
    drop = np.minimum(np.floor(share * counts + 1e-9).astype(int), counts - 1)
    order = np.lexsort((-score, labels))
    rank = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    flagged = np.zeros(len(labels), bool)
    flagged[order] = rank < drop[labels[order]]
    return flagged
