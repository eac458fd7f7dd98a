"""A run's folder: its configuration, its metrics, its results.

Of several processes, the main one alone writes, reads and prints; see `jaxpoison.core.devices`.

config.json     the configuration, written first; another one in the same folder is an error
metrics.jsonl   one line per epoch of each cell; lines after a resumed checkpoint are replaced
cells/          one JSON per finished cell, so that running again does only what is missing
result.json     everything that a table needs, with versions, device and commit
.lock           held by the process that works here
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxpoison.core import hosts
from jaxpoison.core.files import check_writable, write_text
from jaxpoison.runs import lock
from jaxpoison.runs._environment import environment
from jaxpoison.runs._files import plain, read_json, write_json
from jaxpoison.runs._program import require_space
from jaxpoison.runs.cache import use_compilation_cache

PLACE = "run_dir"  # no setting: a run may be moved, and its folder named in other ways


class Run:
    """The folder of one run, held by this process until it ends.

    Args:
      folder: the run's folder; made if missing, `~` stands for the home folder. What `config` has
        as `run_dir` is not compared: folders may be moved.
      config: settings that stay the same as long as the folder is used.
      check: looks at the settings before anything is written; raises ValueError for bad ones.

    Raises:
      PermissionError: if the folder cannot be written to.
      RuntimeError: if another process works in it.
      ValueError: if it holds a run with another configuration; if processes were started with
        different configurations, or see different folders; for settings that JSON cannot hold.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        *,
        check: Callable[[], None] | None = None,
    ):
        self.folder = Path(folder).expanduser()
        lasting = {name: value for name, value in config.items() if name != PLACE}
        self.config = json.loads(json.dumps(plain(lasting), default=str))
        main_config = hosts.on_main(lambda: self.config)
        hosts.on_all(lambda: self._compare(main_config))
        if check is not None:
            check()
        hosts.on_main(self._open)
        hosts.check_shared(self.folder)
        use_compilation_cache()

    def _compare(self, main_config):
        differing = [name for name in self.config if self.config[name] != main_config[name]]
        if differing:
            raise ValueError(
                f"started with other settings than process 0: {_listing(self.config, differing)}; "
                f"there: {_listing(main_config, differing)}"
            )

    def _open(self):
        check_writable(self.folder)
        lock.hold(self.folder)
        path = self.folder / "config.json"
        if path.exists():
            there = read_json(path, "delete it if the settings of this command are the run's")
            differing = [name for name in self.config if self.config[name] != there.get(name)]
            if differing:
                raise ValueError(
                    f"{self.folder} holds a run with another configuration "
                    f"({_listing(there, differing)}): "
                    "choose another --run-dir, or delete it to start again"
                )
        (self.folder / "cells").mkdir(exist_ok=True)
        write_json(path, self.config)

    def require_space(self, num_bytes: int) -> None:
        """Raises DiskFullError if there is no room for `num_bytes` in the folder."""
        hosts.on_main(lambda: require_space(self.folder, num_bytes))

    def finished(self, cell: str) -> dict[str, Any] | None:
        """Returns what `finish` wrote for this cell, None if it has not finished.

        Raises:
          ValueError: if the file is damaged; names it.
        """
        path = self._cell(cell)
        return hosts.on_main(lambda: _row(path) if path.exists() else None)

    def finish(self, cell: str, row: dict[str, Any]) -> None:
        """Records a cell as done."""
        hosts.on_main(lambda: write_json(self._cell(cell), row))

    def _cell(self, cell):
        return self.folder / "cells" / f"{cell}.json"

    def rows(self) -> list[dict[str, Any]]:
        """Returns what `finish` wrote, for all cells that this folder holds."""

        def read():
            return [_row(path) for path in sorted((self.folder / "cells").glob("*.json"))]

        return hosts.on_main(read)

    def log(self, cell: str, epoch: int, metrics: dict[str, float]) -> None:
        """Appends a line of metrics; replaces what a killed run logged from this epoch on."""
        if not hosts.is_main():  # they need not wait
            return
        lines, whole = self._logged()
        kept = [line for line in lines if line["cell"] != cell or line["epoch"] < epoch]
        entry = {"cell": cell, "epoch": epoch, **metrics}
        if whole and len(kept) == len(lines):
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        else:
            write_text(self._log, "".join(json.dumps(line) + "\n" for line in [*kept, entry]))

    def metrics(self, cell: str) -> list[dict[str, float]]:
        """Returns the logged lines of a cell, in order of epochs."""
        return hosts.on_main(lambda: [line for line in self._logged()[0] if line["cell"] == cell])

    @property
    def _log(self):
        return self.folder / "metrics.jsonl"

    def _logged(self):
        """Returns the logged lines, and whether the last one is whole: a kill may have cut it."""
        if not self._log.exists():
            return [], True
        *lines, rest = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        try:
            entries = [json.loads(line) for line in lines]
        except ValueError as error:
            number = next(n for n, line in enumerate(lines, start=1) if not _is_json(line))
            raise ValueError(
                f"{self._log} is damaged in line {number}: delete that line, and with it "
                "cells/ and checkpoints/ of the cell that it is about"
            ) from error
        return entries, not rest

    def write_result(self, rows: list[dict[str, Any]], table: str, **more: Any) -> None:
        """Writes result.json, and table.md."""
        result = {"rows": rows, **more, "config": self.config, "environment": environment()}

        def write():
            write_json(self.folder / "result.json", result)
            write_text(self.folder / "table.md", table)

        hosts.on_main(write)


def _row(path):
    return read_json(path, "delete it, and the same command does this part again")


def _is_json(line):
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _listing(config, names):
    return ", ".join(f"{name}: {config.get(name)!r}" for name in names)
