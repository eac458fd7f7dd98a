"""Which images are copies of each other: groups of exact ones, near ones, and stars of both."""

from typing import NamedTuple

import numpy as np

from jaxpoison.audit import nearest
from jaxpoison.audit.evidence import Evidence

_BITS = 12  # of 128 bits of the perceptual hashes that may differ
_DIFFERENCE = 0.05  # 1 - correlation of gray pixels, at most
_STANDS_OUT = 0.25  # how much less the difference must be than to other images that look alike
_FLAT = 2.0  # standard deviation of gray pixels below which there is nothing to correlate


class Pairs(NamedTuple):
    """Near copies that are no exact ones; each pair in both orders.

    Attributes:
      rows: int32 [P, 2].
      difference: float32 [P], 1 - correlation of gray pixels.
    """

    rows: np.ndarray
    difference: np.ndarray


def compare(mine: Evidence, theirs: Evidence, found: nearest.Neighbors) -> Pairs:
    """Returns which neighbors in `theirs` are near copies of rows of `mine`.

    Of neighbors in the embedding, those with about the same perceptual hashes and about the same
    pixels. Where all images look alike (digits), a copy is also much nearer than its surroundings:
    than half of the ten last neighbors.
    """
    rows, columns = np.nonzero(found.rows >= 0)
    others = found.rows[rows, columns]
    bits = np.bitwise_count(mine.hashes[rows] ^ theirs.hashes[others]).sum(axis=1)
    rows, others = rows[bits <= _BITS], others[bits <= _BITS]
    difference = _differences(mine, theirs, rows, others)
    near = difference <= _DIFFERENCE
    rows, others, difference = rows[near], others[near], difference[near]
    asked, back = np.unique(rows, return_inverse=True)
    around = found.rows[asked, -10:]
    typical = _differences(mine, theirs, np.repeat(asked, around.shape[1]), around.reshape(-1))
    typical = np.where(around < 0, 1, typical.reshape(around.shape))
    # Where a set is so small that the neighbors are all there is, the copies may be among them.
    typical = np.median(typical, axis=1) if around.shape[1] == 10 else np.ones(len(asked))
    near = difference <= _STANDS_OUT * typical[back]
    return Pairs(np.stack([rows, others], axis=1)[near].astype(np.int32), difference[near])


def _differences(mine, theirs, rows, others):
    """Returns 1 - correlation of gray pixels of pairs, float32; 1 where an image is flat."""
    found = np.ones(len(rows), np.float32)
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        a, b = _standard(mine.images[rows[part]]), _standard(theirs.images[others[part]])
        found[part] = 1 - np.einsum("nd,nd->n", a, b)
    return found


def _standard(images):
    gray = images.mean(axis=-1, dtype=np.float32).reshape(len(images), -1)
    gray -= gray.mean(axis=1, keepdims=True)
    size = np.linalg.norm(gray, axis=1, keepdims=True)
    flat = size < _FLAT * np.sqrt(gray.shape[1])
    return np.where(flat, 0, gray / np.maximum(size, 1e-6))


@nearest.once
def near_pairs(evidence: Evidence) -> Pairs:
    """Returns the near copies within the set; of exact copies, one row stands for all."""
    pairs = compare(evidence, evidence, nearest.neighbors(evidence))
    rows = np.concatenate([pairs.rows, pairs.rows[:, ::-1]])
    rows, first = np.unique(rows, axis=0, return_index=True)
    return Pairs(rows, np.tile(pairs.difference, 2)[first])


def stars(num_rows: int, pairs: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Returns the medoid of each row's group, int32 [N]; itself for rows without copies.

    Groups are stars: every member is a copy of the medoid itself, so no chain of small changes
    joins images that differ. The row with most copies comes first, then the lower rank.

    Args:
      num_rows: N.
      pairs: int [P, 2], in both orders.
      rank: int [N], decides ties.
    """
    medoid = np.arange(num_rows, dtype=np.int32)
    degree = np.bincount(pairs[:, 0], minlength=num_rows)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    starts = np.searchsorted(pairs[:, 0], np.arange(num_rows + 1))
    free = np.ones(num_rows, bool)
    members = np.flatnonzero(degree)
    for row in members[np.lexsort((rank[members], -degree[members]))]:
        if free[row]:
            star = pairs[starts[row] : starts[row + 1], 1]
            star = star[free[star]]
            medoid[star], medoid[row] = row, row
            free[star], free[row] = False, False
    return medoid


class Groups(NamedTuple):
    """Groups of exact and near copies.

    Attributes:
      keeper: int32 [N], the row that stands for each row's group.
      exact: int32 [N], equal for exact copies.
      order: int64 [N], rows by keeper, then by id.
      starts: int64 [N + 1], where the rows of each keeper start in `order`.
    """

    keeper: np.ndarray
    exact: np.ndarray
    order: np.ndarray
    starts: np.ndarray


@nearest.once
def groups_of(evidence: Evidence) -> Groups:
    """Returns the groups; the lowest id among the rows with most copies stands for each."""
    exact = nearest.copies_of(evidence)
    rank = np.empty(len(exact), np.int64)
    rank[np.argsort(evidence.ids, kind="stable")] = np.arange(len(exact))
    by_rank = np.argsort(rank)
    first = by_rank[np.unique(exact[by_rank], return_index=True)[1]]
    pairs = first[exact[near_pairs(evidence).rows]]
    medoid = stars(len(exact), np.unique(pairs.reshape(-1, 2), axis=0), rank)
    keeper = medoid[first[exact]]
    order = np.lexsort((rank, keeper))
    return Groups(keeper, exact, order, np.searchsorted(keeper[order], np.arange(len(rank) + 1)))


def others_of(groups: Groups, row: int) -> np.ndarray:
    """Returns the other rows of a row's group: exact copies first, then the keeper."""
    keeper = groups.keeper[row]
    members = groups.order[groups.starts[keeper] : groups.starts[keeper + 1]]
    others = members[members != row]
    return others[np.lexsort((others != keeper, groups.exact[others] != groups.exact[row]))]
