"""From a language model's prediction to the text behind it, as a user runs it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_influence
from flax import nnx
from programs import refusal, run_script

from jaxpoison.runs import pictures

TINY = ("--preset", "quick", "--width", "16", "--epochs", "1", "--heads", "2", "--length", "64")


def test_a_run_trains_ranks_trains_again_and_continues(tmp_path):
    flags = (*TINY, "--run-dir", tmp_path / "run", "--methods", "ekfac")
    done = run_script("experiments/text_influence.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (row,) = result["rows"]
    assert row["topic"] == "specialnames" and row["method"] == "ekfac"
    assert row["removed"] == round(0.05 * result["passages"])
    assert len(row["changes"]) == 1 and 0 < row["loss"] < np.log(150)
    assert row["residual"] > 0 and row["predicted"] > 0
    assert len(result["config"]["text"]["sha256"]) == 64
    assert pictures.is_whole(tmp_path / "run" / "passages.png")
    listing = (tmp_path / "run" / "passages.md").read_text()
    assert listing.count("```text") == 1 + 2 * text_influence.SHOWN

    # What is there is not done again; another method is.
    flags = (*flags, "random")
    again = run_script("experiments/text_influence.py", *flags, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "first-0: epoch" not in again.stdout and "specialnames-random-0: epoch" in again.stdout
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["rows"]
    assert rows[0] == row and rows[1]["method"] == "random" and rows[1]["predicted"] is None


def test_passages_are_the_text_and_labels_the_next_characters():
    text = text_influence.load(32)
    inputs, labels = text.part(np.arange(3))
    np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
    document = text_influence.pydoc_data.topics.topics[str(text.topics[0])]
    assert text.passage(0) + text.passage(1) == document[1:65]
    assert 0.19 < text.held_out.mean() <= 0.2


def test_the_model_does_not_look_ahead():
    config = dataclasses.replace(text_influence.QUICK, width=8, heads=2, length=6)
    model = text_influence.Transformer(config, 5, nnx.Rngs(0))
    tokens = jnp.array([[0, 1, 2, 3, 4, 0]])
    before, after = model(tokens), model(tokens.at[0, 3].set(1))
    same = np.isclose(before, after, atol=1e-6).all(axis=(0, 2))
    np.testing.assert_array_equal(same, [True, True, True, False, False, False])
    np.testing.assert_array_equal(model(model.embed(tokens)), before)
    assert jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "lucky"), "unknown --methods lucky; there are ekfac, gradients"),
        (("--removed", "1"), "--removed must be between 0 and 1, not 1"),
        (("--damping", "0"), "--damping must be positive, not 0"),
        (("--width", "30"), "--width 30 must be a multiple of --heads 4"),
        (("--seeds",), "name at least one of --seeds"),
    ],
)
def test_bad_settings_are_refused_before_any_work(flags, message, tmp_path, monkeypatch):
    def main():
        text_influence.cli.main(
            text_influence.PRESETS, text_influence.__doc__, text_influence.experiment
        )

    found = refusal(
        main, "--preset", "quick", "--run-dir", tmp_path / "run", *flags, patch=monkeypatch
    )
    assert message in found
