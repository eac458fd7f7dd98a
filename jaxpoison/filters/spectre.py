"""SPECTRE (Hayase et al. 2021, arXiv 2104.11315): spectral signatures after robust whitening.

For the examples of a class, with centered features reduced to k main components s_i and an assumed
share e of poisons:

    S      = covariance of the examples that a filter of fourth moments leaves (arXiv 1703.00893)
    y_i    = S^(-1/2) s_i                      clean ones are white now, poisons stand out
    C      = covariance of all y_i
    score  = y_i' Q y_i,  Q = exp(a (C - I) / (|C| - 1)) / trace       quantum entropy

Plain principal components see where a class varies most, which need not be where poisons are. The
filter and the choice of k are those of the authors' code.
"""

from typing import Any

import numpy as np
from scipy.sparse import linalg

from jaxpoison.core.checks import check_count, check_positive
from jaxpoison.filters.features import check_share, checked, verdict
from jaxpoison.filters.result import FilterResult, top_of_each_class

MOST_COMPONENTS = 100
RANKS = 10  # values of k that are tried
SLACK, MARGIN, TAU = 10.0, 3.0, 0.1  # the constants of the filter


def spectre(
    features: Any,
    y: Any,
    *,
    poison_share: float = 0.1,
    num_components: int | None = None,
    alpha: float = 4.0,
) -> FilterResult:
    """Flags the 1.5 * poison_share * n_y examples of a class of highest quantum entropy score.

    Runs in float64 on the host. Of each class at least one example stays.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      poison_share: e, the assumed share of poisons in a class, in (0, 1/3].
      num_components: k; None tries ten values up to 100 in each class, and takes the one whose
        removal leaves the rest most unlike all.
      alpha: a; 0 sums squares over all directions, large values look at the main one alone.

    Raises:
      ValueError: for bad features, labels, share or numbers.
    """
    check_share("poison_share", poison_share)
    if not 0 < poison_share <= 1 / 3:
        raise ValueError(f"poison_share is {poison_share}; robust covariances need one in (0, 1/3]")
    check_positive(alpha=alpha)
    if num_components is not None:
        check_count(num_components=num_components)
    features, labels, classes = checked(features, y)
    score = np.zeros(len(labels), np.float32)
    for label in range(len(classes)):
        mine = labels == label
        own = features[mine].astype(np.float64)
        score[mine] = _scores(own, float(poison_share), num_components, float(alpha))
    flagged = top_of_each_class(score, labels, 1.5 * float(poison_share))
    settings = {
        "filter": "spectre", "poison_share": poison_share, "num_components": num_components,
        "alpha": alpha,
    }  # fmt: skip
    return verdict(y, flagged, score, labels, classes, settings)


def _scores(features, share, num_components, alpha):
    """Returns the scores of one class, float64 [n]."""
    reduced = _components(features)
    most = reduced.shape[1]
    if not most:
        return np.zeros(len(features))
    if num_components is not None:
        return entropy_scores(reduced[:, :num_components], share, alpha)
    drop = int(1.5 * share * len(features))
    best, chosen = -np.inf, np.zeros(len(features))
    for k in np.unique(np.round(np.linspace(1, np.sqrt(most), RANKS) ** 2).astype(int)):
        scores = entropy_scores(reduced[:, :k], share, alpha)
        kept = np.argsort(scores, kind="stable")[: len(scores) - drop]
        covariance = _covariance(_white(reduced, _covariance(reduced[kept])))
        weight = _weight(covariance, alpha)
        found = np.sum(covariance * weight)
        if found > best:
            best, chosen = found, scores
    return chosen


def entropy_scores(reduced: np.ndarray, share: float, alpha: float) -> np.ndarray:
    """Returns y_i' Q y_i, float64 [n], of components [n, k]."""
    if reduced.shape[1] == 1:
        return reduced[:, 0] ** 2
    kept = robust_members(reduced, share)
    white = _white(reduced, _covariance(reduced[kept]))
    return np.einsum("ni,ij,nj->n", white, _weight(_covariance(white), alpha), white)


def robust_members(samples: np.ndarray, share: float) -> np.ndarray:
    """Returns what the filter leaves for the covariance, bool [n]; at most 2 e n are dropped.

    Each round whitens by all that are left. Where the leading fourth moment is more than Gaussian
    samples have, those furthest out along it are dropped: above the first value that Gaussian tails
    would hardly hold, or else the largest, less `MARGIN`.

    Args:
      samples: float64 [n, k], centered.
      share: e.
    """
    rows, limit = np.arange(len(samples)), round(2 * share * len(samples))
    while limit > 0:
        left = samples[rows]
        white = _white(left, left.T @ left / len(left))
        length = np.sum(white**2, axis=1)
        far = SLACK * white.shape[1] * np.log(len(left) / TAU)
        if (length >= far).any():
            keep = _but_the_last(length, length < far, limit)
        else:
            value, direction = _fourth_moment(white)
            if value <= 1 + SLACK * share * np.log(1 / share) ** 2:
                break
            along = np.einsum("ni,ij,nj->n", white, direction, white, optimize=True) - np.trace(
                direction
            )
            along = np.abs(along - np.median(along)) / np.sqrt(2)
            beyond = along[along - MARGIN > SLACK * np.log(1 / share)]
            end = beyond.min() if len(beyond) else along.max()
            if end <= MARGIN:
                break
            keep = _but_the_last(along, along <= end - MARGIN, limit)
        if keep.all():
            break
        limit -= np.sum(~keep)
        rows = rows[keep]
    members = np.zeros(len(samples), bool)
    members[rows] = True
    return members


def _but_the_last(values, keep, limit):
    """Returns `keep`, and all but the `limit` largest values."""
    order = np.argsort(values, kind="stable")
    lowest = np.zeros(len(values), bool)
    lowest[order[: max(len(values) - limit, 0)]] = True
    return keep | lowest


def _fourth_moment(white):
    """Returns the leading eigenpair of E[zz'] - ii', z = vec(yy'), i = vec(I); ([], [k, k]).

    By Lanczos' method, without the k^2 x k^2 matrix; as y is white, it is the covariance of z.
    """
    size = white.shape[1]

    def product(vector):
        matrix = vector.reshape(size, size)
        along = np.einsum("ni,ij,nj->n", white, matrix, white, optimize=True)
        moved = (white * along[:, None]).T @ white / len(white) - np.trace(matrix) * np.eye(size)
        return moved.reshape(-1)

    operator = linalg.LinearOperator((size**2, size**2), matvec=product, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    value, vector = linalg.eigsh(operator, k=1, which="LA", v0=np.ones(size**2))
    direction = vector.reshape(size, size)
    return float(value[0]), (direction + direction.T) / 2


def _components(features):
    """Returns main components, float64 [n, m], without those that only rounding has."""
    centered = features - features.mean(axis=0)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    # More components than half of the examples would have no robust covariance.
    real = int(np.sum(values > 1e-6 * values[0])) if values[0] > 0 else 0
    most = min(real, MOST_COMPONENTS, len(features) // 2)
    return left[:, :most] * values[:most]


def _covariance(samples):
    return np.cov(samples.T, ddof=0).reshape(samples.shape[1], -1)


def _white(samples, covariance):
    """Returns covariance^(-1/2) applied to each row."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 1e-12 * values[-1])
    return (samples @ vectors / np.sqrt(values)) @ vectors.T


def _weight(covariance, alpha):
    """Returns Q = exp(alpha (C - I) / (|C| - 1)) / trace."""
    values, vectors = np.linalg.eigh(covariance)
    # Where the filter has dropped nothing, C = I but for rounding: all directions count alike.
    power = alpha * (values - values[-1]) / max(abs(values[-1] - 1), 1e-6)
    weights = np.exp(power)
    return (vectors * (weights / weights.sum())) @ vectors.T
