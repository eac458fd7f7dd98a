"""Files that appear whole or not at all, folders that can be written to, archives of arrays."""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

# What deflate can do at most, by its format: 258 bytes out of 2 bits.
_MOST_INFLATION = 1032


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


def check_is_file(path: str | os.PathLike[str], what: str) -> Path:
    """Returns `path` (`~` stands for the home folder) if a file is there.

    Args:
      path: where a file should be.
      what: what it should be, for messages, such as "an .npz file".

    Raises:
      FileNotFoundError: if there is nothing.
      IsADirectoryError: if it is a folder.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {what}")
    return path


def read_npz(
    path: str | os.PathLike[str],
    what: str,
    *,
    required: Sequence[str] = (),
    optional: Sequence[str] | None = None,
    max_bytes: int | None = None,
    mapped: bool = False,
) -> dict[str, np.ndarray]:
    """Returns the arrays in an .npz file that may come from anywhere.

    Nothing is unpickled, and no array is allocated before its header has been compared with the
    size of its entry, and that with the size of the file.

    Args:
      path: file to read; `~` stands for the home folder.
      what: what it should be, for messages, such as "an archive of poisons".
      required: entries that must be there.
      optional: entries to read where they are there; None for all that are there.
      max_bytes: how much the entries to be read may hold, unpacked; None for no bound but the
        file's own size times 1032, which is what deflate can do at most.
      mapped: whether arrays that are stored without compression are mapped, read-only, instead of
        read; their checksums are then not compared.

    Raises:
      FileNotFoundError, IsADirectoryError: if there is no file.
      ValueError: if the file is damaged, encrypted, larger than allowed, holds objects, or lacks
        an entry; the message names the file.
    """
    path = check_is_file(path, what)
    with _opened_npz(path, what) as (archive, members):
        missing = [name for name in required if name not in members]
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}; {what} holds {', '.join(required)} "
                f"(this file: {', '.join(members)[:200] or 'nothing'})"
            )
        if optional is not None:
            members = {n: m for n, m in members.items() if n in required or n in optional}
        size = sum(member.file_size for member in members.values())
        if max_bytes is not None and size > max_bytes:
            raise ValueError(
                f"{path} cannot be read as {what}: it unpacks to {size:,} bytes, more than the "
                f"{max_bytes:,} that can be needed"
            )
        arrays = {}
        for name, member in members.items():
            try:
                arrays[name] = _read_npy(archive, member, path if mapped else None)
            except Exception as error:  # the header alone can raise seven kinds
                reason = (str(error) or type(error).__name__).splitlines()[0][:200]
                raise ValueError(
                    f"{path} cannot be read as {what}: entry {name!r} is damaged or of an "
                    f"unknown kind ({reason})"
                ) from error
        return arrays


def npz_names(path: str | os.PathLike[str], what: str) -> list[str]:
    """Returns the names of the arrays in an .npz file; arguments and errors as `read_npz`."""
    path = check_is_file(path, what)
    with _opened_npz(path, what) as (_, members):
        return list(members)


@contextlib.contextmanager
def _opened_npz(
    path: Path, what: str
) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Gives an .npz file with its arrays by name; ValueError if it is damaged."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            archive = stack.enter_context(zipfile.ZipFile(file))
            members = _npz_members(archive, os.fstat(file.fileno()).st_size)
        # zipfile raises many kinds for a damaged file; what cannot be opened is another matter.
        except PermissionError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as {what}: it is no .npz file or damaged ({error})"
            ) from error
        yield archive, members


def _npz_members(archive: zipfile.ZipFile, file_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Returns the arrays in an archive by name; ValueError for what no .npz file has."""
    members = {}
    for member in archive.infolist():
        if not member.filename.endswith(".npy"):
            continue
        name = member.filename.removesuffix(".npy")
        if name in members:
            raise ValueError(f"two entries are named {name!r}")
        if member.flag_bits & 1:
            raise ValueError(f"entry {name!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"entry {name!r} is packed by method {member.compress_type}")
        most = 1 if member.compress_type == zipfile.ZIP_STORED else _MOST_INFLATION
        if member.compress_size > file_bytes or member.file_size > most * member.compress_size:
            raise ValueError(
                f"entry {name!r} claims {member.file_size:,} bytes, more than this file can hold"
            )
        members[name] = member
    return members


def _read_npy(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, map_from: Path | None
) -> np.ndarray:
    """Returns the array in a member, once its header agrees with the member's size.

    With the path of the archive, `map_from`, an array that is stored as it is gets mapped.
    """
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"format version {version}")
        shape, fortran_order, dtype = readers[version](stream)
        if dtype.hasobject or dtype.kind == "V" or not dtype.itemsize:
            raise ValueError(f"dtype {dtype}; only numbers and text are read, never objects")
        if min(shape, default=0) < 0:
            raise ValueError(f"its header promises a shape of {shape}")
        wanted, present = math.prod(shape) * dtype.itemsize, member.file_size - stream.tell()
        if wanted != present:
            raise ValueError(
                f"its header promises {shape} {dtype}, {wanted:,} bytes, but {present:,} follow"
            )
        order = "F" if fortran_order else "C"
        if map_from is not None and wanted and member.compress_type == zipfile.ZIP_STORED:
            start = _data_start(map_from, member, present + stream.tell()) + stream.tell()
            return np.memmap(map_from, dtype, "r", start, shape, order)
        # In blocks, since all bytes at once would double the memory; to the end, for the checksum.
        array = np.empty(shape, dtype, order=order)
        buffer = array.reshape(-1, order="A").view(np.uint8) if wanted else np.empty(0, np.uint8)
        filled = 0
        while filled < wanted:
            block = stream.read(min(wanted - filled, 1 << 20))
            if not block:
                raise ValueError("it ends early")
            buffer[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
            filled += len(block)
        if stream.read(1):
            raise ValueError("more bytes follow than it should hold")
        return array


def _data_start(path: Path, member: zipfile.ZipInfo, num_bytes: int) -> int:
    """Returns where the bytes of a stored member start in the file of its archive."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
        if len(header) < 30:
            raise ValueError("its header is missing")
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = member.header_offset + 30 + sum(lengths)
        if start + num_bytes > os.fstat(file.fileno()).st_size:
            raise ValueError("it ends early")
        return start
