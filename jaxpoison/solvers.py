"""Inverse-curvature-vector products: x with (H + damping I) x = v, knowing only u -> H u.

`v` and `x` are pytrees shaped like the parameters; `damping` > 0 is in the units of H. Each
factory below returns a solver `(matvec, rhs, *, sample=None, key=None) -> Solution`. Inside `jit`
a solver cannot raise, so it returns evidence with its answer; `require_converged` turns that into
an error on the host. All may be differentiated, by the implicit function theorem: a derivative is
one more solve with the same solver, not a walk back through the iterations.

`cg` follows Hestenes & Stiefel 1952. `lissa` follows Agarwal et al. 2016 (arXiv:1602.03943), as
used by Koh & Liang 2017 (arXiv:1703.04730) and HINT (arXiv:2309.08549).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.flatten_util import ravel_pytree

from jaxpoison.curvature import LinearMap, Params, at_least_float32, device_local

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
    _check_positive(damping=damping, tolerance=tolerance)
    _check_count(max_steps=max_steps)
    precondition = preconditioner or (lambda r: r)

    def run(damped, rhs):
        target = tolerance * _norm(rhs)

        def unfinished(state):
            _, r, _, _, step, definite = state
            return (_norm(r) > target) & (step < max_steps) & definite

        def advance(state):
            x, r, p, rz, step, _ = state
            q = damped(p)
            curvature = _dot(p, q)
            definite = curvature > 0
            alpha = jnp.where(definite, rz / curvature, 0.0)
            x = _add_scaled(x, alpha, p)
            r = _add_scaled(r, -alpha, q)
            z = precondition(r)
            rz_next = _dot(r, z)
            return x, r, _add_scaled(z, rz_next / rz, p), rz_next, step + 1, definite

        z = precondition(rhs)
        start = (
            jax.tree.map(jnp.zeros_like, rhs),
            rhs,
            z,
            _dot(rhs, z),
            jnp.zeros_like(target, jnp.int32),
            jnp.ones_like(target, bool),
        )
        x, r, _, _, num_steps, definite = lax.while_loop(unfinished, advance, start)
        return x, (num_steps, definite & (_norm(r) <= target))

    def solver(matvec, rhs, *, sample=None, key=None):
        del sample, key
        solution = _solve(matvec, rhs, damping, run)
        limit = jnp.maximum(tolerance, _rounding(solution.residual))
        return solution._replace(converged=solution.converged & (solution.residual <= limit))

    return solver


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
    _check_positive(damping=damping)
    _check_count(max_size=max_size, rows_at_once=rows_at_once)

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
        solution = _solve(matvec, rhs, damping, run)
        accurate = solution.residual <= _rounding(solution.residual)
        return solution._replace(converged=solution.converged & accurate)

    return solver


def identity() -> Solver:
    """Returns the solver that takes v for x: scores become gradient dot products (TracIn-like).

    The ablation of the inverse Hessian. It solves no system: `residual` is NaN, `converged` True.
    """

    def solver(matvec, rhs, *, sample=None, key=None):
        del matvec, sample, key
        nan = jnp.full((), jnp.nan)
        return Solution(at_least_float32(rhs), nan, jnp.zeros((), jnp.int32), jnp.bool_(True), nan)

    return solver


def lissa(
    *,
    damping: float,
    scale: float | None = None,
    num_steps: int = 1000,
    batch_size: int | None = 64,
    num_repeats: int = 1,
    tolerance: float = 0.5,
) -> Solver:
    """Returns LiSSA, a Neumann series with a fresh mini-batch at each step.

        h_0 = v / scale,    h_{t+1} = h_t + (v - (H_B + damping I) h_t) / scale

    A run is the mean of `num_repeats` such h. It converges when 0 < damping + lambda < 2 scale for
    every eigenvalue lambda of the mini-batch Hessians, by a factor of 1 - (damping + lambda) /
    scale a step: `num_steps` should be several times scale / damping.

    Koh & Liang's update, also used by HINT's authors, puts its `damp` after the division by
    `scale`: theirs solves with damping = damp * scale. See `lissa_from_authors`.

    Args:
      damping: added to the diagonal, in the units of H; positive.
      scale: in the units of H. None: 1.25 (damping + the largest eigenvalue found by power
        iteration in four random mini-batches). The mean of those eigenvalues is at least that of
        H, and it is the mini-batches that the recursion must survive.
      num_steps: length T of the recursion.
      batch_size: examples drawn at each step, with replacement (on each device, where `axis_name`
        is given). None: all examples at every step.
      num_repeats: independent runs to average, computed side by side.
      tolerance: `converged` is set when the residual is finite and at most this. The residual has
        a floor from the mini-batches, so the default only tells an answer from nonsense.
    """
    _check_positive(damping=damping, tolerance=tolerance)
    if scale is not None:
        _check_positive(scale=scale)
    _check_count(num_steps=num_steps, num_repeats=num_repeats)
    if batch_size is not None:
        _check_count(batch_size=batch_size)

    def solver(matvec, rhs, *, sample=None, key=None):
        if batch_size is not None and sample is None:
            raise ValueError(
                "lissa(batch_size=...) needs products with mini-batches, which "
                "influence.group_ihvp supplies; for a bare matvec choose batch_size=None"
            )
        if key is None:
            if batch_size is not None or scale is None:
                raise ValueError("lissa is random: pass a PRNG key, as in key=jax.random.key(0)")
            key = jax.random.key(0)  # full batch at a given scale: nothing is drawn
        scale_key, run_key = jax.random.split(key)

        def mean_hessian(step_key):
            del step_key
            return matvec

        draw, num_draws = mean_hessian, 1
        if sample is not None and batch_size is not None:
            draw, num_draws = (lambda step_key: sample(step_key, batch_size)), 4

        divisor, top = scale, jnp.full((), jnp.nan)
        if divisor is None:

            def largest(draw_key):
                batch_key, start_key = jax.random.split(draw_key)
                return power_iteration(draw(batch_key), rhs, start_key)

            top = jnp.max(jax.vmap(largest)(jax.random.split(scale_key, num_draws)))
            divisor = 1.25 * (damping + top)

        def run(damped, v):
            def recur(repeat_key):
                def step(h, step_key):
                    hvp = damped(h)
                    if batch_size is not None:
                        hvp = _add_scaled(draw(step_key)(h), damping, h)
                    error = jax.tree.map(jnp.subtract, v, hvp)
                    return _add_scaled(h, 1.0 / divisor, error), None

                start = jax.tree.map(lambda x: (x / divisor).astype(x.dtype), v)
                return lax.scan(step, start, jax.random.split(repeat_key, num_steps))[0]

            runs = jax.vmap(recur)(jax.random.split(run_key, num_repeats))
            return jax.tree.map(lambda x: jnp.mean(x, axis=0), runs), (
                jnp.full((), num_steps, jnp.int32),
                jnp.bool_(True),
            )

        solution = _solve(matvec, rhs, damping, run)
        # False for NaN as well.
        return solution._replace(converged=solution.residual <= tolerance, top_eigenvalue=top)

    return solver


def lissa_from_authors(
    *,
    damp: float = 0.01,
    scale: float = 50.0,
    num_steps: int = 980,
    batch_size: int | None = 50,
    num_repeats: int = 1,
    tolerance: float = 0.5,
) -> Solver:
    """Returns LiSSA in the parameters of Koh & Liang's and HINT's code; defaults are HINT's.

    Their u_{t+1} = v + (1 - damp) u_t - H u_t / scale, answer u / scale, tends to
    (H + damp * scale * I)^-1 v: `lissa(damping=damp * scale, scale=scale)`, step by step the same.
    With HINT's values the damping is 0.5, not 0.01.
    """
    _check_positive(damp=damp, scale=scale)
    return lissa(
        damping=damp * scale,
        scale=scale,
        num_steps=num_steps,
        batch_size=batch_size,
        num_repeats=num_repeats,
        tolerance=tolerance,
    )


def power_iteration(
    matvec: LinearMap, like: Params, key: jax.Array, num_steps: int = 20
) -> jax.Array:
    """Returns an estimate of max |lambda| of a symmetric `matvec`, from below, shape ().

    It is ||H u|| for the unit vector u reached after `num_steps` products, never above the truth
    and not below the Rayleigh quotient. Not differentiated through.

    Args:
      matvec: u -> H u, linear and symmetric.
      like: pytree with the shapes and dtypes of u.
      key: PRNG key of the start vector.
      num_steps: products with H; at least 1.
    """
    _check_count(num_steps=num_steps)
    leaves, treedef = jax.tree.flatten(at_least_float32(like))
    keys = jax.random.split(key, len(leaves))
    start = treedef.unflatten(
        [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )

    def normalise(u):
        norm = _norm(u)
        inverse = jnp.where(norm > 0, 1.0 / norm, 0.0)
        return jax.tree.map(lambda x: (inverse * x).astype(x.dtype), u), norm

    def step(_, state):
        return normalise(matvec(state[0]))

    # The first product stands outside the loop: it settles over which devices the state varies.
    state = step(0, normalise(start))
    return lax.stop_gradient(lax.fori_loop(1, num_steps, step, state)[1])


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


def _solve(matvec: LinearMap, rhs: Params, damping: float, run: Callable) -> Solution:
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
    error = _norm(jax.tree.map(jnp.subtract, lax.stop_gradient(damped(x)), v))
    norm = _norm(v)
    residual = jnp.where(norm > 0, error / norm, error)
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


def _dot(x: Params, y: Params) -> jax.Array:
    # Full precision: the default on accelerators rounds the factors to 8 or 11 bits.
    parts = jax.tree.map(lambda a, b: jnp.vdot(a, b, precision=lax.Precision.HIGHEST), x, y)
    return jnp.asarray(sum(jax.tree.leaves(parts)))


def _norm(x: Params) -> jax.Array:
    return jnp.sqrt(_dot(x, x))


def _add_scaled(x: Params, scale: Any, y: Params) -> Params:
    return jax.tree.map(lambda a, b: (a + scale * b).astype(a.dtype), x, y)


def _rounding(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).eps) ** 0.5


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        # Traced values (a damping to differentiate by) cannot be looked at.
        if not isinstance(value, core.Tracer) and not np.all(np.asarray(value) > 0):
            raise ValueError(f"{name} must be positive, got {value}")


def _check_count(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
