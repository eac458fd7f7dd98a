"""Attacks on a frozen extractor as the toolkit of Geiping et al. (arXiv 2009.02276) crafts them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpoison.attacks import transfer
from jaxpoison.attacks.base import TargetedAttack
from jaxpoison.attacks.descent import normal_start, signed_adam
from jaxpoison.attacks.transfer import AUGMENTED, Draws, View
from jaxpoison.core.settings import check_range


def bp_toolkit(
    *,
    epsilon: float,
    num_steps: int = 4000,
    learning_rate: float = 0.1,
    restarts: int = 8,
    draws: Draws = AUGMENTED,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns bullseye polytope as HINT's authors ran it, with the toolkit of Geiping et al.

    Signed Adam on `mean_collision`; arguments as of `head_gradient_matching`. For a target of one
    view it is `fc_toolkit` with four times the steps.
    """
    method = MeanCollision(
        epsilon=epsilon, num_steps=num_steps, learning_rate=learning_rate, restarts=restarts,
        draws=draws, batch_size=batch_size,
    )  # fmt: skip
    return transfer.attack("bp_toolkit", method)


def fc_toolkit(
    *,
    epsilon: float,
    num_steps: int = 1000,
    learning_rate: float = 0.1,
    restarts: int = 8,
    draws: Draws = AUGMENTED,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns feature collision as HINT's authors ran it: see `bp_toolkit`."""
    method = MeanCollision(
        epsilon=epsilon, num_steps=num_steps, learning_rate=learning_rate, restarts=restarts,
        draws=draws, batch_size=batch_size,
    )  # fmt: skip
    return transfer.attack("fc_toolkit", method)


def mean_collision(views: Sequence[View]) -> jax.Array:
    """Returns the mean over m and over the d features of (mean_j f_m(x_j) - f_m(x^t))^2, [].

    The toolkit minimizes this whether it is asked for bullseye polytope or for feature collision:
    with one target the two are the same.
    """
    return jnp.mean(
        jnp.stack([jnp.mean((jnp.mean(v.features, axis=0) - v.target) ** 2) for v in views])
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolkitMethod(transfer.AdaptiveMethod):
    """Signed Adam from random noise, the best of several starts.

    Attributes:
      restarts: random starts, of which each trial keeps the one with the lowest last objective.
    """

    restarts: int

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "restarts", 1, whole=True)

    def start(self, key, bases, target):
        return normal_start(key, bases, self.epsilon)

    def optimizer(self, num_substitutes):
        return signed_adam(self.learning_rate / num_substitutes, self.num_steps)


class MeanCollision(ToolkitMethod):
    """See `bp_toolkit` and `fc_toolkit`."""

    def objective(self, views, memory):
        return mean_collision(views), memory
