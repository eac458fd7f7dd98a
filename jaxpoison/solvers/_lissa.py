"""LiSSA (Agarwal et al. 2016, arXiv:1602.03943): a Neumann series over random mini-batches.

As used by Koh & Liang 2017 (arXiv:1703.04730) and HINT (arXiv:2309.08549).
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpoison.core.checks import check_count, check_positive
from jaxpoison.core.trees import add_scaled, norm
from jaxpoison.solvers._spectrum import power_iteration
from jaxpoison.solvers.base import Solver, solve_and_measure

STEPS_PER_CHECK = 25  # between looks at whether the recursion has diverged or come to rest
EXPLODED = 1e3  # times ||v|| / damping, above which no solution of a definite system lies


def lissa(
    *,
    damping: float,
    scale: float | None = None,
    num_steps: int = 1000,
    batch_size: int | None = 64,
    num_repeats: int = 1,
    stagnation: float = 1e-5,
    tolerance: float = 0.5,
) -> Solver:
    """Returns LiSSA, a Neumann series with a fresh mini-batch at each step.

        h_0 = v / scale,    h_{t+1} = h_t + (v - (H_B + damping I) h_t) / scale

    The answer is the mean of `num_repeats` such h. It converges when 0 < damping + lambda < 2 scale
    for every eigenvalue lambda of the mini-batch Hessians, by a factor of 1 - (damping + lambda) /
    scale a step: `num_steps` should be several times scale / damping.

    Koh & Liang's update, also used by HINT's authors, puts its `damp` after the division by
    `scale`: theirs solves with damping = damp * scale. See `lissa_from_authors`.

    Args:
      damping: added to the diagonal, in the units of H; positive.
      scale: in the units of H. None: 1.25 (damping + the largest eigenvalue found by power
        iteration in four random mini-batches). The mean of those eigenvalues is at least that of
        H, and it is the mini-batches that the recursion must survive.
      num_steps: the most steps to take. Fewer are taken once h has exploded, which leaves
        `converged` False, or stagnates.
      batch_size: examples drawn at each step, with replacement (on each device, where `axis_name`
        is given). None: all examples at every step.
      num_repeats: independent runs to average, computed side by side.
      stagnation: stop once the mean of h over 25 steps is within this, relatively, of the mean
        over the 25 before: on full batches the limit is reached. Mini-batches keep h moving, and
        all `num_steps` are taken. 0: never stop for this.
      tolerance: `converged` is set when the residual is finite and at most this. The residual has
        a floor from the mini-batches, so the default only tells an answer from nonsense.
    """
    check_positive(damping=damping, tolerance=tolerance)
    if scale is not None:
        check_positive(scale=scale)
    check_count(num_steps=num_steps, num_repeats=num_repeats)
    if batch_size is not None:
        check_count(batch_size=batch_size)

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
            def advance(h, step_key):
                hvp = damped(h)
                if batch_size is not None:
                    hvp = add_scaled(draw(step_key)(h), damping, h)
                error = jax.tree.map(jnp.subtract, v, hvp)
                return add_scaled(h, 1.0 / divisor, error)

            def step(index, state):
                h, total = state
                keys = jax.random.split(jax.random.fold_in(run_key, index), num_repeats)
                h = jax.vmap(advance)(h, keys)
                return h, add_scaled(total, 1.0, h)

            def unfinished(state):
                _, _, index, going = state
                return going & (index < num_steps)

            def advance_and_check(state):
                h, mean, index, _ = state
                end = jnp.minimum(index + STEPS_PER_CHECK, num_steps)
                zeros = jax.tree.map(jnp.zeros_like, h)
                h, total = lax.fori_loop(index, end, step, (h, zeros))
                mean_now = jax.tree.map(lambda x: (x / (end - index)).astype(x.dtype), total)
                moved = norm(jax.tree.map(jnp.subtract, mean_now, mean))
                size = norm(mean_now)
                # Both comparisons are False for NaN.
                going = (size < limit) & ~(moved < stagnation * size)
                return h, mean_now, end, going

            def repeated(x):
                return jnp.broadcast_to((x / divisor).astype(x.dtype), (num_repeats, *x.shape))

            start = jax.tree.map(repeated, v)
            limit = EXPLODED * norm(start) * divisor / damping
            h, _, taken, _ = lax.while_loop(
                unfinished,
                advance_and_check,
                (start, start, jnp.zeros_like(limit, jnp.int32), limit >= 0),
            )
            x = jax.tree.map(lambda x: jnp.mean(x, axis=0), h)
            return x, (taken, jnp.ones_like(taken, bool))

        solution = solve_and_measure(matvec, rhs, damping, run)
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
    check_positive(damp=damp, scale=scale)
    return lissa(
        damping=damp * scale,
        scale=scale,
        num_steps=num_steps,
        batch_size=batch_size,
        num_repeats=num_repeats,
        stagnation=0.0,
        tolerance=tolerance,
    )
