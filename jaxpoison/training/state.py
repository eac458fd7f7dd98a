"""What changes from step to step of training."""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxpoison.models import Classifier


class TrainState(NamedTuple):
    """Weights and optimiser.

    Attributes:
      step: finished steps, int32, shape ().
      params: `{"body": ..., "head": {"kernel": [d,K], "bias": [K]}}`.
      batch_stats: running means and variances of the BatchNorm layers.
      opt_state: state of the optax optimiser.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    model: Classifier,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, ...],
) -> TrainState:
    """Returns the state before the first step, for images of shape (H, W, C)."""

    return _init(key, cast(Hashable, model), optimizer, image_shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _init(key, model, optimizer, image_shape):
    variables = model.init(key, jnp.zeros((1, *image_shape)))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
