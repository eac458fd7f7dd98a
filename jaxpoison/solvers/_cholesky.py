"""A direct solver for small systems."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxpoison.core.checks import check_count, check_positive
from jaxpoison.core.trees import at_least_float32
from jaxpoison.solvers.base import Solver, rounding, solve_and_measure


def cholesky(*, damping: float, max_size: int = 20_000, rows_at_once: int = 128) -> Solver:
    """Returns a direct solver, which writes H + damping I out and factorises it: small heads.

    Costs P products (taken `rows_at_once` together), two P x P arrays and P^3 / 3 operations.
    `converged` is False if the matrix is not positive definite or the residual is above
    sqrt(machine epsilon).

    Args:
      damping: added to the diagonal, in the units of H; positive.
      max_size: the largest number of parameters P to accept.
      rows_at_once: products computed under one `vmap`; bounds the memory of the batch.
    """
    check_positive(damping=damping)
    check_count(max_size=max_size, rows_at_once=rows_at_once)

    def run(damped, rhs):
        flat, unravel = ravel_pytree(rhs)
        size = flat.size

        def row(index):
            return ravel_pytree(damped(unravel(jax.nn.one_hot(index, size, dtype=flat.dtype))))[0]

        matrix = lax.map(row, jnp.arange(size), batch_size=min(rows_at_once, size))
        factor = jax.scipy.linalg.cho_factor((matrix + matrix.T) / 2, lower=True)
        x = jax.scipy.linalg.cho_solve(factor, flat)
        return unravel(x), (jnp.ones((), jnp.int32), jnp.all(jnp.isfinite(x)))

    def solver(matvec, rhs, *, sample=None, key=None):
        del sample, key
        size = sum(leaf.size for leaf in jax.tree.leaves(at_least_float32(rhs)))
        if size > max_size:
            raise ValueError(
                f"cholesky would write out a matrix of {size:,} x {size:,} "
                f"({4e-9 * size * size:.1f} GB in float32): use cg, or raise max_size={max_size:,}"
            )
        solution = solve_and_measure(matvec, rhs, damping, run)
        accurate = solution.residual <= rounding(solution.residual)
        return solution._replace(converged=solution.converged & accurate)

    return solver
