"""What the filters on features have in common: their door, and passes over classes and rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.core import devices, loops
from jaxpoison.data import labels as labels_
from jaxpoison.filters.inputs import ids_of
from jaxpoison.filters.result import FilterResult, with_classes

EXACT = jax.lax.Precision.HIGHEST
TINY = jnp.finfo(jnp.float32).tiny
LARGEST = 1e12  # of a feature, so that sums of squares stay in range; the least is 1 / LARGEST
_ROWS = 256  # of an N x N matrix that are held at a time
_CELLS = 2**22  # numbers of several classes that are worked on at a time


def checked(features: Any, y: Any, name: str = "features") -> tuple[np.ndarray, np.ndarray, Any]:
    """Returns features float32 [N, d], labels int32 [N] in 0..K-1 and the K >= 2 classes.

    Raises:
      ValueError: for features that are not N rows of finite numbers, or whose squares float32
        cannot hold, for bad labels, or a single class.
    """
    labels, classes = labels_.encode(y)
    features = np.asarray(features)
    if features.ndim != 2 or len(features) != len(labels) or not features.shape[1]:
        raise ValueError(
            f"{name} have shape {features.shape}; expected [N, d] for {len(labels)} labels. "
            "Flatten or average activations of a convolution first"
        )
    if not (jnp.issubdtype(features.dtype, np.floating) or features.dtype.kind in "iub"):
        raise ValueError(f"{name} have dtype {features.dtype}; expected real numbers")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the {name} of {len(bad)} examples are not finite, the first at indices "
            f"{bad[:10].tolist()}: remove these examples or repair them"
        )
    largest = max(abs(float(features.max())), abs(float(features.min())))
    if largest and not 1 / LARGEST <= largest <= LARGEST:
        raise ValueError(
            f"the largest of the {name} is {largest:.3g} in magnitude, and float32 does not hold "
            f"its square: divide all {name} by it"
        )
    if len(classes) < 2:
        raise ValueError(f"all labels are {classes[0]!s}; filters compare classes, so give two")
    return features.astype(np.float32, copy=False), labels, classes


def check_share(name: str, share: float) -> None:
    """Raises ValueError unless `share` is in [0, 1]."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be in [0, 1], not {share}")


def verdict(
    y: Any,
    flagged: Any,
    score: Any,
    labels: np.ndarray,
    classes: np.ndarray,
    settings: dict[str, Any],
    real: Any = None,
    distances: Any = None,
) -> FilterResult:
    """Returns the result in terms of the labels `y` as they were given."""
    settings = {
        name: value if isinstance(value, str | bool) or value is None else np.asarray(value).item()
        for name, value in settings.items()
    }
    places = np.arange(len(classes))
    result = FilterResult(
        flagged, score, labels, places, real, distances, tuple(settings.items()), ids_of(y)
    )
    return with_classes(result, classes)


def class_means(features: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the mean of each class, float32 [K, d]; every class has members."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.add.reduceat(features[order], np.cumsum(counts) - counts, axis=0, dtype=np.float64)
    return (sums / counts[:, None]).astype(np.float32)


def by_class(fn: Callable[..., Any], *arrays: Any, labels: np.ndarray, **static: Any) -> Any:
    """Returns `fn(members, *arrays of one class)` of all classes, back in the order of examples.

    Classes of about the same size go through one compiled function, several at a time where they
    are small; work and memory are linear in N.

    Args:
      fn: module-level; `members` is bool [m], False for rows that fill up a class; arrays [m, ...];
        returns a pytree of arrays [m, ...].
      *arrays: [N, ...].
      labels: int32 [N], 0 to K - 1.
      **static: keyword arguments of `fn`, hashable.
    """
    run = _classes(fn, **static)
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    sizes = np.maximum(8, 2 ** np.ceil(np.log2(np.maximum(counts, 1))).astype(int))
    width = max([1, *(int(np.prod(array.shape[1:])) for array in arrays)])
    arrays = jax.tree.map(jnp.asarray, arrays)
    rows_found, parts, outputs = [], [], None
    for size in np.unique(sizes[counts > 0]):
        mine = np.flatnonzero((sizes == size) & (counts > 0))
        at_once = int(np.clip(_CELLS // (size * max(size, width)), 1, len(mine)))
        # Classes of no members fill up the last of the groups.
        mine = np.pad(mine, (0, -len(mine) % at_once), constant_values=-1)
        place = np.arange(size)
        members = (mine >= 0)[:, None] & (place < counts[mine][:, None])
        rows = order[np.minimum(starts[mine][:, None] + place, len(labels) - 1)]
        outputs = run(arrays, *(a.reshape(-1, at_once, size) for a in (members, rows)))
        rows_found.append(rows[members])
        parts.append([np.asarray(leaf)[members] for leaf in jax.tree.leaves(outputs)])
    back = np.argsort(np.concatenate(rows_found))
    leaves = [np.concatenate(part)[back] for part in zip(*parts, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(outputs), leaves)


@functools.cache
def _classes(fn, **static):
    @jax.jit
    def run(arrays, members, rows):
        def several(group):
            return jax.vmap(
                lambda members, rows: fn(members, *(a[rows] for a in arrays), **static)
            )(*group)

        outputs = jax.lax.map(several, (members, rows))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)

    return run


@functools.cache
def over_rows(fn: Callable[..., Any], **static: Any) -> Callable[[Any, int], Any]:
    """Returns `run(constants, N)`: `fn(constants, rows [B])` for all N rows, B at a time."""
    mesh = devices.data_mesh()
    rows = loops.map_batches(functools.partial(fn, **static), batch_size=_ROWS, mesh=mesh)

    def run(constants, num_rows):
        numbers = np.arange(num_rows, dtype=np.int32)
        return rows(*devices.replicate((constants, numbers), mesh))

    return run


def squared_distances(features: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns squared Euclidean distances of some rows to all, float32 [B, N]."""
    # Around the mean: far from it, the difference of squares would cancel.
    features = features - jnp.mean(features, axis=0)
    square = jnp.sum(jnp.square(features), axis=1)
    products = jnp.matmul(features[rows], features.T, precision=EXACT)
    return jnp.maximum(square[rows][:, None] - 2 * products + square, 0)
