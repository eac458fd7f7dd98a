"""JAX's compilation cache, in the user's own cache folder."""

import contextlib
import os
import stat
from pathlib import Path

import jax

from jaxpoison.core import loops


def use_compilation_cache() -> Path | None:
    """Has JAX keep what it compiles, unless a cache is set already or this is a CPU.

    On CPU, programs with the fastest convolutions (`models.convolution`) cannot be kept.

    What is kept is native code that later programs run unchecked, so the folder belongs to the user
    and nobody else may write to it: `jaxpoison/compiled` in `$XDG_CACHE_HOME` (default `~/.cache`),
    mode 0700. One that belongs to somebody else, or that cannot be made, is not used.

    Returns:
      The folder, None where none is set by this call.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None or loops.steps_from_host():
        return None
    folder = _private_folder()
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _private_folder():
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored, by the specification of these folders.
    base = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    folder = base / "jaxpoison" / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not hasattr(os, "getuid"):
            return folder
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            folder.chmod(0o700)
            return folder
    return None
