"""The networks inside the package, and the program that trains them."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pretrain
import pytest
from common import cli
from programs import refusal

from jaxpoison import data, models, network

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "jaxpoison" / "models" / "weights"
FULL = ROOT.parent / "shared" / "data" / "tfds"
TINY = ("--preset", "quick", "--recipe.epochs", "2", "--recipe.batch-size", "500")


def run(*args, cwd):
    # As a user runs it: with XLA's optimizations, and with convolutions that no cache can keep.
    ours = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    users = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env=users | {"JAX_NUM_CPU_DEVICES": "1"},
        cwd=cwd,
    )


def train(run_dir, *flags):
    script = ROOT / "experiments" / "pretrain.py"
    return run(script, "--run-dir", run_dir, *TINY, *flags, cwd=run_dir.parent)


def test_training_leaves_weights_that_give_the_accuracy_of_the_table(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    done = train(folder)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((folder / "result.json").read_text())["rows"]
    assert row["num_train"] == 2500 and len(row["test_accuracies"]) == 2
    assert f"Right with kernels in float16, of 1,000: {row['test_correct']}." in done.stdout
    path = folder / "weights" / "seed0.npz"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
    test = data.load_embedded("cifar10").test
    predicted = network.predict(models.fast_cnn(), models.read_variables(path), test.images)
    assert abs(int(np.sum(predicted == test.labels)) - row["test_correct"]) <= 1

    again = train(folder)  # all is there
    assert again.returncode == 0 and "epoch 1/2" not in again.stdout
    main = functools.partial(cli.main, pretrain.PRESETS, None, pretrain.study)
    flags = ("--run-dir", folder, *TINY, "--recipe.learning-rate", "0.3")
    assert "another configuration" in refusal(main, *flags, patch=monkeypatch)


@pytest.mark.skipif(not FULL.exists(), reason="needs the whole of CIFAR-10")
def test_the_images_of_transfer_learning():
    train, test, _ = pretrain.load(
        dataclasses.replace(pretrain.CIFAR10, images="transfer", data_dir=str(FULL))
    )
    assert len(train.labels) == 48_000 and (np.bincount(train.labels) == 4800).all()
    assert len(test.labels) == 10_000


def stated():
    """Returns (name, right of 10,000, bytes, sha256) of each row of the README there."""
    row = r"\| `([\w-]+)\.npz` \| .* \| ([\d,]+) \| ([\d,]+) \| `(\w{64})` \|"
    found = re.findall(row, (WEIGHTS / "README.md").read_text())
    return [(name, *(int(n.replace(",", "")) for n in (right, size)), sha) for
            name, right, size, sha in found]  # fmt: skip


def test_what_is_shipped_is_what_is_stated():
    assert [name for name, *_ in stated()] == list(models.PRETRAINED)
    for name, _, size, sha256 in stated():
        content = (WEIGHTS / f"{name}.npz").read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
    shipped = {*(f"{name}.npz" for name in models.PRETRAINED), "efficientnet-lite0.npz"}
    assert {path.name for path in WEIGHTS.iterdir()} == {*shipped, "README.md"}
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 12e6


COUNT_RIGHT = """
import sys

import numpy as np

from jaxpoison import data, models, network

full, *names = sys.argv[1:]
test = (data.load("cifar10", data_dir=full) if full else data.load_embedded("cifar10")).test
for name in names:
    predicted = network.predict(*models.load_pretrained(name), test.images)
    print(name, int(np.sum(predicted == test.labels)), len(test.labels))
"""


def test_weights_are_as_good_as_stated(tmp_path):
    done = run(
        *("-c", COUNT_RIGHT, FULL if FULL.exists() else "", *models.PRETRAINED), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = {
        name: (int(right), int(of)) for name, right, of in map(str.split, done.stdout.splitlines())
    }
    assert list(found) == [name for name, *_ in stated()]
    for name, right, *_ in stated():
        if FULL.exists():
            assert found[name] == (right, 10_000)
        else:  # a tenth of them
            assert found[name][1] == 1000
            assert abs(found[name][0] / 1000 - right / 1e4) < 0.03


def test_networks_that_are_not_shipped():
    with pytest.raises(ValueError, match=r"no pretrained network 'resnet18'; expected \['cifar10'"):
        models.load_pretrained("resnet18")
