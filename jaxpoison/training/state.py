"""What changes from step to step of training."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpoison.network import as_network


class TrainState(NamedTuple):
    """Weights and optimizer.

    Attributes:
      step: finished steps, int32, shape ().
      params: parameters of the network; `{"body": ..., "head": {"kernel": [d,K], "bias": [K]}}` for
        the classifiers of `models`.
      batch_stats: running means and variances of the BatchNorm layers; for a Flax NNX model,
        everything that is not a parameter.
      opt_state: state of the optax optimizer.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the functions of the network take."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, ...],
) -> TrainState:
    """Returns the state before the first step, for images of shape (H, W, C).

    Args:
      model: a `Network`, or what `network.as_network` takes.
      optimizer: the optax optimizer.
      key: typed PRNG key of the initial weights; a network that was made from weights starts from
        those.
      image_shape: (H, W, C).

    Raises:
      ValueError: if the network has variables besides parameters and batch statistics.
    """
    network = as_network(model)
    variables = network.init(key, image_shape)
    others = variables.keys() - {"params", "batch_stats"}
    if others:
        raise ValueError(
            f"the network has the collections {', '.join(sorted(others))} besides params and "
            "batch_stats: training does not know how to update those"
        )
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, _begin(optimizer, params))


@functools.partial(jax.jit, static_argnums=0)
def _begin(optimizer, params):
    return optimizer.init(params)
