"""How work is spread over devices: examples over all of them, all else copied.

Functions elsewhere are written in the global view: under `jax.jit`, the mean over a sharded batch
is the mean over all of it, so gradients, Hessian products and BatchNorm statistics are those of one
device, and one device is a mesh of 1. With several processes (`core.hosts`) a mesh spans the
devices of all, and each process places only the share of an array that its own devices hold.
"""

import hashlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpoison.core.hosts import _exchange

Tree = TypeVar("Tree")

EXAMPLES = "data"  # the mesh axis over which examples are spread


def data_mesh(devices: Any = None) -> Mesh:
    """Returns a mesh with the one axis `"data"` over `devices` (default: all, of all processes)."""
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(np.asarray(devices), (EXAMPLES,), axis_types=(AxisType.Auto,))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Places a copy of every array of `tree` on each device of `mesh`.

    Raises:
      ValueError: if processes hold different values.
    """
    return _place(tree, NamedSharding(mesh, PartitionSpec()))


def shard_examples(tree: Tree, mesh: Mesh) -> Tree:
    """Places `tree` with the leading axis of every array spread over `mesh`.

    Every process has the whole of `tree`, and places its own devices' part; see `join_examples`.

    Raises:
      ValueError: if a leading axis is not divisible by the number of devices, or processes hold
        different values.
    """
    for leaf in jax.tree.leaves(tree):
        check_divisible(leaf.shape[0], mesh)
    return _place(tree, NamedSharding(mesh, PartitionSpec(EXAMPLES)))


def join_examples(local: Tree, mesh: Mesh) -> Tree:
    """Places `tree` as `shard_examples` does, each process having only its own devices' part.

    Args:
      local: arrays whose leading axis is the examples that this process has read; the whole is
        that of process 0, then of 1, and so on, in equal shares for each device.
      mesh: devices of all processes, in the order of `data_mesh()`.

    Raises:
      ValueError: if a leading axis is not divisible by the number of this process's devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(EXAMPLES))
    for leaf in jax.tree.leaves(local):
        check_divisible(leaf.shape[0], mesh.local_mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), local
    )


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


def to_host(array: Any) -> np.ndarray:
    """Returns the whole of `array` as a NumPy array, in every process.

    All processes must call it, because other processes' devices may hold parts of the array.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _place(tree, sharding):
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    here = [leaf for leaf in jax.tree.leaves(tree) if not _spans_processes(leaf)]
    if here:
        _check_equal(here)

    def place(leaf):
        if _spans_processes(leaf):
            if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                return leaf
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        if not _is_key(leaf):
            leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree)


def _spans_processes(leaf):
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _check_equal(leaves):
    digest = hashlib.blake2b(digest_size=16)
    for leaf in leaves:
        array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    digests = _exchange(digest.digest())
    differing = [process for process, other in enumerate(digests) if other != digests[0]]
    if differing:
        shapes = ", ".join(str(np.shape(leaf)) for leaf in leaves[:4])
        raise ValueError(
            f"arrays to be placed over all processes (shapes {shapes}"
            f"{', ...' if len(leaves) > 4 else ''}) have other values in process "
            f"{', '.join(map(str, differing))} than in process 0: give every process the same "
            "data, settings, keys and versions"
        )
