"""Class centroids of characteristic vectors: one pass of sums, or robust locations.

For one block of one layer, with weights w_n and labels y_n (eq. 4 of arXiv 2403.13523):

    n_y = sum w,   m_y = sum w mu_n / n_y,   V_y = sum w var_n / n_y + sum w (mu_n - m_y)^2 / n_y

The sums run over the examples labeled y. V_y, within plus between examples, is what a BatchNorm
layer would measure on the class as one batch; `variance="mean"` leaves the second term out.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxpoison.data.labels import check_range
from jaxpoison.filters.extraction import Block, CharVec

Estimator = Literal["mean", "median", "trimmed", "geometric_median"]
Variance = Literal["pooled", "mean"]
_TRIMMED_SHARE = 0.25  # at each end
_MAD_TO_SD = 1.4826  # of a normal distribution
_TINY = jnp.finfo(jnp.float32).tiny
_EXACT = jax.lax.Precision.HIGHEST  # accelerators' default products keep three digits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Centroids:
    """Centroids of K classes; a pytree whose arrays all start with the axis of classes.

    Attributes:
      count: float32 [K], sum of the weights of each class; 0 for a class without examples.
      center: for each layer, location of the examples' means and of their variances, [K, C_i].
      spread: for each layer, variance within the class of the same two, [K, C_i].
      paths: names of the layers, as in `CharVec`.
      sizes: positions of the layers, as in `CharVec`.
      estimator: how `center` was computed.
      variance: whether `blocks` pools variance within and between examples.
    """

    count: jax.Array
    center: tuple[Block, ...]
    spread: tuple[Block, ...]
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    estimator: Estimator = dataclasses.field(metadata={"static": True})
    variance: Variance = dataclasses.field(metadata={"static": True})

    @property
    def blocks(self) -> tuple[Block, ...]:
        """(m_y, V_y) of each layer, [K, C_i]: what examples are compared with."""
        return tuple(
            Block(center.mean, center.var + (spread.mean if self.variance == "pooled" else 0))
            for center, spread in zip(self.center, self.spread, strict=True)
        )

    def __add__(self, other: "Centroids") -> "Centroids":
        """Returns the centroids of both sets of examples together (for estimator "mean").

        Raises:
          ValueError: if the two were computed in different ways or are not sums.
        """
        mine, theirs = (
            (c.estimator, c.variance, c.paths, c.sizes, c.count.shape) for c in (self, other)
        )
        if mine != theirs or self.estimator != "mean":
            raise ValueError(
                'only centroids with estimator "mean", and of the same layers, classes and '
                f"variance, can be added; these are {mine} and {theirs}"
            )
        count = self.count + other.count
        share = (other.count / jnp.maximum(count, _TINY))[:, None]

        def merged_center(a, b):
            return a + (b - a) * share

        def merged_spread(a, b, center_a, center_b):
            return a + (b - a) * share + jnp.square(center_b - center_a) * share * (1 - share)

        return dataclasses.replace(
            self,
            count=count,
            center=jax.tree.map(merged_center, self.center, other.center),
            spread=jax.tree.map(
                merged_spread, self.spread, other.spread, self.center, other.center
            ),
        )

    def take(self, positions: ArrayLike) -> "Centroids":
        """Returns the centroids of the classes at `positions`, int [K']; -1 is an empty class."""

        positions = jnp.asarray(positions)

        def rows(a):
            present = (positions >= 0).reshape(-1, *[1] * (a.ndim - 1))
            return jnp.where(present, jnp.asarray(a)[positions], 0)

        return jax.tree.map(rows, self)

    def without(self, charvec: CharVec, labels: jax.Array) -> "Centroids":
        """Returns each example's own class without that example, arrays [N, ...] instead of [K].

        Exact, for examples that are part of the centroids with weight 1:
        m' = m - (mu - m) / (n - 1), and n' S' = n S - (mu - m)(mu - m') for the spread S.

        Args:
          charvec: N examples.
          labels: int32 [N], their classes.

        Raises:
          ValueError: if the centroids are not sums.
        """
        if self.estimator != "mean":
            raise ValueError('leaving an example out of its centroid needs estimator "mean"')
        labels = class_numbers(labels, charvec.num_examples, len(self.count))
        own = jax.tree.map(lambda a: jnp.asarray(a)[labels], self)
        count = own.count - 1
        share = (1 / jnp.maximum(count, 1))[:, None]

        def center(x, m):
            return m - (x - m) * share

        def spread(s, x, m):
            return jnp.maximum(s + (s - (x - m) * (x - center(x, m))) * share, 0)

        return dataclasses.replace(
            own,
            count=count,
            center=jax.tree.map(center, charvec.blocks, own.center),
            spread=jax.tree.map(spread, own.spread, charvec.blocks, own.center),
        )

    def scale(self) -> tuple[Block, ...]:
        """Returns standard deviations within classes, pooled over classes, [C_i] for each layer.

        At least 1e-3 of a block's median; 1 where even that is 0.
        """
        weights = (self.count / jnp.sum(self.count))[:, None]

        def pooled(spread):
            sd = jnp.sqrt(jnp.sum(weights * spread, axis=0))
            sd = jnp.maximum(sd, 1e-3 * jnp.median(sd))
            return jnp.where(sd > 0, sd, 1)

        return jax.tree.map(pooled, self.spread)


def fit_centroids(
    charvec: CharVec,
    labels: jax.Array,
    num_classes: int,
    *,
    weights: jax.Array | None = None,
    estimator: Estimator = "mean",
    variance: Variance = "pooled",
) -> Centroids:
    """Returns the centroids of all classes. Under `jit` with `num_classes` static.

    Under `jit`, where labels cannot be looked at, one that is out of range makes all centroids NaN.

    Args:
      charvec: N examples.
      labels: int32 [N], in [0, num_classes).
      num_classes: K.
      weights: float32 [N] or bool, 0 leaves an example out; default 1. All but "mean" take them
        as in or out.
      estimator: "mean" (the paper); or, channel by channel, "median" and "trimmed" (mean of the
        middle half); or "geometric_median" of each block. None of the robust ones helps once
        poisons are the majority of a class. Their spread is (1.4826 MAD)^2.
      variance: "pooled" or "mean", see above.

    Raises:
      ValueError: for unknown settings, or labels that are not [N] integers; outside `jit` for
        labels out of range.
    """
    for name, value, allowed in (
        ("estimator", estimator, get_args(Estimator)),
        ("variance", variance, get_args(Variance)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    num_examples, dtype = charvec.num_examples, charvec.blocks[0].mean.dtype
    labels = class_numbers(labels, num_examples, num_classes)
    weights = jnp.ones(num_examples) if weights is None else jnp.asarray(weights)
    weights = weights.astype(dtype)
    # A label out of range would be left out without a word.
    weights = jnp.where(jnp.all(known(labels, num_classes) | (weights == 0)), weights, jnp.nan)
    members = weights * jax.nn.one_hot(labels, num_classes, dtype=dtype, axis=0)  # [K, N]
    if estimator == "mean":
        locate = functools.partial(_means, members, labels)
    else:
        place = jnp.where(weights > 0, labels, num_classes)
        locate = functools.partial(_robust, _LOCATIONS[estimator], place, num_classes)
    located = [(locate(block.mean), locate(block.var)) for block in charvec.blocks]
    return Centroids(
        count=jnp.sum(members, axis=1),
        center=tuple(Block(mean[0], var[0]) for mean, var in located),
        spread=tuple(Block(mean[1], var[1]) for mean, var in located),
        paths=charvec.paths,
        sizes=charvec.sizes,
        estimator=estimator,
        variance=variance,
    )


def shrink(trusted: Centroids, dataset: Centroids, tau: float) -> Centroids:
    """Returns (n_t trusted + tau dataset) / (n_t + tau), n_t a class's trusted examples; tau > 0.

    Poisons of the data set can then move the centroids again, the more the larger tau. The spread,
    and so the scale of standardized distances, stays that of the trusted examples.
    """
    share = jnp.where(dataset.count > 0, tau / (trusted.count + tau), 0)[:, None]

    def mixed(mine, theirs, pooled, center):
        mean, var = jax.tree.map(lambda a, b: a + (b - a) * share, mine, theirs)
        return Block(mean, var - (pooled.var - center.var))  # `blocks` adds the last term again

    center = map(mixed, trusted.blocks, dataset.blocks, trusted.blocks, trusted.center)
    count = jnp.where(trusted.count + dataset.count > 0, trusted.count + tau, 0)
    return dataclasses.replace(trusted, count=count, center=tuple(center))


def class_numbers(labels: Any, num_examples: int, num_classes: int) -> jax.Array:
    """Returns labels as an int32 array [N], checked as far as they are known.

    Raises:
      ValueError: if they are not [N] integers, or, outside `jit`, not in [0, num_classes).
    """
    found = labels if hasattr(labels, "dtype") else np.asarray(labels)
    if found.shape != (num_examples,):
        raise ValueError(
            f"labels have shape {found.shape}; expected one for each of {num_examples} examples"
        )
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"labels are {found.dtype}; expected integers in [0, {num_classes})")
    if not isinstance(found, Tracer):
        check_range(np.asarray(found), num_classes, "labels")
    return jnp.asarray(found, jnp.int32)


def known(labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns which labels are in [0, num_classes), bool [N]."""
    return (labels >= 0) & (labels < num_classes)


def _means(members, labels, array):
    """Returns class means and variances around them, [K, C]; 0 for classes without members."""
    weights = members / jnp.maximum(jnp.sum(members, axis=1, keepdims=True), _TINY)
    mean = jnp.matmul(weights, array, precision=_EXACT)
    return mean, jnp.matmul(weights, jnp.square(array - mean[labels]), precision=_EXACT)


def _robust(location, place, num_classes, array):
    """Returns class locations and (1.4826 MAD)^2 around them, [K, C].

    `place` is the class of each example, K for those that are left out.
    """
    center = location(place, num_classes, array)
    # Examples that are left out may be around anything.
    deviation = jnp.abs(array - center[jnp.minimum(place, num_classes - 1)])
    return center, jnp.square(_MAD_TO_SD * _median(place, num_classes, deviation))


def _sorted(place, num_classes, array):
    """Returns values sorted within classes [N, C], first row and number of rows of each class."""
    count = jnp.sum(jax.nn.one_hot(place, num_classes, dtype=jnp.int32, axis=0), axis=1)
    keys = jnp.broadcast_to(place[:, None], array.shape)
    _, ordered = jax.lax.sort((keys, array), dimension=0, num_keys=2)
    return ordered, jnp.cumsum(count) - count, count


def _median(place, num_classes, array):
    ordered, first, count = _sorted(place, num_classes, array)
    low, high = (first + jnp.maximum(count - 1, 0) // 2, first + count // 2)
    middle = (_at(ordered, low) + _at(ordered, high)) / 2
    return jnp.where(count[:, None] > 0, middle, 0)


def _at(ordered, rows):
    return ordered[jnp.minimum(rows, len(ordered) - 1)]


def _trimmed(place, num_classes, array):
    ordered, first, count = _sorted(place, num_classes, array)
    cut = (count * _TRIMMED_SHARE).astype(jnp.int32)
    place = jnp.sort(place)
    mine = jnp.minimum(place, num_classes - 1)
    rank = jnp.arange(len(array), dtype=jnp.int32) - first[mine]
    inside = (place < num_classes) & (rank >= cut[mine]) & (rank < (count - cut)[mine])
    total = jax.ops.segment_sum(jnp.where(inside[:, None], ordered, 0), mine, num_classes)
    return total / jnp.maximum(count - 2 * cut, 1)[:, None].astype(array.dtype)


def _geometric_median(place, num_classes, array):
    """Weiszfeld's iteration, at most 50 steps, until a step is below 1e-6 of the value."""
    members = jax.nn.one_hot(place, num_classes, dtype=array.dtype, axis=0)
    mine = jnp.minimum(place, num_classes - 1)

    def weighted_mean(weights):
        weights = members * weights
        weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), _TINY)
        return jnp.matmul(weights, array, precision=_EXACT)

    def step(state):
        index, moving, center = state
        distance = jnp.linalg.norm(array - center[mine], axis=1)
        new = weighted_mean(1 / jnp.maximum(distance, 1e-8))
        new = jnp.where(moving[:, None], new, center)
        change = jnp.linalg.norm(new - center, axis=1)
        return index + 1, change > 1e-6 * jnp.linalg.norm(new, axis=1), new

    def unfinished(state):
        index, moving, _ = state
        return (index < 50) & jnp.any(moving)

    start = weighted_mean(jnp.ones(len(array), array.dtype))
    state = 0, jnp.ones(num_classes, bool), start
    return jax.lax.while_loop(unfinished, step, state)[2]


_LOCATIONS = {"median": _median, "trimmed": _trimmed, "geometric_median": _geometric_median}
