"""A run's folder: its configuration, its metrics, its results, and progress on the terminal.

Of several processes, the main one alone writes, reads and prints; see `jaxpoison.core.devices`.

config.json     the configuration, written first; another one in the same folder is an error
metrics.jsonl   one line per epoch of each cell; lines after a resumed checkpoint are replaced
cells/          one JSON per finished cell, so that running again does only what is missing
compiled/       JAX's compilation cache, unless yours is set: cells differ in little
result.json     everything that a table needs, with versions, device and commit
"""

import dataclasses
import json
import os
import platform
import subprocess
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxpoison.core import hosts
from jaxpoison.core.files import check_writable, write_text


class Run:
    """The folder of one run.

    Raises:
      PermissionError: if the folder cannot be written to.
      ValueError: if it holds a run with another configuration; if processes were started with
        different configurations, or see different folders.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder = Path(folder)
        self.config = json.loads(json.dumps(config, default=str))
        main_config = hosts.on_main(lambda: self.config)
        hosts.on_all(lambda: self._compare(main_config))
        hosts.on_main(self._open)
        hosts.check_shared(self.folder)
        if jax.config.values["jax_compilation_cache_dir"] is None:
            jax.config.update("jax_compilation_cache_dir", str(self.folder.absolute() / "compiled"))

    def _compare(self, main_config):
        differing = [name for name in self.config if self.config[name] != main_config[name]]
        if differing:
            raise ValueError(
                f"started with other settings than process 0: {_listing(self.config, differing)}; "
                f"there: {_listing(main_config, differing)}"
            )

    def _open(self):
        check_writable(self.folder)
        (self.folder / "cells").mkdir(exist_ok=True)
        path = self.folder / "config.json"
        if path.exists():
            there = json.loads(path.read_text())
            differing = [name for name in self.config if self.config[name] != there.get(name)]
            if differing:
                raise ValueError(
                    f"{self.folder} holds a run with another configuration "
                    f"({_listing(there, differing)}): "
                    "choose another --run-dir, or delete it to start anew"
                )
        write_json(path, self.config)

    def finished(self, cell: str) -> dict[str, Any] | None:
        """Returns what `finish` wrote for this cell, None if it has not finished."""
        path = self.folder / "cells" / f"{cell}.json"
        return hosts.on_main(lambda: json.loads(path.read_text()) if path.exists() else None)

    def finish(self, cell: str, row: dict[str, Any]) -> None:
        """Records a cell as done."""
        hosts.on_main(lambda: write_json(self.folder / "cells" / f"{cell}.json", row))

    def rows(self) -> list[dict[str, Any]]:
        """Returns what `finish` wrote, for all cells that this folder holds."""

        def read():
            return [json.loads(path.read_text()) for path in (self.folder / "cells").glob("*.json")]

        return hosts.on_main(read)

    def log(self, cell: str, epoch: int, metrics: dict[str, float]) -> None:
        """Appends a line of metrics; replaces what a killed run logged from this epoch on."""
        if not hosts.is_main():  # they need not wait
            return
        path = self.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in _whole_lines(path)]
        kept = [line for line in lines if line["cell"] != cell or line["epoch"] < epoch]
        entry = {"cell": cell, "epoch": epoch, **metrics}
        if len(kept) == len(lines):
            with path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        else:
            text = "".join(json.dumps(line) + "\n" for line in [*kept, entry])
            write_text(path, text)

    def metrics(self, cell: str) -> list[dict[str, float]]:
        """Returns the logged lines of a cell, in order of epochs."""

        def read():
            lines = map(json.loads, _whole_lines(self.folder / "metrics.jsonl"))
            return [line for line in lines if line["cell"] == cell]

        return hosts.on_main(read)

    def write_result(self, rows: list[dict[str, Any]], table: str, **more: Any) -> None:
        """Writes result.json, and table.md."""
        result = {"rows": rows, **more, "config": self.config, "environment": environment()}

        def write():
            write_json(self.folder / "result.json", result)
            write_text(self.folder / "table.md", table)

        hosts.on_main(write)


def require_no_errors(rows: dict[str, dict[str, Any]]) -> None:
    """Raises RuntimeError if rows, given by the names of their cells, tell of an `error`."""
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    if failed:
        listing = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {len(rows)} cells failed and the same command tries them again: "
            f"{listing}"
        )


class Meter:
    """Progress over all epochs of a run: a bar on a terminal, a line per epoch elsewhere."""

    def __init__(self, total: int):
        self.console = Console(quiet=not hosts.is_main())
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def show(self, text: str, completed: float) -> None:
        """Says what was just done and how much of the total is done."""
        self._bar.update(self._task, description=text, completed=completed)
        if not self.console.is_terminal:
            say(text)


@dataclasses.dataclass(eq=False, kw_only=True)
class Work:
    """A run at work: what all of its parts need, and how much of it is done."""

    config: Any
    output: Run
    meter: Meter
    done: int = 0

    def tell(self, text: str, *, finished: int = 0, ahead: int = 0) -> None:
        """Says what was just done: `finished` more, or `ahead` of a part that goes on."""
        self.done += finished
        self.meter.show(text, self.done + ahead)


def attempt(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of results that `make` returns, or one with the `error` that it raised."""
    try:
        return make()
    except Exception as error:  # of whatever kind: the cells after it are none the worse
        say(traceback.format_exc())
        return {"error": f"{type(error).__name__}: {error}"}


def succeeded(row: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Returns whether a cell has a row of results, and one that tells of no error."""
    return row is not None and "error" not in row


def say(text: str) -> None:
    """Prints a line, in the main process."""
    if hosts.is_main():
        print(text, flush=True)


def environment() -> dict[str, Any]:
    """Returns versions, device and git commit, for results files."""
    packages = ("jaxpoison", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": hosts.process_count(),
        "cpu_cores": os.cpu_count(),
        "commit": _commit(),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON; the file appears whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def _listing(config, names):
    return ", ".join(f"{name}: {config.get(name)!r}" for name in names)


def _whole_lines(path):
    """Returns the lines of a file that end in a newline: a kill may have cut the last one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _commit():
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if dirty else "")
