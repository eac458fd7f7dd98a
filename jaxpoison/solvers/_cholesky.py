"""A direct solver for small systems."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxpoison.core.checks import check_count, check_positive, number
from jaxpoison.core.trees import at_least_float32
from jaxpoison.solvers._spectrum import top_eigenvalue
from jaxpoison.solvers.base import Loop, Solver, Status, rounding, solve_and_measure

NOISE = 100.0  # times epsilon ||H||: rounding moves eigenvalues by no more


def cholesky(*, damping: float, max_size: int = 20_000, rows_at_once: int = 128) -> Solver:
    """Returns a direct solver, which writes H + damping I out and factorizes it: small heads.

    Costs P products (taken `rows_at_once` together), two P x P arrays and P^3 / 3 operations.
    It converges if the residual is at most sqrt(machine epsilon), half of the digits. If the matrix
    cannot be factorized the status is INDEFINITE, or ROUNDING where a little more on the diagonal,
    as much as rounding may take from it, would do.

    Args:
      damping: added to the diagonal, in the units of H; positive.
      max_size: the largest number of parameters P to accept.
      rows_at_once: products computed under one `vmap`; bounds the memory of the batch.
    """
    return _Cholesky(number(damping), max_size, rows_at_once)


@dataclasses.dataclass(frozen=True)
class _Cholesky:
    damping: Any
    max_size: int
    rows_at_once: int

    def __post_init__(self):
        check_positive(damping=self.damping)
        check_count(max_size=self.max_size, rows_at_once=self.rows_at_once)

    def __call__(self, matvec, rhs, *, sample=None, key=None, progress=None):
        del sample, key, progress
        size = sum(leaf.size for leaf in jax.tree.leaves(at_least_float32(rhs)))
        if size > self.max_size:
            raise ValueError(
                f"cholesky would write out a matrix of {size:,} x {size:,} "
                f"({4e-9 * size * size:.1f} GB in float32): use cg, or raise "
                f"max_size={self.max_size:,}"
            )
        return solve_and_measure(matvec, rhs, self.damping, functools.partial(_run, self), _judge)


def _run(config, damped, rhs, loop):
    flat, unravel = ravel_pytree(rhs)

    def row(index):
        return ravel_pytree(damped(unravel(jax.nn.one_hot(index, flat.size, dtype=flat.dtype))))[0]

    rows_at_once = min(config.rows_at_once, flat.size)
    matrix = loop.map(row, jnp.arange(flat.size), rows_at_once)
    matrix = (matrix + matrix.T) / 2
    factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    x = jax.scipy.linalg.cho_solve((factor, True), flat)

    def multiply(u):
        return jnp.matmul(matrix, u, precision=lax.Precision.HIGHEST)

    top = top_eigenvalue(multiply, flat, jax.random.key(0), 10, Loop())

    def why():
        shift = NOISE * jnp.finfo(flat.dtype).eps * top
        shifted = matrix + shift * jnp.eye(flat.size, dtype=matrix.dtype)
        only_rounding = jnp.isfinite(jnp.linalg.cholesky(shifted, symmetrize_input=False)).all()
        status = jnp.where(only_rounding, int(Status.ROUNDING), int(Status.INDEFINITE))
        return status.astype(jnp.int32)

    factorized = jnp.isfinite(factor).all()
    status = lax.cond(factorized, lambda: jnp.full_like(top, 0, jnp.int32), why)
    return unravel(x), (jnp.ones((), jnp.int32), status, top)


def _judge(residual, status):
    accurate = residual <= rounding(residual)
    return jnp.where((status == 0) & ~accurate, int(Status.ROUNDING), status)
