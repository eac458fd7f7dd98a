"""What all solvers share: their contract, the evidence in a `Solution`, implicit derivatives."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax

from jaxpoison.core.spmd import device_local
from jaxpoison.core.trees import LinearMap, Params, at_least_float32, norm

SampleProduct = Callable[[jax.Array, int], LinearMap]


class Solution(NamedTuple):
    """An approximate solution of (H + damping I) x = v, and how good it is.

    Attributes:
      value: x, a pytree shaped like v, in at least float32.
      residual: ||(H + damping I) x - v|| / ||v||, shape (), computed from x itself with the whole
        of H: 0 is exact, 1 is as bad as x = 0. NaN for `identity`, which solves no system.
      num_steps: iterations taken, int32, shape ().
      converged: whether the solver's own criterion was met, bool, shape ().
      top_eigenvalue: estimate of the largest |eigenvalue| that the solver met; NaN if it made none.
    """

    value: Params
    residual: jax.Array
    num_steps: jax.Array
    converged: jax.Array
    top_eigenvalue: jax.Array


class Solver(Protocol):
    """Solves (H + damping I) x = rhs.

    Args:
      matvec: u -> H u, linear and symmetric, without damping.
      rhs: pytree of arrays.
      sample: `sample(key, batch_size) -> (u -> H_B u)`, the product with the mean over a random
        mini-batch; only stochastic solvers use it.
      key: PRNG key; only stochastic solvers use it.
    """

    def __call__(
        self,
        matvec: LinearMap,
        rhs: Params,
        *,
        sample: SampleProduct | None = None,
        key: jax.Array | None = None,
    ) -> Solution: ...


class DivergedError(RuntimeError):
    """A solution that must not be used; the message says what to change."""


def identity() -> Solver:
    """Returns the solver that takes v for x: scores become gradient dot products (TracIn-like).

    The ablation of the inverse Hessian. It solves no system: `residual` is NaN, `converged` True.
    """

    def solver(matvec, rhs, *, sample=None, key=None):
        del matvec, sample, key
        nan = jnp.full((), jnp.nan)
        return Solution(at_least_float32(rhs), nan, jnp.zeros((), jnp.int32), jnp.bool_(True), nan)

    return solver


def require_converged(solution: Solution, what: str = "the solution") -> Solution:
    """Returns `solution` if all of it converged; for use outside `jit`.

    Args:
      solution: from any solver, `vmap`ped ones included.
      what: named in the message.

    Raises:
      DivergedError: with the residual, the steps taken and what to try.
    """
    converged = np.asarray(solution.converged)
    if converged.all():
        return solution
    residual = np.asarray(solution.residual)
    worst = residual.flat[np.argmax(np.where(np.isfinite(residual), residual, np.inf))]
    steps = int(np.max(np.asarray(solution.num_steps)))
    count = "" if converged.ndim == 0 else f" ({np.sum(~converged)} of {converged.size} systems)"
    top = np.asarray(solution.top_eigenvalue)
    known = (
        f" The largest eigenvalue met is about {np.max(top):.3g}."
        if top.size and np.all(np.isfinite(top))
        else ""
    )
    if not np.isfinite(worst) or worst >= 1:
        advice = (
            "It diverged. For lissa raise scale tenfold, or leave scale=None. If the loss is not "
            "convex in these parameters, damping must exceed the most negative eigenvalue of H; "
            "curvature.gauss_newton has none."
        )
    else:
        advice = (
            "Raise the number of steps or damping. For lissa, num_steps should be several times "
            "scale / damping, and a larger batch_size or num_repeats lowers the noise. For cg an "
            "early stop means an indefinite H: raise damping or use curvature.gauss_newton."
        )
    raise DivergedError(
        f"{what}{count} did not converge: relative residual {worst:.3g} after {steps} steps."
        f"{known} {advice}"
    )


def solve_and_measure(matvec: LinearMap, rhs: Params, damping: float, run: Callable) -> Solution:
    """Applies `run(damped, rhs) -> (x, (num_steps, converged))` and measures the residual of x."""

    def damped(u):
        return jax.tree.map(lambda h, x: (h + damping * x).astype(x.dtype), matvec(u), u)

    rhs = at_least_float32(rhs)
    rhs = device_local(rhs, jax.eval_shape(damped, rhs))
    if jax.sharding.get_abstract_mesh().manual_axes:
        solve = _solve_implicitly
    else:
        solve = functools.partial(lax.custom_linear_solve, symmetric=True, has_aux=True)
    value, (num_steps, converged) = solve(damped, rhs, run)

    # Evidence is not differentiated: sqrt has no derivative at an exact solution.
    x, v = lax.stop_gradient((value, rhs))
    error = norm(jax.tree.map(jnp.subtract, lax.stop_gradient(damped(x)), v))
    size = norm(v)
    residual = jnp.where(size > 0, error / size, error)
    return Solution(value, residual, num_steps, converged, jnp.full((), jnp.nan))


def _solve_implicitly(damped: LinearMap, rhs: Params, run: Callable) -> Any:
    """Does what a symmetric `lax.custom_linear_solve` does, in reverse mode only.

    Inside `shard_map` that function marks all that the matvec closes over as varying over devices,
    contradicting the types under which the matvec was traced. A `custom_vjp` leaves types alone.
    """
    product, product_constants = _hoist(damped, rhs)
    solve, solve_constants = _hoist(lambda v: run(damped, v), rhs)

    def implicit(product_constants, solve_constants, v):
        del product_constants
        return solve(solve_constants, v)

    def forward(product_constants, solve_constants, v):
        solved = solve(solve_constants, v)
        return solved, (product_constants, solve_constants, solved[0])

    def backward(saved, cotangent):  # A x = v, so dx = A^-1 (dv - dA x), and A is symmetric
        product_constants, solve_constants, x = saved
        adjoint, _ = solve(solve_constants, cotangent[0])
        _, pull = jax.vjp(lambda constants: product(constants, x), product_constants)
        return pull(jax.tree.map(jnp.negative, adjoint))[0], None, adjoint

    differentiable = jax.custom_vjp(implicit)
    differentiable.defvjp(forward, backward)
    return differentiable(product_constants, solve_constants, rhs)


def _hoist(fn: Callable, argument: Any) -> tuple[Callable, list[Any]]:
    """Returns `hoisted(constants, argument)` and the constants: all arrays that `fn` closes over.

    `jax.closure_convert` leaves integers and keys inside, which then leak out of `shard_map`.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(argument)
    structure = jax.tree.structure(shape)

    def hoisted(constants, argument):
        leaves = core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(argument))
        return structure.unflatten(leaves)

    return hoisted, closed.consts


def rounding(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).eps) ** 0.5
