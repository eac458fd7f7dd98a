import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import one_device

from jaxpoison import models, solvers, training
from jaxpoison.core import devices
from jaxpoison.data import Dataset
from jaxpoison.defenses import EVERY_EPOCH, PAPER, RELEASED_CODE, HintConfig, HintState, hint
from jaxpoison.defenses._ids import NO_ID
from jaxpoison.training.hooks import Info, with_ids

NUM_CLASSES, SIDE, STD = 3, 4, 0.5
CONFIG = HintConfig(ratio=0.4, gamma=0.5, schedule=(2, 4))
RECIPE = training.Recipe(
    epochs=6, batch_size=8, learning_rate=0.05, milestones=(), max_shift=0.0, flip=False
)


class SmoothBody(nn.Module):
    """tanh of a linear map, which numpy can repeat in float64."""

    @nn.compact
    def __call__(self, x, train: bool):
        return nn.tanh(nn.Dense(5, name="dense")(x.reshape(x.shape[0], -1)))


MODEL = models.Classifier(
    SmoothBody(), num_features=5, num_classes=NUM_CLASSES, mean=(0.5,), std=(STD,)
)


def random_set(num_examples, seed, as_uint8=False):
    """Images whose brightness in one column tells the class; some touch 0 and 1."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(num_examples) % NUM_CLASSES).astype(np.int32)
    images = rng.uniform(-0.1, 0.9, (num_examples, SIDE, SIDE, 1))
    for label in range(NUM_CLASSES):
        images[labels == label, :, label] += 0.3
    images = np.round(255 * np.clip(images, 0, 1))
    if as_uint8:
        return Dataset(images.astype(np.uint8), labels)
    return Dataset((images / 255).astype(np.float32), labels)


TRAIN, TRUSTED = random_set(40, 0), random_set(12, 1)


@functools.cache
def trained(epochs=6):
    """Returns the state of an undefended run: not at a stationary point, not random either."""
    recipe = dataclasses.replace(RECIPE, epochs=epochs)
    return training.fit(MODEL, recipe, TRAIN, key=jax.random.key(0), mesh=one_device())


class Update:
    """HINT called by hand, epoch by epoch, with the weights of `trained`."""

    def __init__(self, config=CONFIG, dataset=TRAIN, mesh=None, **settings):
        mesh = one_device() if mesh is None else mesh
        self.defense = hint(MODEL, TRUSTED, config, mesh=mesh, **settings)
        self.dataset = devices.replicate(with_ids(dataset), mesh)
        self.state = self.defense.init(jax.random.key(7), self.dataset, 100)
        self.mesh = mesh

    def __call__(self, epoch, train_state=None):
        train_state = devices.replicate(
            trained() if train_state is None else train_state, self.mesh
        )
        self.state, dataset, self.info = self.defense.on_epoch(
            self.state, epoch, train_state, self.dataset
        )
        return jax.tree.map(np.asarray, dataset)

    @property
    def chosen(self):
        return np.asarray(self.state.chosen)

    @property
    def noise(self):
        return np.asarray(self.state.noise)


class Numpy:
    """Equations 8 and 9 in float64: dense Hessian, per-example gradients, central differences."""

    def __init__(self, train_state, damping=0.5):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), train_state.params)
        self.dense, self.head = params["body"]["dense"], params["head"]
        self.damping = damping

    def features(self, images):
        x = (np.asarray(images, np.float64) - 0.5) / STD
        f = np.tanh(x.reshape(len(x), -1) @ self.dense["kernel"] + self.dense["bias"])
        return np.c_[f, np.ones(len(f))]

    def probabilities(self, f):
        logits = f @ np.r_[self.head["kernel"], self.head["bias"][None]]
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def gradients(self, images, labels):
        """[N, 6 * 3]: of each example's loss in (kernel, bias), row-major."""
        f = self.features(images)
        wrong = self.probabilities(f) - np.eye(NUM_CLASSES)[np.asarray(labels)]
        return (f[:, :, None] * wrong[:, None]).reshape(len(f), -1)

    def hessian(self, images):
        f = self.features(images)
        p = self.probabilities(f)
        inner = np.einsum("nk,kl->nkl", p, np.eye(NUM_CLASSES)) - p[:, :, None] * p[:, None]
        size = f.shape[1] * NUM_CLASSES
        return np.einsum("ni,nkl,nj->ikjl", f, inner, f).reshape(size, size) / len(f)

    def ihvp(self, trusted, images):
        H = self.hessian(images)
        v = self.gradients(*trusted[:2]).mean(0)
        return np.linalg.solve(H + self.damping * np.eye(len(H)), v)

    def pixel_influence(self, s, images, labels, step=1e-5):
        images = np.asarray(images, np.float64)
        maps = np.zeros_like(images)
        for pixel in np.ndindex(images.shape[1:]):
            move = np.zeros(images.shape[1:])
            move[pixel] = step
            up, down = (self.gradients(x, labels) @ s for x in (images + move, images - move))
            maps[:, *pixel] = -(up - down) / (2 * step)
        return maps

    def loss(self, images, labels):
        p = self.probabilities(self.features(images))
        return -np.log(p[np.arange(len(p)), labels]).mean()


def reference(config, train_states, dataset=TRAIN):
    """Algorithms 1 to 3, for the updates in `train_states` {epoch: state}."""
    images, labels = np.asarray(dataset.images, np.float64), np.asarray(dataset.labels)
    noise, chosen = None, None
    for epoch, train_state in sorted(train_states.items()):
        model = Numpy(train_state)
        if chosen is None:
            s = model.ihvp(TRUSTED, images)
            scores = -model.gradients(images, labels) @ s
            count = int(np.ceil(config.ratio * len(labels)))
            chosen = np.sort(np.argsort(-np.abs(scores), kind="stable")[:count])
            noise = np.zeros_like(images[chosen])
        else:
            current = images.copy()
            current[chosen] += noise
            s = model.ihvp(
                TRUSTED, current[chosen] if config.hessian_examples == "chosen" else current
            )
        maps = model.pixel_influence(s, images[chosen] + noise, labels[chosen])
        gamma = config.gamma / (10 if config.late_epoch and epoch >= config.late_epoch else 1)
        gamma *= STD if config.coordinates == "normalized" else 1
        moved = images[chosen] + np.clip(noise - gamma * maps, -config.beta, config.beta)
        moved = np.clip(moved, 0, 1)
        if config.storage == "uint8_floor":
            moved = np.floor(255 * moved + 1e-3) / 255
        noise = moved - images[chosen]
    return chosen, noise


def test_two_updates_equal_the_algorithm_in_numpy():
    run = Update()
    first, second = trained(), trained(7)
    run(2, first)
    chosen, noise = reference(CONFIG, {2: first})
    np.testing.assert_array_equal(run.chosen, chosen)
    np.testing.assert_allclose(run.noise, noise, atol=2e-5)
    assert 0.1 < float(run.info.metrics["share_at_beta"]) < 0.9
    run(4, second)
    chosen, noise = reference(CONFIG, {2: first, 4: second})
    np.testing.assert_array_equal(run.chosen, chosen)
    np.testing.assert_allclose(run.noise, noise, atol=2e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"coordinates": "normalized"},
        {"late_epoch": 4},
        {"hessian_examples": "chosen"},
        {"beta": 16 / 255, "storage": "uint8_floor"},
    ],
    ids=str,
)
def test_variants_equal_the_algorithm_in_numpy(change):
    config = dataclasses.replace(CONFIG, beta=0.2, **({"gamma": 0.2} | change)) \
        if "beta" not in change else dataclasses.replace(CONFIG, **change)  # fmt: skip
    run, states = Update(config), {2: trained(), 4: trained(7)}
    for epoch, state in states.items():
        run(epoch, state)
    chosen, noise = reference(config, states)
    np.testing.assert_array_equal(run.chosen, chosen)
    off = np.abs(run.noise - noise)
    if config.storage == "uint8_floor":  # a pixel on the edge of two levels may fall either way
        assert (off > 1e-5).mean() < 0.01
        assert off.max() < 1.1 / 255
    else:
        np.testing.assert_allclose(run.noise, noise, atol=2e-5)
    plain = reference(dataclasses.replace(CONFIG, beta=config.beta, gamma=config.gamma), states)
    assert np.abs(plain[1] - noise).max() > 1e-4


def test_the_released_codes_settings():
    assert RELEASED_CODE.beta == 16 / 255
    assert (RELEASED_CODE.late_epoch, RELEASED_CODE.solver) == (40, "lissa")
    assert (RELEASED_CODE.coordinates, RELEASED_CODE.hessian_examples) == ("normalized", "chosen")
    assert RELEASED_CODE.storage == "uint8_floor"
    assert RELEASED_CODE.schedule == HintConfig().schedule == (5, 15, 40)


def test_every_other_epoch_is_the_schedule_that_names_them():
    every = dataclasses.replace(CONFIG, schedule=(2,), every=2)
    named = dataclasses.replace(CONFIG, schedule=(2, 4, 6))
    assert every.updates(7) == named.updates(7) == named.updates(50) == (2, 4, 6)
    assert HintConfig(schedule=(4, 2, 2)).updates(5) == (2, 4)
    assert EVERY_EPOCH.updates(4) == (1, 2, 3) and EVERY_EPOCH.updates(1) == ()
    assert dataclasses.replace(EVERY_EPOCH, schedule=PAPER.schedule, every=None) == PAPER
    runs = [Update(config) for config in (every, named)]
    for epoch in range(1, 7):
        first, second = (run(epoch, trained(5 + epoch % 3)) for run in runs)
        np.testing.assert_array_equal(first.images, second.images)
        assert [run.info.changed for run in runs] == 2 * [epoch in (2, 4, 6)]


@pytest.mark.parametrize("as_uint8", [False, True])
def test_bounds_and_what_stays_as_it_was(as_uint8):
    train = random_set(40, 0, as_uint8)
    run = Update(CONFIG, train)
    before = np.asarray(train.images, np.float32) / (255 if as_uint8 else 1)
    np.testing.assert_array_equal(run(1).images, train.images)  # not yet
    assert run.info == Info()
    for epoch in (2, 3, 4, 5):
        got = run(epoch)
        assert got.images.dtype == np.float32
        assert got.images.min() >= 0
        assert got.images.max() <= 1
        change = np.abs(got.images - before)
        assert change.max() <= CONFIG.beta + 1e-6
        assert change.max() > 0.9 * CONFIG.beta
        others = np.setdiff1d(np.arange(40), run.chosen)
        assert change[others].max() < 1e-7
        assert (change[run.chosen].reshape(16, -1).max(1) > 0).all()
        np.testing.assert_array_equal(got.labels, train.labels)
        assert (run.info == Info()) == (epoch in (3, 5))


def test_noise_persists_between_updates_and_accumulates_at_them():
    config = dataclasses.replace(CONFIG, gamma=0.01)
    run = Update(config)
    run(2)
    chosen, first = run.chosen, run.noise
    run(3, trained(7))
    np.testing.assert_array_equal(run.noise, first)
    run(4)  # with the same weights: nearly the same step once more
    np.testing.assert_array_equal(run.chosen, chosen)
    free = (np.abs(first) > 1e-4) & (np.abs(run.noise) < config.beta)
    ratio = run.noise[free] / first[free]
    assert 1.5 < np.median(ratio) < 2.2
    # Other weights would choose other examples, but D_s is chosen once.
    np.testing.assert_array_equal(run.info.chosen, chosen)
    other = Update(config)
    other(2, trained(1))
    assert np.any(other.chosen != chosen)


def test_chosen_examples_have_the_largest_scores():
    run = Update()
    run(2)
    model = Numpy(trained())
    scores = np.abs(model.gradients(*TRAIN[:2]) @ model.ihvp(TRUSTED, TRAIN.images))
    others = np.setdiff1d(np.arange(40), run.chosen)
    assert len(run.chosen) == 16
    assert scores[run.chosen].min() > scores[others].max()


def test_a_step_lowers_the_trusted_loss_of_a_model_that_follows_it():
    run = Update(dataclasses.replace(CONFIG, gamma=0.01, ratio=1.0))
    got = run(2)
    model = Numpy(trained())
    # One damped Newton step of the head on the difference of the two training losses.
    H = model.hessian(TRAIN.images) + 0.5 * np.eye(18)
    difference = (model.gradients(*got[:2]) - model.gradients(*TRAIN[:2])).mean(0)
    step = np.linalg.solve(H, difference).reshape(6, 3)
    before = model.loss(*TRUSTED[:2])
    predicted = (model.pixel_influence(model.ihvp(TRUSTED, TRAIN.images), *TRAIN[:2])
                 * (got.images - TRAIN.images)).sum() / 40  # fmt: skip
    model.head = {"kernel": model.head["kernel"] - step[:-1], "bias": model.head["bias"] - step[-1]}
    after = model.loss(*TRUSTED[:2])
    assert after < before
    np.testing.assert_allclose(after - before, predicted, rtol=0.1)


class LoudBody(SmoothBody):
    """Features so large that the top eigenvalue is far above the scale of the authors' LiSSA."""

    @nn.compact
    def __call__(self, x, train: bool):
        return 100 * nn.tanh(nn.Dense(5, name="dense")(x.reshape(x.shape[0], -1)))


def test_a_diverging_solver_stops_training_and_says_what_to_change():
    model = models.Classifier(LoudBody(), num_features=5, num_classes=NUM_CLASSES)
    config = dataclasses.replace(CONFIG, solver="lissa", schedule=(0,))
    defense = hint(model, TRUSTED, config, mesh=one_device())
    with pytest.raises(solvers.DivergedError, match="HINT's solve before epoch 0") as error:
        training.fit(
            model, RECIPE, TRAIN, key=jax.random.key(0), defense=defense, mesh=one_device()
        )
    assert "leave scale=None" in str(error.value)


def test_solvers_agree():
    noises = {}
    for solver in ("cg", "cholesky", "lissa", "identity"):
        run = Update(dataclasses.replace(CONFIG, solver=solver, beta=1.0))
        run(2)
        noises[solver] = run.noise
    np.testing.assert_allclose(noises["cg"], noises["cholesky"], atol=1e-5)
    scale = np.abs(noises["cg"]).max()
    assert np.abs(noises["lissa"] - noises["cg"]).max() < 0.1 * scale
    assert np.abs(noises["identity"] - noises["cg"]).max() > 0.2 * scale


def test_a_random_solver_draws_other_batches_at_every_update():
    def noise(epoch):
        run = Update(dataclasses.replace(CONFIG, solver="lissa", ratio=1.0, schedule=(epoch,)))
        run(epoch)
        return run.noise

    first = noise(2)
    np.testing.assert_array_equal(noise(2), first)
    assert np.any(noise(4) != first)


def test_permuting_the_training_set_permutes_the_result():
    order = np.random.default_rng(3).permutation(40)
    straight, permuted = Update(), Update(dataset=Dataset(*(x[order] for x in TRAIN[:2])))
    for epoch in (2, 4):
        want, got = straight(epoch), permuted(epoch)
        np.testing.assert_allclose(got.images, want.images[order], atol=1e-5)
    assert set(order[permuted.chosen]) == set(straight.chosen)


def test_neither_devices_nor_batch_size_change_the_result():
    want = Update()
    want(2)
    for settings in ({"mesh": devices.data_mesh()}, {"batch_size": 7}):
        run = Update(**settings)
        run(2)
        np.testing.assert_array_equal(run.chosen, want.chosen)
        np.testing.assert_allclose(run.noise, want.noise, atol=1e-5)


def test_uint8_storage_stays_on_the_grid_and_within_beta():
    config = dataclasses.replace(CONFIG, beta=16 / 255, storage="uint8_floor", gamma=5.0)
    for train in (TRAIN, random_set(40, 0, as_uint8=True)):
        run = Update(config, train)
        levels = np.asarray(train.images) * (1 if train.images.dtype == np.uint8 else 255.0)
        for epoch in (2, 4):
            moved = 255 * run(epoch).images
            np.testing.assert_allclose(moved, np.round(moved), atol=1e-3)
            change = np.round(moved) - np.round(levels)
            assert np.abs(change).max() == 16
    still = Update(dataclasses.replace(config, gamma=0.0))
    for epoch in (2, 4):  # rounding down must not eat a level that nobody asked for
        np.testing.assert_allclose(still(epoch).images, TRAIN.images, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "as_uint8"), [({"beta": 0.0}, True), ({"gamma": 0.0}, False)], ids=str
)
def test_no_noise_is_plain_training_bit_for_bit(change, as_uint8):
    train = random_set(40, 0, as_uint8)
    recipe = dataclasses.replace(RECIPE, max_shift=1.0, flip=True)

    def fit(defense):
        return training.fit(
            MODEL, recipe, train, key=jax.random.key(0), mesh=one_device(), defense=defense
        )

    config = dataclasses.replace(CONFIG, **change)
    defended = fit(hint(MODEL, TRUSTED, config, mesh=one_device()))
    jax.tree.map(np.testing.assert_array_equal, defended, fit(None))


def test_flipped_labels_rank_high():
    flipped = np.random.default_rng(0).choice(40, 5, replace=False)
    labels = TRAIN.labels.copy()
    labels[flipped] = (labels[flipped] + 1) % NUM_CLASSES
    recipe = dataclasses.replace(RECIPE, epochs=30)
    clean = training.fit(MODEL, recipe, TRAIN, key=jax.random.key(0), mesh=one_device())
    run = Update(dataclasses.replace(CONFIG, ratio=0.25), Dataset(TRAIN.images, labels))
    run(2, clean)
    assert len(set(run.chosen) & set(flipped)) >= 4  # by chance 1.25 of 5


def test_number_of_chosen_examples_is_rounded_up():
    for ratio, num_examples, want in [(0.07, 100, 7), (0.34, 40, 14), (1.0, 40, 40), (0.03, 40, 2)]:
        run = Update(dataclasses.replace(CONFIG, ratio=ratio), random_set(num_examples, 0))
        assert isinstance(run.state, HintState)
        assert run.chosen.shape == (want,)


@pytest.mark.parametrize("mass", [0.3, 0.9])
def test_mass_takes_the_fewest_examples_that_hold_it(mass):
    run = Update(dataclasses.replace(CONFIG, ratio=1.0, mass=mass))
    model = Numpy(trained())
    s = model.ihvp(TRUSTED, TRAIN.images)
    sizes = np.abs(model.gradients(*TRAIN[:2]) @ s)
    order = np.argsort(-sizes)
    share = np.cumsum(sizes[order]) / sizes.sum()
    count = int(np.argmax(share >= mass)) + 1
    moved = run(2).images
    want = np.sort(order[:count])
    np.testing.assert_array_equal(run.chosen, np.r_[want, np.full(40 - count, NO_ID)])
    assert run.info.metrics["ratio"] == count / 40
    np.testing.assert_array_equal(run.info.chosen, want)
    np.testing.assert_array_equal(np.flatnonzero(np.any(moved != TRAIN.images, (1, 2, 3))), want)
    # From here on it is HINT with that share, which is what the same number of examples gives.
    same = Update(dataclasses.replace(CONFIG, ratio=count / 40))
    np.testing.assert_array_equal(same(2).images, moved)
    np.testing.assert_allclose(same(4).images, run(4).images, atol=1e-6)


def test_mass_takes_no_more_than_the_ratio():
    run = Update(dataclasses.replace(CONFIG, ratio=0.1, mass=0.99))
    run(2)
    assert run.info.metrics["ratio"] == 0.1 and run.chosen.max() < 40


def test_random_selection_is_one_draw_from_the_key():
    config = dataclasses.replace(CONFIG, selection="random")
    run = Update(config)
    moved = run(2).images
    first = run.chosen
    assert len(np.unique(first)) == 16 and np.all(np.diff(first) > 0)
    run(4)
    np.testing.assert_array_equal(run.chosen, first)
    other = Update(config)
    other.state = other.state._replace(key=jax.random.key(8))
    other(2)
    assert np.any(other.chosen != first)
    # The noise of an example does not depend on how it was chosen.
    by_influence = Update(dataclasses.replace(CONFIG, ratio=1.0))(2).images
    np.testing.assert_allclose(moved[first], by_influence[first], atol=1e-6)


def test_steps_of_signs_go_against_the_influence_to_the_bound():
    scaled, signed = (
        Update(dataclasses.replace(CONFIG, step=step, gamma=gamma))
        for step, gamma in (("scaled", 1e-3), ("sign", 0.1))
    )
    scaled(2), signed(2)
    received = TRAIN.images[scaled.chosen]
    low, high = (np.clip(received + side, 0, 1) - received for side in (-CONFIG.beta, CONFIG.beta))
    want = np.where(scaled.noise > 0, high, low)
    free = scaled.noise != 0  # a pixel at 0 or 1 that would leave does not say where to
    np.testing.assert_allclose(signed.noise[free], want[free], atol=1e-6)
    assert free.mean() > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 16.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"gamma": -1.0}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"mass": 0.0}, "mass"),
        ({"mass": 1.0}, "mass"),
        ({"mass": 0.9, "selection": "random"}, "selection"),
        ({"selection": "worst"}, "selection"),
        ({"step": "cosine"}, "step"),
        ({"schedule": ()}, "schedule"),
        ({"schedule": (-1, 5)}, "schedule"),
        ({"damping": 0.0}, "damping"),
        ({"solver": "lu"}, "solver"),
        ({"hessian_examples": "some"}, "hessian_examples"),
        ({"coordinates": "lab"}, "coordinates"),
        ({"storage": "int4"}, "storage"),
        ({"every": 0, "schedule": (1,)}, "every must be at least 1"),
        ({"every": 2}, r"schedule is \(2, 4\) and every is 2: .* such as \(2,\)"),
    ],
    ids=str,
)
def test_bad_settings_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        hint(MODEL, TRUSTED, dataclasses.replace(CONFIG, **change))


def test_bad_data_are_errors_before_training():
    def with_nan(dataset):
        images = dataset.images.copy()
        images[3, 1, 1] = np.nan
        return dataset._replace(images=images)

    one_class = Dataset(TRUSTED.images, np.zeros_like(TRUSTED.labels))
    for trusted, message in [
        (one_class, "one-class"),
        (Dataset(TRUSTED.images[:0], TRUSTED.labels[:0]), "empty"),
        (with_nan(TRUSTED), "NaN"),
        (Dataset(TRUSTED.images, TRUSTED.labels + 1), "out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            hint(MODEL, trusted)
    for train, message in [
        (with_nan(TRAIN), "NaN"),
        (Dataset(TRAIN.images, TRAIN.labels + 1), "out of range"),
        (Dataset(2 * TRAIN.images, TRAIN.labels), r"\[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            Update(dataset=train)
    with pytest.raises(ValueError, match="less than one example"):
        Update(dataclasses.replace(CONFIG, ratio=0.01))


def test_a_run_under_hint_reports_and_makes_a_difference():
    log = []
    defense = hint(MODEL, TRUSTED, CONFIG, mesh=one_device())
    state = training.fit(
        MODEL, RECIPE, TRAIN, key=jax.random.key(0), mesh=one_device(), defense=defense,
        report=lambda epoch, metrics: log.append(metrics),
    )  # fmt: skip
    assert np.any(state.params["head"]["kernel"] != trained().params["head"]["kernel"])
    assert [("chosen" in metrics) for metrics in log] == [e in (2, 4) for e in range(6)]
    for name in ("residual", "solver_steps", "step_255_q50", "step_255_q90", "step_255_q99"):
        assert log[2][name] > 0
    assert log[2]["residual"] < 1e-3
    assert log[2]["step_255_q50"] < log[2]["step_255_q90"] < log[2]["step_255_q99"]
    assert log[2]["chosen"].sum() == 16


def test_images_on_device_are_accepted():
    run = Update(dataset=Dataset(*map(jnp.asarray, TRAIN[:2])))
    assert run(2).images.shape == TRAIN.images.shape
