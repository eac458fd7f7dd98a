"""What a run prints: a bar on a terminal, lines elsewhere; printing never fails."""

import contextlib
import os
import sys

from jaxpoison.core import hosts
from jaxpoison.runs.extras import require_extra

BAR_WIDTH = 12


class Meter:
    """Progress over all epochs of a run: a bar on a terminal, a line per epoch elsewhere.

    Args:
      total: how much there is to do.
      console: rich's console to draw on; default the standard output.

    Raises:
      ImportError: without rich; names the extra that brings it.
    """

    def __init__(self, total: int, console=None):
        require_extra("experiments", "rich")
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        self.console = Console(quiet=not hosts.is_main()) if console is None else console
        # Of what does not fit, the text gives way: numbers and times are never cut.
        self._bar = Progress(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH)),
            TextColumn(
                "{task.completed:.0f}/{task.total:.0f}",
                table_column=Column(no_wrap=True, min_width=2 * len(str(total)) + 1),
            ),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            console=self.console,
            disable=not self.console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def show(self, text: str, completed: float) -> None:
        """Shows what was just done and how much of the total is done."""
        self._bar.update(self._task, description=text, completed=completed)
        if not self.console.is_terminal:
            say(text)


def say(text: str) -> None:
    """Prints a line, in the main process.

    Printing never stops a run: characters that the terminal does not have become question marks,
    and where nobody reads any more, nothing is printed.
    """
    if not hosts.is_main():
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        # Python would try again at exit, and fail.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
