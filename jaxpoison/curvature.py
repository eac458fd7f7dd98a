"""Matrix-free products with the curvature of a mean loss, u -> C u.

    Hessian       H = (1/N) sum_i d^2 l_i / d theta^2
    Gauss-Newton  G = (1/N) sum_i J_i^T (d^2 l_i / d f_i^2) J_i,    J_i = d f_i / d theta

H is exact but indefinite for most networks; G drops the curvature of the network itself, is
positive semi-definite for a loss convex in the outputs, and equals H where the outputs are linear
in the parameters (a last layer). Forward-over-reverse products follow Pearlmutter 1994, the
Gauss-Newton product Schraudolph 2002.

A curvature is a function `curvature(params, batch, weights) -> (u -> sum_i weights_i C_i u)`:
bring your own by writing one. `product` turns it into the mean over a data set, in chunks and over
devices. `linear_head` is the closed form for a last layer; `with_l2` adds a penalty on the weights.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.tree_util import Partial

Params = Any  # a pytree of arrays
Batch = Any  # a pytree of arrays with a leading axis of examples, usually (inputs, targets)
LinearMap = Callable[[Params], Params]
AxisName = str | tuple[str, ...] | None


class LossFn(Protocol):
    """Losses of a batch, one per example, shape `[B]`; twice differentiable in `params`."""

    def __call__(self, params: Params, batch: Batch, /) -> jax.Array: ...


class Curvature(Protocol):
    """Linearises at `params` and returns `u -> sum_i weights_i C_i u`.

    `weights` is a scalar or has shape `[B]`. What does not depend on `u` should be computed before
    returning, so that a solver pays for it once.
    """

    def __call__(self, params: Params, batch: Batch, weights: jax.Array, /) -> LinearMap: ...


def hessian(loss_fn: LossFn) -> Curvature:
    """Returns the Hessian of the loss, by forward-mode over the gradient.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses[B]`.
    """

    def curvature(params, batch, weights):
        gradient = jax.grad(lambda p: weighted_loss(loss_fn, p, batch, weights))
        return jax.linearize(gradient, params)[1]

    return curvature


def gauss_newton(
    output_fn: Callable[[Params, Any], Any], output_loss: Callable[[Any, Any], jax.Array]
) -> Curvature:
    """Returns the generalised Gauss-Newton matrix of a loss on the outputs of a network.

    The product is J^T (H_out (J u)): a forward-mode pass, the true Hessian of the loss on the
    outputs (forward-mode over its gradient), and a reverse-mode pass.

    Args:
      output_fn: `output_fn(params, inputs) -> outputs[B, ...]`, a pytree; examples independent.
      output_loss: `output_loss(outputs, targets) -> losses[B]`. The matrix is positive
        semi-definite when this is convex in `outputs`, as cross-entropy of logits is.
    """

    def curvature(params, batch, weights):
        inputs, targets = split_batch(batch)
        outputs, push = jax.linearize(lambda p: output_fn(p, inputs), params)
        gradient = jax.grad(lambda f: weighted_loss(output_loss, f, targets, weights))
        output_hessian = jax.linearize(gradient, outputs)[1]

        return Partial(_gauss_newton_product, push, output_hessian)

    return curvature


def _gauss_newton_product(push, output_hessian, u):
    tangents, pull = jax.vjp(push, u)
    return pull(output_hessian(tangents))[0]


def linear_head(params: Params, batch: Batch, weights: jax.Array) -> LinearMap:
    """The Hessian of `influence.linear_head_loss`, a `Curvature` in closed form.

        H u = [X 1]^T (w * (P * Z - P * rowsum(P * Z))),    Z = [X 1] u,    P = softmax([X 1] theta)

    which is two products with the features for each u. The Hessian of the last layer of any
    network, given its features once.

    Args:
      params: `{"kernel": [d, K], "bias": [K]}`.
      batch: features `[N, d]` and labels, which H does not depend on.
      weights: scalar or `[N]`.
    """
    features, _ = split_batch(batch)
    features = jnp.asarray(features, params["kernel"].dtype)
    probabilities = jax.nn.softmax(_affine(features, params))
    weights = jnp.broadcast_to(weights, features.shape[:1]).astype(features.dtype)
    return Partial(_linear_head_product, features, probabilities, weights)


def _linear_head_product(features, probabilities, weights, u):
    pz = probabilities * _affine(features, u)
    errors = pz - probabilities * jnp.sum(pz, axis=-1, keepdims=True)
    errors = weights[:, None] * errors
    # As [K, d], which XLA's CPU backend computes twice as fast as features.T @ errors. The barrier
    # keeps the compiler from turning the one into the other.
    kernel = jnp.einsum("nk,nd->kd", errors, features, precision=lax.Precision.HIGHEST)
    return {"kernel": lax.optimization_barrier(kernel).T, "bias": jnp.sum(errors, axis=0)}


def _affine(features, head):
    # Full precision: in TF32 or bfloat16 a solver cannot pass a residual of about 1e-3.
    return jnp.matmul(features, head["kernel"], precision=lax.Precision.HIGHEST) + head["bias"]


def with_l2(curvature: Curvature, strength: Any) -> Curvature:
    """Returns the curvature of the mean loss plus (strength / 2) ||theta||^2.

    For parameters found by minimising such an objective; SGD with weight decay does, with the
    decay for strength. Decay on all parameters alike is `damping`; this is for decay on some.

    Args:
      curvature: of the loss alone.
      strength: a number, or a pytree of numbers whose structure is that of the parameters or a
        prefix of it: `{"kernel": 5e-4, "bias": 0.0}`.
    """

    def regularised(params, batch, weights):
        total = jnp.sum(jnp.broadcast_to(weights, (count_examples(batch, "batch"),)))
        strengths = jax.tree.map(lambda s: s * total, jax.tree.broadcast(strength, params))
        return Partial(_add_diagonal, curvature(params, batch, weights), strengths)

    return regularised


def _add_diagonal(multiply, diagonal, u):
    return jax.tree.map(lambda c, d, x: (c + d * x).astype(x.dtype), multiply(u), diagonal, u)


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


def device_local(tree: Any, *others: Any, axis_name: AxisName = None) -> Any:
    """Returns `tree`, marked as differing from device to device wherever `others` do.

    Inside `shard_map` with its default checks, the gradient to a value that is the same on all
    devices is silently summed over them; differentiating a local loss to such parameters and
    averaging gives the mean times the number of devices. Marked as device-local first, the
    gradient stays local and `mean_over_devices` is right, as it is under `pmap`, `vmap` and
    unchecked `shard_map`, where there is nothing to mark.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = {name for name in _names(axis_name) if name in manual}
    for leaf in jax.tree.leaves((tree, others)):
        axes |= varying_axes(leaf)
    return jax.tree.map(lambda x: _vary(x, axes), tree)


def mean_over_devices(tree: Any, axis_name: AxisName) -> Any:
    """Returns the mean of device-local values over `axis_name`; `tree` itself if that is None."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the mesh axes over which `x` may differ, as `shard_map`'s checks see it."""
    return jax.typeof(x).manual_axis_type.varying


def at_least_float32(tree: Any) -> Any:
    """Returns `tree` with half-precision leaves raised to float32; float64 stays."""

    def raise_precision(x):
        x = jnp.asarray(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(raise_precision, tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Returns `tree` with the dtypes of `like`."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), tree, like)


def _names(axis_name: AxisName) -> Iterable[str]:
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _vary(x: Any, axes: set[str]) -> Any:
    missing = tuple(axes - varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x
