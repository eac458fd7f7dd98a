"""Low-rank approximation of H by randomised Nystrom sketches, to solve and to precondition.

    H ~ U diag(lambda) U^T,    rank r, from r products with H (Frangella, Tropp & Udell 2023,
                               arXiv:2110.02820, algorithm 2.1)

For positive semi-definite H: last layers, and Gauss-Newton matrices of whole networks.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxpoison.core.checks import check_count, check_positive
from jaxpoison.core.spmd import device_local
from jaxpoison.core.trees import LinearMap, Params, at_least_float32
from jaxpoison.solvers.base import Solver, solve_and_measure

HIGHEST = lax.Precision.HIGHEST


def nystrom(
    *, damping: float, rank: int, tolerance: float = 0.1, columns_at_once: int = 16
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
      tolerance: `converged` is set when the residual is finite and at most this.
      columns_at_once: products computed under one `vmap`; bounds the memory of the batch.
    """
    check_positive(damping=damping, tolerance=tolerance)
    check_count(rank=rank, columns_at_once=columns_at_once)

    def solver(matvec, rhs, *, sample=None, key=None):
        del sample
        if key is None:
            raise ValueError("nystrom is random: pass a PRNG key, as in key=jax.random.key(0)")

        def run(damped, v):
            def undamped(u):
                return jax.tree.map(lambda hu, x: hu - damping * x, damped(u), u)

            values, vectors = sketch(undamped, v, key, rank, columns_at_once)
            flat, unravel = ravel_pytree(v)
            x = _scale_range(vectors, flat, 1 / (values + damping), 1 / damping)
            return unravel(x), (jnp.full_like(x, rank, jnp.int32, shape=()), jnp.isfinite(x).all())

        solution = solve_and_measure(matvec, rhs, damping, run)
        return solution._replace(converged=solution.residual <= tolerance)

    return solver


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
    values, vectors = sketch(matvec, like, key, rank, columns_at_once)
    inner = (values[-1] + damping) / (values + damping)
    _, unravel = ravel_pytree(like)

    def precondition(r):
        return unravel(_scale_range(vectors, ravel_pytree(r)[0], inner, 1.0))

    return precondition


def sketch(
    matvec: LinearMap, like: Params, key: jax.Array, rank: int, columns_at_once: int
) -> tuple[jax.Array, jax.Array]:
    """Returns eigenvalues `[r]`, falling, and orthonormal eigenvectors `[P, r]` of the sketch."""
    flat, unravel = ravel_pytree(like)
    rank = min(rank, flat.size)
    test = jnp.linalg.qr(jax.random.normal(key, (flat.size, rank), flat.dtype))[0]

    def column(omega):
        return ravel_pytree(matvec(unravel(omega)))[0]

    rows = lax.map(column, device_local(test.T, flat), batch_size=min(columns_at_once, rank))
    image = rows.T
    # A small multiple of the identity, taken off again below, keeps the factorisation definite.
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
