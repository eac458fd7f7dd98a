"""What all solvers share: their contract, the evidence in a `Solution`, implicit derivatives."""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpoison.core import loops
from jaxpoison.core.programs import compiled, hoist, is_traced
from jaxpoison.core.spmd import device_local
from jaxpoison.core.trees import LinearMap, Params, at_least_float32, norm

SampleProduct = Callable[[jax.Array, int], LinearMap]
Progress = Callable[[int, float], None]

USABLE_RESIDUAL = 0.5  # of a stochastic or low-rank answer: nearer to the solution than to zero
NOT_MEASURED = -1.0  # neither residuals nor largest |eigenvalues| can be negative


class Status(enum.IntEnum):
    """How a solve ended; `Solution.describe` puts it into words.

    CONVERGED: the residual is within the tolerance asked for. NOISY: it is not, but the answer is
    of use where a rank order is enough: at most 0.5, by a method that has such errors (LiSSA,
    Nystrom, Arnoldi), or at most sqrt(machine epsilon), where rounding stopped conjugate gradients.
    The others are failures: OUT_OF_STEPS; INDEFINITE, H + damping I is not positive definite;
    ROUNDING, the precision does not allow a better residual; DIVERGED; PRODUCT_NOT_FINITE and
    RHS_NOT_FINITE, H u or v holds NaN or infinities, or overflows.
    """

    CONVERGED = 0
    NOISY = 1
    OUT_OF_STEPS = 2
    INDEFINITE = 3
    ROUNDING = 4
    DIVERGED = 5
    PRODUCT_NOT_FINITE = 6
    RHS_NOT_FINITE = 7


class Solution(NamedTuple):
    """An approximate solution of (H + damping I) x = v, and how good it is.

    Attributes:
      value: x, a pytree shaped like v, in at least float32. NaN where the residual is not finite.
      residual: ||(H + damping I) x - v|| / ||v||, shape (), computed from x itself with the whole
        of H: 0 is exact, 1 is as bad as x = 0, NaN is no answer. -1 for `identity`, which solves
        no system.
      num_steps: iterations taken, int32, shape ().
      status: a `Status`, int32, shape ().
      top_eigenvalue: estimate of the largest |eigenvalue| of H + damping I or of H that the solver
        met, from below, shape (); -1 if it made none.
      damping: that of the system, shape (); 0 for `identity`.
    """

    value: Params
    residual: jax.Array
    num_steps: jax.Array
    status: jax.Array
    top_eigenvalue: jax.Array
    damping: jax.Array

    @property
    def converged(self) -> jax.Array:
        """Whether the residual is within the tolerance asked for, bool, shape ()."""
        return self.status == int(Status.CONVERGED)

    @property
    def usable(self) -> jax.Array:
        """Whether it converged or is merely noisy (`Status.NOISY`), bool, shape ()."""
        return self.status <= int(Status.NOISY)

    def describe(self) -> str:
        """Describes what happened and what to change; outside `jit`.

        Of several systems (under `vmap`) it describes the worst.
        """
        flat = [np.ravel(np.asarray(leaf)) for leaf in self[1:]]
        status, residuals = flat[2], flat[0]
        badness = np.where(np.isfinite(residuals), residuals, np.inf)
        worst = max(range(len(status)), key=lambda i: (status[i] > 0, badness[i]))
        residual, steps, _, top, damping = (x[min(worst, len(x) - 1)] for x in flat)
        size = "not measured" if residual == NOT_MEASURED else f"{residual:.3g}"
        known = f" The largest eigenvalue met is about {top:.3g}." if top >= 0 else ""
        condition = top / damping if top > 0 and damping > 0 else 0.0
        advice = _advice(Status(int(status[worst])), condition, np.asarray(self.residual).dtype)
        return f"relative residual {size} after {steps} steps.{known} {advice}"


class Solver(Protocol):
    """Solves (H + damping I) x = rhs.

    Args:
      matvec: u -> H u, linear and symmetric, without damping. If it has an attribute `on_host`
        that is True, iterative solvers call it outside `jit`, with arrays.
      rhs: pytree of arrays.
      sample: `sample(key, batch_size) -> (u -> H_B u)`, the product with the mean over a random
        mini-batch; only stochastic solvers use it.
      key: PRNG key; only stochastic solvers use it.
      progress: `progress(step, residual)`, called by iterative solvers as they go, outside `jit`.
    """

    def __call__(
        self,
        matvec: LinearMap,
        rhs: Params,
        *,
        sample: SampleProduct | None = None,
        key: jax.Array | None = None,
        progress: Progress | None = None,
    ) -> Solution: ...


class DivergedError(RuntimeError):
    """A solution that must not be used; the message gives advice."""


def identity() -> Solver:
    """Returns the solver that takes v for x: scores become gradient dot products (TracIn-like).

    The ablation of the inverse Hessian. It solves no system: `residual` is -1, `converged` True.
    """
    return _identity


def _identity(matvec, rhs, *, sample=None, key=None, progress=None):
    del matvec, sample, key, progress
    rhs = at_least_float32(_check_not_empty(rhs))
    none = jnp.full((), NOT_MEASURED)
    status = jnp.full((), int(Status.CONVERGED), jnp.int32)
    return Solution(rhs, none, jnp.zeros((), jnp.int32), status, none, jnp.zeros(()))


def require_converged(solution: Solution, what: str = "the solution") -> Solution:
    """Returns `solution` if all of it converged to the tolerance asked for; outside `jit`.

    Args:
      solution: from any solver, `vmap`ped ones included.
      what: named in the message.

    Raises:
      DivergedError: with the residual, the steps taken and what to try.
    """
    return _require(solution, solution.converged, what, "did not converge")


def require_usable(solution: Solution, what: str = "the solution") -> Solution:
    """Returns `solution` if all of it converged or is merely noisy; outside `jit`.

    For where a rank order of scores is enough. Arguments and errors as for
    `require_converged`.
    """
    return _require(solution, solution.usable, what, "is not usable")


def _require(solution, good, what, failure):
    good = np.asarray(good)
    if good.all():
        return solution
    count = "" if good.ndim == 0 else f" ({np.sum(~good)} of {good.size} systems)"
    raise DivergedError(f"{what}{count} {failure}: {solution.describe()}")


def _advice(status: Status, condition: float, dtype: Any) -> str:
    eps = float(jnp.finfo(dtype).eps)
    digits_end = status in (Status.OUT_OF_STEPS, Status.DIVERGED) and condition * eps > 1
    if digits_end or (status == Status.ROUNDING and condition * eps > 1e-3):
        wider = ", or switch jax_enable_x64 on" if dtype == np.float32 else ""
        return (
            f"H is ill-conditioned for {dtype} (largest eigenvalue / damping = {condition:.1e}): "
            f"scale the features, or raise damping{wider}."
        )
    return {
        Status.CONVERGED: "It converged to the tolerance asked for.",
        Status.NOISY: (
            "It is usable but noisy, and did not converge to the tolerance asked for. For lissa "
            "raise num_steps (several times scale / damping), batch_size or num_repeats; for "
            "nystrom and arnoldi raise rank; for ekfac raise damping; or use cg. For cg rounding "
            "is the limit: raise damping or tolerance, or use more precise products."
        ),
        Status.OUT_OF_STEPS: (
            "It ran out of steps. Raise the number of steps (max_steps, num_steps, rank) or "
            "damping. For lissa, num_steps should be several times scale / damping, and a larger "
            "batch_size or num_repeats lowers the noise."
        ),
        Status.INDEFINITE: (
            "H + damping I is not positive definite: damping must exceed the most negative "
            "eigenvalue of H, which solvers.spectrum shows; curvature.gauss_newton has none."
        ),
        Status.ROUNDING: (
            "Rounding in the products with H allows no better. On GPU and TPU wrap the call in "
            'jax.default_matmul_precision("highest"); else raise damping or tolerance.'
        ),
        Status.DIVERGED: (
            "It diverged. For lissa raise scale tenfold, or leave scale=None. If the loss is not "
            "convex in these parameters, damping must exceed the most negative eigenvalue of H; "
            "curvature.gauss_newton has none. For ekfac the factors are too far from H at this "
            "damping: use cg."
        ),
        Status.PRODUCT_NOT_FINITE: (
            "A product with H is NaN or infinite: look for NaN, infinities and huge numbers in the "
            "parameters and training data, for labels that are no classes, and for a loss without "
            "a second derivative there."
        ),
        Status.RHS_NOT_FINITE: (
            "The right-hand side, the gradient of the group's loss, is NaN, infinite or overflows: "
            "look for NaN, infinities and huge numbers in the parameters and the group, and for "
            "labels that are no classes."
        ),
    }[status]


class Loop(NamedTuple):
    """How the iterations of a solver are run: in one `lax.while_loop`, or driven from the host.

    XLA's CPU backend compiles a convolution inside a loop to a kernel some 30 times slower. So
    there, where nothing is traced, each step is one call of a compiled function. `on_host` says
    that products with H are taken on the host already, and steps with them cannot be compiled.
    """

    from_host: bool = False
    on_host: bool = False
    progress: Progress | None = None

    def compiled(self, step: Callable) -> Callable:
        return compiled(step) if self.from_host else step

    def with_products(self, step: Callable) -> Callable:
        """Returns a step that takes products with H, compiled where that is possible."""
        return step if self.on_host else self.compiled(step)

    def while_loop(self, unfinished: Callable, step: Callable, state: Any, report: Callable) -> Any:
        """`report(state) -> (step, residual)` is what `progress` is told."""
        if not self.from_host:
            return lax.while_loop(unfinished, step, state)
        while unfinished(state):
            state = step(state)
            if self.progress is not None:
                index, residual = report(state)
                self.progress(int(index), float(residual))
        return state

    def fori_loop(self, start: Any, end: Any, step: Callable, state: Any) -> Any:
        if not self.from_host:
            return lax.fori_loop(start, end, step, state)
        for index in range(int(start), int(end)):
            state = step(jnp.int32(index), state)
        return state

    def map(self, fn: Callable, xs: jax.Array, batch_size: int) -> Any:
        if not self.from_host:
            return lax.map(fn, xs, batch_size=batch_size)
        several = compiled(jax.vmap(fn))
        parts = [several(xs[i : i + batch_size]) for i in range(0, len(xs), batch_size)]
        return jnp.concatenate(parts)


def choose_loop(
    run: Callable, argument: Any, matvec: LinearMap, progress: Progress | None = None
) -> Loop:
    """Returns the loop for `run(argument, loop)`: from the host on CPU or to show progress."""
    if getattr(matvec, "on_host", False) and not is_traced(argument):
        return Loop(from_host=True, on_host=True, progress=progress)
    wanted = loops.steps_from_host() or progress is not None
    if wanted and not is_traced(argument):
        _, constants = hoist(lambda x: run(x, Loop()), argument)
        if not is_traced(constants):
            return Loop(from_host=True, progress=progress)
    if progress is not None:
        raise ValueError("progress is told from the host: leave it out inside jit, vmap and grad")
    return Loop()


def solve_and_measure(
    matvec: LinearMap,
    rhs: Params,
    damping: Any,
    run: Callable,
    judge: Callable,
    *,
    progress: Progress | None = None,
) -> Solution:
    """Applies a solver's iteration and measures the residual of its answer.

    Args:
      matvec: as for `Solver`.
      rhs: as for `Solver`.
      damping: added to the diagonal.
      run: `run(damped, rhs, loop) -> (x, (num_steps, status, top_eigenvalue))`, where `damped` is
        u -> (H + damping I) u, and `status` what the iteration itself can tell.
      judge: `judge(residual, status) -> status`, for a finite residual.
      progress: as for `Solver`.
    """

    def damped(u):
        return jax.tree.map(lambda h, x: (h + damping * x).astype(x.dtype), matvec(u), u)

    rhs = at_least_float32(_check_not_empty(rhs))
    loop = choose_loop(functools.partial(run, damped), rhs, matvec, progress)
    if loop.from_host:
        damped = loop.with_products(damped)
        value, (num_steps, status, top) = run(damped, rhs, loop)
    else:
        rhs = device_local(rhs, jax.eval_shape(damped, rhs))
        if jax.sharding.get_abstract_mesh().manual_axes:
            solve = _solve_implicitly
        else:
            solve = functools.partial(lax.custom_linear_solve, symmetric=True, has_aux=True)
        traced_run = functools.partial(run, loop=Loop())
        value, (num_steps, status, top) = solve(damped, rhs, traced_run)

    # Evidence is not differentiated: sqrt has no derivative at an exact solution.
    x, v, top = lax.stop_gradient((value, rhs, top))
    size = norm(v)
    bounded = jnp.isfinite(norm(x))
    # Where x is useless, the product with v tells whether H or the solver is to blame.
    probe = jax.tree.map(lambda a, b: jnp.where(bounded, a, b), x, v)
    product = lax.stop_gradient(damped(probe))
    error = norm(jax.tree.map(jnp.subtract, product, v))
    residual = jnp.where(bounded, error / jnp.where(size > 0, size, 1), jnp.nan)
    failure = jnp.where(
        (status == int(Status.INDEFINITE)) | (status == int(Status.ROUNDING)),
        status,
        int(Status.DIVERGED),
    )
    failure = jnp.where(jnp.isfinite(norm(product)), failure, int(Status.PRODUCT_NOT_FINITE))
    failure = jnp.where(jnp.isfinite(size), failure, int(Status.RHS_NOT_FINITE))
    answered = jnp.isfinite(residual) & (status < int(Status.PRODUCT_NOT_FINITE))
    status = jnp.where(
        jnp.isfinite(residual), judge(residual, status), jnp.maximum(failure, 0)
    ).astype(jnp.int32)
    # A finite answer to a question that is NaN, such as x = 0, would give finite scores.
    value = jax.tree.map(lambda a: jnp.where(answered, a, jnp.nan), value)
    given = jnp.broadcast_to(lax.stop_gradient(jnp.asarray(damping, size.dtype)), size.shape)
    return Solution(value, residual, num_steps, status, jnp.asarray(top, size.dtype), given)


def _check_not_empty(rhs):
    if not sum(np.size(leaf) for leaf in jax.tree.leaves(rhs)):
        raise ValueError("the parameters hold no numbers: there is nothing to solve for")
    return rhs


def _solve_implicitly(damped: LinearMap, rhs: Params, run: Callable) -> Any:
    """Does what a symmetric `lax.custom_linear_solve` does, in reverse mode only.

    Inside `shard_map` that function marks all that the matvec closes over as varying over devices,
    contradicting the types under which the matvec was traced. A `custom_vjp` leaves types alone.
    """
    product, product_constants = hoist(damped, rhs)
    solve, solve_constants = hoist(lambda v: run(damped, v), rhs)

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


def judge_noisy(tolerance: float, residual: jax.Array, status: jax.Array) -> jax.Array:
    """Returns the status of a method whose answers have an error of their own, by its residual."""
    del status
    limits = [
        (tolerance, Status.CONVERGED),
        (USABLE_RESIDUAL, Status.NOISY),
        (1.0, Status.OUT_OF_STEPS),
    ]
    status = jnp.full_like(residual, int(Status.DIVERGED), jnp.int32)
    for limit, reached in reversed(limits):
        status = jnp.where(residual <= limit, int(reached), status)
    return status


def rounding(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).eps) ** 0.5
