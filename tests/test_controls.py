"""The controls of HINT's comparison, and the recommended defense: what each does to the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from defended import begin
from networks import Tanh, classifier, one_device

from jaxpoison import training
from jaxpoison.data import Dataset, load_embedded
from jaxpoison.defenses import (
    Defense,
    HintConfig,
    add_trusted,
    bit_depth,
    chain,
    cutmix,
    gray,
    hint,
    jpeg,
    mixup,
    orthogonal_projection,
    recommended,
    refit_head,
)
from jaxpoison.defenses.squeezing import compress
from jaxpoison.training._fit import losses_and_hits
from jaxpoison.training.hooks import Info, with_ids

RECIPE = training.Recipe(
    epochs=3, batch_size=16, learning_rate=0.2, milestones=(1,), max_shift=0.0, flip=False
)
KEY = jax.random.key(0)


MODEL = classifier(Tanh(8), mean=(0.5,), std=(0.3,))


@functools.cache
def random_set(num_examples=48, seed=0):
    rng = np.random.default_rng(seed)
    labels = (np.arange(num_examples) % 3).astype(np.int32)
    images = rng.uniform(0, 0.7, (num_examples, 4, 4, 1))
    for label in range(3):
        images[labels == label, :, label] += 0.3
    return Dataset(images.astype(np.float32), labels)


TRUSTED = random_set(18, 1)


def fit(defense=None, train=None, **more):
    return training.fit(
        MODEL, RECIPE, random_set() if train is None else train, key=KEY, defense=defense,
        mesh=one_device(), **more,
    )  # fmt: skip


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def batch_of(num_examples=64, side=8):
    """Image i is i + 1 everywhere, so a pixel says where it came from."""
    images = (
        jnp.ones((num_examples, side, side, 1))
        * jnp.arange(1, num_examples + 1)[:, None, None, None]
    )
    return Dataset(images, jnp.arange(num_examples) % 3)


@functools.cache
def squeezed(kind):
    """Returns 100 real images, and what a defense makes of them before every epoch."""
    train = load_embedded(kind).train
    train = Dataset(train.images[:100], train.labels[:100])
    defense = jpeg()
    state, train = begin(defense, KEY, train)
    (_, first, _), (_, later, _) = (defense.on_epoch(state, epoch, None, train) for epoch in (0, 5))
    assert_same(first, later)
    return train, Dataset(*map(np.asarray, first))


@pytest.mark.parametrize("kind", ["mnist", "cifar10"])
def test_jpeg_keeps_the_picture(kind):
    train, after = squeezed(kind)
    assert after.images.dtype == np.uint8 and after.images.shape == train.images.shape
    np.testing.assert_array_equal(after.labels, train.labels)
    assert np.any(after.images != train.images)
    pixels = (images.astype(float).ravel() for images in (train.images, after.images))
    assert np.corrcoef(*pixels)[0, 1] > 0.9


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_takes_fine_noise_away(channels):
    """A checkered pattern lies in the frequency that is rounded most coarsely."""
    checkered = np.indices((16, 16)).sum(0)[None, ..., None] % 2
    flat = np.full((1, 16, 16, channels), 120, np.uint8)
    noisy = (flat + 16 * checkered - 8).astype(np.uint8)
    before, after = (
        np.asarray(jpeg().init(KEY, Dataset(images, np.zeros(1, np.int32)), 1))
        for images in (flat, noisy)
    )
    np.testing.assert_array_equal(after, before)
    kept = np.asarray(jpeg(95).init(KEY, Dataset(noisy, np.zeros(1, np.int32)), 1)).astype(float)
    assert np.std(kept) > 6  # at a high quality it stays


def test_jpeg_takes_floats_as_the_bytes_they_round_to():
    train, after = squeezed("cifar10")
    floats = Dataset((train.images / 255).astype(np.float32), train.labels)
    np.testing.assert_array_equal(jpeg().init(KEY, floats, 1), after.images)


def test_gray_is_the_luma_of_pillow():
    from PIL import Image

    train, _ = squeezed("cifar10")
    _, after, _ = gray().on_epoch((), 0, None, train)
    want = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in train.images])
    images = np.asarray(after.images)
    assert images.shape == train.images.shape and images.min() >= 0 and images.max() <= 1
    np.testing.assert_allclose(255 * images[..., 0], want, atol=1.0)
    np.testing.assert_array_equal(images[..., :1].repeat(3, -1), images)


def test_bit_depth_keeps_the_nearest_of_few_levels():
    train, _ = squeezed("cifar10")
    _, after, info = bit_depth().on_epoch((), 0, None, train)
    levels = np.array([0, 85, 170, 255])
    nearest = levels[np.abs(train.images[..., None].astype(int) - levels).argmin(-1)]
    np.testing.assert_allclose(255 * np.asarray(after.images), nearest, atol=1e-3)
    assert info.changed
    _, fine, _ = bit_depth(7).on_epoch((), 1, None, train)
    assert np.abs(255 * np.asarray(fine.images) - train.images).max() <= 1.01
    for bits in (0, 8, 2.0):
        with pytest.raises(ValueError, match="whole number from 1 to 7"):
            bit_depth(bits)


def test_orthogonal_projection_takes_class_wise_noise_away_and_leaves_the_rest():
    rng = np.random.default_rng(0)
    labels = np.arange(400, dtype=np.int32) % 4
    noise = rng.choice([-0.1, 0.1], (4, 6, 6, 3)).astype(np.float32)
    clean = np.clip(rng.normal(0.5, 0.02, (400, 6, 6, 3)), 0, 1).astype(np.float32)
    poisoned = Dataset(clean + noise[labels], labels)
    defense = orthogonal_projection()
    state, train = begin(defense, KEY, poisoned)
    mean, directions = map(np.asarray, state)
    np.testing.assert_allclose(directions.T @ directions, np.eye(4), atol=1e-5)
    _, after, _ = defense.on_epoch(state, 0, None, train)
    pixels = poisoned.images.reshape(400, -1) - mean
    want = poisoned.images.reshape(400, -1) - (pixels @ directions) @ directions.T
    np.testing.assert_allclose(np.asarray(after.images).reshape(400, -1), want, atol=1e-5)

    def spread(images):  # between the means of classes, and within classes
        flat = np.asarray(images).reshape(400, -1)
        means = np.stack([flat[labels == label].mean(0) for label in range(4)])
        return means.std(0).mean(), (flat - means[labels]).std()

    between, within = spread(after.images)
    between_before, within_before = spread(poisoned.images)
    assert between < 0.15 * between_before and within > 0.95 * within_before
    with pytest.raises(TypeError, match="expected a training"):
        orthogonal_projection(RECIPE)


def test_mixup_mixes_labels_as_it_mixes_images():
    batch = batch_of()
    weights = []
    for seed in range(20):
        mixed = mixup(3).on_batch((), jax.random.key(seed), None, batch)
        np.testing.assert_allclose(mixed.labels.sum(-1), 1, rtol=1e-6)
        # Each image is w i + (1 - w) j: linear in which images went in, so j follows from w.
        numbers, labels = np.asarray(mixed.images[:, 0, 0, 0]), np.asarray(mixed.labels)
        own = np.asarray(jax.nn.one_hot(batch.labels, 3))
        differs = labels.max(-1) < 1 - 1e-6
        (weight,) = np.unique(np.round(labels[differs][own[differs] == 1], 4))
        others = (numbers - weight * np.arange(1, 65)) / (1 - weight) - 1
        if 0.05 < weight < 0.95:
            np.testing.assert_allclose(np.sort(others), np.arange(64), atol=0.02)
            want = weight * own + (1 - weight) * own[np.round(others).astype(int)]
            np.testing.assert_allclose(labels, want, atol=1e-3)
        weights.append(weight)
    assert min(weights) < 0.3 and max(weights) > 0.7  # Beta(1, 1) is uniform


def test_cutmix_pastes_one_box_and_counts_its_pixels():
    batch = batch_of(side=16)
    shares = []
    for seed in range(20):
        mixed = cutmix(3).on_batch((), jax.random.key(seed), None, batch)
        images, labels = np.asarray(mixed.images[..., 0]), np.asarray(mixed.labels)
        pasted = images != np.asarray(batch.images[..., 0])
        box = pasted.any(0)
        rows, columns = box.any(1), box.any(0)
        np.testing.assert_array_equal(box, rows[:, None] & columns[None, :])
        for side in (rows, columns):  # without gaps
            assert np.abs(np.diff(np.r_[0, side, 0])).sum() in (0, 2)
        share = box.mean()
        partners = np.where(pasted, images, 0).max((1, 2)).astype(int) - 1
        own = np.asarray(jax.nn.one_hot(batch.labels, 3))
        other = own[np.where(partners < 0, np.arange(64), partners)]
        np.testing.assert_allclose(labels, (1 - share) * own + share * other, atol=1e-6)
        shares.append(share)
    assert min(shares) < 0.2 and max(shares) > 0.5


def test_labels_may_be_shares_and_one_hot_shares_are_labels():
    logits = jax.random.normal(KEY, (5, 3))
    labels = jnp.array([0, 2, 1, 1, 0])
    mixed, plain = (losses_and_hits(logits, y) for y in (jax.nn.one_hot(labels, 3), labels))
    np.testing.assert_allclose(mixed[0], plain[0], rtol=1e-5)
    np.testing.assert_array_equal(mixed[1], plain[1])
    shares = jax.nn.softmax(jax.random.normal(jax.random.key(1), (5, 3)))
    want = -(np.asarray(shares) * np.asarray(jax.nn.log_softmax(logits))).sum(-1)
    losses, hits = losses_and_hits(logits, shares)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    np.testing.assert_array_equal(hits, logits.argmax(-1) == shares.argmax(-1))


def test_training_on_mixed_labels_runs_and_learns():
    log = []
    fit(chain(mixup(3), cutmix_of_shares()), report=lambda epoch, metrics: log.append(metrics))
    assert log[-1]["loss"] < log[0]["loss"]


def cutmix_of_shares():
    """Leaves labels alone that are shares already."""

    def on_batch(state, key, train_state, batch):
        assert batch.labels.shape == (16, 3)
        return batch

    return Defense(on_batch=on_batch)


def test_trusted_examples_added_are_those_of_the_joined_set():
    train = random_set()
    defense = add_trusted(TRUSTED, repeats=2, mesh=one_device())
    _, dataset, _ = defense.on_epoch((), 0, None, jax.tree.map(jnp.asarray, with_ids(train)))
    assert len(dataset.labels) == 48 + 36
    np.testing.assert_array_equal(dataset.ids, np.r_[:48, np.full(36, -1)])
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), train, TRUSTED, TRUSTED)
    assert_same(Dataset(np.asarray(dataset.images), np.asarray(dataset.labels)), joined)
    # The same steps at the same learning rates: the milestone counts epochs.
    added = fit(defense)
    assert_same(added.params, fit(train=joined).params)
    assert int(added.step) == 3 * (84 // 16)


@pytest.mark.parametrize(("num_train", "repeats"), [(48, 3), (5, 1)])
def test_trusted_examples_may_be_half_of_an_epoch(num_train, repeats):
    train = jax.tree.map(lambda x: jnp.asarray(x[:num_train]), with_ids(random_set()))
    defense = add_trusted(TRUSTED, repeats=None, mesh=one_device())  # 18 of them
    _, dataset, _ = defense.on_epoch((), 0, None, train)
    assert len(dataset.labels) == num_train + 18 * repeats
    np.testing.assert_array_equal(dataset.labels[num_train:], np.tile(TRUSTED.labels, repeats))


def test_trusted_examples_added_and_half_dropped_keep_the_schedule():
    def keep_half(state, epoch, train_state, dataset):
        return state, dataset.take(slice(len(dataset.labels) // 2)), Info(changed=True)

    half = Defense(on_epoch=keep_half)
    state = fit(chain(add_trusted(TRUSTED, mesh=one_device()), half))
    assert int(state.step) == 3 * 2  # 66 examples, of which half are two batches
    assert int(optax.tree.get(state.opt_state, "epoch")) == 2


def test_a_new_head_leaves_the_body_and_separates_the_trusted_set():
    flipped = Dataset(TRUSTED.images, (TRUSTED.labels + 1) % 3)  # other labels than in training
    log = []
    state = fit(
        refit_head(MODEL, flipped), test=flipped, report=lambda epoch, metrics: log.append(metrics)
    )
    plain = fit()
    assert_same(state.params["body"], plain.params["body"])
    assert [line["test_accuracy"] > 0.9 for line in log] == [False, False, True]
    predicted = jnp.argmax(MODEL.apply(state.variables, flipped.images), -1)
    assert np.mean(predicted == flipped.labels) == log[-1]["test_accuracy"]


def test_a_new_head_is_in_the_last_checkpoint(tmp_path):
    def checkpoints():
        return training.Checkpoints(tmp_path, every=1, identity="a")

    finished = []

    def finish(state, train_state):
        finished.append(True)
        return refit_head(MODEL, TRUSTED).finish(state, train_state)

    defense = refit_head(MODEL, TRUSTED)._replace(finish=finish)
    first = fit(defense, checkpoints=checkpoints())
    again = fit(defense, checkpoints=checkpoints())
    assert_same(again.params, first.params)
    assert finished == [True]


def test_recommended_is_trusted_examples_as_half_of_an_epoch():
    defense = recommended(TRUSTED, mesh=one_device())
    got = fit(defense)
    assert_same(got.params, fit(add_trusted(TRUSTED, repeats=3, mesh=one_device())).params)
    log = []  # HINT before it sees, and tells of, the set as collected
    healthy = hint(
        MODEL, TRUSTED, HintConfig(ratio=1.0, mass=0.9, schedule=(1,)), mesh=one_device()
    )
    fit(chain(healthy, defense), report=lambda epoch, metrics: log.append(metrics))
    assert log[1]["chosen"].shape == (48,)
    assert log[1]["ratio"] == np.mean(log[1]["chosen"]) < 1


def test_jpeg_before_recommended_squeezes_the_collected_images_alone():
    train, trusted = random_set(), TRUSTED
    defense = chain(jpeg(), recommended(trusted, mesh=one_device()))
    state, collected = begin(defense, KEY, train)
    _, epoch, _ = defense.on_epoch(state, 0, None, collected)
    jpegs, as_they_come = np.split(np.asarray(epoch.images), [len(train.labels)])
    np.testing.assert_allclose(jpegs, compress(train.images, 10) / 255, rtol=1e-6)
    np.testing.assert_array_equal(as_they_come, np.tile(trusted.images, (3, 1, 1, 1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpeg(0), "quality"),
        (lambda: jpeg(100), "quality"),
        (lambda: mixup(3, alpha=0.0), "alpha"),
        (lambda: cutmix(3, alpha=float("nan")), "alpha"),
        (lambda: add_trusted(TRUSTED, repeats=0), "repeats"),
        (lambda: add_trusted(Dataset(TRUSTED.images, 0 * TRUSTED.labels)), "one-class"),
        (lambda: refit_head(MODEL, Dataset(TRUSTED.images, 9 + TRUSTED.labels)), "out of range"),
        (lambda: gray().init(KEY, random_set(), 1), "channels"),
        (lambda: jpeg().init(KEY, Dataset(np.zeros((2, 4, 4, 2), np.uint8), TRUSTED.labels[:2]), 1),
         "channels"),
    ],
)  # fmt: skip
def test_bad_settings_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
