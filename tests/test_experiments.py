"""The experiments as a user runs them: as programs, killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = (
    *("--preset", "quick", "--train-examples", "192", "--recipe.batch-size", "64"),
    *("--test-examples", "100", "--trusted-examples", "100"),
    *("--recipe.epochs", "4", "--hint.schedule", "1", "2", "--trusted-epochs", "2"),
    *("--attacks", "durp", "pgd", "--checkpoint-every", "1"),
)


def command(script, run_dir, *flags):
    return [sys.executable, str(ROOT / "experiments" / script), "--run-dir", str(run_dir), *flags]


def run(script, run_dir, *flags):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "200"}
    return subprocess.run(
        command(script, run_dir, *flags),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=run_dir.parent,
    )


def losses(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return sorted((line["cell"], line["epoch"], line["loss"]) for line in lines)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from start to end, without interruption."""
    run_dir = tmp_path_factory.mktemp("mnist") / "run"
    return run_dir, run("mnist_hint.py", run_dir, *TINY)


def test_a_run_leaves_table_picture_and_results(whole):
    run_dir, done = whole
    assert done.returncode == 0, done.stderr
    assert "| 1 | HINT |" in done.stdout and "trusted images alone" in done.stdout
    assert "74.62" in done.stdout  # the paper's row beside ours
    assert (run_dir / "noise.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((run_dir / "result.json").read_text())
    assert [row["defense"] for row in result["rows"]] == ["none", "none", "hint", "trusted"]
    assert {"versions", "device", "commit"} <= result["environment"].keys()
    assert result["config"]["epsilon"] == 0.3


def test_a_run_logs_the_evidence_of_each_update(whole):
    run_dir, _ = whole
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    updates = [line for line in lines if "residual" in line]
    assert [line["epoch"] for line in updates] == [1, 2]
    for line in updates:
        assert line["residual"] < 1e-5
        assert line["poison_recall"] == pytest.approx(0.5, abs=0.01)  # r = .5 at p = 1
        assert {"step_255_q50", "share_at_beta", "features_seconds"} <= line.keys()


def test_running_again_does_no_work_twice(whole):
    run_dir, first = whole
    again = run("mnist_hint.py", run_dir, *TINY)
    assert again.returncode == 0, again.stderr
    assert "epoch" not in again.stdout.split("Test accuracy")[0]
    assert (
        again.stdout.split("Test accuracy")[1].split("picture")[0]
        == (first.stdout.split("Test accuracy")[1].split("picture")[0])
    )


def test_killed_and_started_again_ends_with_the_same_bits(whole, tmp_path):
    whole_dir, _ = whole
    run_dir = tmp_path / "run"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(
        command("mnist_hint.py", run_dir, *TINY),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=tmp_path,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    # Kill in the middle of HINT's training, after its first update.
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and '"cell": "seed0-p1-hint", "epoch": 1' in metrics.read_text():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    resumed = run("mnist_hint.py", run_dir, *TINY)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(run_dir) == losses(whole_dir)  # exactly: floats as JSON writes them


def test_cifar_runs(tmp_path):
    done = run("cifar_hint.py", tmp_path / "run", *TINY, "--width", "4", "--blocks", "1", "1")
    assert done.returncode == 0, done.stderr
    assert "48.62" in done.stdout
    assert (tmp_path / "run" / "noise.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--poison-ratios", "1.5"), "poison ratios p must be in [0, 1], not 1.5"),
        (("--hint.ratio", "0.001"), "less than one example"),
        (("--hint.schedule", "9"), "has no epoch below the run's 4"),
        (("--epsilon", "8"), "epsilon is in units of pixels"),
        (("--data", "full", "--data-dir", "nowhere"), "jaxpoison.data.prepare"),
        (("--preset", "best"), "invalid choice: 'best'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, flags, message):
    done = run("mnist_hint.py", tmp_path / "run", *TINY, *flags)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_of_another_run_is_refused(whole):
    run_dir, _ = whole
    done = run("mnist_hint.py", run_dir, *TINY, "--hint.beta", "0.1")
    assert done.returncode != 0
    assert "another configuration" in done.stderr and "hint" in done.stderr


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    done = run("mnist_hint.py", tmp_path / "file", *TINY)
    assert done.returncode != 0
    assert "cannot write to" in done.stderr
