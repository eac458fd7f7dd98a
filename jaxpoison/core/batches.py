"""Batches of examples: their losses, their weights, and passes over them in chunks.

Traceable: everything here runs under `jit`, `vmap`, `grad` and `shard_map`. `core.loops` holds
the loops that the host may drive.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax

from jaxpoison.core.spmd import AxisName, device_local, mean_over_devices
from jaxpoison.core.trees import Params, at_least_float32

Batch = Any  # a pytree of arrays with a leading axis of examples, usually (inputs, targets)


class LossFn(Protocol):
    """Losses of a batch, one per example, shape `[B]`; twice differentiable in `params`."""

    def __call__(self, params: Params, batch: Batch, /) -> jax.Array: ...


def normalised_weights(
    weights: jax.Array | None, num_examples: int, name: str, axis_name: AxisName = None
) -> jax.Array:
    """Returns weights, `[N]` or one for all, whose sum is 1; on several devices, its mean is.

    Raises:
      ValueError: if they are not `[N]`; outside `jit` also if they are negative, not finite, or
        all zero.
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
    local = device_local(at_least_float32(weights), axis_name=axis_name)
    return local / mean_over_devices(jnp.sum(local), axis_name)


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


def split_batch(batch: Batch) -> tuple[Any, Any]:
    """Returns `(inputs, targets)`, or raises ValueError if `batch` is no such pair."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"a batch must be a pair (inputs, targets), got {type(batch).__name__}")
    return batch[0], batch[1]


def count_examples(batch: Batch, name: str) -> int:
    """Returns the length of the leading axis that all arrays of `batch` share.

    Raises:
      ValueError: if there is no array, no example, or no common leading axis.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"{name} holds no arrays")
    shapes = {name + jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) > 1 or () in lengths:
        listing = ", ".join(f"{path} {shape}" for path, shape in shapes.items())
        raise ValueError(f"arrays of {name} must share a leading axis of examples, got {listing}")
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
