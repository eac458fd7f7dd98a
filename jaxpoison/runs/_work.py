"""The parts of a run at work: what they need, and what becomes of those that fail."""

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any, TypeGuard

from jaxpoison.runs._program import disk_is_full
from jaxpoison.runs._progress import Meter, say
from jaxpoison.runs._run import Run


@dataclasses.dataclass(eq=False, kw_only=True)
class Work:
    """A run in progress: what all of its parts need, and how much of it is done."""

    config: Any
    output: Run
    meter: Meter
    done: int = 0

    def tell(self, text: str, *, finished: int = 0, ahead: int = 0) -> None:
        """Shows what was just done: `finished` more, or `ahead` of a part that goes on."""
        self.done += finished
        self.meter.show(text, self.done + ahead)


def attempt(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of results that `make` returns, or one with the `error` that it raised.

    Raises:
      Exception: what `make` raised where a disk is full: all that follows would fail as well.
    """
    try:
        return make()
    except Exception as error:  # of whatever kind: the cells after it are none the worse
        if disk_is_full(error):
            raise
        say(traceback.format_exc())
        return {"error": f"{type(error).__name__}: {error}"}


def succeeded(row: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Returns whether a cell has a row of results, and one without an error."""
    return row is not None and "error" not in row


def require_no_errors(rows: dict[str, dict[str, Any]]) -> None:
    """Raises RuntimeError if rows, given by the names of their cells, have an `error`."""
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    if failed:
        listing = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {len(rows)} cells failed and the same command tries them again: "
            f"{listing}"
        )
