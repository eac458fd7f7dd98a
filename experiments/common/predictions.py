"""What trained networks see in images, on the devices and in files."""

import functools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import models
from jaxpoison.core import devices, hosts, loops
from jaxpoison.core.files import replacing
from jaxpoison.data import to_float


def probabilities(model: models.Classifier, variables: Any, images: Any) -> np.ndarray:
    """Returns the share that a network gives to each class, float32 [N, K], on the host."""
    mesh = devices.data_mesh()
    predict = predictor(cast(Hashable, model), mesh)
    return devices.to_host(predict(variables, devices.replicate(images, mesh)))


@functools.lru_cache(maxsize=1)  # one function for all cells, so that it is compiled once
def predictor(model: Any, mesh: jax.sharding.Mesh) -> Callable[[Any, Any], Any]:
    """Returns `predict(variables, images) -> shares`, all on the devices."""

    def predict(variables, images):
        return jax.nn.softmax(jnp.asarray(model.apply(variables, to_float(images))))

    return loops.map_batches(predict, mesh=mesh)


def save(path: Path, shares: np.ndarray) -> None:
    """Writes the likeliest label of each image, and how likely it is, from `shares` [N, K]."""
    labels, confidences = shares.argmax(axis=1), shares.max(axis=1)

    def write():
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(
                file, labels=labels.astype(np.uint8), confidences=confidences.astype(np.float16)
            )

    hosts.on_main(write)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns (labels [N], confidences [N]) from a file of `save`.

    Raises:
      ValueError: if the file is damaged; names it.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["labels"], archive["confidences"]
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        raise ValueError(
            f"{path} is damaged ({error!r}): delete it and "
            f"{path.parents[1] / 'cells' / path.with_suffix('.json').name}, and the same command "
            "trains this cell again"
        ) from error
