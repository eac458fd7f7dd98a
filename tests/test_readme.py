"""The Python examples of the README run as they are printed, and its figures are measured ones."""

import json
import re
import statistics
from pathlib import Path

import jax
import jax.flatten_util
import numpy as np
import pytest

from jaxpoison import data

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


def run(block):
    names = {}
    # Executing them is the test; the text is this repository's own README, never input.
    exec(compile(block, str(README), "exec"), names)
    return names


@pytest.fixture
def few_images(monkeypatch):
    """Cuts the embedded slice, so that training takes seconds."""
    load_embedded = data.load_embedded

    def load(name):
        splits = load_embedded(name)
        parts = ("train", 384), ("validation", 64), ("test", 64)
        return splits._replace(
            **{part: getattr(splits, part).take(slice(size)) for part, size in parts}
        )

    monkeypatch.setattr(data, "load_embedded", load)


def test_there_are_three_examples():
    assert len(BLOCKS) == 3


def test_influence_example():
    names = run(BLOCKS[0])
    assert names["s"].converged
    assert names["scores"].shape == (512,)
    assert names["maps"].shape == (512, 20)


def test_signs_are_as_the_text_says():
    """Trains on, with one example dropped or pixels moved, and sees the trusted loss follow."""
    names = run(BLOCKS[0])
    loss_fn, train, trusted = names["loss_fn"], names["train"], names["trusted"]

    @jax.jit
    def trusted_loss(inputs, weights):
        """After minimising the weighted, damped loss by Newton's method."""

        def objective(flat):
            losses = loss_fn(unravel(flat), (inputs, train[1]))
            return (losses * weights).mean() + 0.005 * (flat @ flat)

        flat = start
        for _ in range(5):
            step = jax.numpy.linalg.solve(jax.hessian(objective)(flat), jax.grad(objective)(flat))
            flat = flat - step
        return loss_fn(unravel(flat), trusted).mean(), flat

    start, unravel = jax.flatten_util.ravel_pytree(names["params"])
    ones = np.ones(len(train[1]), np.float32)
    before, flat = trusted_loss(train[0], ones)
    params = unravel(flat)
    influence, solvers = names["influence"], names["solvers"]
    s = influence.group_ihvp(loss_fn, params, trusted, train, solver=solvers.cg(damping=0.01))
    scores = np.asarray(influence.example_influence(loss_fn, params, s.value, train))
    maps = influence.pixel_influence(loss_fn, params, s.value, train)
    for harmful in (scores.argmax(), scores.argmin()):
        weights = ones.copy()
        weights[harmful] = 0
        change = trusted_loss(train[0], weights)[0] - before
        np.testing.assert_allclose(change, -scores[harmful] / len(ones), rtol=0.2)
    assert (
        trusted_loss(train[0] - 0.1 * maps, ones)[0]
        < before
        < trusted_loss(train[0] + 0.1 * maps, ones)[0]
    )


def test_hint_example(few_images, capsys):
    names = run(BLOCKS[1])
    assert int(names["state"].step) == 3 * 3
    epochs = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [epoch for epoch, *_ in epochs] == ["0", "1", "2"]
    assert all(0 <= float(accuracy) <= 1 for *_, accuracy in epochs)


def test_filter_example():
    """The example of `docs/filters.md`, where the answer is known exactly, is tested with it."""
    names = run(BLOCKS[2])
    flagged = names["result"].is_poison
    assert flagged[:20].sum() >= 17  # wrong labels; the network is right on 92 images of 100
    assert flagged[20:].mean() < 0.2
    assert len(names["x"]) == len(names["y"]) == 500 - flagged.sum()


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def table():
    """Returns {run: cells} of the table of what to expect."""
    rows = re.findall(
        r"^\| \[.*?\]\(docs/results\.md#(\S+?)\), \d seeds? \|(.*)\|$",
        README.read_text(encoding="utf-8"),
        re.M,
    )
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def mean(rows, defense, poison_ratio=None):
    """Returns the mean accuracy over seeds in percent, None for what was not run."""
    found = [
        row["test_accuracy"]
        for row in rows
        if row["defense"] == defense and poison_ratio in (None, row["poison_ratio"])
    ]
    return 100 * statistics.mean(found) if found else None


def results(name):
    path = README.parent / "experiments" / "results" / name / "result.json"
    return json.loads(path.read_text())["rows"]


def test_the_table_of_what_to_expect_has_five_runs():
    assert len(table()) == 5


def test_what_the_published_filter_leaves_was_measured():
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert "[1 of 36 attacks](docs/results.md#transfer-cifar10-strong)" in text
    assert "and 13 of 18 where" in text
    rows = [row for row in results("transfer-cifar10-strong") if row["share"]]

    def left(name, *shares):
        found = [row["filters"][name] for row in rows if row["share"] in shares]
        return tuple(sum(each[key] for each in found) for key in ("successes", "trials"))

    assert left("characteristic vectors", 0.1, 0.24) == (1, 36)
    assert left("characteristic vectors", 0.5) == (13, 18)
    assert left("characteristic vectors, trusted", 0.1, 0.24, 0.5) == (0, 54)


@pytest.mark.parametrize("name", table())
def test_what_to_expect_was_measured(name):
    rows, cells = results(name), table()[name]
    measured = [
        mean(rows, "none", 0.0),
        *(mean(rows, defense, 1.0) for defense in ("none", "hint", "recommended")),
        mean(rows, "trusted"),
    ]
    assert [cell == "-" for cell in cells] == [value is None for value in measured]
    for cell, value in zip(cells, measured, strict=True):
        assert value is None or abs(float(cell) - value) <= 0.051, (cell, value)
