"""The top eigenvectors of H from one Krylov space: influence through them alone.

    x = sum over the r Ritz pairs of largest |lambda| of q <q, v> / (lambda + damping)

Schioppa et al. 2022 (arXiv:2112.03052). Their Arnoldi iteration is, for a symmetric H,
the Lanczos method with full orthogonalization.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.core.checks import check_count, check_positive, number
from jaxpoison.core.trees import dot
from jaxpoison.solvers._spectrum import eigh_tridiagonal, lanczos, random_start
from jaxpoison.solvers.base import Solver, Status, judge_noisy, solve_and_measure


def arnoldi(*, damping: float, rank: int, num_steps: int, tolerance: float = 0.01) -> Solver:
    """Returns a solver that inverts H on its top eigenvectors and drops the rest of v.

    What `nystrom` keeps divided by `damping`, the part of v across the eigenvectors, is dropped
    here, as in the paper: the residual is then at least the share of v that lies there, and is
    small only where gradients lie along the top eigenvectors. Many right-hand sides share one
    basis under `jax.vmap`: each then costs two products with a `num_steps` x P array, and one
    product with H to measure its residual. Unlike `nystrom` it takes an indefinite H, as long as
    lambda + damping is positive for the eigenvalues kept.

    Args:
      damping: added to the diagonal, in the units of H; positive. The paper has none.
      rank: r, eigenvectors kept; at most `num_steps`.
      num_steps: products with H, one after the other; at least 1. Memory is that of as many
        vectors. The top eigenvectors are good once it is a few times `rank`.
      tolerance: it converges if the residual is at most this. Above, and up to 0.5, the answer is
        noisy but usable.

    Raises:
      ValueError: for settings out of range; when called, if there is no key.
    """
    return _Arnoldi(number(damping), rank, num_steps, number(tolerance))


@dataclasses.dataclass(frozen=True)
class _Arnoldi:
    damping: Any
    rank: int
    num_steps: int
    tolerance: Any

    def __post_init__(self):
        check_positive(damping=self.damping, tolerance=self.tolerance)
        check_count(rank=self.rank, num_steps=self.num_steps)
        if self.rank > self.num_steps:
            raise ValueError(
                f"rank = {self.rank} is more than the {self.num_steps} vectors that num_steps = "
                f"{self.num_steps} products make: raise num_steps to a few times rank"
            )

    def __call__(self, matvec, rhs, *, sample=None, key=None, progress=None):
        del sample, progress
        if key is None:
            raise ValueError("arnoldi is random: pass a PRNG key, as in key=jax.random.key(0)")
        run = functools.partial(_run, self, key)
        judge = functools.partial(_judge, self.tolerance)
        return solve_and_measure(matvec, rhs, self.damping, run, judge)


def _run(config, key, damped, v, loop):
    basis, diagonal, off_diagonal = lanczos(damped, config.num_steps, random_start(v, key), loop)
    # Beyond an invariant subspace the basis is zero, and must not be taken for a top eigenvector.
    present = jax.vmap(dot)(basis, basis) > 0.5
    shifted = jnp.where(present, diagonal, config.damping)
    values, vectors = eigh_tridiagonal(shifted, off_diagonal)  # of H + damping I
    kept = jnp.argsort(-jnp.abs(values - config.damping))[: config.rank]
    values, vectors = values[kept], vectors[:, kept]

    definite = (values > 0).all()
    shares = jax.vmap(functools.partial(dot, v))(basis)
    inverse = jnp.where(values > 0, 1 / values, 0.0)
    along = inverse * jnp.matmul(vectors.T, shares, precision="highest")
    weights = jnp.matmul(vectors, along, precision="highest")
    x = jax.tree.map(lambda b: jnp.tensordot(weights, b, axes=1, precision="highest"), basis)
    status = jnp.where(definite, int(Status.CONVERGED), int(Status.INDEFINITE))
    num_steps = jnp.full_like(status, config.num_steps)
    return x, (num_steps, status, jnp.max(jnp.abs(values)))


def _judge(tolerance, residual, status):
    judged = judge_noisy(tolerance, residual, status)
    return jnp.where(status == int(Status.INDEFINITE), status, judged)
