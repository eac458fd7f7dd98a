"""A model with its variables, as pure functions: Flax Linen, Flax NNX or plain functions."""

from jaxpoison.network._functions import from_functions
from jaxpoison.network._linen import from_linen
from jaxpoison.network._make import as_network
from jaxpoison.network._nnx import from_nnx
from jaxpoison.network._passes import (
    accuracy,
    features,
    folded_over_set,
    logits,
    over_set,
    predict,
    shared,
    tapped_logits,
)
from jaxpoison.network.base import Network, Tap, is_batch_norm

__all__ = [
    "Network",
    "Tap",
    "accuracy",
    "as_network",
    "features",
    "folded_over_set",
    "from_functions",
    "from_linen",
    "from_nnx",
    "is_batch_norm",
    "logits",
    "over_set",
    "predict",
    "shared",
    "tapped_logits",
]
