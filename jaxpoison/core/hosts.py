"""Several processes that run one program: joining them, and what one tells the others.

Several hosts run the same program, one process each (or one for each GPU), on the same data and
settings. Process 0 is the main one, which alone writes and prints; `on_main` tells the others
what it found. With a single process these are no-ops.
"""

import atexit
import builtins
import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Value = TypeVar("Value")


SHARED_SECONDS = 30.0  # network file systems may show a new file only when a cache has expired


FAREWELL_SECONDS = 2.0  # in which processes that fail alike can say so before they are ended


# The kinds of errors that travel between processes, by their names.
_ERRORS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
}


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
