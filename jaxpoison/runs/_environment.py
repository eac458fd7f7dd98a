"""Versions, device and commit, for results files."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxpoison.core import hosts


def environment() -> dict[str, Any]:
    """Returns versions, device and git commit, for results files."""
    packages = ("jaxpoison", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": hosts.process_count(),
        "cpu_cores": os.cpu_count(),
        "commit": _commit(),
    }


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from its folder, not installed
        return None


def _commit():
    """Returns the commit of this source tree, with a mark for changes; None outside of one."""
    root = Path(__file__).parents[2]
    try:
        # Inside somebody else's repository, e.g. in its virtual environment, it is not ours.
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        commit = _git(root, "rev-parse", "--short", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if dirty else "")


def _git(folder, *arguments):
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
