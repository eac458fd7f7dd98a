"""Batches of examples: their losses, their weights, and passes over them in chunks.

Traceable: everything here runs under `jit`, `vmap`, `grad` and `shard_map`. `core.loops` holds
the loops that the host may drive.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax

from jaxpoison.core.checks import check_no_nan
from jaxpoison.core.programs import is_visible
from jaxpoison.core.spmd import AxisName, device_local, mean_over_devices
from jaxpoison.core.trees import Params, at_least_float32

Batch = Any  # a pytree of arrays with a leading axis of examples, usually (inputs, targets)


class LossFn(Protocol):
    """Losses of a batch, one per example, shape `[B]`; twice differentiable in `params`."""

    def __call__(self, params: Params, batch: Batch, /) -> jax.Array: ...


def normalized_weights(
    weights: jax.Array | None, num_examples: int, name: str, axis_name: AxisName = None
) -> jax.Array:
    """Returns weights, `[N]` or one for all, whose sum is 1; on several devices, its mean is.

    Raises:
      ValueError: if they are not `[N]`; outside `jit` also if they are negative, not finite, all
        zero, or too large to be summed in the precision of the computation. Under `jit` they are
        NaN then.
    """
    if weights is None:
        return jnp.asarray(1.0 / num_examples)
    if jnp.shape(weights) != (num_examples,):
        raise ValueError(
            f"{name} must have one number per example, shape ({num_examples},), "
            f"got shape {jnp.shape(weights)}"
        )
    if not isinstance(weights, core.Tracer):
        known = np.asarray(weights, np.float64)
        if not (np.isfinite(known).all() and (known >= 0).all() and known.any()):
            raise ValueError(f"{name} must be finite, not negative, and not all zero")
        dtype = at_least_float32(weights).dtype
        with np.errstate(over="ignore"):
            total = known.astype(dtype).sum()
        if not (np.isfinite(total) and total > 0):
            raise ValueError(f"{name} sum to {total} in {dtype}: scale them to a mean of about 1")
    local = device_local(at_least_float32(weights), axis_name=axis_name)
    total = mean_over_devices(jnp.sum(local), axis_name)
    # A sum that overflows would make all weights 0, and the gradient with them.
    return jnp.where((local >= 0) & (total < jnp.inf), local / total, jnp.nan)


def weighted_loss(
    loss_fn: Callable[[Any, Any], jax.Array], argument: Any, batch: Batch, weights: jax.Array
) -> jax.Array:
    """Returns sum_i weights_i l_i, shape (), in at least float32."""
    return jnp.sum(weights * losses_per_example(loss_fn, argument, batch))


def losses_per_example(
    loss_fn: Callable[[Any, Any], jax.Array], argument: Any, batch: Batch
) -> jax.Array:
    """Returns `loss_fn(argument, batch)`, in at least float32.

    Raises:
      ValueError: if its shape is not `[B]`.
    """
    num_examples = count_examples(batch, "batch")
    losses = loss_fn(argument, batch)
    shape = jnp.shape(losses)
    if shape != (num_examples,):
        hint = "; return the losses themselves, not their mean or sum" if shape == () else ""
        raise ValueError(
            f"the loss must be one number per example, shape ({num_examples},), "
            f"got shape {shape}{hint}"
        )
    return at_least_float32(losses)


def check_independent(
    loss_fn: Callable[[Any, Any], jax.Array], argument: Any, batch: Batch, name: str
) -> None:
    """Raises ValueError if the loss of an example depends on the others of its batch.

    Compares two of up to eight examples, spread over the batch, with the same ones in a batch of
    their own copies: at the same places of batches of the same size, so that rounding, and masks
    that depend on the place, are the same. Three evaluations, outside `jit` only.
    """
    num_examples = count_examples(batch, name)
    if num_examples == 1 or not is_visible(argument, batch):
        return
    size = min(num_examples, 8)
    rows = np.linspace(0, num_examples - 1, size).astype(int)

    def losses(rows):
        return loss_fn(argument, jax.tree.map(lambda x: x[rows], batch))

    try:
        together = losses(rows)
    except Exception as error:
        error.add_note(f"Raised by the loss of {size} of the {num_examples} examples of {name}.")
        raise
    if isinstance(together, core.Tracer) or jnp.shape(together) != (size,):
        return  # wrong shapes are reported where all losses are computed
    together = np.asarray(together, np.float64)
    for place in (0, size - 1):
        alone = np.asarray(losses(np.full(size, rows[place])), np.float64)[place]
        allowed = 1e-3 * np.max(np.abs(together)) + 1e-6
        if abs(together[place] - alone) > allowed:  # False for NaN
            raise ValueError(
                f"the loss of an example depends on the others of its batch: that of {name} "
                f"{rows[place]} is {alone:.6g} among copies of itself and {together[place]:.6g} "
                "among others. Usual causes: outputs [B, 1] and targets [B] broadcast to [B, B] "
                "(compare outputs[:, 0]), or BatchNorm in training mode (use its running averages)"
            )


def split_batch(batch: Batch) -> tuple[Any, Any]:
    """Returns `(inputs, targets)`, or raises ValueError if `batch` is no such pair."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"a batch must be a pair (inputs, targets), got {type(batch).__name__}")
    return batch[0], batch[1]


class Stream:
    """Batches that are read again, in order, each time that they are needed.

    For data that does not fit in memory: `Stream(loader)`, or `Stream(lambda: read(path))`. The
    batches may differ in size; together they must be the same examples every time.

    Args:
      batches: an iterable of batches (pytrees of arrays with a leading axis of examples) that can
        be iterated again and again, such as a list or a data loader; or a function that returns a
        new iterator, such as a generator function.

    Raises:
      TypeError: for an iterator, which can be read once only.
    """

    def __init__(self, batches: Iterable[Batch] | Callable[[], Iterable[Batch]]):
        readable = callable(batches) or isinstance(batches, Iterable)
        if isinstance(batches, Iterator) or not readable:
            raise TypeError(
                f"a stream is read many times, which a {type(batches).__name__} does not allow: "
                "pass a list, a loader, or the function that makes the iterator, not called"
            )
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches() if callable(self._batches) else self._batches)

    def __repr__(self) -> str:
        return f"Stream of {type(self._batches).__name__}"

    def count(self, name: str) -> int:
        """Returns the number of examples in one pass.

        Raises:
          ValueError: if there is none, or what a batch holds is not finite.
        """
        total = 0
        for index, batch in enumerate(self):
            total += count_examples(batch, f"{name}, batch {index}")
            check_no_nan(**{f"{name}, batch {index}": batch})
        if total == 0:
            raise ValueError(f"{name} is a stream without batches")
        return total


def count_examples(batch: Batch, name: str) -> int:
    """Returns the length of the leading axis that all arrays of `batch` share.

    Raises:
      ValueError: if there is no array, no example, or no common leading axis.
      TypeError: for leaves that are not arrays.
    """
    if isinstance(batch, Iterator):
        raise TypeError(
            f"{name} is an iterator, which can be read once only: pass influence.Stream(batches), "
            "with a list, a loader or a function that returns a new iterator"
        )
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"{name} holds no arrays")
    for path, leaf in leaves:
        if not hasattr(leaf, "shape") and not isinstance(leaf, bool | int | float | complex):
            place = name + jax.tree_util.keystr(path)
            raise TypeError(
                f"{place} is a {type(leaf).__name__}, which is no array; "
                "an iterable of batches is passed as influence.Stream(batches)"
            )
    lengths = {jnp.shape(leaf)[:1] for _, leaf in leaves}
    if len(lengths) > 1 or () in lengths:
        first = (f"{name}{jax.tree_util.keystr(path)} {jnp.shape(x)}" for path, x in leaves[:8])
        more = f" and {len(leaves) - 8:,} more" if len(leaves) > 8 else ""
        advice = "; turn nested lists into arrays, as in numpy.asarray(inputs)" if more else ""
        raise ValueError(
            f"arrays of {name} must share a leading axis of examples, got {', '.join(first)}{more}"
            f"{advice}"
        )
    ((length,),) = lengths
    if length == 0:
        raise ValueError(f"{name} is empty: a mean over no examples is not defined")
    return length


def chunks(
    batch: Batch, chunk_size: int | None, weights: jax.Array | float = 1.0
) -> tuple[int, Callable[[jax.Array], tuple[Batch, jax.Array]]]:
    """Returns how many chunks there are, and `take(index) -> (chunk, weights of the chunk)`.

    Chunk j holds the examples j, j + num_chunks, j + 2 num_chunks, ...: with the leading axis
    sharded over devices each chunk is spread over all of them, where consecutive rows would all
    sit on one. When `chunk_size` does not divide N the last example fills up the chunks, with a
    weight of 0. A copy of a real example, not zeros: 0 times the loss of a made-up input may be
    NaN. `weights` are one per example or one for all.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}")
    num_examples = count_examples(batch, "batch")
    weights = jnp.asarray(weights)
    if chunk_size is None or chunk_size >= num_examples:
        return 1, lambda index: (batch, weights)
    num_chunks = math.ceil(num_examples / chunk_size)
    missing = num_chunks * chunk_size - num_examples

    def fold(x, fill):
        if missing:
            x = jnp.concatenate([x, jnp.broadcast_to(fill, (missing, *x.shape[1:]))])
        return x.reshape(chunk_size, num_chunks, *x.shape[1:])

    if missing or weights.ndim:
        weights = fold(
            jnp.broadcast_to(weights, (num_examples,)), jnp.zeros_like(weights, shape=())
        )
    folded = jax.tree.map(lambda x: fold(x, x[-1:]), jax.tree.map(jnp.asarray, batch))

    def take(index):
        # Slicing axis 1 in place; moving it to the front would copy the whole data set.
        column = functools.partial(lax.dynamic_index_in_dim, index=index, axis=1, keepdims=False)
        return jax.tree.map(column, folded), column(weights) if weights.ndim else weights

    return num_chunks, take


def map_chunks(fn: Callable[[Batch], Any], batch: Batch, chunk_size: int | None) -> Any:
    """Returns `fn(batch)` for a function that treats examples one by one, chunk by chunk."""
    num_examples = count_examples(batch, "batch")
    num_chunks, take = chunks(batch, chunk_size)
    if num_chunks == 1:
        return fn(batch)

    outputs = lax.map(lambda index: fn(take(index)[0]), jnp.arange(num_chunks))

    def unfold(y):  # [num_chunks, chunk_size, ...] back to the order of the examples
        return jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:])[:num_examples]

    return jax.tree.map(unfold, outputs)
