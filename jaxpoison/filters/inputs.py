"""The door of the filters: whatever a user holds becomes examples and labels, or a clear error.

All of this runs on the host, before any work is done.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpoison.data import labels
from jaxpoison.filters.extraction import CharVec


class Chunk(NamedTuple):
    """Examples that came together.

    Attributes:
      x: an array [N, ...], a dict of such arrays, or a `CharVec`.
      positions: int32 [N], places of the labels among `classes`.
      classes: [K], the labels that occur, ascending.
      ids: [N], names of the examples, or None.
    """

    x: Any
    positions: np.ndarray
    classes: np.ndarray
    ids: np.ndarray | None


class Whole(list[Chunk]):
    """A set that came at once: a list of one chunk."""


class Batches:
    """A set that comes as an iterable of (examples, labels), checked as it is read.

    Attributes:
      source: the iterable.
      readable_again: whether it may be read twice.
    """

    def __init__(self, source: Iterable[Any]):
        self.source = source
        self.readable_again = not isinstance(source, Iterator)

    def __iter__(self) -> Iterator[Chunk]:
        before = None
        for number, batch in enumerate(self.source):
            name = f"batch {number}"
            chunk = _chunk(*_pair(batch, name), name, getattr(batch, "ids", None))
            shapes = shapes_of(chunk.x)
            if before is not None and shapes != before:
                raise ValueError(
                    f"{name} has {described(shapes)}, those before {_listed(before)}: "
                    f"{_one_size(shapes)}"
                )
            before = shapes
            yield chunk


def chunks(X: Any, y: Any = None, name: str = "X") -> Whole | Batches:
    """Returns the examples and labels that a filter was given.

    Args:
      X: examples: an array or data frame [N, ...], a list of arrays of one shape, a dict of
        arrays, or a `CharVec`. Without `y`: a `Dataset` or `PoisonedDataset`, a pair (X, y), or
        an iterable of such pairs.
      y: labels, see `data.labels.encode`.
      name: how to call X in a message.

    Raises:
      TypeError: for what is neither.
      ValueError: for examples or labels that cannot be used.
    """
    if y is not None:
        if _holds_labels(X):
            raise TypeError(f"{name} is a {type(X).__name__}, which has its labels: leave y out")
        return Whole([_chunk(X, y, name)])
    if _holds_labels(X) or _is_pair(X):
        return Whole([_chunk(*_pair(X, name), name, getattr(X, "ids", None))])
    if isinstance(X, dict):
        raise TypeError(
            f"{name} is a dict of {', '.join(map(str, X))}, and there are no labels: give the "
            "inputs of the network as X and the labels as y"
        )
    if hasattr(X, "shape") or isinstance(X, CharVec | str) or not isinstance(X, Iterable):
        raise TypeError(
            f"{name} is {_kind(X)}, and its labels are missing: give y, or a Dataset, or batches "
            "of (examples, labels) as X"
        )
    return Batches(X)


def trusted_chunks(trusted: Any) -> Whole | Batches:
    """Returns the trusted examples and their labels.

    Raises:
      TypeError: for examples without labels.
    """
    if not (_holds_labels(trusted) or _is_pair(trusted)) and (
        hasattr(trusted, "shape") or isinstance(trusted, CharVec | dict)
    ):
        raise TypeError(
            f"trusted is {_kind(trusted)} without labels; expected (X, y) or a Dataset: clean "
            "examples and their labels"
        )
    return chunks(trusted, name="trusted")


def examples(X: Any, name: str = "X") -> Any:
    """Returns examples as arrays of numbers: an array, a dict of arrays or a `CharVec`.

    Raises:
      ValueError: for arrays of objects or text, sizes that differ, or channels first.
    """
    if isinstance(X, CharVec):
        return X
    if isinstance(X, dict):
        if not X:
            raise ValueError(f"{name} is an empty dict; expected the arrays of the network's input")
        return {key: _array(value, f"{name}[{key!r}]") for key, value in X.items()}
    return _array(X, name)


def shapes_of(x: Any) -> tuple[tuple[int, ...], ...]:
    """Returns the shape of one example in each array of `x`."""
    return tuple(leaf.shape[1:] for leaf in jax.tree.leaves(x))


def described(shapes: Sequence[Sequence[int]]) -> str:
    """Returns shapes of examples in words."""
    kind = "images" if any(len(shape) == 3 for shape in shapes) else "examples"
    return f"{kind} of {_listed(shapes)}"


def ids_of(y: Any) -> np.ndarray | None:
    """Returns the index of a pandas Series, [N], or None for anything else."""
    index = getattr(y, "index", None)
    return None if index is None or callable(index) else np.asarray(index)


def where(wanted: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns the place of each of `wanted` among the ascending `classes`, int32; -1 if absent."""
    place = np.searchsorted(classes, wanted).astype(np.int32)
    return np.where(np.isin(wanted, classes), place, -1)


def _chunk(x, y, name, ids=None):
    x = examples(x, name)
    own = "y" if name == "X" else f"{name}: labels"
    positions, classes = labels.encode(y, own)
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(x)}
    if lengths != {len(positions)}:
        raise ValueError(
            f"{name} has {', '.join(map(str, sorted(lengths)))} examples, but there are "
            f"{len(positions)} labels: give one label to each example"
        )
    return Chunk(x, positions, classes, ids_of(y) if ids is None else np.asarray(ids))


def _array(value, name):
    if hasattr(value, "to_numpy"):  # pandas and polars
        value = value.to_numpy()
    if not isinstance(value, jax.Array):
        value = _from_python(value, name)
    if value.ndim == 0:
        raise TypeError(f"{name} is {_kind(value)}; expected examples, [N, ...]")
    if value.dtype.kind in "OSUTMmc":
        raise ValueError(
            f"{name} has dtype {value.dtype}; expected numbers: leave out columns that are none, "
            "and images that are missing"
        )
    if value.ndim == 4 and looks_channels_first(value.shape):
        raise ValueError(
            f"{name} has shape {value.shape}, which looks like [N, C, H, W]; Flax networks take "
            f"[N, H, W, C]: use {name}.transpose(0, 2, 3, 1)"
        )
    return value


def _from_python(value, name):
    if isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.dtype.kind == "O" and value.ndim == 1
    ):
        # One by one, for NumPy's own message would not say which of them is another.
        parts = [np.asarray(one) for one in value]
        for number, part in enumerate(parts):
            if part.shape != parts[0].shape:
                raise ValueError(
                    f"{name}: example {number} has shape {part.shape}, those before "
                    f"{parts[0].shape}: {_one_size([part.shape])}"
                )
        return np.stack(parts) if parts else np.empty(0)
    return np.asarray(value)


def looks_channels_first(shape: Sequence[int]) -> bool:
    """Returns whether images of this shape, [N, ...], have their 1 or 3 channels first."""
    _, channels, height, width = shape
    return min(height, width) > 4 and (channels == 3 or (channels == 1 and height == width))


def _listed(shapes):
    return ", ".join(str(tuple(shape)) for shape in shapes)


def _one_size(shapes):
    return "resize them to one size" if any(len(s) >= 2 for s in shapes) else "give all the same"


def _pair(value, name):
    """Returns (examples, labels) of a `Dataset`, a `PoisonedDataset` or a pair."""
    if _holds_labels(value):
        return value.images, value.labels
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    found = _kind(value)
    if isinstance(value, dict):
        found = f"a dict of {', '.join(map(str, value))}"
    raise TypeError(f"{name} is {found}; expected a pair (examples, labels)")


def _holds_labels(value):
    return hasattr(value, "images") and hasattr(value, "labels")


def _is_pair(value):
    """Whether a tuple or list is (X, y) and not two batches or two examples."""
    if not isinstance(value, tuple | list) or len(value) != 2 or isinstance(value[0], tuple | list):
        return False
    x, y = value
    if _holds_labels(x) or isinstance(y, str | dict) or not hasattr(y, "__len__"):
        return False
    leaves = jax.tree.leaves(_plain(x))
    if np.ndim(y) == 1 and all(np.ndim(leaf) > 1 for leaf in leaves):
        return True
    return np.ndim(y) <= 2 and {np.shape(leaf)[:1] for leaf in leaves} == {np.shape(y)[:1]}


def _plain(x):
    return x.to_numpy() if hasattr(x, "to_numpy") else x


def _kind(value):
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
