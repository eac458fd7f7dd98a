"""Feature collision (Shafahi et al., arXiv 1804.00792): each poison meets the target by itself."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpoison.attacks import transfer
from jaxpoison.attacks.base import TargetedAttack, check_above_zero
from jaxpoison.attacks.descent import projection
from jaxpoison.attacks.transfer import ONCE, Draws, View
from jaxpoison.core.settings import check_range


def feature_collision(
    *,
    epsilon: float,
    num_steps: int = 120,
    step: float = 0.1,
    shrink: float = 0.2,
    watermark: float = 0.3,
    similarity: float = 0.0,
    draws: Draws = ONCE,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns the attack in which each poison by itself collides with the target.

    Gradient descent on sum_m |f_m(x_j) - f_m(x^t)|^2 (+ `similarity` |x_j - x_j^b|^2, whose step
    is implicit), from a blend of base and target. The defaults are those of the benchmark of
    Schwarzschild et al. (arXiv 2006.12557), except for the first step, which is 1e-3 there and
    too short for a narrow ResNet. Unlike there, a step that raises the objective is undone before
    the step is shortened, and every poison has a step size of its own.

    Args:
      epsilon: budget, in units of [0, 1].
      num_steps: S, gradients of each poison.
      step: size of the first steps, as a factor of the gradient in units of pixels in [0, 1]. It
        has to suit the extractor; where poisons hardly move, the objective in the result shows it.
      shrink: factor of the step after it raised the objective, in (0, 1).
      watermark: share of the target in the blend at the start, in [0, 1).
      similarity: weight of the distance to the base; Shafahi et al. set 0.25 (d / pixels)^2 in
        place of a budget.
      draws: random versions of the poisons.
      batch_size: poisons crafted at once, in whole trials and at least one.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    method = FeatureCollision(
        epsilon=epsilon, num_steps=num_steps, step=step, shrink=shrink, watermark=watermark,
        similarity=similarity, draws=draws, batch_size=batch_size,
    )  # fmt: skip
    return transfer.attack("feature_collision", method)


def collision(views: Sequence[View]) -> jax.Array:
    """Returns sum_m |f_m(x_j) - f_m(x^t)|^2 for each poison j, [P]."""
    return functools.reduce(
        jnp.add, [jnp.sum((v.features - v.target) ** 2, axis=-1) for v in views]
    )


class Cautious(NamedTuple):
    """The best of each poison so far, where to go from there, and how far.

    Attributes:
      poisons: [P, H, W, C].
      values: [P], their objective.
      gradient: [P, H, W, C].
      step: [P].
    """

    poisons: jax.Array
    values: jax.Array
    gradient: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureCollision(transfer.Method):
    """See `feature_collision`; gradient descent in which no poison stays where its value rose."""

    step: float
    shrink: float
    watermark: float
    similarity: float

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "similarity", 0)
        check_above_zero(self, "step")
        for name in ("watermark", "shrink"):
            check_range(self, name, 0)
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")

    def start(self, key, bases, target):
        return (1 - self.watermark) * bases + self.watermark * target

    def objective(self, views, memory):
        return collision(views), memory

    def init(self, poisons, num_substitutes):
        infinite = jnp.full(len(poisons), jnp.inf, poisons.dtype)
        steps = jnp.full(len(poisons), self.step, poisons.dtype)
        # Copies, since the loop donates its carry.
        return Cautious(jnp.array(poisons), infinite, jnp.zeros_like(poisons), steps)

    def update(self, state, poisons, values, gradient, bases, pixel_scale, num_substitutes):
        values = values + self.similarity * jnp.sum((poisons - bases) ** 2, axis=(1, 2, 3))
        fell = values <= state.values
        across = fell[:, None, None, None]
        state = Cautious(
            jnp.where(across, poisons, state.poisons),
            jnp.where(fell, values, state.values),
            jnp.where(across, gradient, state.gradient),
            jnp.where(fell, state.step, self.shrink * state.step),
        )
        size = state.step[:, None, None, None]
        forward = state.poisons - size * state.gradient
        # The distance to the base is descended implicitly: forward-backward splitting.
        weight = 2 * size * self.similarity
        moved = (forward + weight * bases) / (1 + weight)
        return state, projection(bases, self.epsilon)(moved)

    def result(self, state, poisons):
        return state.poisons  # the last move has not been judged, and is left out
