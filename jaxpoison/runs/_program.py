"""How a program of ours ends: one line for whoever started it, and an exit status."""

import argparse
import contextlib
import errno
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxpoison.core import memory

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_TEXTS = ("no space left on device", "disk quota exceeded")
INTERRUPTED = 130  # what shells report of a program that Ctrl-C has ended

_needed: dict[Path, int] = {}  # what `require_space` was asked for, to name it later


class DiskFullError(OSError):
    """There is no room for what a run writes."""


@contextlib.contextmanager
def program(folder: Path | None = None) -> Iterator[None]:
    """Runs the body of a program; errors of its user's making end it with one line.

    ValueError, OSError, ImportError and RuntimeError: `error: ...`, exit status 1; a full disk is
    told with its folder and what is left. Ctrl-C: `stopped; the same command continues`, exit
    status 130. Any other error is a defect and keeps its traceback.

    Freed memory stays with the process, see `core.memory`.

    Args:
      folder: where the program writes, for the line about a full disk.
    """
    memory.keep_freed()
    sys.stdout.flush()
    for stream in (sys.stdout, sys.stderr):
        # Terminals that cannot show a character show a question mark.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[attr-defined]
    # Where Orbax logs its tracebacks; that of a full disk is one line below.
    logging.getLogger("absl").addFilter(_not_about_a_full_disk)
    ignored, sys.unraisablehook = sys.unraisablehook, _not_interrupted(sys.unraisablehook)
    try:
        yield
    except KeyboardInterrupt:
        _stop()
    except Exception as error:
        if isinstance(error, DiskFullError):
            _leave(f"error: {error}", 1)
        if disk_is_full(error):
            _leave(f"error: {full_disk(folder or _folder_of(error))}", 1)
        if isinstance(error, ValueError | OSError | ImportError | RuntimeError):
            sys.exit(f"error: {error}")
        raise
    finally:
        sys.unraisablehook = ignored


def disk_is_full(error: BaseException | None) -> bool:
    """Returns whether an error, or one that led to it, came from a full disk."""
    return any(
        (isinstance(each, OSError) and each.errno in _FULL)
        or isinstance(each, DiskFullError)
        or any(text in str(each).lower() for text in _FULL_TEXTS)
        for each in _chain(error)
    )


def full_disk(folder: Path, needed: int | None = None) -> DiskFullError:
    """Returns the error about a folder whose disk is full.

    Args:
      folder: where there is no room.
      needed: bytes that the next file takes, where known.
    """
    needed = _needed.get(folder.absolute()) if needed is None else needed
    left = f"{_size(shutil.disk_usage(_existing(folder)).free)} left"
    wanted = "" if needed is None else f", at least {_size(needed)} needed"
    return DiskFullError(
        f"the disk of {folder} is full ({left}{wanted}): make room there, and the same command "
        "continues"
    )


def require_space(folder: Path, needed: int) -> None:
    """Raises DiskFullError if fewer than `needed` bytes are left where `folder` is."""
    _needed[folder.absolute()] = needed
    if shutil.disk_usage(_existing(folder)).free < needed:
        raise full_disk(folder, needed)


def count(text: str) -> int:
    """Returns a number of things from the command line: the `type` of an argparse argument."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return number


def _not_about_a_full_disk(record):
    return not any(text in record.getMessage().lower() for text in _FULL_TEXTS)


def _chain(error):
    """Yields an error, those inside of it, and those that led to it."""
    seen, waiting = set(), [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]


def _folder_of(error):
    """Returns the folder that an error names, the current one if it names none."""
    for each in _chain(error):
        if isinstance(each, OSError) and isinstance(each.filename, str):
            return Path(each.filename).parent
    return Path.cwd()


def _existing(folder):
    folder = Path(folder).absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())


def _size(num_bytes):
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def _not_interrupted(hook):
    """Returns `hook`, but for Ctrl-C where Python ignores errors: in finalizers and callbacks."""

    def look(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            _stop()
        hook(unraisable)

    return look


def _stop():
    _leave("stopped; the same command continues", INTERRUPTED)


def _leave(line, status):
    """Prints a line and ends the process at once.

    Libraries that were writing would print errors of their own on the way out. Nothing is lost:
    files appear whole or not at all.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        print(line, file=sys.stderr, flush=True)
    os._exit(status)
