"""The experiments as a user runs them: as programs, killed and started again."""

import ast
import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import backdoor as backdoor_grid
import cifar_hint
import mixed_threats
import mnist_hint
import numpy as np
import pytest
import transfer_filter
import trusted_set
import untargeted
from common import backdoor, cli, mixed, predictions, registry, sources, study, trusted
from programs import ROOT, environment, refusal, run_script, script_command, squeezed

from jaxpoison import attacks
from jaxpoison.defenses import AblConfig, HintConfig
from jaxpoison.runs import pictures

TINY = (
    *("--preset", "quick", "--train-examples", "192", "--recipe.batch-size", "64"),
    *("--test-examples", "100", "--trusted-examples", "100"),
    *("--recipe.epochs", "4", "--hint.schedule", "1", "2", "--trusted-epochs", "2"),
    *("--attacks", "durp", "pgd", "--checkpoint-every", "1"),
)
PRESETS = {"paper": mnist_hint.PAPER, "quick": mnist_hint.QUICK}


def run(script, run_dir, *flags, **variables):
    return run_script(
        f"experiments/{script}", "--run-dir", run_dir, *flags, cwd=run_dir.parent, **variables
    )


def losses(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return sorted((line["cell"], line["epoch"], line["loss"]) for line in lines)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from start to end, without interruption, on a terminal that knows ASCII only."""
    run_dir = tmp_path_factory.mktemp("mnist") / "run"
    return run_dir, run("mnist_hint.py", run_dir, *TINY, PYTHONIOENCODING="ascii")


def test_a_run_leaves_table_picture_and_results(whole):
    run_dir, done = whole
    assert done.returncode == 0, done.stderr
    table = squeezed((run_dir / "table.md").read_text())
    assert "| 1 | HINT |" in table and "trusted images alone" in table
    assert "74.62 ± 0.94" in table  # the paper's row next to ours
    for picture in ("noise.png", "summary.png"):
        assert pictures.is_whole(run_dir / picture)
    result = json.loads((run_dir / "result.json").read_text())
    names = ["none", "none", "hint", "recommended", "hint_every", "trusted"]
    assert [row["defense"] for row in result["rows"]] == names
    assert {"versions", "device", "commit"} <= result["environment"].keys()
    assert result["config"]["epsilon"] == 0.3


def test_a_run_ends_with_what_it_has_shown(whole):
    run_dir, done = whole
    end = done.stdout[done.stdout.index("Embedded slice of MNIST: 100% of 192 training images") :]
    assert max(map(len, end.splitlines())) <= 100
    assert "?76.5/255" in end  # for ±, as the terminal can
    rows = json.loads((run_dir / "result.json").read_text())["rows"]
    shown = {
        cells[1].strip(): cells[2].strip()
        for cells in (line.split("|") for line in end.splitlines() if line.startswith("| "))
    }
    for name, row in zip(
        ("clean images, no defense", "poisoned, no defense", "poisoned, HINT",
         "poisoned, recommended", "poisoned, HINT at every epoch", "trusted images alone"),
        rows,
        strict=True,
    ):  # fmt: skip
        assert shown[name] == f"{100 * row['test_accuracy']:.1f}"
    for file in ("summary.png", "table.md"):
        assert str(run_dir / file) in end


def test_a_run_logs_the_evidence_of_each_update(whole):
    run_dir, _ = whole
    lines = [*map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())]
    updates = [line for line in lines if "residual" in line]
    for cell, epochs in (("seed0-p1-hint", [1, 2]), ("seed0-p1-hint_every", [1, 2, 3])):
        assert [line["epoch"] for line in updates if line["cell"] == cell] == epochs
    for line in updates:
        assert line["residual"] < 1e-5
        assert line["poison_recall"] == pytest.approx(0.5, abs=0.01)  # r = .5 at p = 1
        assert {"step_255_q50", "share_at_beta", "features_seconds"} <= line.keys()


def test_running_again_elsewhere_does_no_work_twice_and_removes_what_a_kill_left(whole, tmp_path):
    whole_dir, first = whole
    run_dir = shutil.copytree(whole_dir, tmp_path / "moved")
    left = run_dir / "checkpoints" / "seed0-p1-hint" / "4"
    left.mkdir(parents=True)
    (run_dir / "predictions.png").write_bytes(b"\x89PNG half")
    again = run("mnist_hint.py", run_dir, *TINY, PYTHONIOENCODING="ascii")
    assert again.returncode == 0, again.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["seed0-p0-none"]
    assert pictures.is_whole(run_dir / "predictions.png")
    assert "run_dir" not in json.loads((run_dir / "config.json").read_text())
    assert ": epoch" not in again.stdout
    end = "Embedded slice of MNIST"
    assert (
        again.stdout.split(end)[1].split("picture")[0]
        == first.stdout.split(end)[1].split("picture")[0]
    )


def stop(run_dir, cell, epoch, number):
    """Starts the run, sends it a signal after an epoch of a cell; returns (status, stderr)."""
    metrics = run_dir / "metrics.jsonl"
    # In the background of a shell SIGINT is ignored, and children inherit that.
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = script_command("experiments/mnist_hint.py", "--run-dir", run_dir, *TINY)
    with subprocess.Popen(
        [sys.executable, "-c", listening, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=run_dir.parent,
    ) as process:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and f'"cell": "{cell}", "epoch": {epoch}' in metrics.read_text():
                process.send_signal(number)
                break
            time.sleep(0.05)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_stopped_killed_and_started_again_ends_with_the_same_bits(whole, tmp_path):
    whole_dir, _ = whole
    run_dir = tmp_path / "run"
    stopped = stop(run_dir, "seed0-p0-none", 1, signal.SIGINT)
    assert stopped == (130, "stopped; the same command continues\n")
    # In the middle of HINT's training, after its first update.
    status, _ = stop(run_dir, "seed0-p1-hint", 1, signal.SIGKILL)
    assert status == -signal.SIGKILL
    resumed = run("mnist_hint.py", run_dir, *TINY)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(run_dir) == losses(whole_dir)  # exactly: floats as JSON writes them
    for path in (whole_dir / "predictions").iterdir():
        for got, want in zip(
            predictions.read(run_dir / "predictions" / path.name), predictions.read(path),
            strict=True,
        ):  # fmt: skip
            assert got.tolist() == want.tolist()


def test_cifar_runs(tmp_path):
    few = ("--width", "4", "--defenses", "none", "hint")
    done = run("cifar_hint.py", tmp_path / "run", *TINY, *few)
    assert done.returncode == 0, done.stderr
    assert "48.62" in done.stdout  # not all that is needed to sum up: the whole table
    assert (tmp_path / "run" / "noise.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--poison-ratios", "1.5"), "poison ratios p must be in [0, 1], not 1.5"),
        (("--hint.ratio", "0.001"), "less than one example"),
        (("--hint.schedule", "9"), "which a run of 4 epochs never reaches"),
        (("--epsilon", "8"), "epsilon is in units of pixels"),
        (("--data", "full", "--data-dir", "nowhere"), "jaxpoison.data.prepare"),
        (("--preset", "best"), "invalid choice: 'best'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch, flags, message):
    main = functools.partial(study.main, PRESETS, mnist_hint.__doc__)
    told = refusal(main, "--run-dir", tmp_path / "run", *TINY, *flags, patch=monkeypatch)
    assert message in told
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_of_another_run_is_refused(whole, monkeypatch):
    run_dir, _ = whole
    main = functools.partial(study.main, PRESETS, mnist_hint.__doc__)
    flags = ("--run-dir", run_dir, *TINY, "--hint.beta", "0.1")
    told = refusal(main, *flags, patch=monkeypatch)
    assert "another configuration" in told and "hint" in told


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    done = run("mnist_hint.py", tmp_path / "file", *TINY)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_examples": -50}, "--train-examples must be at least 1, not -50"),
        ({"width": 0}, "--width must be at least 1, not 0"),
        ({"blocks": ()}, "--blocks must name at least one stage"),
        ({"blocks": (1, 0)}, "--blocks must be at least 1, not 0"),
        ({"seeds": (-1,)}, "--seeds must be at least 0, not -1"),
        ({"checkpoint_every": 0}, "--checkpoint-every must be at least 1, not 0"),
        ({"data_dir": "x"}, "--data-dir x has no effect on the slice inside the package"),
    ],
)
def test_flags_that_no_experiment_can_use_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        cli.check_flags(dataclasses.replace(cifar_hint.QUICK, **change))


def test_flags_of_inner_settings_are_named_and_presets_pass():
    config = mnist_hint.QUICK
    object.__setattr__(recipe := dataclasses.replace(config.recipe), "batch_size", 0)
    with pytest.raises(ValueError, match=r"--recipe\.batch-size must be at least 1, not 0"):
        cli.check_flags(dataclasses.replace(config, recipe=recipe))
    for module in (cifar_hint, mnist_hint):
        cli.check_flags(module.PAPER)
    for presets in (
        untargeted.PRESETS,
        transfer_filter.PRESETS,
        backdoor_grid.PRESETS,
        trusted_set.PRESETS,
        mixed_threats.PRESETS,
    ):
        for preset in presets.values():
            cli.check_flags(preset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_examples": 32, "poison_ratios": (0.01,)}, "are 0 poisons, fewer than the 2"),
        ({"train_examples": 64}, "fewer than one batch"),
        (
            {"recipe": {"epochs": 4}, "hint": HintConfig(schedule=(5,))},
            "which a run of 4 epochs never reaches",
        ),
        ({"attacks": ("pgd", "luck")}, "unknown attacks: luck; there are pgd, dap"),
    ],
)
def test_what_would_do_nothing_or_fail_late_is_refused_first(change, message):
    config = mnist_hint.QUICK
    recipe = {"batch_size": 128 if message.startswith("fewer") else 32} | change.pop("recipe", {})
    recipe = dataclasses.replace(config.recipe, **recipe)
    config = dataclasses.replace(config, recipe=recipe, **{"train_examples": 64, **change})
    with pytest.raises(ValueError, match=message):
        study.check(config, sources.build_model(config))


def test_damaged_predictions_are_named(tmp_path):
    path = tmp_path / "predictions" / "cell.npz"
    path.parent.mkdir()
    path.write_bytes(b"PK half")
    with pytest.raises(ValueError, match=r"cell\.npz is damaged .*delete it and .*cell\.json"):
        predictions.read(path)


def test_every_name_is_listed_once_in_lines_that_fit():
    lines = registry.listing(registry.DEFENSES).splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == list(registry.DEFENSES) and max(map(len, lines)) <= 80
    for path in (ROOT / "experiments").glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert max(map(len, text.splitlines())) <= 80, path.name


def test_the_scale_of_the_papers_in_small(tmp_path):
    flags = ("--preset", "tiny", "--parts", "dap_l2", "--base.defenses", "none", "jpeg")
    small = ("--base.train-examples", "64", "--base.test-examples", "20")
    done = run("paper_scale.py", tmp_path / "run", *flags, *small)
    assert done.returncode == 0, done.stderr
    assert "seed0-p0-surrogate: epoch 2/2" in done.stdout
    report = squeezed((tmp_path / "run" / "report.md").read_text())
    assert "## DAP alone, as Tao et al. have it" in report and "within 0.5 in L2" in report
    assert "JPEG, quality 10" in report and "## TAP" not in report
    (archive,) = (tmp_path / "run" / "dap_l2" / "poisons").iterdir()
    poisoned = attacks.load(archive)
    (settings,) = poisoned.config["attacks"]
    assert (settings["norm"], settings["epsilon"], settings["num_steps"]) == ("l2", 0.5, 100)
    again = run("paper_scale.py", tmp_path / "run", *flags, *small)
    assert again.returncode == 0 and ", loss" not in again.stdout


def test_backdoors_in_small(tmp_path):
    flags = ("--preset", "quick", "--train-examples", "256", "--test-examples", "100")
    flags += ("--trusted-examples", "64", "--recipe.epochs", "2", "--attacks", "badnets", "sig")
    flags += ("--defenses", "none", "layers", "attribution", "--shares", "0.05", "0.2")
    done = run("backdoor.py", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["rows"]
    cells = {(row["attack"], row["share"], row["defense"]) for row in rows}
    # A tenth of the images has the target class, so SIG cannot poison a fifth.
    both = [("badnets", 0.05), ("badnets", 0.2), ("sig", 0.05)]
    assert cells == {("clean", 0.0, "none")} | {
        (*one, name) for one in both for name in ("none", "layers", "attribution")
    }
    for row in rows:
        assert row["num_train"] == 256
        if row["defense"] in ("layers", "attribution"):
            assert 0 <= row["poison_recall"] <= 1 and "by_chance" not in row
    poisoned = attacks.load(tmp_path / "run" / "poisons" / "seed0-badnets-0.2.npz")
    assert poisoned.images.dtype == "uint8" and (poisoned.attack_id == 1).sum() == 51
    table = squeezed((tmp_path / "run" / "table.md").read_text())
    assert "| BadNets | 20 |" in table and "| SIG | 5 |" in table
    again = run("backdoor.py", tmp_path / "run", *flags)
    assert again.returncode == 0 and "epoch" not in again.stdout.split("Backdoors to class")[0]


def test_trusted_sets_in_small(tmp_path):
    flags = ("--preset", "quick", "--train-examples", "192", "--test-examples", "100")
    flags += ("--recipe.batch-size", "64", "--recipe.epochs", "2", "--hint.schedule", "1")
    flags += ("--trusted-epochs", "2", "--attacks", "durp", "--sizes", "20")
    flags += ("--wrong-size", "20", "--defenses", "recommended", "trusted")
    done = run("trusted_set.py", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    cells = [
        (row["poison_ratio"], row["num_trusted"], row["wrong_share"], row["defense"])
        for row in result["rows"]
    ]
    assert sorted(cells) == sorted(
        [(0.0, 0, 0.0, "none"), (1.0, 0, 0.0, "none")]
        + [(1.0, 20, wrong, name) for wrong in (0.0, 0.1) for name in ("recommended", "trusted")]
    )
    table = squeezed((tmp_path / "run" / "table.md").read_text())
    assert "| trusted images | wrong labels, % | recommended | trusted images alone |" in table
    assert "| 20 | 10 |" in table
    again = run("trusted_set.py", tmp_path / "run", *flags)
    assert again.returncode == 0 and ": epoch" not in again.stdout


def test_mixed_threats_in_small(tmp_path):
    flags = ("--preset", "quick", "--train-examples", "256", "--test-examples", "100")
    flags += ("--recipe.batch-size", "64", "--recipe.epochs", "2", "--trusted-examples", "64")
    flags += ("--attacks", "durp", "--num-poisons", "4", "--gm.num-steps", "2")
    flags += ("--defenses", "recommended", "activation", "spectral+recommended")
    done = run("mixed_threats.py", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = result["rows"]
    cells = [(row["threats"], row["drops"], row["defense"]) for row in rows]
    num_triggered = np.sum(sources.load(mixed_threats.QUICK, 0).test.labels[:100] != 0)
    both = ("", "none"), ("", "recommended"), ("spectral", "recommended"), ("activation", "none")
    kinds = ("clean", *mixed.THREATS, "all")
    assert cells == [(threats, *one) for one in both for threats in kinds]
    for row in rows:
        assert 0 <= row["taken"] <= row["num_targets"] == 2
        assert 0 <= row["successes"] <= row["num_triggered"] == num_triggered
        assert bool(row["drops"]) == ("found" in row) == (row["num_train"] < 256)
        if row["threats"] == "all" and row["drops"]:
            assert list(row["found"]) == list(mixed.THREATS)
    table = squeezed((tmp_path / "run" / "table.md").read_text())
    assert "| spectral signatures, then recommended |" in table and "| all at once |" in table

    config = dataclasses.replace(mixed_threats.QUICK, train_examples=256, trusted_examples=64)
    folder = SimpleNamespace(folder=tmp_path / "run")
    work = SimpleNamespace(config=config, output=folder, model=sources.build_model(config))
    clean = sources.load(config, 0).train
    every, where = mixed.composed(work, 0, "all")
    counts = {name: rows.sum() for name, rows in where.items()}
    assert counts == {"untargeted": 256, "flips": 26, "backdoor": 13, "targeted": 8}
    own = sum(where[name].astype(int) for name in ("flips", "backdoor", "targeted"))
    assert own.max() == 1  # disjoint
    assert set(clean.labels[where["targeted"]]) == {
        base
        for _, base in attacks.load(folder.folder / "poisons/seed0-targeted.npz").config["targets"]
    }
    wrong = every.labels != clean.labels
    np.testing.assert_array_equal(wrong, where["flips"] | where["backdoor"])
    assert (every.labels[where["backdoor"]] == config.target_class).all()
    for threats in kinds:
        one, its = mixed.composed(work, 0, threats)
        touched = np.any(one.images != clean.images, axis=(1, 2, 3))
        for name, rows in its.items():
            # In a set with all threats each image is that of the set where its threat is alone.
            alone = mixed.composed(work, 0, "untargeted" if name == "flips" else name)[0].images
            exact = rows if name != "untargeted" else own == 0
            if threats == "all":
                np.testing.assert_array_equal(every.images[exact], alone[exact])
        if threats in ("clean", "flips"):
            assert not touched.any()
        elif threats != "all":
            assert touched[its[threats]].all() and not touched[~its[threats]].any()
    again = run("mixed_threats.py", tmp_path / "run", *flags)
    assert again.returncode == 0 and ": epoch" not in again.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": ()}, "at least one seed and one untargeted attack"),
        ({"backdoor": "sip"}, "unknown backdoors: sip; there are badnets"),
        ({"defenses": ("luck+none",)}, "unknown filters: luck; there are spectral"),
        ({"defenses": ("luck",)}, "unknown defenses: luck; there are none"),
        ({"flip_share": 0.6}, "flip_share must be in .0, 0.5. and at least one image, not 0.6"),
        ({"num_targets": 11}, "num_targets must be from 1 to the 10 classes"),
        ({"num_poisons": 500}, "num_poisons must be from 1 to 87, the images of the smallest"),
    ],
)
def test_mixed_threats_that_cannot_be_are_refused_before_any_work(change, message):
    config = dataclasses.replace(mixed_threats.QUICK, **change)
    with pytest.raises(ValueError, match=message):
        mixed.check(config, sources.build_model(config))


def test_trusted_sets_are_balanced_nested_and_as_wrong_as_asked():
    config = trusted_set.PRESETS["mnist-laptop"]
    sets = {
        (cell.num_trusted, cell.wrong_share): trusted.trusted_images(config, cell)
        for cell in trusted.cells_of(config, 0)
        if isinstance(cell, trusted.TrustedCell)
    }
    train = {image.tobytes() for image in sources.load(config, 0).train.images}
    for (size, wrong), dataset in sets.items():
        if not wrong:
            assert np.bincount(dataset.labels).tolist() == [size // 10] * 10
            np.testing.assert_array_equal(dataset.images, sets[1000, 0].images[:size])
    assert not train & {image.tobytes() for image in sets[1000, 0].images}
    right = sets[300, 0.0]
    for wrong in (0.01, 0.05, 0.1):
        moved = sets[300, wrong]
        np.testing.assert_array_equal(moved.images, right.images)
        assert (moved.labels != right.labels).sum() == 300 * wrong
        assert set((moved.labels - right.labels) % 10) == {0, 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (15,)}, "multiples of the 10 classes, not 15"),
        ({"sizes": (5000,)}, "takes 500 images of each class; there are"),
        ({"wrong_shares": (2.0,)}, r"must be in \[0, 1\], not 2"),
        ({"poison_ratios": (0.5, 1.0)}, "name one poison ratio"),
    ],
)
def test_a_trusted_set_that_cannot_be_is_refused_before_any_work(change, message):
    with pytest.raises(ValueError, match=message):
        trusted.check(dataclasses.replace(trusted_set.PRESETS["mnist-laptop"], **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": ("badnet",)}, "unknown attacks: badnet; there are badnets, blended"),
        ({"shares": (0.0001,)}, "at least one of the 2000 training images, not 0.0001"),
        ({"target_class": 11}, "target class 11 does not occur"),
        ({"defenses": ("luck",)}, "unknown defenses: luck"),
        ({"abl": AblConfig(turn=12)}, "which a run of 10 epochs never reaches"),
    ],
)
def test_a_backdoor_that_cannot_be_is_refused_before_any_work(change, message):
    config = dataclasses.replace(backdoor_grid.PRESETS["quick"], **change)
    with pytest.raises(ValueError, match=message):
        backdoor.check(config, sources.build_model(config))
