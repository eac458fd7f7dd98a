"""Which images are copies of each other: groups of exact ones, near ones, and stars of both."""

from typing import NamedTuple

import numpy as np

from jaxpoison.audit import nearest
from jaxpoison.audit.evidence import Evidence

_BITS = 12  # of 128 bits of the perceptual hashes that may differ
_DIFFERENCE = 0.05  # 1 - correlation of gray pixels, at most
_STANDS_OUT = 0.07  # how much less the difference is than between images of this class
_RANK = 10  # of its neighbors by difference, the one that is no copy any more
_SAMPLE = 4000  # images that tell what is usual in a class
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
    pixels. Where all images of a class look alike (digits), a copy is also much nearer than what is
    usual between them.
    """
    rows, columns = np.nonzero(found.rows >= 0)
    others = found.rows[rows, columns]
    bits = np.bitwise_count(mine.hashes[rows] ^ theirs.hashes[others]).sum(axis=1)
    rows, others = rows[bits <= _BITS], others[bits <= _BITS]
    ours = pixels(mine)
    difference = _differences(ours, ours if theirs is mine else pixels(theirs), rows, others)
    most = np.minimum(_DIFFERENCE, _STANDS_OUT * usual(mine))
    near = difference <= most[mine.labels[rows]]
    return Pairs(np.stack([rows, others], axis=1)[near].astype(np.int32), difference[near])


@nearest.once
def pixels(evidence: Evidence) -> np.ndarray:
    """Returns gray pixels at half the resolution, centered, of unit length, float32 [N, 256].

    0 for flat images, whose differences to all others are therefore 1.
    """
    num, size = evidence.images.shape[:2]
    found = np.empty((num, (size // 2) ** 2), np.float32)
    for start in range(0, num, 4096):
        images = np.asarray(evidence.images[start : start + 4096])
        gray = np.einsum("nhiwjc->nhw", images.reshape(-1, size // 2, 2, size // 2, 2, 3) / 12.0)
        gray = gray.reshape(len(gray), -1) - gray.mean(axis=(1, 2))[:, None]
        length = np.linalg.norm(gray, axis=1, keepdims=True)
        flat = length < _FLAT * np.sqrt(gray.shape[1])
        found[start : start + 4096] = np.where(flat, 0, gray / np.maximum(length, 1e-6))
    return found


@nearest.once
def usual(evidence: Evidence) -> np.ndarray:
    """Returns the difference in pixels that is usual between neighbors of each class, float [K].

    The median, over images of the class, of the tenth smallest difference: groups of up to ten near
    copies do not change it, whatever their number.
    """
    group = nearest.copies_of(evidence)
    rows = np.argsort(group, kind="stable")[:: -(-len(group) // _SAMPLE)]  # a sample by content
    others = nearest.neighbors(evidence).rows[rows]
    ours = pixels(evidence)
    apart = _differences(ours, ours, np.repeat(rows, others.shape[1]), others.reshape(-1))
    apart = np.sort(np.where(others < 0, 1, apart.reshape(others.shape)), axis=1)
    # Too few neighbors tell nothing of what is usual.
    tenth = apart[:, _RANK - 1] if others.shape[1] >= _RANK else np.ones(len(rows))
    labels = evidence.labels[rows]
    found = np.full(evidence.num_classes, np.median(tenth))
    for label in np.unique(labels):
        found[label] = np.median(tenth[labels == label])
    return found


def _differences(mine, theirs, rows, others):
    """Returns 1 - correlation of gray pixels of pairs, float32."""
    found = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), 16384):
        part = slice(start, start + 16384)
        found[part] = 1 - np.einsum("nd,nd->n", mine[rows[part]], theirs[others[part]])
    return found


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
