"""Accuracy on a data set, a batch at a time."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxpoison import loops, parallel
from jaxpoison.data import Dataset, to_float
from jaxpoison.models import Classifier


class Evaluator(Protocol):
    """Returns the predicted labels, int32 [N], of `images` [N,H,W,C], uint8 or in [0,1]."""

    def __call__(self, variables: Any, images: Any) -> jax.Array: ...


def evaluator(
    model: Classifier, *, batch_size: int | None = None, mesh: jax.sharding.Mesh
) -> Evaluator:
    """Returns the function that predicts labels with BatchNorm in evaluation mode."""

    def predict(variables, images):
        logits = jnp.asarray(model.apply(variables, to_float(images)))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    predict_all = loops.map_batches(predict, batch_size=batch_size, mesh=mesh)
    return lambda variables, images: predict_all(variables, parallel.replicate(images, mesh))


def accuracy(predict: Evaluator, variables: Any, dataset: Dataset) -> float:
    """Returns the share of `dataset` that is predicted right, in [0, 1]."""
    return float(jnp.mean(predict(variables, dataset.images) == dataset.labels))
