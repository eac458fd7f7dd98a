"""Checkpoints of a training run in a folder (Orbax): an interrupted run resumes where it was."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxpoison.core import devices, hosts
from jaxpoison.core.files import check_writable


class Checkpoints:
    """The newest state of one run, kept in `folder`.

    A checkpoint appears whole or not at all, so a run may be killed at any moment, and carries a
    checksum, so weights that a disk has changed are never continued from. Of several processes each
    writes what only its devices hold, so all must see the same folder.

    Args:
      folder: where checkpoints live; made if missing. `~` stands for the home folder.
      every: epochs from one checkpoint to the next.
      identity: text that identifies the run, e.g. its configuration. A folder that holds
        another run's checkpoints is an error, never continued from.

    Raises:
      PermissionError: if `folder` cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike, *, every: int, identity: str):
        if every < 1:
            raise ValueError(f"every must be at least one epoch, not {every}")
        self.folder = Path(folder).expanduser().absolute()
        self.every = every
        self.identity = identity
        hosts.on_main(lambda: str(check_writable(self.folder)))  # as JSON can carry it
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(1), enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, epoch: int, tree: Any) -> None:
        """Saves `tree` (a pytree of arrays) as the state after `epoch` finished epochs."""
        identity = {"run": self.identity, "checksum": _checksum(tree)}
        self._manager.save(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                identity=ocp.args.JsonSave(identity),
            ),
        )

    def restore(self, like: Any) -> tuple[int, Any]:
        """Returns (finished epochs, state) of the newest checkpoint, (0, like) if there is none.

        Args:
          like: a state of the same run: structure, shapes, types and placement to restore to.

        Raises:
          ValueError: if the checkpoint is broken or belongs to another run.
        """
        epoch = hosts.on_main(self._manager.latest_step)
        if epoch is None:
            return 0, like
        # Each part by itself: the identity says why the state would not fit.
        identity = self._read(epoch, identity=ocp.args.JsonRestore())
        if identity["run"] != self.identity:
            raise ValueError(
                f"{self.folder} holds a checkpoint of another run:\n  there: {identity['run']}\n"
                f"  here:  {self.identity}\nchoose another folder, or delete this one"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = self._read(epoch, state=ocp.args.StandardRestore(abstract))
        if _checksum(state) != identity["checksum"]:
            raise ValueError(
                f"the checkpoint {self.folder / str(epoch)} is damaged: its arrays do not have the "
                f"checksum that they were saved with; delete {self.folder} to start the run again"
            )
        return epoch, state

    def _read(self, epoch, **item):
        (name,) = item
        try:
            return self._manager.restore(epoch, args=ocp.args.Composite(**item))[name]
        except Exception as error:  # Orbax raises many kinds for a file that is damaged or gone
            raise ValueError(
                f"the checkpoint {self.folder / str(epoch)} cannot be read "
                f"({type(error).__name__}: {error}); delete {self.folder} to start the run again"
            ) from error

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


def _checksum(tree: Any) -> str:
    """Returns a checksum of types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(devices.to_host(leaf))
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
