"""Conjugate gradients (Hestenes & Stiefel 1952) with evidence of convergence.

Departs from `jax.scipy.sparse.linalg.cg`: it counts its steps, watches for indefiniteness,
recomputes the residual at the end (the recursion's own drifts in float32), keeps a state in at
least float32 and traces inside `shard_map` with checks on.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpoison.core.checks import check_count, check_positive, number
from jaxpoison.core.trees import LinearMap, Params, add_scaled, dot, norm
from jaxpoison.solvers.base import NOT_MEASURED, Solver, Status, rounding, solve_and_measure

NOISE = 100.0  # times epsilon ||H||: a p^T H p / p^T p no further below zero may be rounding


def cg(
    *,
    damping: float,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
    preconditioner: LinearMap | None = None,
) -> Solver:
    """Returns conjugate gradients, for positive definite H + damping I.

    Stops at ||r|| <= tolerance ||v||, after `max_steps`, or when it meets a direction p with
    p^T (H + damping I) p <= 0. Then the answer so far is returned, with the status INDEFINITE, or
    ROUNDING where that may be all that is negative: take a larger damping, or
    `curvature.gauss_newton`.

    Args:
      damping: added to the diagonal, in the units of H; positive.
      tolerance: on the relative residual. `converged` also asks that the recomputed residual is at
        most twice that plus 100 times machine epsilon. Where rounding keeps it above, up to
        sqrt(machine epsilon), the answer is usable, with the status NOISY.
      max_steps: at most this many products with H.
      preconditioner: r -> M r with M symmetric positive definite, near (H + damping I)^-1.
    """
    return _CG(number(damping), number(tolerance), max_steps, preconditioner)


@dataclasses.dataclass(frozen=True)
class _CG:
    damping: Any
    tolerance: Any
    max_steps: int
    preconditioner: LinearMap | None

    def __post_init__(self):
        check_positive(damping=self.damping, tolerance=self.tolerance)
        check_count(max_steps=self.max_steps)

    def __call__(self, matvec, rhs, *, sample=None, key=None, progress=None):
        del sample, key
        run = functools.partial(_run, self)
        judge = functools.partial(_judge, self.tolerance)
        return solve_and_measure(matvec, rhs, self.damping, run, judge, progress=progress)


class _State(NamedTuple):
    x: Params
    r: Params
    p: Params
    rz: jax.Array
    step: jax.Array
    definite: jax.Array
    status: jax.Array
    top: jax.Array


def _run(config, damped, rhs, loop):
    size = norm(rhs)
    target = config.tolerance * size

    def unfinished(state):
        return (norm(state.r) > target) & (state.step < config.max_steps) & state.definite

    advance = loop.compiled(functools.partial(_advance, config))

    def step(state):
        return advance(state, damped(state.p))

    def report(state):
        return state.step, norm(state.r) / size

    z = _precondition(config, rhs)
    start = _State(
        x=jax.tree.map(jnp.zeros_like, rhs),
        r=rhs,
        p=z,
        rz=dot(rhs, z),
        step=jnp.zeros_like(target, jnp.int32),
        definite=jnp.ones_like(target, bool),
        status=jnp.full_like(target, int(Status.OUT_OF_STEPS), jnp.int32),
        top=jnp.full_like(target, NOT_MEASURED),
    )
    end = loop.while_loop(unfinished, step, start, report)
    met = end.definite & (norm(end.r) <= target)
    return end.x, (end.step, jnp.where(met, int(Status.CONVERGED), end.status), end.top)


def _advance(config, state, q):
    """Takes one step, given q = (H + damping I) p."""
    curvature, size = dot(state.p, q), norm(state.p)
    definite = curvature > 0
    alpha = jnp.where(definite, state.rz / jnp.where(definite, curvature, 1), 0.0)
    x = add_scaled(state.x, alpha, state.p)
    r = add_scaled(state.r, -alpha, q)
    z = _precondition(config, r)
    rz = dot(r, z)
    top = jnp.maximum(state.top, norm(q) / size)
    # Where H is positive semi-definite, rounding alone can make p^T H p negative.
    noise = NOISE * jnp.finfo(top.dtype).eps * top * size**2
    failure = jnp.where(curvature < -noise, int(Status.INDEFINITE), int(Status.ROUNDING))
    failure = jnp.where(jnp.isfinite(curvature), failure, int(Status.PRODUCT_NOT_FINITE))
    return _State(
        x=x,
        r=r,
        p=add_scaled(z, rz / state.rz, state.p),
        rz=rz,
        step=state.step + 1,
        definite=definite,
        status=jnp.where(definite, state.status, failure).astype(jnp.int32),
        top=top,
    )


def _precondition(config, r):
    return r if config.preconditioner is None else config.preconditioner(r)


def _judge(tolerance, residual, status):
    """Takes back a claim of convergence that the recomputed residual does not bear out."""
    limit = 2 * tolerance + 100 * jnp.finfo(residual.dtype).eps
    usable = jnp.maximum(limit, rounding(residual))
    honest = jnp.where(residual <= usable, int(Status.NOISY), int(Status.ROUNDING))
    honest = jnp.where(residual <= limit, int(Status.CONVERGED), honest)
    return jnp.where(status == int(Status.CONVERGED), honest, status)
