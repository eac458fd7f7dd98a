"""Bullseye polytope (Aghakhani et al., arXiv 2005.00191): their mean meets the target."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpoison.attacks import transfer
from jaxpoison.attacks.base import TargetedAttack
from jaxpoison.attacks.transfer import ONCE, Draws, View


def bullseye_polytope(
    *,
    epsilon: float,
    num_steps: int = 1200,
    learning_rate: float = 0.04,
    squared: bool = False,
    draws: Draws = ONCE,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns the attack that puts the target at the mean of the poisons' features.

    Adam from the base images; see `bullseye`. Several views of a target are attacked at the mean of
    their features (the authors' multi-target mode).

    Args:
      epsilon: budget, in units of [0, 1]; the authors' is 0.1.
      num_steps: S. The authors' script for transfer takes 800, their default is 4,000.
      learning_rate: Adam's, in units of the first substitute's normalized pixels.
      squared: as for `bullseye`.
      draws: random versions of the poisons.
      batch_size: poisons crafted at once, in whole trials and at least one.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    method = BullseyePolytope(
        epsilon=epsilon, num_steps=num_steps, learning_rate=learning_rate, squared=squared,
        draws=draws, batch_size=batch_size,
    )  # fmt: skip
    return transfer.attack("bullseye_polytope", method)


def bullseye(views: Sequence[View], *, squared: bool = False) -> jax.Array:
    """Returns the mean over m of |f_m(x^t) - mean_j f_m(x_j)| / |f_m(x^t)|, [].

    Args:
      views: one for each substitute m.
      squared: half the squared ratio, as the paper writes, and not the authors' code.
    """
    gaps = jnp.stack(
        [relative_gap(v.target - jnp.mean(v.features, axis=0), v.target) for v in views]
    )
    return jnp.mean(gaps**2 / 2 if squared else gaps)


def relative_gap(gap: jax.Array, target: jax.Array) -> jax.Array:
    """Returns |gap| / |target| for vectors [d], [], with a gradient where the gap is zero."""
    # The norm of nothing has no gradient: 0/0 would spread NaN through a trial that has arrived.
    return jnp.sqrt(jnp.sum(gap**2) + 1e-20) / jnp.maximum(jnp.linalg.norm(target), 1e-10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BullseyePolytope(transfer.AdaptiveMethod):
    """See `bullseye_polytope`."""

    squared: bool

    def objective(self, views, memory):
        return bullseye(views, squared=self.squared), memory
