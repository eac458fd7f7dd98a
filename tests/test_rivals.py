"""FRIENDS, adversarial training and random noise: the truths that each of them rests on."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpoison import models, parallel, training
from jaxpoison.data import Dataset
from jaxpoison.defenses import (
    FatConfig,
    FriendsConfig,
    adversarial_training,
    chain,
    fixed_noise,
    friends,
    random_noise,
)

RECIPE = training.Recipe(
    epochs=8, batch_size=16, learning_rate=0.2, milestones=(), max_shift=0.0, flip=False
)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.BatchNorm(use_running_average=not train)(x)


MODEL = models.Classifier(Body(), num_features=16, num_classes=3, mean=(0.5,), std=(0.3,))


@functools.cache
def random_set(num_examples=96):
    rng = np.random.default_rng(0)
    labels = (np.arange(num_examples) % 3).astype(np.int32)
    images = rng.uniform(0, 0.8, (num_examples, 6, 6, 1))
    for label in range(3):
        images[labels == label, :, 2 * label] += 0.2
    return Dataset(images.astype(np.float32), labels)


def one_device():
    return parallel.data_mesh(jax.devices()[:1])


def fit(defense=None, mesh=None, **more):
    return training.fit(
        MODEL,
        RECIPE,
        random_set(),
        key=jax.random.key(0),
        defense=defense,
        mesh=mesh or one_device(),
        **more,
    )


@functools.cache
def trained():
    return fit()


def predictions(images):
    return np.asarray(jax.nn.softmax(MODEL.apply(trained().variables, jnp.asarray(images))))


def test_random_noise_has_its_distribution_and_is_fresh_at_every_step():
    batch = Dataset(jnp.full((400, 6, 6, 1), 0.5), jnp.zeros(400, jnp.int32))

    def draw(kind, seed):
        defense = random_noise(0.06, kind)
        return np.asarray(defense.on_batch((), jax.random.key(seed), None, batch).images) - 0.5

    for kind, spread in (("bernoulli", 1.0), ("uniform", 1 / np.sqrt(3)), ("gaussian", 1.0)):
        noise = draw(kind, 0)
        np.testing.assert_allclose(noise.std(), 0.06 * spread, rtol=0.03)
        assert abs(noise.mean()) < 0.002
        assert not np.array_equal(noise, draw(kind, 1))
    np.testing.assert_allclose(np.abs(draw("bernoulli", 0)), 0.06, rtol=1e-5)
    assert np.abs(draw("uniform", 0)).max() <= 0.06 + 1e-6


def test_fixed_noise_moves_the_asked_share_once_and_for_all():
    train = random_set()
    defense = fixed_noise(0.062, 0.25)
    state = defense.init(jax.random.key(0), train)
    (_, first, _), (_, later, _) = (defense.on_epoch(state, epoch, None, train) for epoch in (0, 7))
    np.testing.assert_array_equal(first.images, later.images)
    moved = np.abs(np.asarray(first.images) - train.images).max(axis=(1, 2, 3))
    assert (moved > 0).sum() == 24 and moved.max() <= 0.062 + 1e-6
    assert np.min(first.images) >= 0 and np.max(first.images) <= 1


def make_friendly(config, mesh=None, train=None):
    train = random_set() if train is None else train
    defense = friends(MODEL, config, mesh=mesh or one_device(), batch_size=40)
    state = defense.init(jax.random.key(3), train)
    return defense.on_epoch(state, config.epoch, trained(), train)


def test_friendly_noise_grows_while_the_prediction_stays():
    # The authors' step is for 3,072 pixels, over which the gradient of a mean is spread; here 36.
    config = FriendsConfig(learning_rate=0.5, num_steps=300)
    state, noisy, info = make_friendly(config)
    noise = np.asarray(state.noise)
    still = dataclasses.replace(config, num_steps=1, learning_rate=1e-9)
    start = np.asarray(make_friendly(still)[0].noise)
    growth = np.sqrt((noise**2).mean() / (start**2).mean())
    assert growth > 1.1 and np.abs(noise).max() <= config.zeta + 1e-6
    train = random_set()
    before = predictions(train.images)

    def divergence(images):
        return (before * np.log(before / predictions(images))).sum(1).mean()

    got = divergence(np.asarray(noisy.images))
    np.testing.assert_allclose(info["divergence"], got, atol=1e-5)
    careless = divergence(np.clip(train.images + growth * start, 0, 1))
    assert got < 0.01 * careless
    np.testing.assert_allclose(noisy.images, np.clip(train.images + noise, 0, 1), atol=1e-6)


def test_friendly_noise_follows_the_authors_loop():
    """Step by step beside SGD written out, in batches of the authors' size."""
    config = FriendsConfig(num_steps=6, start=0.02)
    train = Dataset(*(x[:40] for x in random_set()))
    got = np.asarray(make_friendly(config, train=train)[0].noise)
    variables = trained().variables
    reference = jax.nn.log_softmax(MODEL.apply(variables, train.images))
    noise = jax.random.uniform(
        jax.random.fold_in(jax.random.key(3), 0), (40, 6, 6, 1), minval=-0.02, maxval=0.02
    )

    def objective(noise):
        bounded = jnp.clip(noise, -config.zeta, config.zeta)
        noisy = jax.nn.log_softmax(MODEL.apply(variables, jnp.clip(train.images + bounded, 0, 1)))
        change = (jnp.exp(reference) * (reference - noisy)).sum() / 128
        return change - (bounded**2).sum() / (128 * 36)

    velocity = jnp.zeros_like(noise)
    for step in range(6):
        rate = 100 * 0.1 ** ((step >= 3) + (step >= 4))
        gradient = jax.grad(objective)(noise)
        velocity = 0.9 * velocity + gradient
        noise = noise - rate * (gradient + 0.9 * velocity)
    np.testing.assert_allclose(got, np.clip(noise, -config.zeta, config.zeta), atol=1e-5)


def test_friends_trains_on_many_devices_as_on_one():
    config = FriendsConfig(epoch=1, num_steps=5)
    one, all_of_them = (
        fit(friends(MODEL, config, mesh=mesh, batch_size=40), mesh)
        for mesh in (one_device(), parallel.data_mesh())
    )
    for left, right in zip(*map(jax.tree.leaves, (one.params, all_of_them.params)), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-4)


@pytest.mark.parametrize(("norm", "epsilon"), [("l2", 0.8), ("linf", 0.15)])
def test_friendly_adversarial_examples_are_just_misclassified_or_at_the_budget(norm, epsilon):
    train = random_set()
    batch = Dataset(jnp.asarray(train.images), jnp.asarray(train.labels))
    config = FatConfig(epsilon=epsilon, norm=norm, num_steps=30, jitter=0.0)
    defense = adversarial_training(MODEL, config)
    tau = defense.init(jax.random.key(0), train)
    moved = defense.on_batch(tau, jax.random.key(1), trained(), batch)
    change = np.asarray(moved.images) - train.images
    sizes = np.sqrt((change**2).sum((1, 2, 3))) if norm == "l2" else np.abs(change).max((1, 2, 3))
    assert sizes.max() <= epsilon + 1e-5
    assert np.min(moved.images) >= 0 and np.max(moved.images) <= 1
    wrong = predictions(moved.images).argmax(1) != train.labels
    clean_wrong = predictions(train.images).argmax(1) != train.labels
    assert clean_wrong.mean() < 0.1 and wrong.mean() > 0.5
    # Ascent goes on to the border wherever it has not yet crossed the decision boundary.
    held_inside = np.all((np.asarray(moved.images) > 0) & (np.asarray(moved.images) < 1), (1, 2, 3))
    assert (sizes[~wrong & held_inside] > 0.9 * epsilon).all()

    # With patience it goes on to a greater loss.
    def loss(images):
        return float(optax.softmax_cross_entropy_with_integer_labels(
            MODEL.apply(trained().variables, images), batch.labels).mean())  # fmt: skip

    patient = defense.on_batch(tau + 3, jax.random.key(1), trained(), batch)
    assert loss(batch.images) < loss(moved.images) < loss(patient.images)


def test_patience_follows_its_epochs_and_training_resists_the_attack():
    taus = []
    config = FatConfig(epsilon=0.8, tau_epochs=(2, 5), num_steps=5)
    defended = fit(
        adversarial_training(MODEL, config), report=lambda epoch, m: taus.append(m["tau"])
    )
    assert taus == [0, 0, 1, 1, 1, 2, 2, 2]
    train = random_set()
    batch = Dataset(jnp.asarray(train.images), jnp.asarray(train.labels))
    attack = adversarial_training(MODEL, FatConfig(epsilon=0.8, num_steps=20))

    def robust_accuracy(state):
        moved = attack.on_batch(jnp.int32(9), jax.random.key(2), state, batch)
        logits = MODEL.apply(state.variables, moved.images)
        return float((logits.argmax(-1) == batch.labels).mean())

    assert robust_accuracy(defended) > robust_accuracy(trained()) + 0.1


def test_rivals_chain():
    state = fit(chain(friends(MODEL, FriendsConfig(epoch=1, num_steps=3), mesh=one_device()),
                      adversarial_training(MODEL, FatConfig(num_steps=2))))  # fmt: skip
    assert int(state.step) == 8 * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_noise(1.5), "size of noise"),
        (lambda: random_noise(0.1, "cauchy"), "bernoulli, uniform or gaussian"),
        (lambda: fixed_noise(0.1, 0.0), r"in \(0, 1\]"),
        (lambda: friends(MODEL, FriendsConfig(zeta=16)), "zeta is in units of pixels"),
        (lambda: friends(MODEL, FriendsConfig(num_steps=0)), "num_steps at least 1"),
        (lambda: friends(MODEL, FriendsConfig(mu=16)), "size of noise"),
        (lambda: adversarial_training(MODEL, FatConfig(epsilon=0)), "epsilon must be positive"),
        (lambda: adversarial_training(MODEL, FatConfig(norm="l1")), "l2 or linf"),
        (lambda: adversarial_training(MODEL, FatConfig(num_steps=0)), "num_steps"),
    ],
)
def test_bad_settings_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
