"""The targeted experiment as a user runs it: a program, run again, with what is missing."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from common import targeted
from programs import refusal, run_script, squeezed
from targeted import PRESETS, QUICK

from jaxpoison import attacks, models, runs
from jaxpoison.data import load_embedded

TINY = (
    *("--preset", "quick", "--train-examples", "192", "--test-examples", "64"),
    *("--trusted-examples", "64", "--recipe.epochs", "2", "--recipe.milestones", "1"),
    *("--recipe.batch-size", "64", "--width", "2", "--blocks", "1", "--num-poisons", "6"),
    *("--num-targets", "2", "--gm.num-steps", "3", "--hint.schedule", "1"),
)


def run(run_dir, *flags):
    return run_script("experiments/targeted.py", "--run-dir", run_dir, *flags, cwd=run_dir.parent)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("targeted") / "run"
    return run_dir, run(run_dir, *TINY, "--defenses", "hint")


def test_a_run_prints_strength_first_and_leaves_table_and_archives(first):
    run_dir, done = first
    assert done.returncode == 0, done.stderr
    strength = done.stdout.index("Strength: of undefended victims")
    assert done.stdout.index("target001-none") < strength < done.stdout.index("target000-hint")
    assert "Without poisons, a network from new weights" in done.stdout
    printed = squeezed(done.stdout)
    assert "| GM | none, no poisons |" in printed and "| GM | HINT |" in printed
    assert (run_dir / "predictions.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((run_dir / "result.json").read_text())
    assert result["kind"] == "targeted"
    assert [(row["target"], row["defense"]) for row in result["rows"]] == [
        (0, "clean"), (1, "clean"), (0, "none"), (1, "none"), (0, "hint"), (1, "hint"),
    ]  # fmt: skip
    for without, undefended in zip(result["rows"][:2], result["rows"][2:4], strict=True):
        for name in ("target_id", "target_label", "base_label"):
            assert without[name] == undefended[name]
    train = load_embedded("cifar10", seed=0).train.images[:192]
    for row in result["rows"]:
        assert row["success"] == (row["prediction"] == row["base_label"])
        assert 0 <= row["intended_confidence"] <= row["confidence"] <= 1
        one = attacks.load(run_dir / "poisons" / f"target{row['target']:03d}.npz")
        assert (one.target.target_id, one.target.base_label) == (
            row["target_id"],
            row["base_label"],
        )
        assert one.images.dtype == np.uint8
        assert one.is_poisoned.sum() == 6
        assert 0 < np.abs(one.images.astype(int) - train).max() <= 32
        assert np.all(one.labels[one.is_poisoned] == row["base_label"])


def test_running_again_does_only_what_is_missing(first):
    run_dir, _ = first
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "poisons").iterdir()}
    again = run(run_dir, *TINY, "--defenses", "hint", "random_noise", "--num-targets", "1")
    assert again.returncode == 0, again.stderr
    trained = [line.split(":")[0] for line in again.stdout.splitlines() if ": epoch" in line]
    assert set(trained) == {"gm-target000-random_noise"}
    assert "crafting" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def work(folder, config, model=None, splits=None):
    output = runs.Run(folder, {})
    meter = runs.Meter(1)
    return targeted.Work(config=config, output=output, meter=meter, model=model, splits=splits)


def test_a_network_without_poisons_that_cannot_be_trained_does_not_stop_the_others(
    tmp_path, monkeypatch
):
    config = dataclasses.replace(QUICK, num_targets=2)

    def fail(_):
        raise MemoryError("too large")

    monkeypatch.setattr(targeted, "without_poisons", fail)
    rows = targeted.unpoisoned(work(tmp_path, config))
    assert [row["target"] for row in rows] == [0, 1]
    assert {row["error"] for row in rows} == {"MemoryError: too large"}
    seen = [{"success": False}, {"success": True}]
    monkeypatch.setattr(targeted, "without_poisons", lambda _: seen)
    again = targeted.unpoisoned(work(tmp_path, config))
    assert [row["success"] for row in again] == [False, True]
    monkeypatch.setattr(targeted, "without_poisons", fail)  # is not asked again
    assert targeted.unpoisoned(work(tmp_path, config)) == again


def test_the_intended_class_may_be_the_likeliest_other_one(tmp_path):
    splits = load_embedded("cifar10", seed=0)
    model = models.resnet18(width=2, blocks=(1,))
    known = attacks.Victim(model, model.init(jax.random.key(0), splits.test.images[:1] / 255.0))
    config = dataclasses.replace(QUICK, num_targets=5, intended="runner_up")
    trials = targeted.draw(work(tmp_path, config, model, splits), known)
    logits = np.asarray(model.apply(known.variables, trials.targets[:, 0] / np.float32(255)))
    ranking = np.argsort(-logits, axis=1)
    np.testing.assert_array_equal(ranking[:, 0], trials.target_labels)
    np.testing.assert_array_equal(ranking[:, 1], trials.base_labels)


def test_metapoison_runs(tmp_path):
    flags = (
        "--attack",
        "mp",
        "--mp.num-steps",
        "1",
        "--mp.surrogates",
        "1",
        "--mp.batch-size",
        "64",
    )
    done = run(
        tmp_path / "run", *TINY, *flags, "--mp.poisons-per-batch", "6", "--defenses", "none",
        "--num-targets", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| MP | none |" in squeezed(done.stdout)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-poisons", "60"), "60 poisons of one class: the largest has"),
        (("--defenses", "luck"), "unknown defenses: luck"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch, flags, message):
    main = functools.partial(targeted.main, PRESETS, None)
    told = refusal(main, "--run-dir", tmp_path / "run", *TINY, *flags, patch=monkeypatch)
    assert message in told
    assert not (tmp_path / "run" / "checkpoints").exists()
