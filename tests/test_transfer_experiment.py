"""The comparison of filters as a user runs it: as a program, and again after a part got lost."""

import dataclasses
import functools
import json
import warnings

import jax
import numpy as np
import pytest
import transfer_filter
from common import cli
from networks import Normed, classifier
from programs import refusal, run_script, squeezed
from transfer import settings, study, verdicts

from jaxpoison import attacks, evaluation, filters
from jaxpoison.data import Dataset, embedded
from jaxpoison.defenses import HintConfig

# A budget of half the range: so few steps would achieve nothing with less.
TINY = (
    *("--preset", "quick", "--pretraining.epochs", "2", "--pretraining.milestones", "1"),
    *("--parts.pretraining", "24", "--parts.train", "10", "--parts.trusted", "5"),
    *("--parts.targets", "5", "--test-examples", "200", "--num-targets", "2"),
    *("--attacks", "bp", "--hint-attacks", "bp", "--crafting.bp-steps", "12"),
    *("--crafting.gm-steps", "12"),
    *("--epsilons-255", "128", "--shares", "0.8", "--hint-share", "0.8", "--min-success", "0"),
    *("--hint.schedule", "5"),
)
CELL = "tiny-bp-eps128-p0.8"


def run(run_dir, *flags):
    return run_script(
        "experiments/transfer_filter.py", "--run-dir", run_dir, *TINY, *flags, cwd=run_dir.parent
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("transfer") / "run"
    return run_dir, run(run_dir)


def test_a_run_leaves_tables_pictures_and_results(whole):
    run_dir, done = whole
    assert done.returncode == 0, done.stderr
    table = (run_dir / "table.md").read_text()
    assert table in done.stdout
    table = squeezed(table)
    assert "at p = 0.8: with centroids of the data" in table.splitlines()[2]  # what may fail, first
    assert "| bullseye polytope | characteristic vectors | 4.17, 89.57 |" in table  # the paper's
    assert "filter + HINT" in table and "1/5, 92.41" in table
    for name in ("roc.png", "share.png", "vectors.png", "predictions-bp.png"):
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")
    result = json.loads((run_dir / "result.json").read_text())
    clean, attacked = result["rows"]
    assert clean["share"] == 0 and "tpr" not in clean["filters"]["deep k-NN"]
    assert attacked["successes"] > 0  # or nothing was filtered
    assert len(attacked["filters"]) == 12 and len(attacked["filters"]) == len(clean["filters"])
    for row in attacked["filters"].values():
        assert all(0 <= row[name] <= 1 for name in ("tpr", "fpr", "auroc", "accuracy"))
        assert row["trials"] == attacked["successes"] >= row["successes"]
    assert [row["defense"] for row in result["hint"]] == ["none", "hint", "filter", "filter + hint"]


def test_poisons_are_kept_in_8_bits_within_their_budget(whole):
    run_dir, _ = whole
    with np.load(run_dir / "poisons" / f"{CELL}.npz") as archive:
        images, rows, labels = archive["images"], archive["rows"], archive["base_labels"]
    assert images.dtype == np.uint8 and images.shape[1:] == (8, 32, 32, 3)
    train = pool_part(24, 10)
    np.testing.assert_array_equal(train.labels[rows], np.tile(labels[:, None], (1, 8)))
    change = np.abs(images.astype(int) - train.images[rows])
    assert 0 < change.max() <= 128


def pool_part(first, number):
    """Returns `number` images of each class of the embedded slice, from the `first` on."""
    pool, _ = embedded.read_part("cifar10", "train")
    rows = [np.flatnonzero(pool.labels == k)[first : first + number] for k in range(10)]
    return pool.take(np.concatenate(rows))


def test_running_again_does_only_what_is_missing(whole):
    run_dir, first = whole
    kept = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.suffix == ".npz"}
    (run_dir / "cells" / f"{CELL}.json").unlink()  # as if killed before it was judged
    again = run(run_dir)
    assert again.returncode == 0, again.stderr
    assert again.stdout.split("\nPoisons in")[1] == first.stdout.split("\nPoisons in")[1]
    told = again.stdout.split("\nPoisons in")[0]
    assert "sets to be filtered" in told
    assert "epoch" not in told and "/16 poisons" not in told and "trial" not in told
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_an_attacker_who_knows_the_filter_pays_for_passing(whole):
    run_dir, _ = whole

    def attack(folder):
        flags = ("--run-dir", folder, "--steps", "4", "--share", "0.5")
        return run_script("experiments/adaptive_filter.py", *flags, cwd=folder)

    done = attack(run_dir)
    assert done.returncode == 0, done.stderr
    rows = json.loads((run_dir / "adaptive-last_3.json").read_text())["rows"]
    assert [row["lambda"] for row in rows] == [0.0, 0.03, 0.1, 0.3, 1.0, 3.0, "bisected"]
    assert rows[0]["objective"] < rows[5]["objective"]
    for row in rows:
        assert row["found"]["none"] == 0 and 0 <= row["found"]["trusted"] <= 1
        assert [len(hits) for hits in row["taken"].values()] == [2, 2, 2]
    assert "| the best for each target |" in squeezed(done.stdout)
    nowhere = attack(run_dir.parent)
    assert nowhere.returncode != 0 and "holds no run: make one with" in nowhere.stderr


def test_extractors_that_are_fine_tuned(whole):
    run_dir, _ = whole
    done = run_script(
        *("experiments/fine_tuning.py", "--run-dir", run_dir, "--attacks", "gm"),
        *("--share", "0.5", "--targets", "1", "--depths", "0", "9"),
        *("--epochs", "4", "--batch-size", "10"),
        cwd=run_dir,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((run_dir / "fine_tuning.json").read_text())
    rows = result["rows"]
    frozen, updated, *_, tuned = [row for row in rows if row["defense"] == "none"]
    assert result["stages"][0] == ["stem", "stem_norm"] and tuned["depth"] == 4
    first, *_, last = frozen["found_after"].values()
    assert first == last and first["cosine"] == pytest.approx(1)
    for other in (updated, tuned):
        assert other["found_after"]["4"]["cosine"] < other["found_after"]["1"]["cosine"] < 1 - 1e-5
    per_setting = ["none", "before", "each epoch"]
    assert [row["defense"] for row in rows] == 2 * [*per_setting, "hint"] + 2 * per_setting
    assert len([*(run_dir / "cells").glob("tuned-*")]) == len(rows)
    assert all(0 <= row["accuracy"] <= 1 and row["trials"] == 1 for row in rows)


def test_tables_are_filtered_too(tmp_path):
    out = tmp_path / "result.json"
    flags = ("--tables", "digits", "--trials", "5", "--shares", "0.5", "--out", out)
    done = run_script("experiments/tabular_filter.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    digits = json.loads(out.read_text())["digits"]
    assert digits["clean_accuracy"] > 0.9
    weak, strong = (
        next(row["filters"] for row in digits["rows"] if row["budget"] == budget)
        for budget in (0.1, 1.0)
    )
    assert weak == {"none": weak["none"]} and weak["none"]["successes"] == 0  # nothing to compare
    assert strong["none"]["successes"] >= 4 and strong["none"]["tpr"] == 0
    dataset, trusted = (
        strong[f"characteristic vectors{kind}"]["tpr"] for kind in ("", ", trusted")
    )
    assert trusted > 0.8 > dataset  # half of the class are poisons
    assert strong["nearest feature centroid, trusted"]["successes"] <= 1


def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch):
    main = functools.partial(cli.main, transfer_filter.PRESETS, None, study.compare)
    flags = ("--run-dir", tmp_path / "run", *TINY, "--shares", "1.5")
    assert "a share p must be in (0, 1]" in refusal(main, *flags, patch=monkeypatch)
    assert not (tmp_path / "run").exists()


# Parts of it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": ("vgg",)}, "networks must be some of resnet18"),
        ({"networks": ()}, "networks must be some of resnet18"),
        ({"attacks": ()}, "at least one of attacks"),
        ({"shares": (0.001,)}, "at least one of the 50 images"),
        ({"hint_share": 0.3}, "hint_share must be one of the shares"),
        ({"hint_attacks": ("cp",)}, "hint_attacks must be some of the attacks"),
        ({"hint": HintConfig(schedule=(60,))}, "beyond the 60 epochs of a head"),
        ({"trusted_per_class": 101}, "between 1 and 100"),
        ({"epsilons_255": (300.0,)}, "epsilon is in units of pixels"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        settings.require_sensible(dataclasses.replace(transfer_filter.PAPER, **change))


def test_presets_are_sensible_and_parts_that_do_not_fit_are_refused():
    for preset in transfer_filter.PRESETS.values():
        settings.require_sensible(preset)
    sets = settings.load(transfer_filter.QUICK)
    sizes = [len(part.labels) for part in sets[:4]]
    assert sizes == [2300, 300, 200, 200]
    images = np.concatenate([part.images for part in sets[:4]])
    assert len({image.tobytes() for image in images}) > 0.999 * sum(sizes)  # no image twice
    with pytest.raises(ValueError, match="at most the 300 that there are"):
        settings.load(
            dataclasses.replace(transfer_filter.QUICK, parts=settings.Parts(targets=9999))
        )


MODEL = classifier(Normed(4))


def colored(num_examples, seed):
    """Images in the color of their class, classes one after the other."""
    rng = np.random.default_rng(seed)
    labels = np.sort(np.arange(num_examples) % 3).astype(np.int32)
    images = 0.3 * rng.random((num_examples, 4, 4, 3)) + 0.4 * np.eye(3)[labels][:, None, None]
    return Dataset(images.astype(np.float32), labels)


CLEAN, TRUSTED = colored(30, 0), colored(15, 1)


def trial(images, rows=slice(0, 10), base=0, target=1):
    """A set in which `rows`, of class `base`, are poisons that look like `images`."""
    poisoned, attack_id = CLEAN.images.copy(), np.zeros(30, np.int8)
    poisoned[rows], attack_id[rows] = images, 1
    aim = attacks.Target(CLEAN.images[10:11], target, base, 0)
    return attacks.PoisonedDataset(poisoned, CLEAN.labels, attack_id, {"attacks": [{}]}, aim)


@pytest.fixture(scope="module")
def victim():
    return attacks.Victim(MODEL, MODEL.init(jax.random.key(0), CLEAN.images[:1]))


def test_vectors_are_judged_as_the_filter_itself_does(victim):
    half = 0.5 * (CLEAN.images[:4] + CLEAN.images[10:14])
    sets = [trial(CLEAN.images[10:14], slice(0, 4)), trial(half, slice(3, 7))]
    view = verdicts.view(victim, CLEAN, sets, TRUSTED)
    for centroids, trusted in (("dataset", None), ("trusted", TRUSTED)):
        reference = None if trusted is None else (view.trusted[0], view.trusted[2])
        flagged, score = verdicts.characteristic(
            view.charvec, view.places, view.labels, reference, 3
        )
        one = filters.CharacteristicVectorFilter(*victim, centroids=centroids)
        for number, poisoned in enumerate(sets):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", filters.ContaminationWarning)
                want = one.fit_filter(poisoned.images, poisoned.labels, trusted)
            np.testing.assert_array_equal(flagged[number], want.is_poison)
            np.testing.assert_allclose(score[number], want.score, atol=1e-6)
        assert np.all(flagged[0][:4])  # they are images of another class


def test_a_poison_moves_from_one_centroid_to_the_other(victim):
    sets = [trial(CLEAN.images[:10]), trial(CLEAN.images[10:20])]
    view = verdicts.view(victim, CLEAN, sets, TRUSTED)
    np.testing.assert_allclose(verdicts.shift(view).mean(axis=1), [0, 1], atol=1e-5)
    vectors = verdicts.directions(view.charvec)
    (block,) = view.charvec.blocks
    cosines = [
        float(array[0] @ array[12] / np.linalg.norm(array[0]) / np.linalg.norm(array[12]))
        for array in block
    ]
    distance = np.sum((vectors[0] - vectors[12]) ** 2)
    np.testing.assert_allclose(distance, 2 * np.mean(1 - np.array(cosines)), rtol=1e-4)


def test_measures(victim):
    sets = [trial(CLEAN.images[10:14], slice(0, 4)), trial(CLEAN.images[10:14], slice(4, 8))]
    view = verdicts.view(victim, CLEAN, sets, TRUSTED)
    poisons = view.is_poisoned
    half = poisons.copy()
    half[0] = False
    half[0, 29] = True
    found = {
        "right": verdicts.Verdict(poisons, poisons.astype(np.float32)),
        "half": verdicts.Verdict(half, -poisons.astype(np.float32)),
    }
    after = evaluation.Outcome(
        np.zeros(4), np.array([False, False, True, False]), np.array([0.5, 0.7, 0.1, 0.3]), {}
    )
    result = verdicts.measure(view, found, after)
    assert result["filters"]["right"] == pytest.approx(
        {"successes": 0, "trials": 2, "accuracy": 0.6, "fpr": 0, "tpr": 1, "auroc": 1}
    )
    assert result["filters"]["half"] == pytest.approx(
        {"successes": 1, "trials": 2, "accuracy": 0.2, "fpr": 0.5 / 26, "tpr": 0.5, "auroc": 0}
    )
    assert result["roc"]["right"] == [1.0] * 51
