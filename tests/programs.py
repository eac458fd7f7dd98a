"""Running programs as users do: each in a process of its own, on one device."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 600  # a hang fails after so long


def script_command(script, *flags):
    """Returns the command that runs a script of the repository."""
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run_script(script, *flags, cwd, **variables):
    """Runs a script of the repository in the folder `cwd`, on a terminal of 200 columns."""
    return _run(script_command(script, *flags), cwd, {"COLUMNS": "200", **variables})


def run_code(code, *arguments, cwd=ROOT, **variables):
    """Runs Python source in the folder `cwd`, where it finds the package of this repository."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return _run(command, cwd, {"PYTHONPATH": str(ROOT), **variables})


def environment(**variables):
    """Returns the variables of a program: one device, unless others are given."""
    return os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | variables


def refusal(main, *flags, patch):
    """Calls `main()` in this process with flags that it must refuse; returns the one line.

    `patch` is pytest's monkeypatch. What a program makes of its errors is `runs.program`'s.
    """
    printed = io.StringIO()
    patch.setattr(sys, "argv", ["program", *map(str, flags)])
    patch.setattr(sys, "stderr", printed)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code  # a text is status 1
    return " ".join(f"{printed.getvalue()} {stopped.value.code}".split())


def squeezed(text):
    """Returns text without the spaces that align the cells of its tables."""
    return re.sub(" +", " ", text)


def _run(command, cwd, variables):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=environment(**variables),
        cwd=cwd,
    )  # fmt: skip
