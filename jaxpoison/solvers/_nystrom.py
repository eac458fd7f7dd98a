"""Low-rank approximation of H by randomized Nystrom sketches, to solve and to precondition.

    H ~ U diag(lambda) U^T,    rank r, from r products with H (Frangella, Tropp & Udell 2023,
                               arXiv:2110.02820, algorithm 2.1)

For positive semi-definite H: last layers, and Gauss-Newton matrices of whole networks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxpoison.core.checks import check_count, check_positive, number
from jaxpoison.core.spmd import device_local
from jaxpoison.core.trees import LinearMap, Params, at_least_float32
from jaxpoison.solvers.base import Loop, Solver, Status, judge_noisy, solve_and_measure

HIGHEST = lax.Precision.HIGHEST


def nystrom(
    *, damping: float, rank: int, tolerance: float = 0.01, columns_at_once: int = 16
) -> Solver:
    """Returns a direct solver for a rank-r approximation of a positive semi-definite H.

    The answer is exact where H has rank r; else its error is about that of dropping the
    eigenvalues beyond the r largest, against `damping`: the residual tells. Many right-hand sides
    share one sketch under `jax.vmap`: each then costs two products with a P x r matrix, and one
    product with H to measure its residual. Where that is not accurate enough, use
    `cg(preconditioner=nystrom_preconditioner(...))`.

    Args:
      damping: added to the diagonal, in the units of H; positive.
      rank: r, the number of products with H; at most the number of parameters P counts. The sketch
        is an array of P x r.
      tolerance: it converges if the residual is at most this. Above, and up to 0.5, the answer is
        noisy but usable.
      columns_at_once: products computed under one `vmap`; bounds the memory of the batch.
    """
    return _Nystrom(number(damping), rank, number(tolerance), columns_at_once)


@dataclasses.dataclass(frozen=True)
class _Nystrom:
    damping: Any
    rank: int
    tolerance: Any
    columns_at_once: int

    def __post_init__(self):
        check_positive(damping=self.damping, tolerance=self.tolerance)
        check_count(rank=self.rank, columns_at_once=self.columns_at_once)

    def __call__(self, matvec, rhs, *, sample=None, key=None, progress=None):
        del sample, progress
        if key is None:
            raise ValueError("nystrom is random: pass a PRNG key, as in key=jax.random.key(0)")
        run = functools.partial(_run, self, key)
        judge = functools.partial(judge_noisy, self.tolerance)
        return solve_and_measure(matvec, rhs, self.damping, run, judge)


def _run(config, key, damped, v, loop):
    def undamped(u):
        return jax.tree.map(lambda hu, x: hu - config.damping * x, damped(u), u)

    values, vectors = sketch(undamped, v, key, config.rank, config.columns_at_once, loop)
    flat, unravel = ravel_pytree(v)
    x = _scale_range(vectors, flat, 1 / (values + config.damping), 1 / config.damping)
    # Only an indefinite H has a sketch that cannot be factorized.
    status = jnp.where(jnp.isfinite(x).all(), int(Status.CONVERGED), int(Status.INDEFINITE))
    num_steps = jnp.full_like(x, config.rank, jnp.int32, shape=())
    return unravel(x), (num_steps, status, values[0] + config.damping)


def nystrom_preconditioner(
    matvec: LinearMap,
    like: Params,
    key: jax.Array,
    *,
    damping: float,
    rank: int,
    columns_at_once: int = 16,
) -> LinearMap:
    """Returns r -> M r for `cg(preconditioner=...)`, from a rank-`rank` sketch of H.

        M = (lambda_r + damping) U (diag(lambda) + damping I)^-1 U^T + (I - U U^T)

    CG then takes steps as if the top eigenvalues were not there. Arguments as for `nystrom`;
    `matvec` is u -> H u, `like` a pytree shaped like the parameters. Worth its `rank` products
    where several right-hand sides share it, or a few large eigenvalues stand out.
    """
    check_positive(damping=damping)
    check_count(rank=rank, columns_at_once=columns_at_once)
    like = at_least_float32(like)
    values, vectors = sketch(matvec, like, key, rank, columns_at_once, Loop())
    inner = (values[-1] + damping) / (values + damping)
    _, unravel = ravel_pytree(like)

    def precondition(r):
        return unravel(_scale_range(vectors, ravel_pytree(r)[0], inner, 1.0))

    return precondition


def sketch(
    matvec: LinearMap, like: Params, key: jax.Array, rank: int, columns_at_once: int, loop: Loop
) -> tuple[jax.Array, jax.Array]:
    """Returns eigenvalues `[r]`, falling, and orthonormal eigenvectors `[P, r]` of the sketch."""
    flat, unravel = ravel_pytree(like)
    rank = min(rank, flat.size)
    test = jnp.linalg.qr(jax.random.normal(key, (flat.size, rank), flat.dtype))[0]

    def column(omega):
        return ravel_pytree(matvec(unravel(omega)))[0]

    rows = loop.map(column, device_local(test.T, flat), min(columns_at_once, rank))
    image = rows.T
    # A small multiple of the identity, taken off again below, keeps the factorization definite.
    eps = jnp.finfo(flat.dtype).eps
    shift = jnp.sqrt(jnp.asarray(flat.size, flat.dtype)) * eps * jnp.linalg.norm(image)
    shift = jnp.maximum(shift, jnp.finfo(flat.dtype).tiny)
    image = image + shift * test
    inner = jnp.matmul(test.T, image, precision=HIGHEST)
    factor = jnp.linalg.cholesky((inner + inner.T) / 2)
    half = jax.scipy.linalg.solve_triangular(factor, image.T, lower=True).T
    vectors, singular, _ = jnp.linalg.svd(half, full_matrices=False)
    return jnp.maximum(singular**2 - shift, 0.0), vectors


def _scale_range(vectors, flat, inside, outside):
    """Returns `flat` times `inside` along the eigenvectors, times `outside` across them."""
    shares = jnp.matmul(vectors.T, flat, precision=HIGHEST)
    return outside * flat + jnp.matmul(vectors, (inside - outside) * shares, precision=HIGHEST)
