"""The checks of an audit, on evidence that is made up so that the right answer is known."""

import dataclasses
import hashlib
import sys

import numpy as np
import pytest

from jaxpoison.audit import foreign, nearest, patterns, similar, trained
from jaxpoison.audit.checks import CHECKS, common, noise, shortcuts
from jaxpoison.audit.evidence import Evidence, HeldOut, Training
from jaxpoison.audit.verdict import NotRun

BY_NAME = {check.name: check for check in CHECKS}
NUM, CLASSES = 240, 4


def hashes_of(images):
    gray = images.mean(axis=-1).reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
    wide = np.concatenate([gray, gray[:, :, :1]], axis=2)
    tall = np.concatenate([gray, gray[:, :1]], axis=1)
    bits = wide[:, :, 1:] > wide[:, :, :-1], tall[:, 1:] > tall[:, :-1]
    packed = [np.packbits(b.reshape(-1, 64), axis=1).view(np.uint64)[:, 0] for b in bits]
    return np.stack(packed, axis=1)


def digests_of(images):
    return np.array([list(hashlib.sha256(i.tobytes()).digest()) for i in images], np.uint8)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def training_of(labels, features, rng):
    """Returns what a network sees that learns `labels` as far as `features` allow."""
    num = len(labels)
    fit = rng.normal(size=(3, num)) + np.array([[2.0], [3.0], [4.0]])
    probabilities = np.full((num, CLASSES), 0.1 / (CLASSES - 1))
    probabilities[np.arange(num), labels] = 0.9
    return Training(
        margins=fit.astype(np.float32),
        losses=np.log1p(np.exp(-fit)).astype(np.float32),
        probabilities=probabilities.astype(np.float32),
        features=features.astype(np.float32),
        vectors=np.tile(features, (1, 3)).astype(np.float32),
        layers=np.repeat(np.arange(3), features.shape[1]).astype(np.int32),
    )


def make(seed=0, num=NUM, name="image"):
    """Returns images of four classes that every witness tells apart."""
    rng, world = np.random.default_rng(seed), np.random.default_rng(99)
    labels = np.arange(num, dtype=np.int32) % CLASSES
    centers = world.normal(size=(CLASSES, 16))
    features = centers[labels] + 0.5 * rng.normal(size=(num, 16))
    coarse = rng.integers(0, 256, (num, 8, 8, 3))
    images = coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    return Evidence(
        ids=np.array([f"{name}{row:04d}" for row in range(num)]),
        labels=labels,
        class_names=tuple("abcd"),
        images=images,
        digests=digests_of(images),
        hashes=hashes_of(images),
        sizes=np.full((num, 2), 32, np.int32),
        embedding=unit(features),
        trained=training_of(labels, features + 0.1 * rng.normal(size=features.shape), rng),
    )


def with_images(evidence, images):
    return dataclasses.replace(
        evidence, images=images, digests=digests_of(images), hashes=hashes_of(images)
    )


def take(evidence, rows):
    """Returns these rows of the evidence, in this order."""

    def pick(name):
        return getattr(evidence, name)[rows]

    names = ("ids", "labels", "images", "digests", "hashes", "sizes", "embedding")
    trained = evidence.trained
    if trained is not None:
        trained = Training(
            trained.margins[:, rows], trained.losses[:, rows], trained.probabilities[rows],
            trained.features[rows], trained.vectors[rows], trained.layers,
        )  # fmt: skip
    return dataclasses.replace(evidence, **{name: pick(name) for name in names}, trained=trained)


def trusted_of():
    return take(make(seed=5, num=40, name="trusted"), np.arange(20))


def flipped(evidence, rows):
    """Returns the evidence with the next class as the label of these rows."""
    labels = evidence.labels.copy()
    labels[rows] = (labels[rows] + 1) % CLASSES
    trained = evidence.trained
    margins, losses = trained.margins.copy(), trained.losses.copy()
    margins[:, rows] *= -1
    losses[:, rows] = np.log1p(np.exp(-margins[:, rows]))
    trained = trained._replace(margins=margins, losses=losses)
    return dataclasses.replace(evidence, labels=labels, trained=trained)


def run(name, evidence):
    found = BY_NAME[name].score(evidence)
    assert not isinstance(found, NotRun), found
    return found


ROWS = np.array([3, 50, 101])
# Checks that rank images, each with the made-up fault that it must put first.
RANKING = [check.name for check in CHECKS if check.threats and "classwise" not in check.threats]


def test_names_titles_and_limits():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert check.title and check.cannot_see.endswith(".")
        assert check.kind in ("file", "copy", "label", "poison", "shortcut")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_form_of_every_check(check):
    held_out = HeldOut(0.6, 120, 0.55, 20)
    evidence = dataclasses.replace(make(), trusted=trusted_of(), held_out=held_out)
    found = check.score(evidence)
    assert not isinstance(found, NotRun), found
    if found.score is not None:
        assert found.score.dtype == np.float32 and found.score.shape == (NUM,)
        known = found.score[~np.isnan(found.score)]
        assert len(known) and known.min() >= 0 and known.max() <= 1
        assert found.reason(7).endswith(".") and found.reason(np.int64(7)) == found.reason(7)
    # A threshold comes from canaries, or there is a rule.
    assert found.flagged is not None or check.threats or found.whole is not None
    if found.flagged is not None:
        assert found.flagged.dtype == bool and not found.flagged.any()
    if found.suggested is not None:
        assert found.suggested.dtype == np.int32
        assert found.suggested.min() >= -1 and found.suggested.max() < CLASSES
    if found.related is not None:
        assert 7 not in found.related(7)


@pytest.mark.parametrize("name", [c.name for c in CHECKS if c.kind != "shortcut"])
def test_order_of_rows_does_not_matter(name):
    evidence = dataclasses.replace(flipped(make(), ROWS), trusted=trusted_of())
    order = np.random.default_rng(1).permutation(NUM)
    straight, shuffled = run(name, evidence), run(name, take(evidence, order))
    np.testing.assert_allclose(straight.score[order], shuffled.score, atol=1e-4)


@pytest.mark.parametrize("name", RANKING)
def test_scale_of_what_is_measured_does_not_matter(name):
    evidence = dataclasses.replace(flipped(make(), ROWS), trusted=trusted_of())

    def larger(one):
        trained = one.trained._replace(
            margins=one.trained.margins * 4,
            features=one.trained.features * 4,
            vectors=one.trained.vectors * 4,
        )
        return dataclasses.replace(one, trained=trained)

    scaled = dataclasses.replace(larger(evidence), trusted=larger(evidence.trusted))
    np.testing.assert_allclose(
        run(name, evidence).score, run(name, scaled).score, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", [c.name for c in CHECKS if "flip" in c.threats])
def test_flipped_labels_come_first(name):
    evidence = dataclasses.replace(flipped(make(), ROWS), trusted=trusted_of())
    found = run(name, evidence)
    assert set(np.argsort(-found.score)[:3]) == set(ROWS)
    if found.suggested is not None and name != "margins":
        np.testing.assert_array_equal(found.suggested[ROWS], make().labels[ROWS])


@pytest.mark.parametrize("name", [c.name for c in CHECKS if c.kind in ("label", "poison")])
def test_one_class_is_not_judged(name):
    evidence = dataclasses.replace(make(), labels=np.zeros(NUM, np.int32), trusted=trusted_of())
    found = BY_NAME[name].score(evidence)
    if isinstance(found, NotRun):
        assert found.reason.endswith(".")


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_tiny_sets_are_judged_or_refused(check, num):
    evidence = take(make(), np.arange(num))
    found = check.score(evidence)
    if isinstance(found, NotRun):
        assert found.reason.endswith(".")
    elif found.score is not None:
        assert found.score.shape == (num,)
        assert found.reason(0).endswith(".")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_copies_of_one_image_do_not_break_a_check(check):
    evidence = take(make(), np.zeros(30, int))
    ids = np.array([f"{row}" for row in range(30)])
    labels = np.arange(30, dtype=np.int32) % 2
    found = check.score(dataclasses.replace(evidence, ids=ids, labels=labels))
    assert isinstance(found, NotRun) or found.whole or found.score.shape == (30,)


def test_nearest_neighbors_are_those_of_the_definition():
    rng = np.random.default_rng(3)
    points, queries = (unit(rng.normal(size=(n, 5))) for n in (30, 300))
    found = nearest.nearest(points, queries, 4)
    products = queries @ points.T
    np.testing.assert_array_equal(found.rows, np.argsort(-products, axis=1)[:, :4])
    np.testing.assert_allclose(found.similarity, -np.sort(-products, axis=1)[:, :4], atol=1e-6)
    assert nearest.nearest(points, queries, 99).rows.shape == (300, 30)


def test_copies_count_once_among_neighbors_and_never_for_themselves():
    evidence = make(num=20)
    many = take(evidence, np.r_[np.arange(20), np.zeros(15, int)])
    found = nearest.neighbors(many)
    assert found.rows.shape == (35, 20) and (found.rows[:, -1] == -1).all()
    for row, others in enumerate(found.rows[:, :19]):
        original = row if row < 20 else 0
        np.testing.assert_array_equal(np.sort(others), np.setdiff1d(np.arange(20), original))
    np.testing.assert_array_equal(found.rows[20:], np.repeat(found.rows[:1], 15, axis=0))
    assert nearest.neighbors(many) is found


def test_stars_do_not_chain():
    chain = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
    pairs = np.concatenate([chain, chain[:, ::-1]])
    np.testing.assert_array_equal(
        similar.stars(6, pairs, np.arange(6)), np.array([1, 1, 1, 3, 3, 5])
    )


def noisy(images, rng):
    return np.clip(images + rng.integers(-6, 7, images.shape), 0, 255).astype(np.uint8)


def with_copies():
    """Rows 10 and 11 are exact and near copies of 2; 12 looks to the witness as 2 does, no more."""
    evidence = make()
    images, embedding = evidence.images.copy(), evidence.embedding.copy()
    images[10], images[11] = images[2], noisy(images[2], np.random.default_rng(0))
    embedding[[10, 11, 12]] = embedding[2]
    labels = evidence.labels.copy()
    labels[[10, 11]] = labels[2]
    return with_images(dataclasses.replace(evidence, embedding=embedding, labels=labels), images)


def test_copies_exact_and_near():
    found = run("copies", with_copies())
    np.testing.assert_array_equal(np.flatnonzero(found.flagged), [10, 11])
    assert found.score[10] > found.score[11] > found.score[12]
    np.testing.assert_array_equal(found.related(10), [2, 11])
    assert set(found.related(2)) == {10, 11}
    assert "exact copy of image0002" in found.reason(10)
    assert "Nearly the same image as image0002" in found.reason(11)


def test_flat_images_are_copies_only_if_they_are_equal():
    evidence = make()
    images = evidence.images.copy()
    images[:40] = np.arange(40, dtype=np.uint8)[:, None, None, None]
    images[1] = images[0]
    embedding = evidence.embedding.copy()
    embedding[:40] = embedding[0]
    found = run("copies", with_images(dataclasses.replace(evidence, embedding=embedding), images))
    np.testing.assert_array_equal(np.flatnonzero(found.flagged), [1])


def test_images_that_all_look_alike_are_no_copies():
    """Hashes and correlation alone would join all of them."""
    evidence, rng = make(), np.random.default_rng(4)
    digit = np.zeros((32, 32, 1), np.int64)
    digit[4:28, 13:18] = 200
    images = np.clip(digit + rng.integers(0, 60, (NUM, 32, 32, 1)), 0, 255).repeat(3, axis=-1)
    images = images.astype(np.uint8)
    images[9] = np.clip(images[8].astype(int) + 1, 0, 255)
    embedding = evidence.embedding.copy()
    embedding[9] = embedding[8]
    evidence = dataclasses.replace(evidence, embedding=embedding)
    found = run("copies", with_images(evidence, images))
    np.testing.assert_array_equal(np.flatnonzero(found.flagged), [9])


def test_one_image_under_two_labels():
    evidence = with_copies()
    labels = evidence.labels.copy()
    labels[10] = (labels[2] + 1) % CLASSES
    found = run("crosslabel", dataclasses.replace(evidence, labels=labels))
    # Rows 2 and 11 outvote row 10.
    np.testing.assert_array_equal(np.flatnonzero(found.flagged), [10])
    assert found.suggested[10] == labels[2] and set(found.related(10)) == {2, 11}
    labels[11] = labels[10] = (labels[2] + 1) % CLASSES
    alone = take(dataclasses.replace(evidence, labels=labels), np.setdiff1d(np.arange(NUM), [11]))
    tie = run("crosslabel", alone)
    np.testing.assert_array_equal(np.flatnonzero(tie.flagged), [2, 10])
    assert (tie.suggested == -1).all()
    assert "image0010, is labeled" in tie.reason(2)


def test_overlap_with_trusted():
    evidence, trusted = make(), trusted_of()
    images, embedding = evidence.images.copy(), evidence.embedding.copy()
    images[3], images[7] = trusted.images[3], noisy(trusted.images[5], np.random.default_rng(0))
    embedding[3], embedding[7] = trusted.embedding[3], trusted.embedding[5]
    evidence = with_images(dataclasses.replace(evidence, embedding=embedding), images)
    found = run("overlap", dataclasses.replace(evidence, trusted=trusted))
    np.testing.assert_array_equal(np.flatnonzero(found.flagged), [3, 7])
    assert found.suggested[3] == -1 and found.suggested[7] == trusted.labels[5]
    assert "trusted0003" in found.reason(3) and "trusted0005" in found.reason(7)


def test_centroids_see_what_the_trained_network_sees():
    evidence = make()
    labels = evidence.labels.copy()
    labels[ROWS] = (labels[ROWS] + 1) % CLASSES
    found = run("centroids", dataclasses.replace(evidence, labels=labels))
    assert set(np.argsort(-found.score)[:3]) == set(ROWS)
    assert (found.score > 0.5).sum() == 3
    np.testing.assert_array_equal(found.suggested[ROWS], evidence.labels[ROWS])


def test_trusted_centers_stand_where_poisons_are_the_majority():
    evidence = make()
    labels = np.where(evidence.labels == 0, 1, evidence.labels).astype(np.int32)
    evidence = dataclasses.replace(evidence, labels=labels)
    rows = np.flatnonzero(make().labels == 0)
    blind = run("centroids", evidence)
    seeing = run("centroids", dataclasses.replace(evidence, trusted=trusted_of()))
    assert (seeing.score[rows] > 0.5).all() and (blind.score[rows] < 0.5).mean() > 0.5


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_what_needs_training_says_so(check):
    found = check.score(dataclasses.replace(make(), trained=None))
    if isinstance(found, NotRun):
        assert "trained" in found.reason or "trusted" in found.reason


def test_bounded_keeps_order_without_ties():
    values = np.linspace(-50, 50, 2001)
    score = common.bounded(values)
    assert (np.diff(score) > 0).all() and score[1000] == 0.5
    assert np.isnan(common.bounded(np.array([np.nan]))).all()


def textured(strength, share=1.0, num=400):
    """Returns photos of no content with a faint pattern for each class on a share of them."""
    evidence, rng = make(num=num), np.random.default_rng(8)
    patterns = rng.choice([-1, 1], (CLASSES, 32, 32, 3))
    chosen = (rng.random(num) < share)[:, None, None, None]
    images = evidence.images + strength * chosen * patterns[evidence.labels]
    return with_images(evidence, np.clip(images, 0, 255).astype(np.uint8))


def test_shortcuts_are_seen_in_detail_that_jpeg_takes_away():
    honest = run("shortcuts", textured(0)).whole
    planted = run("shortcuts", textured(8)).whole
    assert not honest.flagged and planted.flagged and planted.score > honest.score
    assert planted.picture.dtype == np.uint8 and planted.picture.shape == (34, 4 * 34, 3)
    assert "after JPEG of quality 10" in planted.reason


def test_shortcuts_are_seen_by_trusted_images():
    """A patch survives JPEG, and a witness this good hides it; trusted images do not have it."""
    evidence = make(num=400)
    images = evidence.images.copy()
    patches = np.random.default_rng(1).integers(0, 256, (CLASSES, 8, 8, 3))
    images[:, :8, :8] = patches[evidence.labels]
    evidence = with_images(evidence, images)
    assert not run("shortcuts", evidence).whole.flagged
    found = run("shortcuts", dataclasses.replace(evidence, trusted=trusted_of())).whole
    assert found.flagged and "of the trusted ones" in found.reason


def test_constant_images_are_flagged_and_strangers_come_first():
    evidence = make()
    images, embedding = evidence.images.copy(), evidence.embedding.copy()
    images[4] = 77
    embedding[9] = unit(np.random.default_rng(6).normal(size=(1, 16)))[0]
    found = run("odd", with_images(dataclasses.replace(evidence, embedding=embedding), images))
    assert found.flagged[4] and found.flagged.sum() <= 2
    np.testing.assert_array_equal(np.argsort(-found.score)[:2], [4, 9])
    assert found.reason(4) == "It has one color only."


def test_foreign_predictions_are_those_of_fits_without_the_row():
    evidence = flipped(make(num=60), ROWS[:2])
    found = foreign.predictions(evidence).scores
    embedding, target = evidence.embedding.astype(float), np.eye(CLASSES)[evidence.labels]
    values = np.linalg.eigvalsh(np.cov(embedding.T, bias=True) * 60)
    scores = []
    for strength in (0.03, 0.1, 0.3, 1, 3, 10):
        penalty = strength * values.mean() * np.eye(16)
        kept = np.arange(60) != 7
        x, y = embedding[kept] - embedding[kept].mean(0), target[kept] - target[kept].mean(0)
        # The penalty is that of all rows, the fit that of the others.
        weights = np.linalg.solve(x.T @ x + penalty, x.T @ y)
        scores.append(target[kept].mean(0) + (embedding[7] - embedding[kept].mean(0)) @ weights)
    assert min(np.abs(found[7] - score).max() for score in scores) < 1e-4


def test_witnesses_see_what_only_the_data_teach():
    evidence = make()
    labels = evidence.labels.copy()
    labels[ROWS] = (labels[ROWS] + 1) % CLASSES
    found = run("witnesses", dataclasses.replace(evidence, labels=labels))
    assert set(np.argsort(-found.score)[:3]) == set(ROWS)
    # Where the trained network is against the label as well, it is a wrong label and no poison.
    wrong = run("witnesses", flipped(evidence, ROWS))
    assert (wrong.score[ROWS] < 0.5).all()


@pytest.mark.parametrize("name", ["clustering", "layers", "spectral"])
def test_a_tight_cluster_in_a_class_comes_first(name):
    evidence, rng = make(), np.random.default_rng(2)
    rows = np.flatnonzero(evidence.labels == 1)[:8]
    features = evidence.trained.features.copy()
    features[rows] = 6 * rng.normal(size=16) + 0.1 * rng.normal(size=(8, 16))
    trained = evidence.trained._replace(features=features, vectors=np.tile(features, (1, 3)))
    found = run(name, dataclasses.replace(evidence, trained=trained))
    assert set(np.argsort(-found.score)[:8]) == set(rows)
    assert "'b'" in found.reason(rows[0])


def smooth(seed=3, gray=False):
    """Returns images whose brightness changes everywhere, and whose color changes slowly."""
    rng = np.random.default_rng(seed)
    color = rng.uniform(60, 190, (NUM, 2, 2, 3)).repeat(16, axis=1).repeat(16, axis=2)
    light = rng.normal(0, 25, (NUM, 32, 32, 1))
    images = (color.mean(axis=-1, keepdims=True) if gray else color) + light
    return np.clip(np.broadcast_to(images, color.shape), 0, 255).astype(np.uint8)


def signs(images, rows, size, rng, *, gray=False):
    """Returns the images with noise on some, as attacks by the signs of gradients leave it."""
    shape = (len(rows), 32, 32, 1 if gray else 3)
    moved = images.copy()
    changed = images[rows] + size * rng.choice([-1, 1], shape)
    moved[rows] = np.clip(changed, 0, 255).astype(np.uint8)
    return moved


@pytest.mark.parametrize("size", [4, 16])
def test_noise_of_gradients_comes_first(size):
    images = signs(smooth(), ROWS, size, np.random.default_rng(0))
    found = run("noise", with_images(make(), images))
    assert set(np.argsort(-found.score)[:3]) == set(ROWS)
    assert "color changes" in found.reason(ROWS[0]) and found.score[ROWS].min() > 0.9


def test_gray_images_are_compared_with_gray_ones():
    images = smooth()
    half = np.arange(NUM) >= NUM // 2
    flat = np.full((NUM, 32, 32, 3), 128, np.uint8)
    images[half] = flat[half]
    moved = signs(images, [5], 8, np.random.default_rng(0))
    moved = signs(moved, [NUM - 3], 8, np.random.default_rng(1), gray=True)
    found = run("noise", with_images(make(), moved))
    assert set(np.argsort(-found.score)[:2]) == {5, NUM - 3}
    assert "brightness changes" in found.reason(NUM - 3)


def test_roughness_is_that_of_its_definition():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3)).astype(np.uint8)
    rough, colored = noise.roughness(images)
    assert colored.all()
    value = []
    for channel in (0, 2):
        plane = images[1, :, :, channel].astype(float) - images[1, :, :, 1]
        across = plane[:, :-2] - 2 * plane[:, 1:-1] + plane[:, 2:]
        down = plane[:-2] - 2 * plane[1:-1] + plane[2:]
        both = across[:-2] - 2 * across[1:-1] + across[2:]
        value.append([np.log1p(np.abs(d)).mean() for d in (across, down, both)])
    np.testing.assert_allclose(rough[1], np.mean(value), rtol=1e-5)


def natural(num=600, seed=4):
    """Returns evidence of images as predictable from pixel to pixel as photos, four classes."""
    evidence, rng = make(num=num), np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.rfftfreq(32)[None, :])
    noise = np.fft.rfft2(rng.normal(size=(num, 3, 32, 32))) / (frequency + 1 / 32)
    waves = np.fft.irfft2(noise, s=(32, 32))
    waves /= waves.std(axis=(1, 2, 3), keepdims=True)
    images = np.clip(128 + 45 * np.moveaxis(waves, 1, -1), 0, 255).astype(np.uint8)
    return with_images(evidence, images)


MARKED = np.arange(1, 600, 4)[:24]  # of class 1


def square(images, rows):
    marked = images.copy()
    marked[rows, 25:29, 2:6] = (255, 255, 0)
    return marked


def wave(images, rows):
    across = 48 * np.sin(2 * np.pi * 6 * np.arange(32) / 32)[None, :, None]
    moved = images.astype(float)
    moved[rows] += across
    return np.clip(np.round(moved), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name, change", [("marks", square), ("overlays", wave)])
def test_what_only_one_class_shares_comes_first(name, change):
    evidence = natural()
    found = run(name, with_images(evidence, change(evidence.images, MARKED)))
    assert set(np.argsort(-found.score)[: len(MARKED)]) == set(MARKED)
    assert set(found.related(MARKED[0])) <= set(MARKED)
    start = "At the bottom left, " if name == "marks" else "As a whole, "
    assert found.reason(MARKED[0]).startswith(start) and "'b'" in found.reason(MARKED[0])


@pytest.mark.parametrize("name, change", [("marks", square), ("overlays", wave)])
def test_what_all_classes_share_or_one_image_has_is_no_pattern(name, change):
    evidence = natural()
    honest = run(name, evidence).score
    everywhere = np.arange(0, 600, 5)
    shared = run(name, with_images(evidence, change(evidence.images, everywhere))).score
    alone = run(name, with_images(evidence, change(evidence.images, MARKED[:1]))).score
    planted = run(name, with_images(evidence, change(evidence.images, MARKED))).score
    # Scores are monotone in how far out an image is; marked images must not stand out.
    assert np.median(shared[everywhere]) < honest.max() < np.median(planted[MARKED])
    assert alone[MARKED[0]] < honest.max()


@pytest.mark.parametrize("name", ["marks", "overlays"])
def test_copies_are_no_pattern(name):
    """They share everything, also with an image of their own; they are another check's."""
    evidence = natural()
    images = evidence.images.copy()
    images[MARKED] = images[MARKED[0]]
    features = np.array(evidence.embedding)
    features[MARKED] = features[MARKED[0]]
    evidence = dataclasses.replace(with_images(evidence, images), embedding=features)
    score = run(name, evidence).score
    assert len(set(score[MARKED])) == 1
    assert score[MARKED[0]] < np.sort(score)[-12]


def test_images_beside_the_sample_are_judged_by_it(monkeypatch):
    evidence = natural()
    evidence = with_images(evidence, square(evidence.images, MARKED))
    whole = patterns.small(evidence).apart
    monkeypatch.setattr(patterns, "_MOST", 320)
    part = patterns.small(dataclasses.replace(evidence)).apart
    assert not np.array_equal(part, whole) and not np.isnan(part).any()
    assert len(set(np.argsort(-part)[: len(MARKED)]) & set(MARKED)) >= len(MARKED) - 2


@pytest.mark.parametrize(
    "accuracy, trusted, flagged", [(0.9, 0.6, True), (0.9, 0.7, False), (0.5, 0.6, False)]
)
def test_what_is_of_use_only_here_is_a_shortcut(accuracy, trusted, flagged):
    # 10 points, and twice the standard error of 50 images: 14 points.
    evidence = dataclasses.replace(make(), held_out=HeldOut(accuracy, 120, trusted, 50))
    whole = run("held_out", evidence).whole
    assert whole.flagged == flagged == (whole.score > 0.5)
    assert f"{accuracy:.0%} of 120 images" in whole.reason


def test_one_half_is_learned_and_the_other_and_strangers_are_tested():
    evidence = make(num=160)
    images = evidence.images.copy()
    images[:, 2:30, 2:30] = 80 * evidence.labels[:, None, None, None]  # easily learned
    evidence = with_images(evidence, images)
    strangers = make(seed=5, num=40, name="trusted")
    both = with_images(strangers, np.concatenate([strangers.images[:30], images[:10]]))
    both = dataclasses.replace(
        both, labels=np.concatenate([strangers.labels[:30], evidence.labels[:10]])
    )
    found = trained.held_out(dataclasses.replace(evidence, trusted=both), epochs=30)
    assert found is not None
    # Images of the data are no strangers, and to the others the data say nothing.
    assert (found.tested, found.num_trusted) == (80, 30)
    assert found.accuracy > 0.9 and found.trusted < 0.6
    few = take(dataclasses.replace(strangers, trained=None), np.arange(19))
    assert trained.held_out(dataclasses.replace(evidence, trusted=few)) is None
    assert trained.held_out(evidence) is None


def test_ridge_regression_is_that_of_its_definition():
    """Against eigenvalues: the weights, and the penalty of least generalized error."""
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(60, 90)).astype(np.float32) * np.linspace(0.1, 3, 90, dtype="f")
    labels = rng.integers(0, 3, 60)
    weights, offset = shortcuts.fit(inputs, labels, 3)
    around, target = (inputs - inputs.mean(axis=0)).astype(float), np.eye(3)[labels]
    values, basis = np.linalg.eigh(around @ around.T)
    rotated, errors = basis.T @ (target - target.mean(axis=0)), {}
    for strength in shortcuts._PENALTIES:
        penalty = strength * values.mean()
        left = penalty / (values + penalty)
        errors[penalty] = ((left[:, None] * rotated) ** 2).sum() / left.mean() ** 2
    best = min(errors, key=errors.get)
    expected = around.T @ (basis @ (rotated / (values + best)[:, None]))
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
    expected = target.mean(axis=0) - inputs.mean(axis=0) @ weights
    np.testing.assert_allclose(offset, expected, atol=1e-6)


def test_what_is_learned_too_soon_comes_first():
    evidence = make()
    losses = evidence.trained.losses.copy()
    losses[0, 8] = 1e-6
    trained = evidence.trained._replace(losses=losses)
    assert np.argmax(run("early", dataclasses.replace(evidence, trained=trained)).score) == 8


def test_without_cleanlab_confident_learning_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    found = BY_NAME["confident"].score(make())
    assert isinstance(found, NotRun) and "pip install" in found.reason
