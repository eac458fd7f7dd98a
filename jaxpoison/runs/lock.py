"""One process at a time in a run's folder."""

import contextlib
import errno
import json
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

NAME = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

# Of this process, by folder: a lock is held until the process ends, and held once.
_held: dict[Path, int] = {}


def hold(folder: Path) -> None:
    """Takes the folder for this process until it ends.

    The operating system gives the lock back however the process ends, so that one killed with
    SIGKILL blocks nobody; on network file systems as well, where they support locks. Where they do
    not, the file names the holder, who is asked for if it is on this host.

    Raises:
      RuntimeError: if another process holds it; names host and process.
    """
    if fcntl is None:
        return
    folder = folder.resolve()
    path = folder / NAME
    if folder in _held:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(_held[folder]), path.stat()):
                return
        os.close(_held.pop(folder))  # of a folder that was deleted meanwhile
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(file):
            raise RuntimeError(_refusal(folder, _owner(file)))
        me = {"host": socket.gethostname(), "process": os.getpid(), "boot": _boot()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(me).encode(), 0)
    except BaseException:
        os.close(file)
        raise
    _held[folder] = file


def _lock(file):
    assert fcntl is not None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            return False
    return not _alive(_owner(file))


def _owner(file):
    """Returns what the lock's holder wrote, {} if nothing can be read."""
    with contextlib.suppress(ValueError, OSError):
        owner = json.loads(os.pread(file, 1000, 0))
        if isinstance(owner, dict):
            return owner
    return {}


def _alive(owner):
    """Returns whether the holder still runs, as far as this host can know."""
    if owner.get("host") != socket.gethostname() or owner.get("boot") != _boot():
        return False
    process = owner.get("process")
    if not isinstance(process, int) or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _boot():
    """Returns what names this start of the machine, None where it cannot be told."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _refusal(folder, owner):
    who = f"process {owner.get('process', '?')} on host {owner.get('host', '?')}"
    return f"{folder} is in use by {who}: wait until it has ended, or choose another --run-dir"
