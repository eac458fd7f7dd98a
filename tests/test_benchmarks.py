"""The benchmarks as a user runs them, at sizes that say nothing about speed."""

import importlib
import json

import numpy as np
import pytest
import scipy.stats
from programs import ROOT, run_script

TINY = ("--rounds", "1", "--sample-seconds", "0")
SMALL = (*TINY, "--train", "32", "--group", "16", "--epochs", "0")


def run(tmp_path, script, *flags):
    out = tmp_path / "result.json"
    done = run_script(f"benchmarks/{script}", "--out", out, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"versions", "device", "commit"} <= result["environment"].keys()
    assert result["limit_gflops"] > 0
    for row in result["rows"]:
        assert row["work"] in done.stdout
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["gflops"] is None or row["of_limit"] > 0
    return result


def by_work(result, prefix):
    found = [row for row in result["rows"] if row["work"].startswith(prefix)]
    assert found
    return found


def test_hvp(tmp_path):
    nothing_there = ("--peers", "--peers-python", "false")  # the program that always fails
    result = run(tmp_path, "hvp.py", *SMALL, "--batches", "16", *nothing_there)
    assert result["peers"] == {}
    afresh = by_work(result, "Hessian product, all parameters, B = 16, afresh")
    hand = next(row for row in afresh if row["name"] == "JAX by hand")
    assert hand["difference"] < 1e-5  # XLA's convolutions against ours
    assert all(row["compile_seconds"] > 0 for row in result["rows"])


def test_ihvp(tmp_path):
    result = run(tmp_path, "ihvp.py", *SMALL, "--chunk-size", "16", "--tolerance", "1e-2")
    whole, in_chunks = by_work(result, "CG to 0.01, all parameters")[2:4]  # Gauss-Newton
    assert whole["residual"] < 0.01 and whole["products"] == in_chunks["products"]
    precise = by_work(result, "CG to 0.01, last layer")[-1]
    assert precise["residual"] < 2e-5
    assert [row["items_per_second"] * row["seconds"] for row in by_work(result, "LiSSA")] == (
        pytest.approx([100] * 4)
    )


def test_influence(tmp_path):
    result = run(tmp_path, "influence.py", *SMALL, "--batch", "32", "--chunk-size", "16")
    for row in by_work(result, "pixel maps"):
        assert row["items_per_second"] * row["seconds"] == pytest.approx(32)


def test_scaling(tmp_path):
    sizes = ("--examples", "32", "64", "--only", "examples")
    result = run(tmp_path, "scaling.py", *TINY, *sizes)
    assert all(row["peak_megabytes"] > 100 for row in result["rows"])
    assert "seconds by examples, scores" in result["slopes"]


def test_hint_selection(tmp_path):
    sizes = ("--networks", "mnist", "--examples", "128", "--batch-size", "64", "--part", "2")
    result = run(tmp_path, "hint_selection.py", *TINY, *sizes)
    solve = by_work(result, "MNIST CNN, N = 128: solve")[0]
    assert solve["residual"] < 2e-6


def test_filter_overhead(tmp_path):
    result = run(tmp_path, "filter_overhead.py", *TINY, "--widths", "2", "--batches", "4")
    plain, vectors, verdict = by_work(result, "ResNet-18 of width 2, B = 4")
    assert plain["ratio"] == 1 and verdict["items_per_second"] > 0
    # 5 BatchNorm layers of each width: the first stage has the stem's in place of a shortcut's.
    assert vectors["bytes_per_example"] == 4 * 2 * 2 * (5 + 5 * 2 + 5 * 4 + 5 * 8)


def test_train_step(tmp_path):
    flags = ("--networks", "MNIST CNN", "--batch", "4", "--peers", "--peers-python", "false")
    result = run(tmp_path, "train_step.py", *TINY, *flags)
    assert result["peers"] == {}
    ours, plain = by_work(result, "MNIST CNN, B = 4")
    # Forward (28 to 24 pixels, 1 to 40 channels; 12 to 8, 40 to 100; linear), to the weights, and
    # to all activations but the images.
    first, second, last = 24**2 * 25 * 40, 8**2 * 25 * 40 * 100, 1600 * 10
    flops = ours["gflops"] * ours["seconds"] * 1e9
    assert flops == pytest.approx(4 * 2 * (2 * first + 3 * second + 3 * last))
    assert plain["difference"] < 1e-6


def test_datamodeling_scores_are_spearmans(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    quality = importlib.import_module("attribution_quality")
    rng = np.random.default_rng(0)
    scores, halves = rng.normal(size=(3, 20)), rng.random((40, 20)) < 0.5
    exact = np.exp(halves @ scores.T)  # any rising function of the sums
    losses = np.stack([exact[:, 0], -exact[:, 1], rng.normal(size=40)], axis=1)
    want = scipy.stats.spearmanr(halves @ scores[2], losses[:, 2]).statistic
    got = quality.datamodeling_scores(scores, halves, losses)
    np.testing.assert_allclose(got, [1, -1, want], rtol=1e-12)
