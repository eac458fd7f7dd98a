"""A curvature, and its mean over a data set: in chunks, over mini-batches, over devices."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from jaxpoison.core import loops
from jaxpoison.core.batches import (
    Batch,
    Stream,
    check_independent,
    chunks,
    count_examples,
    normalized_weights,
)
from jaxpoison.core.checks import check_no_nan, shortened
from jaxpoison.core.programs import compiled, hoist, is_traced
from jaxpoison.core.spmd import AxisName, device_local, mean_over_devices
from jaxpoison.core.trees import LinearMap, Params, at_least_float32, cast_like
from jaxpoison.curvature._exact import gauss_newton, hessian, with_l2
from jaxpoison.curvature.base import Curvature


def product(
    curvature: Curvature,
    params: Params,
    batch: Batch | Stream,
    *,
    weights: jax.Array | None = None,
    chunk_size: int | None = None,
    axis_name: AxisName = None,
) -> LinearMap:
    """Returns `u -> C u`, where C is the mean of `curvature` over `batch`.

    Args:
      curvature: `hessian(loss_fn)`, `gauss_newton(...)`, `linear_head` or your own.
      params: where C is taken; half-precision leaves are raised to float32.
      batch: pytree with leading axis N; or a `Stream` of such, read once for each product, which
        then takes concrete `u` only.
      weights: non-negative, `[N]`: C is the weighted mean sum_i w_i C_i / sum_i w_i. A weight of 0
        leaves an example out, such as one that fills up a batch; let it be a copy of a real one,
        because 0 times a loss that is not finite is NaN. None: all alike.
      chunk_size: examples per pass. None: all N at once, and everything that does not depend on u
        is computed here, once. Otherwise memory is that of one chunk, and each product computes
        the linearization again. The result does not depend on it, nor need it divide N.
      axis_name: the mapped axis or axes over which `batch` is split, when called inside the
        caller's own `shard_map`, `pmap` or `vmap(axis_name=...)`; shards must be of equal size.
        None elsewhere, `jit` over sharded arrays included.

    Returns:
      A linear function of a pytree shaped like `params`. Without `chunk_size` it is a pytree, which
      a `jit`ted function may return and take: `jax.jit(lambda p: product(curvature, p, batch))`
      linearizes once, `jax.jit(lambda operator, u: operator(u))` multiplies many times.

    Raises:
      ValueError: for an empty or ragged batch, chunk_size < 1, or weights that are not `[N]`;
        outside `jit` also if weights are negative, not finite or all zero, if parameters or data
        are NaN, or if the loss of an example depends on the others.
      TypeError: for something else than a curvature.
    """
    _check_curvature(curvature)
    if isinstance(batch, Stream):
        if weights is not None or chunk_size is not None or axis_name is not None:
            raise ValueError(
                "weights, chunk_size and axis_name are for arrays: a stream's own batches are its "
                "chunks, and all examples count alike"
            )
        return _StreamProduct(curvature, at_least_float32(params), batch)
    num_examples = count_examples(batch, "batch")
    _check_values(curvature, params, batch)
    params = device_local(at_least_float32(params), batch, weights, axis_name=axis_name)
    weights = normalized_weights(weights, num_examples, "weights", axis_name)
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

    Raises:
      ValueError: for a stream, and as `product`, except that data are not looked at.
    """
    _check_curvature(curvature)
    if isinstance(batch, Stream):
        raise ValueError(
            "mini-batches are drawn from arrays, not from a stream: use solvers.cg, or "
            "solvers.lissa on a part that fits in memory"
        )
    num_examples = count_examples(batch, "batch")
    params = device_local(at_least_float32(params), batch, weights, axis_name=axis_name)
    weights = normalized_weights(weights, num_examples, "weights", axis_name)
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    index = jax.random.randint(key, (batch_size,), 0, num_examples)
    sample = jax.tree.map(lambda x: jnp.asarray(x)[index], batch)
    weights = num_examples / batch_size * (weights[index] if weights.ndim else weights)
    return _weighted_product(curvature, params, sample, weights, None, axis_name)


def _check_curvature(curvature):
    if not callable(curvature) or curvature in (hessian, gauss_newton, with_l2):
        name = getattr(curvature, "__name__", repr(curvature))
        raise TypeError(
            f"curvature must be a curvature, got {shortened(name)}: call the function that makes "
            "it, as in curvature.hessian(loss_fn) or curvature.gauss_newton(output_fn, output_loss)"
        )


def _check_values(curvature, params, batch):
    check_no_nan(params=params, batch=batch)
    losses = getattr(curvature, "losses", None)
    if losses is not None:
        check_independent(losses, params, batch, "example")


def _weighted_product(curvature, params, batch, weights, chunk_size, axis_name):
    """Returns `u -> sum_i weights_i C_i u`, averaged over devices."""
    num_chunks, take = chunks(batch, chunk_size, weights)
    if num_chunks == 1:
        averaged = functools.partial(_averaged_product, axis_name)
        return Partial(averaged, params, curvature(params, batch, weights))

    def add(total, index, u):
        part = curvature(params, *take(index))(u)
        return jax.tree.map(jnp.add, total, part)

    return _ChunkedProduct(params, add, num_chunks, axis_name)


class _ChunkedProduct:
    """A product that takes chunks one by one: in one loop, or driven from the host.

    `on_host` tells, for concrete u, whether a solver should call it as it is, uncompiled.
    """

    def __init__(self, params, add, num_chunks, axis_name):
        self.params, self.add, self.num_chunks = params, add, num_chunks
        self.axis_name = axis_name
        self.on_host = False
        if loops.steps_from_host() and not is_traced(params):
            zeros = jax.tree.map(jnp.zeros_like, params)
            _, constants = hoist(add, zeros, 0, params)
            self.on_host = not is_traced(constants)
            self.compiled_add = compiled(add)

    def __call__(self, u):
        if self.on_host and not is_traced(u):
            return _averaged_product(self.axis_name, self.params, self._step_through, u)
        return _averaged_product(self.axis_name, self.params, self._scan, u)

    def _scan(self, u):
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        steps = jnp.arange(self.num_chunks)
        return lax.scan(lambda total, i: (self.add(total, i, u), None), zeros, steps)[0]

    def _step_through(self, u):
        total = jax.tree.map(jnp.zeros_like, self.params)
        for index in range(self.num_chunks):
            total = self.compiled_add(total, index, u)
        return total


class _StreamProduct:
    """A product over a stream of batches, each read and multiplied in turn."""

    on_host = True

    def __init__(self, curvature, params, stream):
        self.params, self.stream = params, stream
        for batch in stream:
            _check_values(curvature, params, batch)
            break
        self.num_examples = stream.count("train")

        def add(total, batch, u):
            part = curvature(params, batch, jnp.asarray(1 / self.num_examples))(u)
            return jax.tree.map(jnp.add, total, part)

        self.add = compiled(add)

    def __call__(self, u):
        if is_traced(u, self.params):
            raise ValueError(
                "train is a stream of batches, which only the host can read: call this outside "
                "jit, vmap and grad, with solvers.cg or solvers.identity"
            )
        u = cast_like(u, self.params)
        total, num_examples = jax.tree.map(jnp.zeros_like, self.params), 0
        for batch in self.stream:
            total = self.add(total, batch, u)
            num_examples += count_examples(batch, "train")
        if num_examples != self.num_examples:
            raise ValueError(
                f"train is a stream that gave {self.num_examples} examples when it was read first "
                f"and {num_examples} now: it must give the same ones every time"
            )
        return total


def _averaged_product(axis_name, params, local_product, u):
    tangent = device_local(cast_like(u, params), params)
    return mean_over_devices(local_product(tangent), axis_name)
