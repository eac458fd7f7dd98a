"""Per-example gradients in a random space of few dimensions, and influence in that space.

    phi_i = P^T g_i,   P of shape [parameters, rank],   E <phi_i, phi_j> = <g_i, g_j>
    scores = -q^T (Phi^T Phi / N + damping I)^-1 phi_i

The projection of TRAK, Park et al. 2023 (arXiv:2303.14186), section 3, whose scores are these
without damping, for q the gradient of a query. Its model output function and the weights that it
gives to examples are the caller's to choose by `loss_fn`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxpoison.attribution._datainf import gradients_per_example
from jaxpoison.core import batches, trees
from jaxpoison.core.batches import Batch, LossFn
from jaxpoison.core.checks import check_count, check_no_nan, check_positive
from jaxpoison.core.trees import Params

Kind = Literal["normal", "rademacher"]
HIGHEST = lax.Precision.HIGHEST


def project_gradients(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    rank: int,
    kind: Kind = "rademacher",
    chunk_size: int | None = None,
    rows_at_once: int = 4096,
) -> jax.Array:
    """Returns P^T grad_theta l_i of every example, shape `[N, rank]`, in at least float32.

    Entries of P are independent, of mean 0 and variance 1 / rank, so that inner products are kept
    in expectation: the variance of one is about (|g|^2 |h|^2 + <g, h>^2) / rank. The same key,
    rank, kind and `rows_at_once` give the same P, whatever the batch; P is never held whole.

    Args:
      loss_fn: as for `influence.group_ihvp`.
      params: as for `influence.group_ihvp`.
      batch: `(inputs, targets)` with leading axis N.
      key: PRNG key of P: one for a training set and all queries to it.
      rank: dimensions of the space; at least 1.
      kind: "normal" or "rademacher" (random signs, cheaper to draw) for the entries of P.
      chunk_size: examples per pass; the memory is that of as many gradients.
      rows_at_once: rows of P drawn together; the memory is that of as many times `rank`.

    Raises:
      ValueError: for settings out of range, or losses that depend on other examples.
    """
    check_count(rank=rank, rows_at_once=rows_at_once)
    if kind not in ("normal", "rademacher"):
        raise ValueError(f"kind must be 'normal' or 'rademacher', got {kind!r}")
    check_no_nan(params=params, batch=batch)
    batches.check_independent(loss_fn, params, batch, "batch")
    params = trees.at_least_float32(params)
    flat, _ = ravel_pytree(params)
    num_blocks = -(-flat.size // rows_at_once)
    missing = num_blocks * rows_at_once - flat.size

    def rows(index):  # of P, times sqrt(rank)
        draw = jax.random.normal if kind == "normal" else jax.random.rademacher
        return draw(jax.random.fold_in(key, index), (rows_at_once, rank), flat.dtype)

    def project(chunk):
        gradients = gradients_per_example(loss_fn, params, chunk)
        flat_gradients = jax.vmap(lambda g: ravel_pytree(g)[0])(gradients)
        padded = jnp.pad(flat_gradients, ((0, 0), (0, missing)))

        def add(total, index):
            block = lax.dynamic_slice_in_dim(padded, index * rows_at_once, rows_at_once, axis=1)
            return total + jnp.matmul(block, rows(index), precision=HIGHEST), None

        zeros = jnp.zeros_like(padded, shape=(len(padded), rank))
        return lax.scan(add, zeros, jnp.arange(num_blocks))[0] / rank**0.5

    return batches.map_chunks(project, batch, chunk_size)


def projected_scores(queries: jax.Array, features: jax.Array, *, damping: float) -> jax.Array:
    """Returns -q^T (Phi^T Phi / N + damping I)^-1 phi_i, shape `[M, N]`; positive is harmful.

    Args:
      queries: projected gradients of queries `[M, rank]`, or the mean over a group, `[1, rank]`.
      features: those of the training examples, Phi `[N, rank]`, by the same projection.
      damping: in the units of the empirical Fisher matrix, the mean of g g^T; positive.

    Raises:
      ValueError: for arrays of other shapes.
    """
    check_positive(damping=damping)
    if jnp.ndim(queries) != 2 or jnp.ndim(features) != 2 or queries.shape[1] != features.shape[1]:
        raise ValueError(
            "queries [M, rank] and features [N, rank] must share rank, got "
            f"{jnp.shape(queries)} and {jnp.shape(features)}"
        )
    gram = jnp.matmul(features.T, features, precision=HIGHEST) / len(features)
    damped = gram + damping * jnp.eye(len(gram), dtype=gram.dtype)
    directions = jax.scipy.linalg.solve(damped, queries.T, assume_a="pos").T
    return -jnp.matmul(directions, features.T, precision=HIGHEST)
