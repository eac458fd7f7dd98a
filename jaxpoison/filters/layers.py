"""A filter by clusters over all layers, after FLARE (Hou et al. 2025, arXiv 2411.19479).

Where a trigger is told from honest images differs from attack to attack: early or late, seldom in
the last features alone. So each layer says one number of an example, how abnormal it is there, and
the whole set is split in two by these numbers. Later layers separate classes rather than poisons,
and may hide them; the split is made without the last layer, without the last two and so on, and the
one that is the most distinct counts.
"""

from typing import Any

import numpy as np

from jaxpoison.data import labels as labels_
from jaxpoison.filters.clustering import two_means
from jaxpoison.filters.extraction import CharVec
from jaxpoison.filters.features import by_class, checked, verdict
from jaxpoison.filters.result import FilterResult

_TO_DEVIATION = 1.4826  # of a median absolute deviation, for a normal distribution


def layer_clustering(vectors: CharVec, y: Any) -> FilterResult:
    """Flags the smaller of two clusters of the whole set, by how abnormal each layer is.

    After FLARE, with its idea and not its means. FLARE takes the least likely activation of a layer
    under its running statistics, UMAP and HDBSCAN; here an example's abnormality in a layer is

        log(1 + max over channels of |v - median| / deviation)

    of its characteristic vector v (means and variances), with median and median absolute deviation
    over the set; then 2-means, which starts at the sign of the main component. The split with the
    most distinct clusters counts: squared distance of the centers over the mean squared distance to
    them. The score is how much nearer an example is to the smaller cluster's center.

    Args:
      vectors: of N examples, from `extract_charvec`.
      y: labels [N], or one-hot [N, K]; they have no part in the clusters.

    Raises:
      TypeError: for other vectors. ValueError: for vectors or labels that are bad or do not fit.
    """
    if not isinstance(vectors, CharVec):
        raise TypeError(
            f"vectors are {type(vectors).__name__}; expected a CharVec, as extract_charvec returns"
        )
    checked(np.asarray(vectors.ravel()), y, "vectors")
    labels, classes = labels_.encode(y)
    values = abnormality(vectors)
    best, flagged, score = -1.0, np.zeros(len(labels), bool), np.zeros(len(labels), np.float32)
    used = 0
    for last in range(values.shape[1], 0, -1):
        around = values[:, :last] - values[:, :last].mean(axis=0)
        one_class = np.zeros(len(labels), np.int32)
        _, near = by_class(two_means, around, labels=one_class, num_components=last)
        distinct = _distinct(around, near > 0)
        if distinct > best:
            best, flagged, score, used = distinct, near > 0, near, last
    settings = {"filter": "layer_clustering", "layers": used, "of": values.shape[1]}
    return verdict(y, flagged, score, labels, classes, settings)


def abnormality(vectors: CharVec) -> np.ndarray:
    """Returns how abnormal each example is in each layer, float32 [N, L]; 0 is as usual."""
    columns = []
    for block in vectors.blocks:
        own = np.concatenate([np.asarray(block.mean), np.asarray(block.var)], axis=1)
        away = np.abs(own.astype(np.float64) - np.median(own, axis=0))
        usual = _TO_DEVIATION * np.median(away, axis=0)
        # A channel that is the same for most examples says nothing of the others.
        away[:, usual == 0] = 0
        columns.append(np.log1p((away / np.where(usual, usual, 1)).max(axis=1)))
    return np.stack(columns, axis=1).astype(np.float32)


def _distinct(around, second):
    """Returns squared distance of two centers over the mean squared distance to them; 0 for one."""
    if second.all() or not second.any():
        return 0.0
    centers = np.stack([around[~second].mean(axis=0), around[second].mean(axis=0)])
    within = np.mean(np.sum(np.square(around - centers[second.astype(int)]), axis=1))
    return float(np.sum(np.square(centers[1] - centers[0])) / max(within, 1e-12))
