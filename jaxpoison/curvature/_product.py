"""A curvature, and its mean over a data set: in chunks, over mini-batches, over devices."""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from jaxpoison.core.batches import Batch, chunks, count_examples, normalised_weights
from jaxpoison.core.spmd import AxisName, device_local, mean_over_devices
from jaxpoison.core.trees import LinearMap, Params, at_least_float32, cast_like


class Curvature(Protocol):
    """Linearises at `params` and returns `u -> sum_i weights_i C_i u`.

    `weights` is a scalar or has shape `[B]`. What does not depend on `u` should be computed before
    returning, so that a solver pays for it once.
    """

    def __call__(self, params: Params, batch: Batch, weights: jax.Array, /) -> LinearMap: ...


def product(
    curvature: Curvature,
    params: Params,
    batch: Batch,
    *,
    weights: jax.Array | None = None,
    chunk_size: int | None = None,
    axis_name: AxisName = None,
) -> LinearMap:
    """Returns `u -> C u`, where C is the mean of `curvature` over `batch`.

    Args:
      curvature: `hessian(loss_fn)`, `gauss_newton(...)`, `linear_head` or your own.
      params: where C is taken; half-precision leaves are raised to float32.
      batch: pytree with leading axis N.
      weights: non-negative, `[N]`: C is the weighted mean sum_i w_i C_i / sum_i w_i. A weight of 0
        leaves an example out, such as one that fills up a batch; let it be a copy of a real one,
        because 0 times a loss that is not finite is NaN. None: all alike.
      chunk_size: examples per pass. None: all N at once, and everything that does not depend on u
        is computed here, once. Otherwise memory is that of one chunk, and each product computes
        the linearisation again. The result does not depend on it, nor need it divide N.
      axis_name: the mapped axis or axes over which `batch` is split, when called inside the
        caller's own `shard_map`, `pmap` or `vmap(axis_name=...)`; shards must be of equal size.
        None elsewhere, `jit` over sharded arrays included.

    Returns:
      A linear function of a pytree shaped like `params`. Without `chunk_size` it is a pytree, which
      a `jit`ted function may return and take: `jax.jit(lambda p: product(curvature, p, batch))`
      linearises once, `jax.jit(lambda operator, u: operator(u))` multiplies many times.

    Raises:
      ValueError: for an empty or ragged batch, chunk_size < 1, or weights that are not `[N]`;
        outside `jit` also if they are negative, not finite or all zero.
    """
    num_examples = count_examples(batch, "batch")
    params = device_local(at_least_float32(params), batch, weights, axis_name=axis_name)
    weights = normalised_weights(weights, num_examples, "weights", axis_name)
    return _weighted_product(curvature, params, batch, weights, chunk_size, axis_name)


def minibatch_product(
    curvature: Curvature,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    batch_size: int,
    weights: jax.Array | None = None,
    axis_name: AxisName = None,
) -> LinearMap:
    """Returns `u -> C_B u`, over `batch_size` examples drawn with replacement.

    Its expectation is `product`'s. Examples are drawn uniformly; `weights`, as for `product`,
    multiply what they add. With `axis_name`, each device draws `batch_size` examples of its own
    shard, independently, and the product is the mean over devices.
    """
    num_examples = count_examples(batch, "batch")
    params = device_local(at_least_float32(params), batch, weights, axis_name=axis_name)
    weights = normalised_weights(weights, num_examples, "weights", axis_name)
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    index = jax.random.randint(key, (batch_size,), 0, num_examples)
    sample = jax.tree.map(lambda x: jnp.asarray(x)[index], batch)
    weights = num_examples / batch_size * (weights[index] if weights.ndim else weights)
    return _weighted_product(curvature, params, sample, weights, None, axis_name)


def _weighted_product(curvature, params, batch, weights, chunk_size, axis_name):
    """Returns `u -> sum_i weights_i C_i u`, averaged over devices."""
    averaged = functools.partial(_averaged_product, axis_name)
    num_chunks, take = chunks(batch, chunk_size, weights)
    if num_chunks == 1:
        return Partial(averaged, params, curvature(params, batch, weights))

    def local_product(u, /):
        def add(total, index):
            part = curvature(params, *take(index))(u)
            return jax.tree.map(jnp.add, total, part), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return lax.scan(add, zeros, jnp.arange(num_chunks))[0]

    return functools.partial(averaged, params, local_product)


def _averaged_product(axis_name, params, local_product, u):
    tangent = device_local(cast_like(u, params), params)
    return mean_over_devices(local_product(tangent), axis_name)
