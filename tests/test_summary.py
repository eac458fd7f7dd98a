"""What a run ends with: each line of the table says what its numbers say, and no more."""

import numpy as np
import pytest
from common import figures, study, summary

ACCURACIES = {"none": 0.3, "hint": 0.5, "recommended": 0.95, "trusted": 0.9}


def rows(clean=0.97, seeds=(0,), **accuracies):
    found = [(0.0, "none", clean)]
    found += [
        (0.0 if name == "trusted" else 1.0, name, accuracy)
        for name, accuracy in (ACCURACIES | accuracies).items()
    ]
    return [
        {"seed": seed, "poison_ratio": p, "defense": name, "test_accuracy": accuracy}
        for seed in seeds
        for p, name, accuracy in found
    ]


def meanings(found, num_test=2000):
    return {line.defense: line.meaning for line in summary.summary(found, num_test, 500)}


def test_lines_are_in_the_order_in_which_one_reads_them():
    found = summary.summary(rows(jpeg=0.6, hint_every=0.8), 2000, 500)
    names = ["clean", "none", "hint", "hint_every", "jpeg", "recommended", "trusted"]
    assert [line.defense for line in found] == names
    assert [line.accuracy for line in found] == [0.97, 0.3, 0.5, 0.8, 0.6, 0.95, 0.9]
    assert found[4].name == "poisoned, JPEG, quality 10"


def test_meanings_are_differences_of_the_accuracies():
    assert meanings(rows()) == {
        "clean": "what these images are worth",
        "none": "the attack costs 67 points",
        "hint": "recovers 20 of the 67 points",
        "recommended": "recovers 65 of the 67 points",
        "trusted": "500 clean images: ahead of HINT",
    }


def test_means_are_over_seeds():
    found = rows(hint=0.4) + [row | {"seed": 1} for row in rows(hint=0.6)]
    lines = {line.defense: line.accuracy for line in summary.summary(found, 2000, 500)}
    assert lines["hint"] == pytest.approx(0.5) and lines["none"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("accuracies", "name", "meaning"),
    [
        ({"hint": 0.32}, "hint", "recovers nothing that this test could show"),
        ({"hint": 0.28}, "hint", "recovers nothing that this test could show"),
        ({"hint": 0.2}, "hint", "10 points worse than no defense"),
        ({"recommended": 0.99}, "recommended", "recovers 67 of the 67 points"),
        ({"trusted": 0.2}, "trusted", "500 clean images: behind HINT"),
        ({"trusted": 0.5}, "trusted", "500 clean images: on a par with HINT"),
        ({"none": 0.965}, "none", "the attack does no damage"),
        ({"none": 0.965}, "hint", "nothing to recover"),
    ],
)
def test_what_chance_may_have_made_is_not_told_as_a_result(accuracies, name, meaning):
    assert meanings(rows(**accuracies))[name] == meaning


def test_two_standard_errors_shrink_with_test_images():
    # 2 sqrt((.30 x .70 + .32 x .68) / n) is 2.9 points at 2,000 images and 1.3 at 10,000.
    assert meanings(rows(hint=0.32), 2_000)["hint"].startswith("recovers nothing")
    assert meanings(rows(hint=0.32), 10_000)["hint"] == "recovers 2 of the 67 points"
    assert meanings(rows(hint=0.32, seeds=range(5)), 2_000)["hint"].startswith("recovers 2 ")


@pytest.mark.parametrize("name", ["none", "hint", "recommended", "trusted"])
def test_a_run_that_lacks_a_row_or_failed_in_one_is_not_summed_up(name):
    found = rows()
    assert not summary.summary([row for row in found if row["defense"] != name], 2000, 500)
    (row,) = (row for row in found if row["defense"] == name and row is not found[0])
    row |= {"error": "ValueError: x"}
    assert not summary.summary(found, 2000, 500)


def test_several_shares_of_poisons_are_not_summed_up():
    half = [row | {"poison_ratio": 0.5} for row in rows() if row["poison_ratio"] == 1]
    assert not summary.summary(rows() + half, 2000, 500)


def test_defenses_without_poisons_are_left_out():
    more = {"seed": 0, "poison_ratio": 0.0, "defense": "hint", "test_accuracy": 0.1}
    assert summary.summary([*rows(), more], 2000, 500) == summary.summary(rows(), 2000, 500)


def test_the_table_fits_a_terminal():
    lines = summary.summary(rows(hint_every=0.3), 2000, 500)
    text = summary.table(lines, "Caption.").markdown().strip().splitlines()
    assert text[0] == "Caption." and len(text) == 2 + 2 + len(lines)
    assert max(map(len, text)) <= 100
    cells = [cell.strip() for cell in text[4].split("|")]
    assert cells == ["", "clean images, no defense", "97.0", "what these images are worth", ""]


def test_the_headline_is_about_frequent_updates_where_there_are_some():
    for more, told in (
        ({"hint_every": 0.4}, "HINT at every epoch it is 40%"),
        ({}, "HINT it is 50%"),
    ):
        lines = summary.summary(rows(**more), 2000, 500)
        assert summary.headline(lines) == (
            f"Poisoned training images take accuracy from 97% to 30%. With {told}, with trusted "
            "images mixed in 95%"
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_is_drawn(tmp_path, channels):
    images = np.random.default_rng(0).random((2, 8, 8, channels))
    shown = figures.Changed(images, images[::-1], 0.01 * images, ["seven", "ship"])
    lines = summary.summary(rows(), 2000, 500)
    figures.summary(tmp_path / "summary.png", lines, shown, "Title")
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_magnified_noise_is_gray_where_nothing_changed():
    noise = np.zeros((1, 40, 40, 1))
    noise[0, :2] = -0.05
    noise[0, 2:4] = 0.025
    heading, images = figures.magnified("noise", noise)
    assert heading == "noise, ×10"
    np.testing.assert_allclose(images[0, [0, 2, 9], 0, 0], [0, 0.75, 0.5])


def test_examples_shown_are_of_different_classes():
    assert study.distinct(np.array([3, 3, 1, 3, 7, 1, 0, 9])).tolist() == [0, 2, 4, 6]
