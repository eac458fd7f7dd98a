"""A run's folder and how its programs end: kills, two processes, damaged files, full disks."""

import argparse
import dataclasses
import errno
import io
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import run_code

from jaxpoison import cli, runs
from jaxpoison.core import loops
from jaxpoison.runs import _program, _progress, cache, pictures

SETTINGS = {"run_dir": Path("anywhere"), "epsilon": 0.3, "schedule": (1, 2)}


@dataclasses.dataclass(frozen=True)
class Inner:
    ratio: object = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    blocks: tuple = (1, 2)


def test_settings_in_numpy_and_jax_become_pythons():
    made = runs.plain(Outer(Inner(np.float32(0.25)), (jnp.int32(3), np.array(4))))
    assert made == Outer(Inner(0.25), (3, 4))
    assert [type(value) for value in (made.inner.ratio, *made.blocks)] == [float, int, int]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Inner(np.ones(2)), r"inner\.ratio is of type ndarray"),
        (Inner(float("nan")), r"inner\.ratio is NaN"),
        (Inner(object), r"inner\.ratio is of type type"),
    ],
)
def test_settings_that_json_cannot_hold_are_named_before_any_work(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        runs.plain(Outer(bad))
    with pytest.raises(ValueError, match=message):
        runs.Run(tmp_path / "run", {"inner": bad})
    assert not (tmp_path / "run").exists()


def test_results_in_numpy_and_jax_are_written_as_numbers(tmp_path):
    runs.write_json(tmp_path / "a.json", {"a": np.float32(0.5), "b": jnp.arange(2)})
    assert runs.read_json(tmp_path / "a.json") == {"a": 0.5, "b": [0, 1]}
    with pytest.raises(TypeError, match="type object"):
        runs.write_json(tmp_path / "a.json", {"a": object()})
    assert runs.read_json(tmp_path / "a.json") == {"a": 0.5, "b": [0, 1]}


def test_a_folder_may_be_named_in_another_way_moved_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.Run(Path("a"), SETTINGS).finish("cell", {"x": 1})
    again = runs.Run(tmp_path / "a", SETTINGS | {"run_dir": tmp_path / "a"})
    assert again.finished("cell") == {"x": 1} and "run_dir" not in again.config
    shutil.copytree("a", "b")
    assert runs.Run(Path("b"), SETTINGS | {"epsilon": np.float64(0.3)}).rows() == [{"x": 1}]
    with pytest.raises(ValueError, match=r"b holds a run with another .*epsilon: 0.3"):
        runs.Run(Path("b"), SETTINGS | {"epsilon": 0.1})


@pytest.mark.parametrize("content", [b'{"te', b"\xff\xfe\x00"])
def test_damaged_files_are_named_with_what_to_do(tmp_path, content):
    run = runs.Run(tmp_path, SETTINGS)
    run.finish("cell", {})
    for name, use in (
        ("cells/cell.json", lambda: run.finished("cell")),
        ("cells/cell.json", run.rows),
        ("config.json", lambda: runs.Run(tmp_path, SETTINGS)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged .*: delete it"):
            use()


def test_a_line_of_metrics_that_a_kill_has_cut_is_dropped(tmp_path):
    run = runs.Run(tmp_path, SETTINGS)
    run.log("cell", 0, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"cell": "cell", "ep')
    assert [line["epoch"] for line in run.metrics("cell")] == [0]
    run.log("cell", 1, {"loss": 0.5})
    run.log("cell", 2, {"loss": 0.25})
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2]
    path.write_text('{"cell": "cell", "ep{"cell": "cell", "epoch": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged in line 1: delete that line"):
        run.metrics("cell")


def test_bad_settings_leave_no_trace(tmp_path):
    def check():
        raise ValueError("no such attack")

    with pytest.raises(ValueError, match="no such attack"):
        runs.Run(tmp_path / "run", SETTINGS, check=check)
    assert not (tmp_path / "run").exists()


HOLDER = """
import sys, time
from pathlib import Path
from jaxpoison import runs
runs.Run(Path(sys.argv[1]), {})
print("held", flush=True)
time.sleep(600)
"""


def test_one_process_at_a_time_and_a_killed_one_blocks_nobody(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            who = f"in use by process {holder.pid} on host {socket.gethostname()}"
            with pytest.raises(RuntimeError, match=who):
                runs.Run(tmp_path, {})
        finally:
            holder.send_signal(signal.SIGKILL)
    runs.Run(tmp_path, {})
    runs.Run(tmp_path, {})  # the process that holds it may open it again


def test_pictures_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.png"
    figure, _ = pictures.pyplot().subplots()

    class Cut:
        def savefig(self, file, **options):
            file.write(b"\x89PNG\r\n\x1a\n half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pictures.save(Cut(), path)
    assert not list(tmp_path.iterdir())
    pictures.save(figure, path)
    assert pictures.is_whole(path)
    path.write_bytes(path.read_bytes()[:-20])  # as an older version may have left it
    assert not pictures.is_whole(path) and not pictures.is_whole(tmp_path / "b.png")


def test_printing_never_fails(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    runs.say("60 ± 10")
    assert raw.getvalue() == b"60 ? 10\n"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        runs.say("to nobody")
        runs.say("to nobody")


def test_times_are_whole_at_80_columns():
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, legacy_windows=False)
    with runs.Meter(12345, console) as meter:
        meter.show("seed0-p0.6-hint_recommended: epoch 10/26, loss 1.234, " + 3 * "long ", 1234)
    last = screen.getvalue().split("\r")[-1]
    assert "1234/12345" in last and "0:00:00" in last and "-:--:--" in last


def test_a_stage_has_a_bar_on_a_terminal_and_elsewhere_lines_at_its_ends(capsys, monkeypatch):
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, legacy_windows=False)
    with runs.Stages(console) as stages:
        stages.tell("Reading [red]images", 1200, 2500)
        stages.tell("Reading [red]images", 2500, 2500)
        stages.tell("Training", 1, 3)
    last = screen.getvalue().split("\r")[-1]
    assert "Reading [red]images" in last and "2500/2500" in last
    assert "Training" in last and "1/3" in last
    assert not capsys.readouterr().out
    now = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    with runs.Stages() as stages:
        for done, seconds in ((1, 0), (2, 9), (3, 3), (4, 1)):
            now[0] += seconds
            stages.tell("Reading", 1000 * done, 4000)
        stages.tell("Training", 1, 1)
    assert capsys.readouterr().out.splitlines() == [
        "Reading: 1,000 of 4,000, 0 s",
        "Reading: 3,000 of 4,000, 12 s",
        "Reading: 4,000 of 4,000, 13 s",
        "Training: 1 of 1, 0 s",
    ]


def test_tables_are_markdown_and_columns_of_any_text():
    wide = "w" * 300
    assert runs.markdown(["a", ""], [["60 ± 10", "[0, 31] %"], ["x|y", wide]]).splitlines() == [
        f"| a       | {'':300} |",
        f"|---------|{'-' * 302}|",
        f"| 60 ± 10 | {'[0, 31] %':300} |",
        rf"| x\|y    | {wide} |",
    ]
    lines = [["wrong label", "9", "of 60"], ["[bold]", "1,200", "of 2,000"]]
    assert runs.columns(lines, right=(1,)) == (
        "  wrong label      9  of 60\n  [bold]       1,200  of 2,000"
    )
    assert runs.columns([]) == "" and len(runs.markdown(["a"], []).splitlines()) == 2
    for broken in (lambda: runs.markdown(["a"], [["1", "2"]]), lambda: runs.columns([["1"], []])):
        with pytest.raises(ValueError, match=r"a row of \d cells in a table of 1"):
            broken()


@pytest.fixture
def ended(monkeypatch):
    """The exit statuses with which a program has ended the process."""
    statuses = []

    def leave(status):
        statuses.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(_program.os, "_exit", leave)
    return statuses


def test_an_interrupted_program_ends_with_one_line(ended, capsys):
    with pytest.raises(SystemExit), runs.program():
        raise KeyboardInterrupt
    assert ended == [130]
    assert capsys.readouterr().err == "stopped; the same command continues\n"


def test_an_interruption_where_python_ignores_errors_ends_a_program_as_well():
    """Ctrl-C may come while an object is finalized: Python prints the error and goes on."""
    done = run_code(
        "import sys\n"
        "from jaxpoison import runs\n"
        "class Interrupted:\n"
        "    def __del__(self):\n"
        "        raise KeyboardInterrupt\n"
        "before = sys.unraisablehook\n"
        "with runs.program():\n"
        "    pass\n"
        "assert sys.unraisablehook is before\n"
        "with runs.program():\n"
        "    Interrupted()\n"
        "    print('went on')\n"
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "stopped; the same command continues\n"


def test_a_full_disk_is_one_line(ended, capsys, tmp_path):
    def write():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a"))
        except OSError as error:
            raise ValueError("the checkpoint cannot be written") from error

    with pytest.raises(ValueError):
        runs.attempt(write)  # is not a failed cell: all others would fail as well
    with pytest.raises(SystemExit), runs.program(tmp_path):
        logging.getLogger("absl").error("Orbax: No space left on device, in 280 lines")
        runs.attempt(write)
    with pytest.raises(SystemExit), runs.program(tmp_path):
        runs.Run(tmp_path, {}).require_space(10**18)
    assert ended == [1, 1]
    plain, with_need = capsys.readouterr().err.splitlines()
    assert f"error: the disk of {tmp_path} is full (" in plain and " left): make room" in plain
    assert "GB left, at least 1000000000.0 GB needed)" in with_need


def test_errors_of_the_users_making_are_one_line_and_others_keep_their_traceback():
    with pytest.raises(SystemExit, match="error: bad"), runs.program():
        raise ValueError("bad")
    with pytest.raises(ZeroDivisionError), runs.program():
        raise ZeroDivisionError


def test_what_is_compiled_is_kept_where_only_its_user_may_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "jaxpoison" / "compiled"
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)
    assert cache._private_folder() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)  # somebody else's choice
    assert cache._private_folder() is None
    assert runs.use_compilation_cache() is None  # one is set already, for all tests
    given = jax.config.values["jax_compilation_cache_dir"]
    folder.unlink()
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setattr(loops, "steps_from_host", lambda: True)
        assert runs.use_compilation_cache() is None  # on CPU
        monkeypatch.setattr(loops, "steps_from_host", lambda: False)
        assert runs.use_compilation_cache() == folder
    finally:
        jax.config.update("jax_compilation_cache_dir", given)


def test_missing_extras_are_named():
    with pytest.raises(
        ImportError, match=r'no_such_thing .*pip install "jaxpoison\[experiments\]"'
    ):
        runs.require_extra("experiments", "json", "no_such_thing")


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many"])
def test_counts_on_the_command_line(text):
    assert runs.count("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match=f"from 1 on, not {text}"):
        runs.count(text)


def test_the_command_of_the_package(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == "0.1.0\n"
    assert cli.main(["prepare", "mnist", "--data-dir", str(tmp_path), "--archives", "no"]) == 1
    assert "error: " in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "jaxpoison", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "prepare" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("kept", [True, False])
def test_what_threads_free_stays_with_the_process(kept):
    """XLA allocates in threads. Of 100 MB, twice, nothing is faulted in the second time."""
    program = f"""
import ctypes, resource, threading
from jaxpoison.core import memory
assert not {kept} or memory.keep_freed()
lib = ctypes.CDLL(None)
lib.malloc.restype, lib.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
lib.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
lib.free.argtypes = [ctypes.c_void_p]
faults = []
def use():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = lib.malloc(100_000_000)
        lib.memset(block, 1, 100_000_000)
        lib.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=use)
thread.start()
thread.join()
print(faults[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    faults = int(done.stdout)
    # Without: 4 KB pages 24,000 times, or huge ones 48 times.
    assert faults < 10 if kept else faults > 20
