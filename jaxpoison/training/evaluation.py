"""Accuracy on a data set, a batch at a time."""

import functools
from collections.abc import Hashable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset, to_float
from jaxpoison.models import Classifier


class Evaluator(Protocol):
    """Returns the predicted labels, int32 [N], of `images` [N,H,W,C], uint8 or in [0,1]."""

    def __call__(self, variables: Any, images: Any) -> jax.Array: ...


def evaluator(
    model: Classifier, *, batch_size: int | None = None, mesh: jax.sharding.Mesh
) -> Evaluator:
    """Returns the function that predicts labels with BatchNorm in evaluation mode."""

    predict_all = _predictor(cast(Hashable, model), batch_size, mesh)
    return lambda variables, images: predict_all(variables, devices.replicate(images, mesh))


@functools.lru_cache(maxsize=8)  # a function of its own would be compiled anew at each call
def _predictor(model, batch_size, mesh):
    def predict(variables, images):
        logits = jnp.asarray(model.apply(variables, to_float(images)))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return loops.map_batches(predict, batch_size=batch_size, mesh=mesh)


def accuracy(predict: Evaluator, variables: Any, dataset: Dataset) -> float:
    """Returns the share of `dataset` that is predicted right, in [0, 1]."""
    return float(jnp.mean(predict(variables, dataset.images) == dataset.labels))
