"""The contract of a curvature."""

from typing import Protocol

import jax

from jaxpoison.core.batches import Batch
from jaxpoison.core.trees import LinearMap, Params


class Curvature(Protocol):
    """Linearizes at `params` and returns `u -> sum_i weights_i C_i u`.

    `weights` is a scalar or has shape `[B]`. What does not depend on `u` should be computed before
    returning, so that a solver pays for it once.
    """

    def __call__(self, params: Params, batch: Batch, weights: jax.Array, /) -> LinearMap: ...
