"""Nearest neighbors in the foreign embedding: found once, read by several checks."""

import functools
import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.audit.evidence import Evidence
from jaxpoison.core import devices, loops

_CHUNK = 8192  # rows of the embedding that are worked on at a time
_ROWS = 256  # of the matrix of similarities that are held at a time
_EXACT = jax.lax.Precision.HIGHEST
MOST_EXACT = 200_000
"""Points up to which all of them are compared; above, `lax.approx_max_k` at a recall of 0.95."""
COUNT = 50
"""Neighbors that `neighbors` finds."""
WIDTH = 256
"""Components of the embedding that `neighbors` compares."""

T = TypeVar("T")


class Neighbors(NamedTuple):
    """The nearest rows of each row, nearest first.

    Attributes:
      rows: int32 [N, k], -1 where there are fewer than k.
      similarity: float32 [N, k], cosine; -inf where there are fewer than k.
    """

    rows: np.ndarray
    similarity: np.ndarray


def once(fn: Callable[[Evidence], T]) -> Callable[[Evidence], T]:
    """Returns `fn` with its result kept as long as the evidence is; results are read only."""
    kept: weakref.WeakKeyDictionary[Evidence, T] = weakref.WeakKeyDictionary()

    @functools.wraps(fn)
    def cached(evidence: Evidence) -> T:
        if evidence not in kept:
            kept[evidence] = fn(evidence)
        return kept[evidence]

    return cached


@once
def copies_of(evidence: Evidence) -> np.ndarray:
    """Returns the group of each row, int32 [N]: equal for equal pixels of equal size."""
    words = np.ascontiguousarray(evidence.digests).view(np.uint64)
    return np.unique(words, axis=0, return_inverse=True)[1].astype(np.int32).reshape(-1)


@once
def neighbors(evidence: Evidence) -> Neighbors:
    """Returns the `COUNT` nearest other images of each row, by cosine of the `spread` embedding.

    Exact copies of a row are no neighbors of it, and exact copies with the same label count as one
    image: nobody outvotes others by copies.
    """
    group = copies_of(evidence)
    pairs = group.astype(np.int64) * evidence.num_classes + evidence.labels
    _, points, place = np.unique(pairs, return_index=True, return_inverse=True)
    embedding = spread(evidence, points)
    found = nearest(embedding, embedding, COUNT, own=(group[points], group[points]))
    rows = np.where(found.rows < 0, -1, points[found.rows]).astype(np.int32)
    return Neighbors(rows[place], found.similarity[place])


class Principal(NamedTuple):
    """The principal axes of the embedding.

    Attributes:
      mean: float32 [D].
      values: float64 [D], variances along the axes, ascending.
      basis: float32 [D, D], the axes in columns.
    """

    mean: np.ndarray
    values: np.ndarray
    basis: np.ndarray


@once
def principal(evidence: Evidence) -> Principal:
    """Returns the principal axes of the embedding of all rows, a part of the rows at a time."""
    embedding = evidence.embedding
    num, width = embedding.shape
    total, products = np.zeros(width), np.zeros((width, width))
    for start in range(0, num, _CHUNK):
        total += np.asarray(embedding[start : start + _CHUNK], float).sum(axis=0)
    mean = (total / num).astype(np.float32)
    for start in range(0, num, _CHUNK):
        around = np.asarray(embedding[start : start + _CHUNK], np.float32) - mean
        products += around.T @ around
    values, basis = np.linalg.eigh(products / num)
    return Principal(mean, np.maximum(values, 0), basis.astype(np.float32))


def spread(evidence: Evidence, rows: np.ndarray) -> np.ndarray:
    """Returns the main `WIDTH` components of rows, half way to equal variance, of unit length.

    Directions that differ between photos and say nothing of what is on these images count for
    less. On human labels of CIFAR-10, neighbors found so are better witnesses, and cost a fifth.
    """
    mean, values, basis = principal(evidence)
    kept = np.arange(len(values))[::-1][:WIDTH]
    kept = kept[values[kept] > 1e-6 * max(values[-1], 1e-12)]
    around = np.asarray(evidence.embedding[rows], np.float32) - mean
    around = around @ (basis[:, kept] / values[kept] ** 0.25).astype(np.float32)
    return around / np.maximum(np.linalg.norm(around, axis=1, keepdims=True), 1e-12)


def nearest(
    points: np.ndarray,
    queries: np.ndarray,
    count: int,
    *,
    own: tuple[np.ndarray, np.ndarray] | None = None,
) -> Neighbors:
    """Returns the `count` points with the largest products with each query.

    Args:
      points: float32 [P, D], P >= 1.
      queries: float32 [Q, D].
      count: neighbors, at most P are returned.
      own: int32 [P] and [Q]; a point and a query with equal numbers are no neighbors.
    """
    count = min(count, len(points))
    if own is None:
        own = np.full(len(points), -1, np.int32), np.full(len(queries), -2, np.int32)
    mesh = devices.data_mesh()
    constants, each = devices.replicate(((points, own[0]), (queries, own[1])), mesh)
    found = _search(count, len(points) <= MOST_EXACT)(constants, each)
    similarity, rows = (devices.to_host(array) for array in found)
    known = similarity > -np.inf
    return Neighbors(np.where(known, rows, -1).astype(np.int32), similarity)


@functools.cache
def _search(count, exact):
    def search(constants, batch):
        points, theirs = constants
        queries, mine = batch
        products = jnp.matmul(queries, points.T, precision=_EXACT)
        products = jnp.where(mine[:, None] == theirs, -jnp.inf, products)
        return jax.lax.top_k(products, count) if exact else jax.lax.approx_max_k(products, count)

    return loops.map_batches(search, batch_size=_ROWS, mesh=devices.data_mesh())
