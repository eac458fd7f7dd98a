"""How work is spread over devices and processes: examples over all devices, all else copied.

This is the only module that knows about either. Functions elsewhere are written in the global
view: under `jax.jit`, the mean over a sharded batch is the mean over all of it, so gradients,
Hessian products and BatchNorm statistics are those of one device, and one device is a mesh of 1.

Several hosts run the same program, one process each (or one for each GPU), on the same data and
settings: `processes` joins them, a mesh then spans the devices of all, and each places only the
share of an array that its own devices hold. Process 0 is the main one, which alone writes and
prints; `on_main` tells the others what it found. Alone, a process waits for nobody.
"""

import atexit
import builtins
import contextlib
import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")
Value = TypeVar("Value")

EXAMPLES = "data"  # the mesh axis over which examples are spread

SHARED_SECONDS = 30.0  # network file systems may show a new file only when a cache has expired
FAREWELL_SECONDS = 2.0  # in which processes that fail alike can say so before they are ended

# The kinds of errors that travel between processes, by their names.
_ERRORS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
}


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
      ValueError: if a leading axis does not divide by the number of devices, or processes hold
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
      ValueError: if a leading axis does not divide by the number of this process's devices.
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


@contextlib.contextmanager
def processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Joins the processes of a run, before anything else asks JAX for its devices.

    On SLURM, Open MPI, Kubernetes and TPU pods all three arguments follow from the environment.
    An error that leaves the context ends the program at once when it has been printed; JAX would
    wait for the other processes at exit, and they for this one.

    Args:
      coordinator: `address:port` of process 0, where it listens.
      num_processes: how many there are.
      process_id: which of them this is, from 0.

    Raises:
      ValueError: if arguments are missing and the environment does not know them.
    """
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot join the other processes ({error}): where the environment does not say who "
            "they are, give the coordinator's address and port, the number of processes and the "
            "number of this one"
        ) from error
    try:
        yield
    except BaseException as error:
        # Handlers run last in, first out: after Python has printed the error, before JAX's own.
        atexit.register(_leave)
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise RuntimeError(
                f"{error}\nIf another process of the run has ended, its output says why."
            ) from error
        raise


def process_count() -> int:
    """Returns how many processes run together."""
    return jax.process_count()


def is_main() -> bool:
    """Returns whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def on_main(fn: Callable[[], Value]) -> Value:
    """Returns `fn()` in every process, called on the main one alone while the others wait.

    So files are written and read by one process, and what follows in the others comes after.

    Args:
      fn: whose value can be written as JSON; small, for it travels through the devices.

    Raises:
      Exception: in every process, what `fn` raised, as the nearest built-in kind.
    """
    if process_count() == 1:
        return fn()
    mine = json.dumps(_attempt(fn)).encode() if is_main() else b""
    error, value = json.loads(_exchange(mine)[0])
    if error is not None:
        kind, text = error
        raise _ERRORS[kind](text)
    return value


def on_all(fn: Callable[[], Value]) -> Value:
    """Returns `fn()`, called in every process, once it has succeeded in all of them.

    For what can fail on one host, such as reading its disk: the others would wait for it forever.

    Raises:
      Exception: in every process, what `fn` raised in the first where it failed, as the nearest
        built-in kind.
    """
    if process_count() == 1:
        return fn()
    outcome: list[Value] = []
    error, _ = _attempt(lambda: outcome.append(fn()))
    for process, other in enumerate(map(json.loads, _exchange(json.dumps(error).encode()))):
        if other is not None:
            kind, text = other
            raise _ERRORS[kind](f"process {process}: {text}")
    return outcome[0]


def check_shared(folder: Path) -> None:
    """Raises ValueError, in every process, if `folder` is not the same folder for all of them.

    The main process must be able to write to it.
    """
    if process_count() == 1:
        return
    probe = folder / f".shared-{on_main(lambda: uuid.uuid4().hex)}"
    on_main(probe.touch)

    def look():
        deadline = time.monotonic() + SHARED_SECONDS
        while not probe.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{folder} does not show a file that process 0 has just written there: all "
                    "processes must see the same folder, on a file system that they share"
                )
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                os.listdir(folder)  # has some network file systems look again

    try:
        on_all(look)
    finally:
        if is_main():
            probe.unlink()


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


def _exchange(mine: bytes) -> list[bytes]:
    """Returns what each process has passed, in order."""
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    # Rounded up to a power of two, so that few sizes are compiled.
    padded = np.zeros(1 << max(int(sizes.max()) - 1, 63).bit_length(), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def _attempt(fn):
    """Returns `(error, value)`, one of them None; an error as the name of its kind and its text."""
    try:
        return None, fn()
    except Exception as error:
        for kind in type(error).__mro__:
            if _ERRORS.get(kind.__name__) is kind:
                with contextlib.suppress(TypeError):  # some kinds take more than a text
                    return (kind.__name__, str(kind(str(error)))), None
        raise


def _leave():
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(FAREWELL_SECONDS)
    os._exit(1)
