"""Conjugate gradients (Hestenes & Stiefel 1952) with evidence of convergence."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpoison.core.checks import check_count, check_positive
from jaxpoison.core.trees import LinearMap, add_scaled, dot, norm
from jaxpoison.solvers.base import Solver, rounding, solve_and_measure


def cg(
    *,
    damping: float,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
    preconditioner: LinearMap | None = None,
) -> Solver:
    """Returns conjugate gradients, for positive definite H + damping I.

    Stops at ||r|| <= tolerance ||v||, after `max_steps`, or when it meets a direction p with
    p^T (H + damping I) p <= 0. Then the system is indefinite, the answer so far is returned and
    `converged` is False: take a larger damping, or `curvature.gauss_newton`.

    Departs from `jax.scipy.sparse.linalg.cg`: it counts its steps, watches for indefiniteness,
    recomputes the residual at the end (the recursion's own drifts in float32), keeps a state in at
    least float32 and traces inside `shard_map` with checks on.

    Args:
      damping: added to the diagonal, in the units of H; positive.
      tolerance: on the relative residual. `converged` also asks that the recomputed residual is
        below it or below sqrt(machine epsilon), which rounding may impose.
      max_steps: at most so many products with H.
      preconditioner: r -> M r with M symmetric positive definite, near (H + damping I)^-1.
    """
    check_positive(damping=damping, tolerance=tolerance)
    check_count(max_steps=max_steps)
    precondition = preconditioner or (lambda r: r)

    def run(damped, rhs):
        target = tolerance * norm(rhs)

        def unfinished(state):
            _, r, _, _, step, definite = state
            return (norm(r) > target) & (step < max_steps) & definite

        def advance(state):
            x, r, p, rz, step, _ = state
            q = damped(p)
            curvature = dot(p, q)
            definite = curvature > 0
            alpha = jnp.where(definite, rz / curvature, 0.0)
            x = add_scaled(x, alpha, p)
            r = add_scaled(r, -alpha, q)
            z = precondition(r)
            rz_next = dot(r, z)
            return x, r, add_scaled(z, rz_next / rz, p), rz_next, step + 1, definite

        z = precondition(rhs)
        start = (
            jax.tree.map(jnp.zeros_like, rhs),
            rhs,
            z,
            dot(rhs, z),
            jnp.zeros_like(target, jnp.int32),
            jnp.ones_like(target, bool),
        )
        x, r, _, _, num_steps, definite = lax.while_loop(unfinished, advance, start)
        return x, (num_steps, definite & (norm(r) <= target))

    def solver(matvec, rhs, *, sample=None, key=None):
        del sample, key
        solution = solve_and_measure(matvec, rhs, damping, run)
        limit = jnp.maximum(tolerance, rounding(solution.residual))
        return solution._replace(converged=solution.converged & (solution.residual <= limit))

    return solver
