"""The tables that the guides have typed hold the figures of the committed results."""

import importlib
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TRANSFER = "transfer-cifar10-laptop"


def results(name):
    return json.loads((ROOT / "experiments" / "results" / name).read_text(encoding="utf-8"))


def table(page, heading):
    """Returns the rows of the first table under a heading, without the header."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.split(rf"^## {re.escape(heading)}$", text, flags=re.M)[1].split("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", section, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def percent(share):
    return f"{100 * share:.0f}%"


def test_the_attacker_who_knows_the_filter():
    result = results(f"{TRANSFER}/adaptive-last_3.json")
    *rows, best = table("filters.md", "An attacker who knows it")
    swept = [row["lambda"] for row in result["rows"][:-1]]
    assert [float(shown[0]) for shown in rows[:-1]] == swept
    taken = {kind: np.zeros(20, bool) for kind in ("dataset", "trusted")}
    for row, shown in zip(result["rows"], rows, strict=True):
        count = {kind: sum(hits) for kind, hits in row["taken"].items()}
        assert shown[1].split(" of ")[0] == str(count["none"])
        assert shown[2] == percent(row["found"]["dataset"])
        assert shown[4] == percent(row["found"]["trusted"])
        assert [shown[3], shown[5]] == [str(count["dataset"]), str(count["trusted"])]
        for kind, hits in taken.items():
            hits |= row["taken"][kind]
    assert best[3].startswith(f"{taken['dataset'].sum()} of 20")
    assert best[5].startswith(f"{taken['trusted'].sum()} of 20")


def test_the_extractor_that_is_trained_further():
    rows = results(f"{TRANSFER}/fine_tuning.json")["rows"]
    shown = table("filters.md", "An extractor that is trained further")
    settings = [(0, True), (0, False), (1, True), (1, False)]
    for (depth, frozen), cells in zip(settings, shown, strict=True):
        same = [row for row in rows if (row["depth"], row["bn_frozen"]) == (depth, frozen)]
        successes = {row["defense"]: str(row["successes"]) for row in same}
        wanted = [successes.get(name, "-") for name in ("none", "before", "each epoch", "hint")]
        assert [cell.split(" of ")[0] for cell in cells[1:5]] == wanted
        (none,) = (row for row in same if row["defense"] == "none")
        found = ", ".join(f"{100 * none['found_after'][n]['tpr']:.0f}" for n in ("1", "5", "20"))
        assert cells[5] == f"{found}%"


def test_tables_without_images():
    result = results("tabular-sklearn-laptop/result.json")
    for label, *cells in table("filters.md", "Without images"):
        name, share, total = re.fullmatch(r"([\w ]+), p = ([\d.]+): (\d+) of 40", label).groups()
        rows = [
            row
            for row in result[name]["rows"]
            if row["budget"] == 1.0 and row["share"] == float(share)
        ]
        filters = list(rows[0]["filters"])
        sums = {key: sum(row["filters"][key]["successes"] for row in rows) for key in filters}
        assert sums["none"] == int(total)
        assert cells == [str(sums[key]) for key in filters if key != "none"]


@pytest.mark.parametrize("index", range(3))
def test_leave_one_out(index):
    case = results("leave-one-out-mnist-laptop/result.json")["cases"][index]
    row = table("influence.md", "What influence means, and when it fails")[index]
    assert row[1:] == [f"{case['pearson']:.3f}", f"{case['slope']:.2f}"]


def test_what_hint_costs():
    path = ROOT / "benchmarks" / "results" / "hint_overhead.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "experiments" / "cost.md").read_text(encoding="utf-8")
    shown = re.search(r"([\d.]+) times plain training, ([\d.]+) by counting passes", text)
    assert shown is not None
    assert shown[1] == f"{result['overhead']:.3f}"
    assert shown[2] == f"{result['overhead_predicted']:.3f}"


def test_products_that_solves_over_a_whole_network_take():
    folder = ROOT / "benchmarks"
    result = json.loads((folder / "results" / "kronecker_narrow.json").read_text(encoding="utf-8"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    lines = re.split(r"^### Whole networks and EK-FAC$", text, flags=re.M)[1].split("\n### ")[0]
    shown = [line.strip("|").split("|") for line in re.findall(r"^\| [\d.]+ .*$", lines, re.M)]
    solvers = ("cg", "cg, EK-FAC", "cg, EK-FAC at 30 times the damping", "cg, Nystrom")
    assert [float(cells[0]) for cells in shown] == result["settings"]["dampings"]
    for share, *cells in shown:
        rows = {row["solver"]: row for row in result["rows"] if row["damping"] == float(share)}
        over = f"over {result['settings']['most']}"
        wanted = [", ".join(str(n or over) for n in rows[name]["products"]) for name in solvers]
        for name in ("EK-FAC", "K-FAC"):
            row = rows[name]
            wanted.append(f"{row['residual']:.3g}, {row['correlation']:.2f}")
        assert [cell.strip() for cell in cells] == wanted


def test_how_many_poisons_explanations_name():
    result = json.loads((ROOT / "benchmarks" / "results" / "explain.json").read_text("utf-8"))
    page = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "benchmarks" / "explain.py"))["table"](result) in page


def test_how_good_attributions_are(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cells = importlib.import_module("attribution_quality").cells
    path = ROOT / "benchmarks" / "results" / "attribution_quality.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert table("influence.md", "Other rules, and a store of gradients") == [
        list(cells(row)) for row in rows
    ]
