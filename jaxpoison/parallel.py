"""How work is spread over devices: a mesh of one axis, examples sharded, all else copied.

This is the only module that knows about devices. Functions elsewhere are written in the global
view: under `jax.jit`, the mean over a sharded batch is the mean over all of it, so gradients,
Hessian products and BatchNorm statistics are those of one device, and one device is a mesh of 1.
"""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

EXAMPLES = "data"  # the mesh axis over which examples are spread


def data_mesh(devices: Any = None) -> Mesh:
    """Returns a mesh with the one axis `"data"` over `devices` (default: all of them)."""
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(np.asarray(devices), (EXAMPLES,), axis_types=(AxisType.Auto,))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Places a copy of every array of `tree` on each device of `mesh`."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_examples(tree: Tree, mesh: Mesh) -> Tree:
    """Places `tree` with the leading axis of every array spread over `mesh`.

    Raises:
      ValueError: if a leading axis does not divide by the number of devices.
    """
    for leaf in jax.tree.leaves(tree):
        check_divisible(leaf.shape[0], mesh)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(EXAMPLES)))


def constrain_examples(tree: Tree, mesh: Mesh) -> Tree:
    """Inside `jit`: asks that the leading axis of every array of `tree` be spread over `mesh`."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(EXAMPLES)))


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError if `batch_size` examples cannot be spread evenly over `mesh`."""
    if batch_size % mesh.size:
        raise ValueError(
            f"a batch of {batch_size} examples does not divide by {mesh.size} devices: "
            f"choose a batch size that is a multiple of {mesh.size}"
        )
