"""Files that appear whole or not at all, and folders that can be written to."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a binary file that takes the place of `path` once the block has ended without an error.

    A process that is killed meanwhile leaves `path` as it was, and next to it an unfinished file
    that the next write replaces. If the block raises, nothing is left.

    Args:
      path: the file to write; `~` stands for the home folder.

    Raises:
      OSError: if the folder cannot be written to; a full disk included. The error names `path`.
    """
    path = Path(path).expanduser()
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(unfinished)):
            error.filename = str(path)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` in UTF-8; the file appears whole or not at all. Raises as `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Makes `folder` (`~` stands for the home folder) and returns its absolute path.

    Raises:
      PermissionError: if it cannot be made or written to.
    """
    folder = Path(folder).expanduser().absolute()
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder} ({error.strerror}): choose another folder"
        ) from error
    return folder
