"""Inverse-Fisher-vector products in closed form: the mean of inverses for the inverse of the mean.

    x_l = 1/damping (v_l - 1/N sum_i g_il <g_il, v_l> / (damping + |g_il|^2)),   for each layer l

DataInf of Kwon et al. 2024 (arXiv:2310.00902): each (g g^T + damping I)^-1 is written
out by Sherman and Morrison. g_il is the gradient of example i in layer l.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxpoison import influence, solvers
from jaxpoison.core import batches, programs, trees
from jaxpoison.core.batches import Batch, LossFn, Stream
from jaxpoison.core.checks import check_no_nan, check_positive, number
from jaxpoison.core.trees import Params
from jaxpoison.solvers.base import NOT_MEASURED, judge_noisy


def datainf(
    loss_fn: LossFn,
    params: Params,
    group: Batch | Stream,
    train: Batch | Stream,
    *,
    damping: float,
    tolerance: float = 0.01,
    group_weights: jax.Array | None = None,
    chunk_size: int | None = None,
) -> solvers.Solution:
    """Returns DataInf's approximation of x = (F + damping I)^-1 v, v the group's mean gradient.

    F is the empirical Fisher matrix, the mean of g g^T over `train`. `influence.example_influence`
    makes scores of `value`. The approximation is good where |g|^2 is small against `damping`; for
    small dampings it tends to v / damping less the part that each example alone would explain. The
    residual, with the whole of F, tells. Two passes over `train`.

    Args:
      loss_fn: as for `influence.group_ihvp`.
      params: each array is a layer, as in the paper; None for what is left out.
      group: examples whose mean loss is of interest, with leading axis M.
      train: examples of F, with leading axis N; a `Stream` is read batch by batch, outside `jit`.
      damping: one for all layers, in the units of F; positive. The paper takes, in each layer, 0.1
        times the mean of g^2 over examples and coordinates.
      tolerance: it converges if the residual is at most this; it is noisy up to 0.5.
      group_weights: `[M]`, for a weighted mean.
      chunk_size: examples per pass; the memory is that of as many gradients.

    Returns:
      A `solvers.Solution`; `num_steps` is 0 and `top_eigenvalue` -1.

    Raises:
      ValueError, TypeError: as `influence.group_ihvp`.
    """
    check_positive(damping=damping, tolerance=tolerance)
    damping = number(damping)
    v = influence.group_gradient(
        loss_fn, params, group, weights=group_weights, chunk_size=chunk_size
    )
    check_no_nan(train=None if isinstance(train, Stream) else train)
    params = trees.at_least_float32(params)

    def explained(chunk, weights):  # sum_i weights_i g <g, v> / (damping + |g|^2), layer by layer
        def layer(g, v):
            g = g.reshape(len(g), -1)
            share = jnp.matmul(g, v.ravel(), precision="highest") / (damping + jnp.sum(g**2, 1))
            return jnp.matmul(weights * share, g, precision="highest").reshape(v.shape)

        return jax.tree.map(layer, gradients_per_example(loss_fn, params, chunk), v)

    total = _mean_over(explained, train, v, chunk_size)
    x = jax.tree.map(lambda v, e: (v - e) / damping, v, total)

    def fisher(chunk, weights):
        def losses(p):
            return batches.losses_per_example(loss_fn, p, chunk)

        along = jax.jvp(losses, (params,), (trees.cast_like(x, params),))[1]
        return jax.vjp(losses, params)[1](weights * along)[0]

    product = trees.add_scaled(_mean_over(fisher, train, v, chunk_size), damping, x)
    size = trees.norm(v)
    error = trees.norm(jax.tree.map(jnp.subtract, product, v))
    residual = error / jnp.where(size > 0, size, 1)
    finite = jnp.isfinite(residual)
    failed = int(solvers.Status.PRODUCT_NOT_FINITE)
    status = jnp.where(finite, judge_noisy(tolerance, residual, jnp.int32(0)), failed)
    value = jax.tree.map(lambda a: jnp.where(finite, a, jnp.nan), x)
    none = jnp.full_like(residual, NOT_MEASURED)
    steps = jnp.zeros((), jnp.int32)
    return solvers.Solution(value, residual, steps, status, none, jnp.full_like(none, damping))


def gradients_per_example(loss_fn: LossFn, params: Params, batch: Batch) -> Params:
    """Returns grad_theta l_i of every example: shaped like `params`, with a leading axis `[B]`."""

    def loss(p, example):
        one = jax.tree.map(lambda x: x[None], example)
        return batches.losses_per_example(loss_fn, p, one)[0]

    return jax.vmap(jax.grad(loss), (None, 0))(params, jax.tree.map(jnp.asarray, batch))


def _mean_over(fn, train, like, chunk_size):
    """Returns the mean over the examples of `fn(chunk, weights)`, which is their weighted sum."""
    zeros = jax.tree.map(jnp.zeros_like, like)

    def add(total, chunk, weights):
        return jax.tree.map(jnp.add, total, fn(chunk, weights))

    if isinstance(train, Stream):
        each = 1 / train.count("train")
        step = programs.compiled(lambda total, chunk: add(total, chunk, each))
        return functools.reduce(step, train, zeros)
    num_examples = batches.count_examples(train, "train")
    num_chunks, take = batches.chunks(train, chunk_size, jnp.full(num_examples, 1 / num_examples))
    if num_chunks == 1:
        return add(zeros, *take(jnp.int32(0)))
    return lax.scan(lambda total, i: (add(total, *take(i)), None), zeros, jnp.arange(num_chunks))[0]
