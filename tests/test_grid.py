"""The grid, its tables and its pictures: programs as a user runs them, at the smallest scale."""

import dataclasses
import functools
import json

import flax.linen as nn
import numpy as np
import pytest
import sensitivity
import untargeted
from common import cost, figures, page, registry, sources, study, tables, threats
from common.settings import Cell
from programs import ROOT, refusal, run_script, squeezed

from jaxpoison import models
from jaxpoison.data import load_embedded

EXPERIMENTS = ROOT / "experiments"
TINY = (
    *("--preset", "mnist-laptop", "--train-examples", "128", "--test-examples", "64"),
    *("--trusted-examples", "128", "--recipe.batch-size", "64", "--recipe.epochs", "2"),
    *("--hint.schedule", "1", "--trusted-epochs", "1", "--attacks", "durp", "--seeds", "0"),
)
GRID = (
    *("--poison-ratios", "1", "--defenses", "none", "recommended"),
    *("--controls", "random_noise", "--control-ratios", "1"),
)


def run(cwd, script, *flags):
    return run_script(f"experiments/{script}", *flags, cwd=cwd)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid in which poisons cannot be read at first, and the same command after that."""
    folder = tmp_path_factory.mktemp("grid")
    run_dir = folder / "runs" / "tiny"
    archive = run_dir / "poisons" / "seed0-p1.npz"
    archive.parent.mkdir(parents=True)
    archive.write_text("no archive")
    command = ("untargeted.py", "--run-dir", str(run_dir), *TINY, *GRID)
    first = run(folder, *command)
    rows = json.loads((run_dir / "result.json").read_text())["rows"]
    archive.unlink()
    second = run(folder, *command)
    return run_dir, (first, rows), second


CELLS = [(0, "none"), (1, "none"), (1, "recommended"), (1, "random_noise"), (0, "trusted")]


def test_a_failure_is_recorded_and_does_not_stop_the_grid(grid):
    _, (done, rows), _ = grid
    assert done.returncode == 1
    assert [(row["poison_ratio"], row["defense"]) for row in rows] == CELLS
    for row in rows:
        if row["poison_ratio"] == 1:
            assert "cannot be read as an archive" in row["error"] and "test_accuracy" not in row
        else:
            assert 0 <= row["test_accuracy"] <= 1 and "error" not in row
    assert "3 of 5 cells failed" in done.stderr
    assert "| 1 | random noise of HINT's size | failed | 0 |" in squeezed(done.stdout)


def test_the_same_command_trains_what_failed_and_nothing_else(grid):
    run_dir, (_, first), done = grid
    assert done.returncode == 0, done.stderr
    rows = json.loads((run_dir / "result.json").read_text())["rows"]
    assert [(row["poison_ratio"], row["defense"]) for row in rows] == CELLS
    assert rows[0] == first[0] and rows[-1] == first[-1]
    assert all(0 <= row["test_accuracy"] <= 1 for row in rows)
    epochs = [line for line in done.stdout.splitlines() if ": epoch " in line]
    assert {line.split(":")[0] for line in epochs} == {
        "seed0-p1-none", "seed0-p1-recommended", "seed0-p1-random_noise"
    }  # fmt: skip
    assert rows[2]["num_train"] == 128  # as collected, not as defended
    # Of all checkpoints, only those of the clean network are needed again.
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["seed0-p0-none"]


def test_a_choice_of_what_is_there_runs_nothing_and_loses_nothing(grid):
    run_dir, _, _ = grid
    before = json.loads((run_dir / "result.json").read_text())["rows"]
    less = ("--poison-ratios", "1", "--defenses", "recommended", "--control-ratios", "0")
    done = run(run_dir.parent, "untargeted.py", "--run-dir", str(run_dir), *TINY, *less)
    assert done.returncode == 0, done.stderr
    assert ": epoch " not in done.stdout
    printed = squeezed(done.stdout)
    assert "| 1 | recommended |" in printed and "| 1 | random noise" in printed
    assert json.loads((run_dir / "result.json").read_text())["rows"] == before


def test_predictions_are_those_of_the_accuracy_in_the_table(grid):
    run_dir, _, _ = grid
    assert (run_dir / "predictions.png").read_bytes().startswith(b"\x89PNG")
    labels = load_embedded("mnist").test.labels[:64]
    for row in json.loads((run_dir / "result.json").read_text())["rows"]:
        with np.load(run_dir / "predictions" / f"{Cell.of(row).name}.npz") as archive:
            assert np.mean(archive["labels"] == labels) == pytest.approx(row["test_accuracy"])
            assert np.all(archive["confidences"] >= 0.1) and np.all(archive["confidences"] <= 1)


def test_tables_of_a_grid_are_written_as_markdown_and_latex(grid):
    run_dir, _, _ = grid
    (run_dir.parent / "notes.md").write_text("What to make of all.")
    (run_dir / "notes.md").write_text("What to make of it.")
    page, latex = run_dir.parent / "page.md", run_dir.parent / "tables.tex"
    done = run(run_dir, "tables.py", "--results", str(run_dir.parent), "--out", str(page),
               "--latex", str(latex))  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = squeezed(page.read_text())
    order = ("What to make of all.", "- [tiny]", "## tiny", "What to make of it.")
    assert sorted(order, key=text.index) == list(order)
    assert "| random noise of HINT's size | not run |" in text and "](tiny/predictions.png)" in text
    assert r"\begin{tabular}{lrr}" in latex.read_text()
    assert r"HINT's size & not run &" in latex.read_text()


def test_sensitivity_runs(tmp_path):
    done = run(tmp_path, "sensitivity.py", "--run-dir", "run", *TINY, "--defenses", "hint_r0.25")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    table = tables.table_IV(result)
    assert [row[0] for row in table.rows] == ["r = 0.25"]
    assert table.rows[0][2] == "97.13 ± 0.03"
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (update,) = [line for line in lines if "residual" in line]
    assert update["poison_recall"] <= 0.25 * 128 / 77 + 1e-6


def test_cost_adds_up_and_goes_on(tmp_path):
    flags = ("--dataset", "mnist", "--examples", "128", "--rounds", "1", "--run-dir", "run")
    names = ("--defenses", "hint_r0.5", "epic")
    done = run(tmp_path, "cost.py", *flags, *names)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    plain, hint, epic = result["rows"]
    assert [row["defense"] for row in result["rows"]] == ["none", "hint_r0.5", "epic"]
    assert plain["step_ratio"] == 1 and plain["num_events"] == 0
    assert hint["num_events"] == 2 and epic["num_events"] == 12  # at 6, 8, ..., 28
    for row in (hint, epic):
        parts = row["num_events"] * row["event_epochs"]
        parts += (30 - row["num_events"]) * row["ordinary_epochs"]
        assert row["ratio"] == pytest.approx(row["step_ratio"] + parts / 30)
    assert hint["counted"] == pytest.approx(1 + 2 * (1 + 2 * 0.5) / (3 * 30))
    assert "| EPIC |" in squeezed(done.stdout)
    again = run(tmp_path, "cost.py", *flags, *names)
    assert again.returncode == 0 and "compiled" not in again.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--defenses", "none", "magic"), "unknown defenses: magic; there are none, hint"),
        (("--defenses", "none", "--controls", "grey"), "leave this defen"),
        (("--defenses", "friends", "--friends.epoch", "2"), "a run of 2 epochs never reaches"),
        (("--control-ratios", "-1"), "poison ratios p must be in [0, 1], not -1"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch, flags, message):
    main = functools.partial(study.main, untargeted.PRESETS, untargeted.__doc__)
    told = refusal(main, "--run-dir", tmp_path / "run", *TINY, *flags, patch=monkeypatch)
    assert message in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("script", [untargeted, sensitivity])
@pytest.mark.parametrize("preset", list(untargeted.PRESETS))
def test_presets_name_defenses_that_can_be_built(script, preset):
    config = script.PRESETS[preset]
    splits = load_embedded(config.dataset)
    model = models.Classifier(Body(), num_features=3)
    for name in config.defenses + config.controls:
        assert name in registry.DEFENSES and tables.label(name)
        study.defense_of(config, model, splits, Cell(0, 1.0, name))
    names = [cell.name for seed in config.seeds for cell in study.cells_of(config, seed)]
    assert len(names) == len(set(names))


def test_variants_of_hint_differ_in_what_their_names_say():
    made = {}

    def note(model, trusted, config):
        return config

    config = untargeted.MNIST_LAPTOP
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry.defenses, "hint", note)
        for name in ("hint", "hint_sign", "hint_random", "hint_mass", "hint_r0.1", "hint_beta0.125",
                     "hint_identity", "hint_released", "hint_every", "hint_every_all",
                     "hint_every_random", "hint_every_sign", "hint_every_identity"):  # fmt: skip
            made[name] = registry.make_defense(name, config, None, load_embedded("mnist"))
    changed = {
        name: {
            field.name: getattr(other, field.name)
            for field in dataclasses.fields(other)
            if getattr(other, field.name) != getattr(made["hint"], field.name)
        }
        for name, other in made.items()
    }
    assert changed == {
        "hint": {},
        "hint_every": {"schedule": (1,), "every": 1},
        "hint_every_all": {"schedule": (1,), "every": 1, "ratio": 1.0},
        "hint_every_random": {"schedule": (1,), "every": 1, "selection": "random"},
        "hint_every_sign": {"schedule": (1,), "every": 1, "step": "sign", "gamma": 0.062 / 4},
        "hint_every_identity": {
            "schedule": (1,),
            "every": 1,
            "solver": "identity",
            "gamma": 0.1 / 0.5,
        },
        "hint_sign": {"step": "sign"},
        "hint_random": {"selection": "random"},
        "hint_mass": {"ratio": 1.0, "mass": 0.9},
        "hint_r0.1": {"ratio": 0.1},
        "hint_beta0.125": {"beta": 0.125},
        "hint_identity": {"solver": "identity", "gamma": 0.2},
        "hint_released": {
            "beta": 16 / 255,
            "solver": "lissa",
            "hessian_examples": "chosen",
            "coordinates": "normalized",
            "late_epoch": 5,  # of the schedule (2, 5)
            "storage": "uint8_floor",
        },
    }


def row(ratio, defense, accuracy, seed=0, **more):
    values = {"seed": seed, "poison_ratio": ratio, "defense": defense, "num_train": 100}
    return {**values, "test_accuracy": accuracy, "train_seconds": 1.0, **more}


def made_by_hand(rows, **more):
    config = dataclasses.asdict(untargeted.MNIST_LAPTOP)
    environment = {"device": "1 x cpu", "commit": "abc"}
    return {"rows": rows, "config": config, "environment": environment, "source": "MNIST", **more}


def test_table_II_gives_mean_and_spread_and_marks_what_is_missing():
    failed = {"seed": 1, "poison_ratio": 1.0, "defense": "hint", "error": "ValueError: x"}
    rows = [row(1.0, "none", value, seed) for seed, value in enumerate((0.5, 0.6, 0.7))]
    rows += [row(1.0, "hint", 0.8), failed, {**failed, "defense": "epic"}]
    table = tables.table_II(made_by_hand(rows, kind="untargeted"))
    ours, paper = table.rows
    assert ours == [
        "1",
        "ours",
        "60.00 ± 10.00",
        "80.00 (1 failed)",
        "not run",
        "not run",
        "failed",
    ]
    assert r"74.62 $\pm$ 0.94 & 88.92 $\pm$ 0.19" in table.latex()
    assert paper[2:4] == ["74.62 ± 0.94", "88.92 ± 0.19"]
    assert "3 seeds" in table.caption
    assert tables.table_IV(made_by_hand(rows)) is None


def test_tables_name_the_network():
    rows = [row(1.0, "none", 0.5), row(1.0, "hint", 0.6)]
    for preset, name in (("cifar10-fast", "fast network of width 64"),
                         ("cifar10-laptop", "ResNet of width 8 and blocks 1-1-1")):  # fmt: skip
        config = dataclasses.asdict(untargeted.PRESETS[preset])
        result = made_by_hand(rows, kind="untargeted") | {"config": config}
        assert f"training images, {name}, " in tables.table_II(result).caption


def test_the_fast_network_is_as_wide_as_it_is_told():
    config = untargeted.PRESETS["cifar10-fast"]
    for width in (16, 64):
        model = sources.build_model(dataclasses.replace(config, width=width))
        assert model.body.widths == (width, 2 * width, 4 * width)


def test_table_III_counts_targets_with_wilson_intervals():
    rows = [row(0.0, "none", 0.9, seed, attack="gm", success=seed < 15) for seed in range(20)]
    table = tables.table_III(made_by_hand(rows, kind="targeted"))
    assert table.rows[0] == ["GM", "none", "15 of 20 [53, 89] %", "5 of 5", "90.00 ± 0.00",
                             "93.69 ± 0.19"]  # fmt: skip
    assert table.rows[1][:4] == ["GM", "HINT", "not run", "0 of 5"]
    # One network sees all targets, so that its accuracy has no spread.
    seen = [row(0.0, "clean", 0.9, 0, attack="gm", success=False) for _ in range(20)]
    table = tables.table_III(made_by_hand(seen, kind="targeted"))
    assert table.rows[0] == ["GM", "none, no poisons", "0 of 20 [0, 16] %", "-", "90.00", "-"]


def test_the_results_page_is_that_of_the_committed_results():
    text = (ROOT / "docs" / "results.md").read_text()
    assert text == page.page(EXPERIMENTS / "results", ROOT / "docs"), (
        "run python experiments/tables.py"
    )


def test_the_page_of_threats_is_that_of_the_committed_results():
    text = (ROOT / "docs" / "threats.md").read_text()
    assert text == threats.page(EXPERIMENTS / "results", ROOT / "docs"), (
        "run python experiments/tables.py"
    )


def committed(name):
    return json.loads((EXPERIMENTS / "results" / name / "result.json").read_text())


def lines_of(heading, start):
    """Returns cells of the lines of a table of the page of threats that start so."""
    text = squeezed((ROOT / "docs" / "threats.md").read_text()).split(f"## {heading}\n")[1]
    lines = text.split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] == start]


def test_threats_are_looked_up_where_they_were_measured():
    (header,) = lines_of("Training from scratch", "defense")
    (none,) = lines_of("Training from scratch", "none")
    (atda,) = lines_of("Training from scratch", "ATDA")
    rows = committed("untargeted-mnist-schedule")["rows"]
    mean = np.mean([100 * r["test_accuracy"] for r in rows
                    if r["defense"] == "none" and r["poison_ratio"] == 1])  # fmt: skip
    assert none[1].startswith(f"{mean:.2f} ± ")
    # DeepConfuse was run with few defenses; others must not borrow figures of other attacks.
    assert atda[header.index("DeepConfuse, digits")] == "-"
    blended = header.index("Blended 5%, digits")
    (row,) = (
        r for r in committed("backdoor-mnist-laptop")["rows"]
        if (r["attack"], r["share"], r["defense"]) == ("blended", 0.05, "activation")
    )  # fmt: skip
    (clustering,) = lines_of("Training from scratch", "activation clustering")
    success = 100 * row["successes"] / row["num_triggered"]
    assert clustering[blended].startswith(f"{success:.1f} / {100 * row['test_accuracy']:.1f} ")


def test_threats_count_the_attacks_that_a_filter_leaves():
    rows = [r for r in committed("transfer-cifar10-laptop")["rows"] if "filters" in r]
    name = "deep k-NN"
    each = [r["filters"][name] for r in rows if r["share"] == 0.8]
    left = f"{sum(e['successes'] for e in each)} of {sum(e['trials'] for e in each)}"
    line, strong = lines_of("Transfer learning", name)
    assert line[-2] == left == "65 of 120"
    for place, share in enumerate((0.1, 0.24, 0.5)):
        rows = [r for r in committed("transfer-cifar10-strong")["rows"] if r["share"] == share]
        each = [r["filters"][name] for r in rows]
        left = f"{sum(e['successes'] for e in each)} of {sum(e['trials'] for e in each)}"
        assert strong[1 + place] == left == "0 of 18"
    kinds = [cell.split(" of ") for cell in line[1:4]]
    assert sum(int(total) for _, total in kinds) == 420


def test_accuracy_over_p_is_drawn(tmp_path):
    rows = [row(p, name, 0.9 - p / 3) for p in (0.0, 0.5, 1.0) for name in ("none", "hint")]
    rows.append(row(0.0, "trusted", 0.5))
    curves = tables.curves(rows, "mnist")
    assert list(curves) == ["none", "HINT"]
    np.testing.assert_allclose([point[1] for point in curves["none"]], [90, 73.333, 56.667], 1e-4)
    assert [point[3] for point in curves["none"]] == [98.44, None, 74.62]
    figures.accuracy(tmp_path / "accuracy.png", curves)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_counted_cost_is_what_the_papers_settings_amount_to():
    settings = untargeted.CIFAR10_PAPER
    passes = {name: cost.counted(settings, name, 49_000, 1_000) for name in cost.DEFENSES}
    assert passes["none"] == 1
    assert passes["hint_r1"] == pytest.approx(1 + 3 * 3 / 240)
    assert passes["atda"] == pytest.approx(1 + 20 / 3)
    assert passes["friends"] == pytest.approx(1 + 62 / 240)
    assert cost.events(settings, "epic") == tuple(range(12, 69, 4))
    assert passes["epic"] == pytest.approx(1 + 15 / 240)
    assert passes["recommended"] == 2
