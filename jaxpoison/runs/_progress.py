"""What a run prints: bars on a terminal, lines elsewhere; printing never fails."""

import contextlib
import math
import os
import sys
import time

from jaxpoison.core import hosts

BAR_WIDTH = 12
SECONDS = 10.0  # between two lines on a stage that goes on


class Meter:
    """Progress over all epochs of a run: a bar on a terminal, a line per epoch elsewhere.

    Args:
      total: how much there is to do.
      console: rich's console to draw on; default the standard output.
    """

    def __init__(self, total: int, console=None):
        self.console = _console() if console is None else console
        self._bar = _bars(self.console, digits=len(str(total)))
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


class Stages:
    """Progress over stages that follow each other: a bar for each on a terminal, lines elsewhere.

    A line is printed when a stage begins and when it ends, and every ten seconds between.

    Args:
      console: rich's console to draw on; default the standard output.
    """

    def __init__(self, console=None):
        self.console = _console() if console is None else console
        self._bar = _bars(self.console, digits=5)
        self._task = None
        self._stage, self._start, self._told = "", 0.0, 0.0

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def tell(self, stage: str, done: int, total: int) -> None:
        """Shows that of a stage `done` of `total` is done."""
        now = time.monotonic()
        if self._task is None or stage != self._stage:
            self._task = self._bar.add_task(stage)
            self._stage, self._start, self._told = stage, now, -math.inf
        self._bar.update(self._task, completed=done, total=total)
        if not self.console.is_terminal and (done >= total or now - self._told >= SECONDS):
            self._told = now
            say(f"{stage}: {done:,} of {total:,}, {now - self._start:.0f} s")


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


def _console():
    from rich.console import Console

    return Console(quiet=not hosts.is_main())


def _bars(console, digits):
    """Returns rich's bars with times and counts; of what does not fit, the text gives way."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    return Progress(
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        BarColumn(BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH)),
        TextColumn(
            "{task.completed:.0f}/{task.total:.0f}",
            table_column=Column(no_wrap=True, min_width=2 * digits + 1),
        ),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        console=console,
        disable=not console.is_terminal,
        expand=True,
    )
