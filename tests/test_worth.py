"""What a remedy is worth: removals that really remove, intervals that hold, honest verdicts."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxpoison import data
from jaxpoison.audit import worth as worths
from jaxpoison.audit.worth import worth
from jaxpoison.data import Dataset
from jaxpoison.evaluation.statistics import crossed_mean, student_quantile


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worths, "WIDTHS", (8, 16, 32))
        # Digits are not mirrored.
        recipe = dataclasses.replace(worths.ONE_CYCLE, flip=False, max_shift=1)
        patch.setattr(worths, "ONE_CYCLE", recipe)
        yield


@functools.cache
def mnist():
    return data.load_embedded("mnist").train


def digits(count, start=0):
    """Every second pixel of digits, in three equal channels: [count, 14, 14, 3]."""
    part = mnist().take(slice(start, start + count))
    return part._replace(images=np.repeat(part.images[:, ::2, ::2], 3, axis=-1))


def work_of(dataset, steps=1):
    return worths._Work(dataset, digits(20, 4_000), True, 10, steps)


def test_what_is_removed_is_never_drawn_and_the_rest_keeps_its_order():
    keep = np.arange(50) % 3 > 0
    rows = worths.drawn(keep, 200, seed=4)
    assert keep[rows].all() and len(rows) == 200
    passes = rows[: 200 // keep.sum() * keep.sum()].reshape(-1, keep.sum())
    assert all((np.sort(each) == np.flatnonzero(keep)).all() for each in passes)
    whole = worths.drawn(np.ones(50, bool), 50, seed=4)
    np.testing.assert_array_equal(rows[: keep.sum()], whole[keep[whole]])


def test_training_with_a_mask_is_training_on_the_subset_in_the_same_order(monkeypatch):
    dataset, keep = digits(200), np.arange(200) % 4 > 0
    predicted = []
    original = worths.predict
    monkeypatch.setattr(
        worths,
        "predict",
        lambda net, variables, *rest, **kwargs: (
            predicted.append(variables) or original(net, variables, *rest, **kwargs)
        ),
    )
    work = work_of(dataset, steps=3)
    hits = worths._hits(work, worths._squeezed(work, ""), keep, None, 5)
    rows = worths.drawn(keep, 3 * worths.BATCH_SIZE, 5)
    # The same rows, numbered within the subset; what was removed is not even there.
    within = np.cumsum(keep)[rows] - 1
    monkeypatch.setattr(worths, "drawn", lambda keep, count, seed: within)
    work = work_of(dataset.take(keep), steps=3)
    alone = worths._hits(work, worths._squeezed(work, ""), np.ones(150, bool), None, 5)
    np.testing.assert_array_equal(hits, alone)
    jax.tree.map(np.testing.assert_array_equal, *predicted)


def test_one_step_is_the_gradient_of_what_is_kept(monkeypatch):
    """Closed form: the head's bias after a step of a network whose features are all the same."""
    dataset, keep = digits(70), np.arange(70) < 64
    dataset.images[...] = 128
    variables = []
    original = worths.predict
    monkeypatch.setattr(
        worths,
        "predict",
        lambda net, found, *rest, **kwargs: (
            variables.append(found) or original(net, found, *rest, **kwargs)
        ),
    )
    recipe = dataclasses.replace(worths.ONE_CYCLE, max_shift=0, flip=False, momentum=0)
    monkeypatch.setattr(worths, "ONE_CYCLE", recipe)
    work = work_of(dataset, steps=1)
    worths._hits(work, worths._squeezed(work, ""), keep, None, 0)
    network = worths.as_network(worths.models.fast_cnn(widths=worths.WIDTHS, num_classes=10))
    before = network.init(jax.random.split(jax.random.key(0))[0], (14, 14, 3))
    images = dataset.images[keep] / np.float32(255)
    logits, _ = network.train_logits(before, images)
    labels = np.eye(10)[dataset.labels[keep]] * (1 - recipe.label_smoothing)
    gradient = (jax.nn.softmax(logits) - labels - recipe.label_smoothing / 10).mean(axis=0)
    # The middle of the cycle's only step: two thirds of the way down.
    rate = recipe.learning_rate * min(0.5 / 0.25, 0.5 / 0.75)
    moved = network.head(variables[0])["bias"] - network.head(before)["bias"]
    np.testing.assert_allclose(moved, -rate * gradient, atol=1e-6)


def test_flipped_labels_are_worth_removing():
    few = digits(2_500)
    few = few.take(few.labels < 3)
    train, trusted = few.take(slice(300)), few.take(slice(300, 600))
    wrong = np.random.default_rng(0).permutation(300) < 120
    labels = np.where(wrong, (train.labels + 1) % 3, train.labels)
    found = worth(
        train.images, labels, trusted, {"labels": wrong},
        num_classes=3, num_seeds=2, epochs=15,
    )  # fmt: skip
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["as_is", "without:labels", "random:labels", "jpeg", "recommended"]
    removed, at_random = rows["without:labels"], rows["random:labels"]
    assert removed.low > 0 and removed.mean > at_random.mean + 0.05
    assert found.action in ("without:labels", "recommended")
    assert removed.mean == pytest.approx(removed.accuracy - rows["as_is"].accuracy)
    assert "points of accuracy on 300 trusted images" in found.reason
    assert (rows["as_is"].mean, rows["as_is"].low, rows["as_is"].high) == (0, 0, 0)


def test_clean_data_are_left_alone():
    train = digits(500)
    innocent = np.random.default_rng(1).random(500) < 0.05
    found = worth(
        train.images, train.labels, None, {"labels": innocent, "poison": np.zeros(500, bool)},
        num_classes=10, num_seeds=2, epochs=4,
    )  # fmt: skip
    assert found.action == "nothing"
    assert [row.name for row in found.rows] == ["as_is", "without:labels", "random:labels", "jpeg"]
    assert any("No trusted images" in note and "held out" in note for note in found.notes)
    assert any("'poison' flagged nothing" in note for note in found.notes)
    assert found.rows[0].n == int(0.2 * (~innocent).sum())


def test_a_killed_run_goes_on(tmp_path):
    class Killed(Exception):
        pass

    train, trusted = digits(100), digits(50, 100)
    finished = []

    def run(folder, stop=None, labels=train.labels):
        def progress(done, total):
            finished.append((done, total))
            if done == stop:
                raise Killed

        return worth(
            train.images, labels, trusted, {}, num_classes=10, num_seeds=2, epochs=1,
            folder=folder, progress=progress,
        )  # fmt: skip

    calls = []
    original = worths._hits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worths, "_hits", lambda *args: calls.append(1) or original(*args))
        with pytest.raises(Killed):
            run(tmp_path, stop=3)
        assert len(calls) == 3
        resumed = run(tmp_path)
        assert len(calls) == 6 and finished[-1] == (6, 6)
        assert run(tmp_path) == resumed and len(calls) == 6
        assert run(None) == resumed
        run(tmp_path, labels=train.labels[::-1].copy())  # other data: measured again
        assert len(calls) == 18


def test_trusted_images_are_not_trained_on():
    train = digits(60)
    trusted = Dataset(train.images[:20], train.labels[:20])
    work, _, notes = worths._prepared(*train[:2], trusted, {}, 10, 0, 1)
    assert len(work.train.labels) == 40
    assert notes == ["20 images are among the trusted ones as well: they were not trained on."]
    assert not {*worths._digests(work.train.images)} & {*worths._digests(trusted.images)}


def test_halves_of_the_trusted_set_take_turns():
    labels = np.repeat(np.arange(5), 4)
    first, second = worths._half(labels, 0), worths._half(labels, 1)
    np.testing.assert_array_equal(first, ~second)
    assert np.bincount(labels[first]).tolist() == [2] * 5


def test_large_sets_are_sampled(monkeypatch):
    monkeypatch.setattr(worths, "MOST_IMAGES", 30)
    train = digits(60)
    mask = np.arange(60) % 2 == 0
    work, masks, notes = worths._prepared(*train[:2], digits(9, 70), {"m": mask}, 10, 0, None)
    assert notes == ["Trained on 30 of 60 images, drawn at random."]
    for image, label, flag in zip(*work.train[:2], masks["m"], strict=True):
        (row,) = np.flatnonzero((train.images == image).all(axis=(1, 2, 3)))
        assert (train.labels[row], mask[row]) == (label, flag)


def test_bad_input():
    train = digits(40)
    with pytest.raises(ValueError, match=r"removals\['m'\] is int64 \(40,\); expected bool"):
        worth(*train[:2], None, {"m": np.zeros(40, np.int64)}, num_classes=10)
    with pytest.raises(ValueError, match="an interval needs at least 2"):
        worth(*train[:2], None, {}, num_classes=10, num_seeds=1)
    with pytest.raises(ValueError, match="expected at least 2 of each"):
        worth(*train[:2], None, {"m": np.ones(40, bool)}, num_classes=10)
    with pytest.raises(ValueError, match="at least 2 classes"):
        worth(train.images, train.labels * 0, None, {}, num_classes=1)
    with pytest.raises(ValueError, match="training set: images are float32"):
        worth(train.images / np.float32(255), train.labels, None, {}, num_classes=10)
    with pytest.raises(ValueError, match="same size"):
        worth(*train[:2], train._replace(images=train.images[:, 1:]), {}, num_classes=10)
    with pytest.raises(ValueError, match="trusted set"):
        worth(*train[:2], train._replace(labels=train.labels + 10), {}, num_classes=10)


# Intervals.


@pytest.mark.parametrize(
    ("p", "freedom", "quantile"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.995, 2, 9.92484), (0.975, 1e4, 1.9602)],
)
def test_quantiles_of_the_tables(p, freedom, quantile):
    assert student_quantile(p, freedom) == pytest.approx(quantile, rel=2e-3)


def test_intervals_cover():
    """Of gains made of an effect of the seed, one of the image, and noise."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        seeds, images = rng.normal(0, 0.02, (4, 1)), rng.normal(0, 0.3, 80)
        values = 0.1 + seeds + images + rng.normal(0, 0.3, (4, 80))
        mean, low, high = crossed_mean(values)
        assert mean == pytest.approx(values.mean())
        covered += low < 0.1 < high
    assert covered >= 92


def test_crossed_mean_of_a_table():
    # Rows all alike: what is left is the t interval of the columns' means.
    column = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    mean, low, high = crossed_mean(np.stack([column, column, column]))
    half = 2.776445 * column.std(ddof=1) / np.sqrt(5)
    np.testing.assert_allclose([mean, low, high], [0.6, 0.6 - half, 0.6 + half], rtol=1e-5)
    assert crossed_mean(np.zeros((3, 4))) == (0, 0, 0)
    # With what is known of the variance of a row: that, and its degrees of freedom.
    _, low, high = crossed_mean(np.ones((4, 9)), pooled=(0.04, 1.0))
    np.testing.assert_allclose([low, high], [1 - 1.27062, 1 + 1.27062], rtol=1e-4)
    with pytest.raises(ValueError, match="each at least 2"):
        crossed_mean(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="NaN alone"):
        crossed_mean(np.array([[np.nan, 1], [np.nan, 2]]))
    with pytest.raises(ValueError, match="level"):
        crossed_mean(np.zeros((3, 4)), level=1)
    with pytest.raises(ValueError, match="freedom"):
        student_quantile(0.9, 0)
