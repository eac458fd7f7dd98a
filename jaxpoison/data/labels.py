"""The one door for labels: whatever holds one class for each example becomes int32 positions.

Taken are NumPy and JAX arrays, lists, and columns of pandas or polars, of integers of any width,
booleans, strings, or whole numbers in floating point; and one-hot rows [N, K] with K >= 2. All of
this runs on the host, on concrete arrays. No value is cast before its range has been checked.
"""

from typing import Any

import jax
import numpy as np
from jax import core

_LARGEST = np.iinfo(np.int32).max
_MISSING_TYPES = ("NoneType", "NAType", "NaTType")


def encode(y: Any, name: str = "y") -> tuple[np.ndarray, np.ndarray]:
    """Returns (positions int32 [N], classes [K]) such that `classes[positions]` are the labels.

    The classes are those that occur, ascending: integers, booleans or strings. The cost depends
    on N only, so that ids may be as large and as sparse as 64-bit hashes.

    Args:
      y: N >= 1 labels, or one-hot rows [N, K]; see the module. One-hot rows become the numbers of
        their columns.
      name: what to call them in a message.

    Raises:
      TypeError: for a value that is no sequence of labels (a data set, a single number), or traced.
      ValueError: for no labels, labels that are missing, masked, of mixed kinds or not whole
        numbers, integers beyond 64 bits, or more than one axis without one-hot rows. The message
        names the first bad value.
    """
    classes, positions = np.unique(_as_vector(y, name), return_inverse=True)
    return positions.astype(np.int32), classes


def as_class_numbers(y: Any, num_classes: int | None = None, name: str = "labels") -> np.ndarray:
    """Returns labels as class numbers, int32 [N]; an int32 array is returned as it is.

    Args:
      y: as in `encode`, except for strings.
      num_classes: labels must lie in [0, num_classes); None asks for [0, 2^31).
      name: what to call them in a message.

    Raises:
      TypeError, ValueError: as `encode`; ValueError also for strings and for labels out of range.
    """
    labels = _as_vector(y, name)
    if labels.dtype.kind not in "iub":
        raise ValueError(
            f"{name}: strings such as {labels[0]!s:.40}; expected class numbers. Number "
            f"them with classes, numbers = np.unique({_argument(name)}, return_inverse=True)"
        )
    check_range(labels, num_classes, name)
    return labels.astype(np.int32, copy=False)


def check_range(labels: np.ndarray, num_classes: int | None, name: str) -> None:
    """Raises a ValueError that names the first of `labels` outside [0, num_classes).

    Args:
      labels: integers [N] of any width.
      num_classes: None asks for [0, 2^31), which int32 can hold.
      name: what to call them in the message.
    """
    if labels.dtype.kind == "b":
        labels = labels.astype(np.uint8)
    largest = _LARGEST if num_classes is None else num_classes - 1
    wrong = (labels < 0) | (labels > largest)
    if wrong.any():
        first = int(wrong.argmax())
        allowed = "0, 1, 2, ..." if num_classes is None else f"0 to {num_classes - 1}"
        raise ValueError(
            f"{name}: {wrong.sum()} labels out of range, the first is label {labels[first]} of "
            f"example {first}; expected {allowed}. Renumber the classes or correct num_classes"
        )


def _as_vector(y: Any, name: str) -> np.ndarray:
    """Returns the labels as integers, booleans or strings [N], N >= 1."""
    labels = _as_array(y, name)
    if labels.ndim == 2 and len(labels):
        column = f"{_argument(name)}[:, 0]"
        if not isinstance(y, np.ndarray | jax.Array):
            column = f"np.asarray({_argument(name)})[:, 0]"
        labels = _from_one_hot(labels, name, column)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"{name}: labels have shape {labels.shape}; expected [N], one label for each of N >= 1 "
            "examples"
        )
    kind = labels.dtype.kind
    if kind in "OT":  # T is NumPy's StringDType, whose missing values only show as objects
        labels = _from_objects(labels.astype(object), name)
    if labels.dtype.kind == "f":
        labels = _from_floats(labels, name)
    if labels.dtype.kind not in "iubUS":
        raise ValueError(f"{name}: dtype {labels.dtype}; expected integers or strings")
    return labels


def _as_array(y: Any, name: str) -> np.ndarray:
    if hasattr(y, "images") or hasattr(y, "dataset") or isinstance(y, dict | set | str | bytes):
        raise TypeError(
            f"{name}: got a {type(y).__name__}; expected [N] labels, for instance the `labels` of "
            "a data set"
        )
    if isinstance(y, core.Tracer):
        raise TypeError(f"{name}: labels are traced; read them on the host, outside of jit")
    if np.ma.is_masked(y):
        masked = np.ma.getmaskarray(y)
        raise ValueError(
            f"{name}: {masked.sum()} labels are masked, the first at {_first(masked)}; give "
            "every example a class, or leave these examples out"
        )
    try:
        # Lists as objects: NumPy would turn [1, "a"] into strings and [2**63, -1] into floats.
        array = np.asarray(y, object) if isinstance(y, list | tuple) else np.asarray(y)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: got a {type(y).__name__} that NumPy cannot read as one array; expected [N] "
            "labels"
        ) from error
    if array.ndim == 0:
        raise TypeError(f"{name}: got a single {type(y).__name__}; expected [N] labels")
    return array


def _from_one_hot(rows: np.ndarray, name: str, column: str) -> np.ndarray:
    """Returns where the 1 is in each row, int64 [N]; `column` is the advice for [N, 1]."""
    if rows.shape[1] == 1:
        raise ValueError(
            f"{name}: labels are a column of shape {rows.shape}; expected [N]. Use {column}"
        )
    if rows.dtype.kind == "O":
        rows = np.stack([_from_objects(row, name) for row in rows])
    if rows.dtype.kind not in "iubf":
        raise ValueError(f"{name}: labels have shape {rows.shape}; expected [N], one label each")
    one_hot = ((rows == 0) | (rows == 1)).all(axis=1) & ((rows == 1).sum(axis=1) == 1)
    if not one_hot.all():
        raise ValueError(
            f"{name}: labels have shape {rows.shape}; expected [N], or one-hot rows with a single "
            f"1: row {int((~one_hot).argmax())} is none"
        )
    return rows.argmax(axis=1)


def _from_objects(labels: np.ndarray, name: str) -> np.ndarray:
    """Returns integers, floats, booleans or strings, the one kind that Python objects [N] are."""
    values = [_scalar(value) for value in labels.tolist()]
    missing = [type(v).__name__ in _MISSING_TYPES or (type(v) is float and v != v) for v in values]
    if any(missing):
        first = missing.index(True)
        raise ValueError(
            f"{name}: {sum(missing)} labels are missing, the first is {values[first]} of example "
            f"{first}; give every example a class, or leave these examples out"
        )
    kinds = {type(value) for value in values}
    if kinds == {str} or kinds == {bool} or kinds == {bytes}:
        return np.array(values)
    if kinds <= {int, float} and float in kinds:
        return np.array(values, np.float64)
    if kinds == {int}:
        low, high = min(values), max(values)
        for dtype in (np.int64, np.uint64):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return np.array(values, dtype)
        raise ValueError(f"{name}: {low} to {high} do not fit in 64 bits; use strings")
    kind = type(values[0])
    if kind not in (str, bool, int, float, bytes):
        raise ValueError(
            f"{name}: example 0 has a {kind.__name__}; expected one integer or string for each"
        )
    other = next(i for i, value in enumerate(values) if type(value) is not kind)
    raise ValueError(
        f"{name}: labels of several kinds, {kind.__name__} for example 0 and "
        f"{type(values[other]).__name__} for example {other}; use integers or strings throughout"
    )


def _scalar(value: Any) -> Any:
    """Returns the Python value of a NumPy, JAX or PyTorch scalar; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _from_floats(labels: np.ndarray, name: str) -> np.ndarray:
    """Returns whole numbers in floating point as int64; no other number passes."""
    for wrong, found, advice in (
        (~np.isfinite(labels), "not finite", "give every example a class"),
        (labels != np.trunc(labels), "not whole numbers", "expected classes, not quantities"),
        # Beyond this, neighbors round to the same float: classes may have been merged already.
        (
            np.abs(labels) > 2.0 ** (np.finfo(labels.dtype).nmant + 1),
            f"too large for {labels.dtype}",
            "read them as integers",
        ),
    ):
        if wrong.any():
            first = int(wrong.argmax())
            raise ValueError(
                f"{name}: {wrong.sum()} labels are {found}, the first is {labels[first]} "
                f"of example {first}; {advice}"
            )
    return labels.astype(np.int64)


def _first(mask: np.ndarray) -> str:
    index = np.argwhere(mask)[0].tolist()
    return f"example {index[0]}" if len(index) == 1 else f"index {index}"


def _argument(name: str) -> str:
    """Returns how to write the labels in an expression: `name`, unless it is words."""
    return name if name.replace(".", "_").isidentifier() else "labels"
