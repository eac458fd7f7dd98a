"""FRIENDS, adversarial training and random noise: the truths that each of them rests on."""

import dataclasses
import functools
import heapq
import itertools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from defended import begin
from networks import one_device

from jaxpoison import models, training
from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset
from jaxpoison.defenses import (
    EpicConfig,
    FatConfig,
    FriendsConfig,
    _epic,
    adversarial_training,
    chain,
    epic,
    fixed_noise,
    friends,
    random_noise,
)
from jaxpoison.defenses._epic import alone, facility_location, medoid_budgets, similarities
from jaxpoison.training.hooks import Defense, Info

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
    state, train = begin(defense, jax.random.key(0), train)
    (_, first, _), (_, later, _) = (defense.on_epoch(state, epoch, None, train) for epoch in (0, 7))
    np.testing.assert_array_equal(first.images, later.images)
    moved = np.abs(np.asarray(first.images) - train.images).max(axis=(1, 2, 3))
    assert (moved > 0).sum() == 24 and moved.max() <= 0.062 + 1e-6
    assert np.min(first.images) >= 0 and np.max(first.images) <= 1


def make_friendly(config, mesh=None, train=None):
    train = random_set() if train is None else train
    defense = friends(MODEL, config, mesh=mesh or one_device(), batch_size=40)
    state, train = begin(defense, jax.random.key(3), train)
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
    np.testing.assert_allclose(info.metrics["divergence"], got, atol=1e-5)
    careless = divergence(np.clip(train.images + growth * start, 0, 1))
    assert got < 0.01 * careless
    np.testing.assert_allclose(noisy.images, np.clip(train.images + noise, 0, 1), atol=1e-6)


def test_friendly_noise_follows_the_authors_loop():
    """Step by step against SGD written out, in batches of the authors' size."""
    config = FriendsConfig(num_steps=6, start=0.02)
    train = random_set().take(slice(40))
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
        for mesh in (one_device(), devices.data_mesh())
    )
    for left, right in zip(*map(jax.tree.leaves, (one.params, all_of_them.params)), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-4)


@pytest.mark.parametrize(("norm", "epsilon"), [("l2", 0.8), ("linf", 0.15)])
def test_friendly_adversarial_examples_are_just_misclassified_or_at_the_budget(norm, epsilon):
    train = random_set()
    batch = Dataset(jnp.asarray(train.images), jnp.asarray(train.labels))
    config = FatConfig(epsilon=epsilon, norm=norm, num_steps=30, jitter=0.0)
    defense = adversarial_training(MODEL, config)
    tau, _ = begin(defense, jax.random.key(0), train)
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
        (lambda: random_noise(1.5), r"size must be in \[0, 1\]"),
        (lambda: random_noise(0.1, "cauchy"), "one of bernoulli, uniform, gaussian"),
        (lambda: fixed_noise(0.1, 0.0), "ratio must be above 0"),
        (lambda: friends(MODEL, FriendsConfig(zeta=16)), r"zeta must be in \[0, 1\]"),
        (lambda: friends(MODEL, FriendsConfig(num_steps=0)), "num_steps must be at least 1"),
        (lambda: friends(MODEL, FriendsConfig(mu=16)), r"mu must be in \[0, 1\]"),
        (lambda: adversarial_training(MODEL, FatConfig(epsilon=0)), "epsilon must be above 0"),
        (lambda: adversarial_training(MODEL, FatConfig(norm="l1")), "one of l2, linf"),
        (lambda: adversarial_training(MODEL, FatConfig(num_steps=0)), "num_steps"),
    ],
)
def test_bad_settings_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def random_similarities(num_examples, num_filled=0, seed=0):
    rng = np.random.default_rng(seed)
    proxies = rng.dirichlet(np.full(5, 0.3), num_examples) - np.eye(5)[0]
    valid = np.arange(num_examples) < num_examples - num_filled
    similarity = similarities(jnp.asarray(proxies, jnp.float32), jnp.asarray(valid))
    distances = np.linalg.norm(proxies[:, None] - proxies[None], axis=-1)
    want = np.exp(-distances / 5) * valid[:, None] * valid[None]
    np.testing.assert_allclose(similarity, want, atol=1e-6)
    return similarity, jnp.asarray(valid), want


def greedy(similarity, candidates, budget):
    """The definition, in float64, with gains computed again for every candidate."""
    best, chosen = np.zeros(len(similarity)), []
    for _ in range(budget):
        gains = {j: np.maximum(similarity[:, j] - best, 0).sum() for j in candidates
                 if j not in chosen}  # fmt: skip
        chosen.append(max(gains, key=gains.get))
        best = np.maximum(best, similarity[:, chosen[-1]])
    return chosen


@pytest.mark.parametrize(("num_examples", "num_filled", "budget"), [(12, 0, 3), (40, 7, 6),
                                                                   (200, 20, 18)])  # fmt: skip
def test_facility_location_is_the_greedy_choice(num_examples, num_filled, budget):
    similarity, valid, want = random_similarities(num_examples, num_filled)
    chosen = jax.jit(facility_location)(similarity, valid, budget)
    expected = greedy(want, range(num_examples - num_filled), budget)
    assert set(np.flatnonzero(chosen)) == set(expected)
    value = want[:, np.flatnonzero(chosen)].max(1).sum()
    if num_examples == 12:  # within 1 - 1/e of the best of all subsets, and here equal to it
        best = max(want[:, list(s)].max(1).sum() for s in itertools.combinations(range(12), 3))
        assert value > 0.99 * best


def lazy_greedy(similarity, budget):
    """Minoux's accelerated greedy algorithm, with a heap."""
    heap = [(-column.sum(), j) for j, column in enumerate(similarity.T)]
    heapq.heapify(heap)
    best, chosen = np.zeros(len(similarity)), []
    while len(chosen) < budget:
        _, j = heapq.heappop(heap)
        gain = np.maximum(similarity[:, j] - best, 0).sum()
        if not heap or gain >= -heap[0][0]:
            chosen.append(j)
            best = np.maximum(best, similarity[:, j])
        else:
            heapq.heappush(heap, (-gain, j))
    return chosen


def test_facility_location_on_1000_points_equals_lazy_greedy():
    similarity, valid, want = random_similarities(1000, seed=1)
    chosen = np.flatnonzero(jax.jit(facility_location)(similarity, valid, 100))
    expected = lazy_greedy(want, 100)
    assert len(set(chosen) & set(expected)) >= 98  # rounding settles what are nearly ties
    np.testing.assert_allclose(
        want[:, chosen].max(1).sum(), want[:, expected].max(1).sum(), rtol=1e-5
    )


def test_medoids_without_followers_are_alone():
    similarity, valid, want = random_similarities(40, 7)
    medoids = facility_location(similarity, valid, 10)
    nearest = [max(np.flatnonzero(medoids), key=lambda j, i=i: want[i, j]) for i in range(33)]
    expected = [nearest.count(i) == 1 and i in nearest for i in range(33)]
    got = np.asarray(alone(similarity, medoids) & valid)
    np.testing.assert_array_equal(got[:33], expected)
    assert any(expected) and not got[33:].any()


def test_medoid_budgets_add_up():
    sizes = np.array([33, 21, 46, 0, 7])
    for seed in range(5):
        budgets = np.asarray(medoid_budgets(jax.random.key(seed), sizes, 0.1))
        assert budgets.sum() == 10 and (budgets <= np.ceil(0.1 * sizes)).all()
        assert (budgets[sizes > 0] >= 1).all() and budgets[3] == 0


def test_epic_drops_for_good_and_training_goes_on_with_the_rest():
    config = EpicConfig(fraction=0.3, start=2, every=2, last=4)
    logged = []
    state = fit(
        epic(MODEL, config, mesh=one_device(), batch_size=40),
        report=lambda epoch, metrics: logged.append(metrics),
    )
    dropped = [m.get("dropped") for m in logged]

    def steps(epoch):
        return (96 - int(dropped[epoch])) // 16

    assert [d is not None for d in dropped] == [False, False, True, False, True] + [False] * 3
    assert 0 < dropped[2] <= dropped[4] < 48
    first, second = (logged[epoch]["chosen"] for epoch in (2, 4))
    assert first.sum() == dropped[2] and (second >= first).all()
    assert int(state.step) == 2 * 6 + 2 * steps(2) + 4 * steps(4)


def test_each_selection_of_epic_draws_by_its_own_key(monkeypatch):
    keys = []

    def nothing(run, key, variables, dataset):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return jnp.zeros(len(dataset.labels), bool)

    monkeypatch.setattr(_epic, "selection", nothing)
    defense = epic(MODEL, EpicConfig(start=2, every=2, last=4), mesh=one_device())
    state, train = begin(defense, jax.random.key(0), random_set())
    for epoch in (2, 3, 4):
        state, train, _ = defense.on_epoch(state, epoch, SimpleNamespace(variables=None), train)
    assert len(set(keys)) == len(keys) == 2


def test_learning_rate_falls_at_its_epochs_though_epochs_have_become_shorter():
    """Half the examples dropped: if steps were counted, the milestone would come twice as late."""
    recipe = dataclasses.replace(RECIPE, milestones=(4,), momentum=0.0, weight_decay=0.0)
    biases = []

    def halve(state, epoch, train_state, dataset):
        biases.append(np.asarray(train_state.params["head"]["bias"]))
        return state, dataset.take(slice(48)), Info(changed=True)

    state = training.fit(
        MODEL, recipe, random_set(), key=jax.random.key(0), mesh=one_device(),
        defense=Defense(on_epoch=halve),
    )  # fmt: skip
    steps = np.abs(np.diff([*biases, state.params["head"]["bias"]], axis=0)).max(axis=1)
    assert steps[4:].max() < 0.3 * steps[:4].min()


@pytest.mark.parametrize("from_host", [True, False])
def test_shorter_epochs_do_not_recompile(monkeypatch, from_host):
    monkeypatch.setattr(loops, "steps_from_host", lambda: from_host)
    traces = []

    def shrink(state, epoch, train_state, dataset):
        return state, dataset.take(slice(96 - 16 * epoch)), Info(changed=True)

    def count(state, key, train_state, batch):
        traces.append(1)
        return batch

    recipe = dataclasses.replace(RECIPE, epochs=5)
    state = training.fit(
        MODEL, recipe, random_set(), key=jax.random.key(0), mesh=one_device(),
        defense=Defense(on_epoch=shrink, on_batch=count),
    )  # fmt: skip
    assert int(state.step) == 6 + 5 + 4 + 3 + 2
    # Whole epochs, and then all four shorter ones; a scan traces the step for shapes as well.
    assert len(traces) <= (2 if from_host else 4)
