"""`as_network`: the door through which every model comes in."""

from typing import Any

import flax.linen as nn
from flax import nnx

from jaxpoison.network._linen import from_linen
from jaxpoison.network._nnx import from_nnx
from jaxpoison.network.base import Network


def as_network(model: Any, *, image_shape: tuple[int, ...] | None = None) -> Network:
    """Returns `model` as a `Network`.

    Args:
      model: a `Network`, which passes through; a Flax Linen or NNX module. Where their mode or
        their last layer have to be named, use `from_linen`, `from_nnx`; for other models
        `from_functions`.
      image_shape: (H, W, C) of the images that it will see; if given, `num_classes`,
        `num_features` and the last linear layer are found as `Network.for_images` does.

    Raises:
      TypeError: if `model` is none of these.
    """
    if isinstance(model, type):
        raise TypeError(f"{model.__name__} is a class: pass an instance, {model.__name__}(...)")
    if isinstance(model, Network):
        network = model
    elif isinstance(model, nn.Module):
        network = from_linen(model)
    elif isinstance(model, nnx.Module):
        network = from_nnx(model)
    else:
        raise TypeError(
            f"a {type(model).__name__} is no network: pass a flax.linen or flax.nnx module, or "
            "from_functions(apply, params) for a function apply(params, images) -> logits"
        )
    return network if image_shape is None else network.for_images(image_shape)
