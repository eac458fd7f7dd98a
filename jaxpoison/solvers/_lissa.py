"""LiSSA (Agarwal et al. 2016, arXiv:1602.03943): a Neumann series over random mini-batches.

    h_0 = v / scale,    h_{t+1} = h_t + (v - (H_B + damping I) h_t) / scale

As used by Koh & Liang 2017 (arXiv:1703.04730) and HINT (arXiv:2309.08549). It converges when
0 < damping + lambda < 2 scale for every eigenvalue lambda of the mini-batch Hessians, by a factor
of 1 - (damping + lambda) / scale a step. Koh & Liang's update, also used by HINT's authors, puts
its `damp` after the division by `scale`: theirs solves with damping = damp * scale.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.core.checks import check_count, check_positive, number
from jaxpoison.core.trees import add_scaled, norm
from jaxpoison.solvers._spectrum import top_eigenvalue
from jaxpoison.solvers.base import NOT_MEASURED, Solver, Status, judge_noisy, solve_and_measure

STEPS_PER_CHECK = 25  # between looks at whether the recursion has diverged or come to rest
EXPLODED = 1e3  # times ||v|| / damping, above which no solution of a definite system lies
DRAWS = 4  # mini-batches whose largest eigenvalue the scale is found by


def lissa(
    *,
    damping: float,
    scale: float | None = None,
    num_steps: int = 1000,
    batch_size: int | None = 64,
    num_repeats: int = 1,
    stagnation: float = 1e-5,
    tolerance: float = 0.01,
) -> Solver:
    """Returns LiSSA, a Neumann series with a fresh mini-batch at each step.

    Args:
      damping: added to the diagonal, in the units of H; positive.
      scale: in the units of H. None: 1.25 (damping + the largest eigenvalue that power iteration
        finds in four random mini-batches), for it is those that the recursion must survive.
      num_steps: the most steps, several times scale / damping. Fewer are taken once h has exploded
        or stagnates.
      batch_size: examples drawn at each step, with replacement (on each device, where `axis_name`
        is given). None: all examples at every step.
      num_repeats: independent runs to average, computed side by side.
      stagnation: stop once the mean of h over 25 steps is within this, relatively, of the mean
        over the 25 before: on full batches the limit is reached. Mini-batches keep h moving, and
        all `num_steps` are taken. 0: never stop for this.
      tolerance: it converges if the residual is at most this. The mini-batches put a floor under
        the residual: above this, and up to 0.5, the answer is noisy but usable.
    """
    scale = None if scale is None else number(scale)
    damping, stagnation, tolerance = map(number, (damping, stagnation, tolerance))
    return _Lissa(damping, scale, num_steps, batch_size, num_repeats, stagnation, tolerance)


def lissa_from_authors(
    *,
    damp: float = 0.01,
    scale: float = 50.0,
    num_steps: int = 980,
    batch_size: int | None = 50,
    num_repeats: int = 1,
    tolerance: float = 0.01,
) -> Solver:
    """Returns LiSSA in the parameters of Koh & Liang's and HINT's code; defaults are HINT's.

    Their u_{t+1} = v + (1 - damp) u_t - H u_t / scale, answer u / scale, tends to
    (H + damp * scale * I)^-1 v: `lissa(damping=damp * scale, scale=scale)`, step by step the same.
    With HINT's values the damping is 0.5, not 0.01.
    """
    check_positive(damp=damp, scale=scale)
    return lissa(
        damping=number(damp) * number(scale),
        scale=scale,
        num_steps=num_steps,
        batch_size=batch_size,
        num_repeats=num_repeats,
        stagnation=0.0,
        tolerance=tolerance,
    )


@dataclasses.dataclass(frozen=True)
class _Lissa:
    damping: Any
    scale: Any
    num_steps: int
    batch_size: int | None
    num_repeats: int
    stagnation: Any
    tolerance: Any

    def __post_init__(self):
        check_positive(damping=self.damping, tolerance=self.tolerance)
        if self.scale is not None:
            check_positive(scale=self.scale)
        check_count(num_steps=self.num_steps, num_repeats=self.num_repeats)
        if self.batch_size is not None:
            check_count(batch_size=self.batch_size)

    def __call__(self, matvec, rhs, *, sample=None, key=None, progress=None):
        if self.batch_size is not None and sample is None:
            raise ValueError(
                "lissa(batch_size=...) needs products with mini-batches, which "
                "influence.group_ihvp supplies; for a bare matvec choose batch_size=None"
            )
        if key is None:
            if self.batch_size is not None or self.scale is None:
                raise ValueError("lissa is random: pass a PRNG key, as in key=jax.random.key(0)")
            key = jax.random.key(0)  # full batch at a given scale: nothing is drawn
        draw = None
        if sample is not None and self.batch_size is not None:
            draw = functools.partial(_draw, sample, self.batch_size)
        run = functools.partial(_run, self, matvec, draw, key)
        judge = functools.partial(judge_noisy, self.tolerance)
        return solve_and_measure(matvec, rhs, self.damping, run, judge, progress=progress)


def _draw(sample, batch_size, key):
    return sample(key, batch_size)


def _run(config, matvec, draw, key, damped, v, loop):
    """Runs the recursion; `draw(key) -> (u -> H_B u)`, or None for the whole of H."""
    scale_key, run_key = jax.random.split(key)
    divisor, top = config.scale, jnp.full_like(norm(v), NOT_MEASURED)
    if divisor is None:
        top = _largest_eigenvalue(draw or (lambda key: matvec), v, scale_key, draw is None, loop)
        divisor = 1.25 * (config.damping + top)

    def advance(h, step_key):
        hvp = damped(h) if draw is None else add_scaled(draw(step_key)(h), config.damping, h)
        error = jax.tree.map(jnp.subtract, v, hvp)
        return add_scaled(h, 1.0 / divisor, error)

    def step(index, state):
        h, total = state
        keys = jax.random.split(jax.random.fold_in(run_key, index), config.num_repeats)
        h = jax.vmap(advance)(h, keys)
        return h, add_scaled(total, 1.0, h)

    def repeated(x):
        return jnp.broadcast_to((x / divisor).astype(x.dtype), (config.num_repeats, *x.shape))

    step = loop.compiled(step)
    start = jax.tree.map(repeated, v)
    limit = EXPLODED * norm(start) * divisor / config.damping

    def unfinished(state):
        _, _, index, going, _ = state
        return going & (index < config.num_steps)

    def advance_and_check(state):
        h, mean, index, _, _ = state
        end = jnp.minimum(index + STEPS_PER_CHECK, config.num_steps)
        zeros = jax.tree.map(jnp.zeros_like, h)
        h, total = loop.fori_loop(index, end, step, (h, zeros))
        mean_now = jax.tree.map(lambda x: (x / (end - index)).astype(x.dtype), total)
        moved = norm(jax.tree.map(jnp.subtract, mean_now, mean))
        size = norm(mean_now)
        # Both comparisons are False for NaN.
        going = (size < limit) & ~(moved < config.stagnation * size)
        return h, mean_now, end, going, moved / jnp.where(size > 0, size, 1)

    def report(state):
        return state[2], state[4]

    taken = jnp.zeros_like(limit, jnp.int32)
    state = start, start, taken, limit >= 0, jnp.zeros_like(limit)
    h, _, taken, _, _ = loop.while_loop(unfinished, advance_and_check, state, report)
    x = jax.tree.map(lambda x: jnp.mean(x, axis=0), h)
    return x, (taken, jnp.full_like(taken, int(Status.DIVERGED)), top)


def _largest_eigenvalue(draw, like, key, whole, loop):
    """Returns the largest |eigenvalue| of `DRAWS` mini-batches, or of the whole H."""

    keys = jax.vmap(jax.random.split)(jax.random.split(key, 1 if whole else DRAWS))
    multiply = loop.compiled(lambda batch_key, u: draw(batch_key)(u))

    def largest(batch_key, start_key):
        product = functools.partial(multiply, batch_key) if loop.from_host else draw(batch_key)
        return top_eigenvalue(product, like, start_key, 20, loop._replace(on_host=True))

    if loop.from_host:
        return jnp.max(jnp.stack([largest(*pair) for pair in keys]))
    return jnp.max(jax.vmap(lambda pair: largest(*pair))(keys))
