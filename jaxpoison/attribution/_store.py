"""Projected gradients of a training set on disk, to be asked again and again.

A folder of `shard-00000.npy`, ... of shape `[rows, rank]`, and `index.json` with the settings and,
for each shard, its rows, its SHA-256 and the CRC-32 of the batch that it was made of. A shard
counts once the index names it, and both appear whole or not at all (`core.files.replacing`): a
process may be killed at any time, and the next one goes on with the next shard. Nothing is pickled.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from jaxpoison.core import batches, files
from jaxpoison.core.batches import Batch
from jaxpoison.core.checks import check_count, check_positive
from jaxpoison.influence import TopScores

FORMAT = "jaxpoison store 1"


class Store:
    """Projected gradients `[N, rank]` in shards on disk; one of them is in memory at a time.

    Make one with `Store.create`, which also goes on with an unfinished one, or `Store.open`. One
    process may write to a store, any number may read it.

    Attributes:
      folder: where it is.
      rank: numbers for each example.
      dtype: of the shards, float16 or float32.
      settings: what `create` was given: how the gradients were made.
    """

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder = folder
        self.rank = index["rank"]
        self.dtype = np.dtype(index["dtype"])
        self.settings = index["settings"]
        self._shards = index["shards"]
        self._trusted = set()

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        rank: int,
        dtype: str = "float32",
        settings: dict[str, Any],
    ) -> Self:
        """Makes a store, or opens the one that is there if it was made with the same arguments.

        Args:
          folder: made if it is not there.
          rank: numbers for each example.
          dtype: "float16" or "float32".
          settings: what the gradients depend on, such as seed, kind of projection and a hash of
            the parameters; what JSON can hold. Another one is another store.

        Raises:
          ValueError: if the folder holds a store of other settings, or other arguments are wrong.
        """
        check_count(rank=rank)
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype must be 'float16' or 'float32', got {dtype!r}")
        folder = files.check_writable(folder)
        settings = json.loads(json.dumps(settings))
        if (folder / "index.json").exists():
            store = cls.open(folder)
            wanted = {"rank": rank, "dtype": dtype, "settings": settings}
            found = {"rank": store.rank, "dtype": store.dtype.name, "settings": store.settings}
            for name, value in wanted.items():
                if found[name] != value:
                    raise ValueError(
                        f"{folder} holds a store with {name} = {found[name]}, not {value}: "
                        "choose another folder"
                    )
            return store
        store = cls(folder, {"rank": rank, "dtype": dtype, "settings": settings, "shards": []})
        store._write_index()
        return store

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Opens a store; its shards are checked as they are read.

        Raises:
          FileNotFoundError: if there is none.
          ValueError: if its index is damaged.
        """
        path = files.check_is_file(Path(folder).expanduser() / "index.json", "the index of a store")
        try:
            index = json.loads(path.read_text())
            if index["format"] != FORMAT:
                raise ValueError(f"its format is {index['format']!r}, not {FORMAT!r}")
            for shard in index["shards"]:
                if not (isinstance(shard["rows"], int) and shard["rows"] > 0):
                    raise ValueError(f"a shard of {shard['rows']} rows")
                _ = shard["sha256"], shard["batch"]
            if index["dtype"] not in ("float16", "float32"):
                raise ValueError(f"its dtype is {index['dtype']!r}")
            return cls(path.parent, index)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as the index of a store: {error}") from error

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self._shards)

    def add(self, stream: Iterable[Batch], project: Callable[[Batch], Any]) -> None:
        """Adds projected gradients, a shard for each batch; goes on where an earlier call stopped.

        Args:
          stream: all batches of the training set, in the same order every time. Those whose shards
            are there are compared with them by checksum and not projected again.
          project: `project(batch) -> [B, rank]`, such as `project_gradients` of a fixed key,
            under `jax.jit`.

        Raises:
          ValueError: for a batch that is another than at its place before, projections of another
            shape, or numbers that are not finite in the store's dtype.
        """
        place = -1
        for place, batch in enumerate(stream):
            num_rows, checksum = batches.count_examples(batch, f"batch {place}"), _checksum(batch)
            if place < len(self._shards):
                if self._shards[place]["batch"] != checksum:
                    raise ValueError(
                        f"batch {place} is not the one that shard {place} of {self.folder} was "
                        "made of: pass the same batches in the same order, or another folder"
                    )
                continue
            rows = np.asarray(project(batch))
            if rows.shape != (num_rows, self.rank):
                raise ValueError(
                    f"project(batch) must have shape ({num_rows}, {self.rank}), got {rows.shape}"
                )
            with np.errstate(over="ignore"):
                rows = rows.astype(self.dtype)
            if not np.isfinite(rows).all():
                raise ValueError(
                    f"projected gradients of batch {place} are not finite in {self.dtype}: "
                    "look for NaN in the parameters, or store float32"
                )
            path = self._path(place)
            with files.replacing(path) as file:
                np.save(file, rows, allow_pickle=False)
            sha256 = _sha256(path)
            self._shards.append({"rows": num_rows, "sha256": sha256, "batch": checksum})
            self._write_index()
        if place + 1 < len(self._shards):
            raise ValueError(
                f"the stream has {place + 1} batches, but {self.folder} holds "
                f"{len(self._shards)} shards: pass the whole training set"
            )

    def shards(self) -> Iterator[np.ndarray]:
        """Gives the shards in order, mapped read-only, `[rows, rank]`.

        Raises:
          ValueError: for a shard that is missing, damaged or of another store; it names the file.
        """
        for place, shard in enumerate(self._shards):
            yield self._read(place, shard)

    def rows(self, examples: Any) -> np.ndarray:
        """Returns the projected gradients of examples by their numbers, `[len(examples), rank]`.

        Raises:
          IndexError: for numbers that are not from 0 to N - 1.
        """
        examples = np.asarray(examples, int)
        if examples.ndim != 1 or ((examples < 0) | (examples >= len(self))).any():
            raise IndexError(f"examples must be numbers [k] from 0 to {len(self) - 1}")
        found, start = np.empty((len(examples), self.rank), self.dtype), 0
        for place, shard in enumerate(self._shards):
            end = start + shard["rows"]
            inside = (examples >= start) & (examples < end)
            if inside.any():
                found[inside] = self._read(place, shard)[examples[inside] - start]
            start = end
        return found

    def query(
        self, queries: Any, *, damping: float, top_k: int | None = None
    ) -> np.ndarray | TopScores:
        """Returns -q^T (Phi^T Phi / N + damping I)^-1 phi_i, as `projected_scores` but from disk.

        Args:
          queries: projected gradients `[M, rank]`, or their mean over a group, `[rank]`; of
            examples of the store itself: `rows`.
          damping: in the units of the empirical Fisher matrix; positive.
          top_k: None for all scores, float64 `[M, N]`, or `[N]` for a group; k for the k most
            harmful and the k most helpful, `TopScores` of fields `[M, k]` or `[k]`, without
            holding the scores.

        Raises:
          ValueError: for queries of another shape, an empty store, or top_k out of range.
        """
        check_positive(damping=damping)
        queries = np.asarray(queries, np.float64)
        if queries.ndim not in (1, 2) or queries.shape[-1] != self.rank:
            raise ValueError(
                f"queries must be [M, {self.rank}] or [{self.rank}], got shape {queries.shape}"
            )
        if not self._shards:
            raise ValueError(f"{self.folder} is empty: add a stream of batches first")
        if top_k is not None:
            check_count(top_k=top_k)
            if top_k > len(self):
                raise ValueError(f"top_k = {top_k} is more than the {len(self)} examples stored")
        matrix = damping * np.eye(self.rank)
        for shard in self.shards():
            rows = shard.astype(np.float64)
            matrix += rows.T @ rows / len(self)
        directions = np.linalg.solve(matrix, np.atleast_2d(queries).T)  # [rank, M]
        if top_k is None:
            scores = np.concatenate([-(shard @ directions) for shard in self.shards()]).T
            return scores if queries.ndim == 2 else scores[0]
        none = np.zeros((0, directions.shape[1]))
        harmful = helpful = none, none.astype(np.int32)
        start = 0
        for shard in self.shards():
            scores = -(shard @ directions)
            numbers = np.broadcast_to(
                np.arange(start, start + len(shard), dtype=np.int32)[:, None], scores.shape
            )
            harmful = _largest(harmful, scores, numbers, top_k)
            helpful = _largest(helpful, -scores, numbers, top_k)
            start += len(shard)
        fields: Any = [x.T for x in (*harmful, -helpful[0], helpful[1])]
        return TopScores(*(x if queries.ndim == 2 else x[0] for x in fields))

    def _path(self, place):
        return self.folder / f"shard-{place:05d}.npy"

    def _read(self, place, shard):
        path = files.check_is_file(self._path(place), "a shard of the store")
        if place not in self._trusted:
            if _sha256(path) != shard["sha256"]:
                raise ValueError(
                    f"{path} is damaged or of another store: its checksum is not the one in "
                    f"index.json. Delete the folder and add the stream again"
                )
            self._trusted.add(place)
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.shape != (shard["rows"], self.rank) or rows.dtype != self.dtype:
            raise ValueError(
                f"{path} holds {rows.shape} {rows.dtype}, but index.json promises "
                f"{(shard['rows'], self.rank)} {self.dtype}"
            )
        return rows

    def _write_index(self):
        index = {"format": FORMAT, "rank": self.rank, "dtype": self.dtype.name}
        index |= {"settings": self.settings, "shards": self._shards}
        files.write_text(self.folder / "index.json", json.dumps(index, indent=1) + "\n")


def _largest(kept, scores, numbers, top_k):
    """Returns the `top_k` largest scores of each column with their numbers, falling."""
    scores = np.concatenate([kept[0], scores])
    numbers = np.concatenate([kept[1], numbers])
    order = np.argsort(-scores, axis=0, kind="stable")[:top_k]
    return np.take_along_axis(scores, order, 0), np.take_along_axis(numbers, order, 0)


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(batch):
    crc = 0
    for leaf in jax.tree.leaves(batch):
        array = np.ascontiguousarray(leaf)
        header = f"{array.shape} {array.dtype}".encode()
        crc = zlib.crc32(array.tobytes(), zlib.crc32(header, crc))
    return crc
