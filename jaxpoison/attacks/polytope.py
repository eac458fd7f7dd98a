"""Convex polytope (Zhu et al., arXiv 1905.05897): the poisons' convex hull holds the target."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpoison.attacks import transfer
from jaxpoison.attacks.base import TargetedAttack, check_above_zero
from jaxpoison.attacks.bullseye import relative_gap
from jaxpoison.attacks.transfer import ONCE, Draws, View


def convex_polytope(
    *,
    epsilon: float,
    num_steps: int = 1200,
    learning_rate: float = 0.04,
    tolerance: float = 1e-6,
    draws: Draws = ONCE,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns the attack that puts the target into the convex hull of the poisons' features.

    Every step fits the coefficients of each substitute, from those of the step before, and then
    moves the poisons by Adam, from the base images.

    Args:
      epsilon: budget, in units of [0, 1]; the authors' is 0.1.
      num_steps: S; the authors' is 4,000.
      learning_rate: Adam's, in units of the first substitute's normalized pixels.
      tolerance: of the coefficients, see `simplex_least_squares`.
      draws: random versions of the poisons.
      batch_size: poisons crafted at once, in whole trials and at least one.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    method = ConvexPolytope(
        epsilon=epsilon, num_steps=num_steps, learning_rate=learning_rate, tolerance=tolerance,
        draws=draws, batch_size=batch_size,
    )  # fmt: skip
    return transfer.attack("convex_polytope", method)


def polytope(views: Sequence[View], coefficients: Sequence[jax.Array]) -> jax.Array:
    """Returns the mean over m of |f_m(x^t) - sum_j c_mj f_m(x_j)|^2 / (2 |f_m(x^t)|^2), [].

    Args:
      views: one for each substitute m.
      coefficients: c_m [P], in the simplex; `simplex_least_squares` fits them.
    """
    gaps = [
        relative_gap(v.target - c @ v.features, v.target)
        for v, c in zip(views, coefficients, strict=True)
    ]
    return jnp.mean(jnp.stack(gaps) ** 2 / 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvexPolytope(transfer.AdaptiveMethod):
    """See `convex_polytope`; its memory is the coefficients of each substitute."""

    tolerance: float

    def __post_init__(self):
        super().__post_init__()
        check_above_zero(self, "tolerance")

    def memory(self, num_poisons, num_substitutes, dtype):
        return tuple(jnp.full(num_poisons, 1 / num_poisons, dtype) for _ in range(num_substitutes))

    def objective(self, views, memory):
        fitted = tuple(
            simplex_least_squares(
                jax.lax.stop_gradient(v.features), v.target, c, tolerance=self.tolerance
            )
            for v, c in zip(views, memory, strict=True)
        )
        return polytope(views, fitted), fitted


def simplex_least_squares(
    features: jax.Array,
    target: jax.Array,
    start: jax.Array,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 500,
) -> jax.Array:
    """Returns the c >= 0 with sum 1 that minimizes |target - c @ features|^2, [P].

    Accelerated projected gradient descent, restarted where it would rise (Beck and Teboulle 2009;
    O'Donoghue and Candes 2015), until a step moves c by less than `tolerance` of its length.

    Args:
      features: float32 or float64 [P, d].
      target: [d], of the same type.
      start: [P], in the simplex; that of a nearby problem saves steps.
      tolerance: see above.
      max_steps: where to stop at the latest.
    """
    dtype = jnp.result_type(features, target)
    gram, linear = features @ features.T, features @ target
    # No eigenvalue exceeds the largest absolute row sum. The features of networks that end in ReLU
    # are non-negative, and for them the bound is nearly the largest eigenvalue itself.
    size = 1 / jnp.maximum(jnp.max(jnp.sum(jnp.abs(gram), axis=1)), 1e-30)

    def unfinished(state):
        _, _, _, moved, step = state
        return (moved > tolerance) & (step < max_steps)

    def advance(state):
        c, ahead, momentum, _, step = state
        new = project_to_simplex(ahead - size * (gram @ ahead - linear))
        rising = jnp.vdot(ahead - new, new - c) > 0
        next_momentum = jnp.where(rising, 1.0, (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2)
        pace = jnp.where(rising, 0.0, (momentum - 1) / next_momentum)
        moved = jnp.linalg.norm(new - c) / jnp.linalg.norm(c)
        return new, new + pace * (new - c), next_momentum, moved, step + 1

    start = jnp.asarray(start, dtype)
    begin = (
        start, start, jnp.ones((), dtype), jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32)
    )  # fmt: skip
    return jax.lax.while_loop(unfinished, advance, begin)[0]


def project_to_simplex(point: jax.Array) -> jax.Array:
    """Returns the nearest point with non-negative entries of sum 1 (Duchi et al. 2008), [P]."""
    largest_first = -jnp.sort(-point)
    excess = jnp.cumsum(largest_first) - 1
    count = jnp.arange(1, len(point) + 1, dtype=jnp.int32)
    support = jnp.sum(largest_first * count > excess, dtype=jnp.int32)
    return jnp.maximum(point - excess[support - 1] / support, 0)
