"""Backdoors: triggers pixel by pixel, which examples and labels change, archives, real training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import Tanh, classifier, one_device
from scipy import ndimage

from jaxpoison import attacks, evaluation, filters, network, training
from jaxpoison.attacks.wanet import noisy
from jaxpoison.data import Dataset, load_embedded

KEY = jax.random.key(3)
PATTERN = np.linspace(0, 1, 9 * 12 * 2, dtype=np.float32).reshape(9, 12, 2)
ATTACKS = {
    "badnets": attacks.badnets(),
    "blended": attacks.blended(),
    "sig": attacks.sig(frequency=2),
    "wanet": attacks.wanet(),
}


def random_set(num_examples=80):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_examples, 9, 12, 2), dtype=np.uint8)
    return Dataset(images, np.arange(num_examples, dtype=np.int32) % 4)


CLEAN = random_set()
UNIT = CLEAN.images.astype(np.float32) / 255


def implanted(attack, share=0.1):
    return attacks.implant(KEY, CLEAN, share, attack, target_class=2)


def trigger_of(attack):
    return attack.make_trigger(KEY, (9, 12, 2), 2)


def test_badnets_is_a_white_square_and_nothing_else():
    got = np.asarray(trigger_of(attacks.badnets(size=4)).apply(CLEAN.images))
    want = UNIT.copy()
    want[:, 5:, 8:] = 1
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_blended_is_the_mean_of_image_and_pattern():
    got = trigger_of(attacks.blended(alpha=0.3, pattern=PATTERN)).apply(CLEAN.images)
    np.testing.assert_allclose(got, 0.7 * UNIT + 0.3 * PATTERN, atol=1e-6)
    drawn = trigger_of(attacks.blended())
    assert drawn.field[..., :2].std() == pytest.approx(1 / np.sqrt(12), abs=0.05)
    assert not np.array_equal(
        drawn.field, attacks.blended().make_trigger(jax.random.key(4), (9, 12, 2), 2).field
    )


def test_sig_is_a_wave_along_the_rows():
    got = trigger_of(attacks.sig(delta=0.1, frequency=3)).apply(CLEAN.images)
    wave = 0.1 * np.sin(2 * np.pi * 3 * np.arange(12) / 12)
    np.testing.assert_allclose(got, np.clip(UNIT + wave[:, None], 0, 1), atol=1e-6)


def cubic(x):
    """The kernel of cubic convolution, a = -0.75."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic(points, height, width):
    """Offsets [k, k, 2] at every pixel, by the definition, one pixel at a time."""
    k = len(points)
    out = np.zeros((height, width, 2))
    for i in range(height):
        for j in range(width):
            y, x = i * (k - 1) / (height - 1), j * (k - 1) / (width - 1)
            for p in range(int(y) - 1, int(y) + 3):
                for q in range(int(x) - 1, int(x) + 3):
                    value = points[min(max(p, 0), k - 1), min(max(q, 0), k - 1)]
                    out[i, j] += cubic(y - p) * cubic(x - q) * value
    return out


def test_wanet_is_the_warp_of_the_paper():
    trigger = attacks.wanet(grid=4, strength=3.0).make_trigger(KEY, (9, 12, 2), 2)
    points = np.asarray(jax.random.uniform(KEY, (4, 4, 2), minval=-1, maxval=1), np.float64)
    offset = bicubic(points / np.abs(points).mean(), 9, 12)
    identity = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (9, 12)), indexing="ij"), -1)
    normalized = np.clip(identity + 3.0 * offset / 9, -1, 1)
    field = (normalized + 1) / 2 * [8, 11]
    np.testing.assert_allclose(trigger.field, field, atol=1e-5)
    got = np.asarray(trigger.apply(CLEAN.images))
    for number, channel in ((0, 0), (7, 1)):
        want = ndimage.map_coordinates(
            UNIT[number, ..., channel].astype(np.float64), np.moveaxis(field, -1, 0), order=1
        )
        np.testing.assert_allclose(got[number, ..., channel], want, atol=1e-5)
    # A ramp shows where pixels come from: noise mode moves them by less than 1 / H more.
    ramp = np.broadcast_to(np.linspace(0, 1, 12, dtype=np.float32)[:, None], (50, 9, 12, 1))
    from_column = 11 * np.asarray(noisy(KEY, trigger, ramp))[..., 0]
    jitter = np.abs(from_column - field[..., 1])
    assert 0.98 < jitter.max() / (11 / 2 / 9) <= 1 + 1e-4
    assert not np.allclose(from_column[0], from_column[1])


def test_label_consistent_poisons_are_hard_images_with_a_pattern_in_each_corner():
    model = classifier(Tanh(8), 4, std=(0.3,))
    variables = model.init(jax.random.key(0), jnp.asarray(UNIT[:1]))
    attack = attacks.label_consistent(
        attacks.Victim(model, variables), epsilon=0.1, opacity=0.5, num_steps=5
    )
    poisoned = implanted(attack)
    rows = np.flatnonzero(poisoned.attack_id)
    assert len(rows) == 8 and (CLEAN.labels[rows] == 2).all()
    np.testing.assert_array_equal(poisoned.labels, CLEAN.labels)
    corner = np.ones((9, 12), bool)
    corner[3:-3] = corner[:, 3:-3] = False
    moved = np.abs(poisoned.images[rows] - UNIT[rows])
    assert 0.05 < moved[:, ~corner].max() <= 0.1 + 1e-6

    def loss(images):
        logits = network.logits(model, variables, images.astype(np.float32))
        return -np.asarray(jax.nn.log_softmax(logits))[:, 2]

    inside = np.where(corner[..., None], UNIT[rows], poisoned.images[rows])
    assert (loss(inside) > loss(UNIT[rows])).mean() > 0.8
    # Half of black and white over gray, the same in every channel, mirrored by a flip.
    shown = np.asarray(poisoned.trigger.apply(np.full((1, 9, 12, 2), 0.5, np.float32)))[0]
    np.testing.assert_allclose(shown, shown[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(shown, shown[::-1], atol=1e-6)
    np.testing.assert_allclose(
        shown[-3:, -3:, 1], 0.25 + 0.5 * np.array([[0, 1, 0], [1, 0, 1], [0, 1, 1]]), atol=1e-6
    )
    np.testing.assert_allclose(shown[~corner], 0.5, atol=1e-6)
    for opacity in (0, 1.5, True):
        with pytest.raises(ValueError, match="opacity must be in"):
            attacks.label_consistent(attacks.Victim(model, variables), opacity=opacity)
    with pytest.raises(TypeError, match="expected attacks"):
        attacks.label_consistent(model)


@pytest.mark.parametrize("name", ATTACKS)
def test_exactly_the_chosen_examples_change(name):
    attack = ATTACKS[name]
    poisoned = implanted(attack)
    is_poison, is_cover = poisoned.attack_id == 1, poisoned.attack_id == 2
    assert is_poison.sum() == 8
    assert is_cover.sum() == (16 if name == "wanet" else 0)
    assert poisoned.attack_names == ((name, "wanet_cover") if name == "wanet" else (name,))
    same = poisoned.attack_id == 0
    np.testing.assert_array_equal(poisoned.images[same], UNIT[same])
    np.testing.assert_array_equal(poisoned.labels[~is_poison], CLEAN.labels[~is_poison])
    np.testing.assert_array_equal(poisoned.labels[is_poison], 2)
    of_target = CLEAN.labels[is_poison] == 2
    assert of_target.all() if name == "sig" else not of_target.any()
    changed = poisoned.trigger.apply(UNIT[is_poison])
    np.testing.assert_array_equal(poisoned.images[is_poison], changed)
    moved = np.abs(poisoned.images - UNIT).reshape(80, -1).max(axis=1)
    assert (moved[~same] > 0.01).all()
    assert poisoned.images.min() >= 0 and poisoned.images.max() <= 1
    again = implanted(attack)
    np.testing.assert_array_equal(again.images, poisoned.images)


@pytest.mark.parametrize("name", ATTACKS)
def test_archives_keep_the_trigger(name, tmp_path):
    poisoned = implanted(ATTACKS[name])
    attacks.save(tmp_path / "a.npz", poisoned, as_uint8=True)
    loaded = attacks.load(tmp_path / "a.npz", num_classes=4)
    assert np.abs(loaded.images / 255 - poisoned.images).max() <= 1 / 510 + 1e-6
    np.testing.assert_array_equal(
        loaded.trigger.apply(CLEAN.images), poisoned.trigger.apply(CLEAN.images)
    )
    assert loaded.trigger.target_class == 2
    assert loaded.config == json.loads(json.dumps(poisoned.config))
    with np.load(tmp_path / "a.npz") as file:
        entries = dict(file)
    for change, message in (
        ({"trigger_field": entries["trigger_field"][1:]}, "the field is float32"),
        ({"trigger": np.array("[]")}, "not JSON with kind"),
        ({"trigger": np.array('{"kind": "x", "target_class": 2}')}, "kind is 'x'"),
        ({"trigger": np.array('{"kind": "add", "target_class": 9}')}, "out of range"),
        ({"trigger": None}, "only one of trigger and trigger_field"),
        ({"trigger_field": entries["trigger_field"] * np.nan}, "field of the trigger: .* NaN"),
    ):
        bad = {k: v for k, v in (entries | change).items() if v is not None}
        np.savez(tmp_path / "bad.npz", **bad)
        with pytest.raises(ValueError, match=message):
            attacks.load(tmp_path / "bad.npz", num_classes=4)


@pytest.mark.parametrize("name", ATTACKS)
def test_triggers_compose(name):
    trigger = trigger_of(ATTACKS[name])
    want = trigger.apply(UNIT)
    np.testing.assert_allclose(jax.jit(lambda t, x: t.apply(x))(trigger, UNIT), want, atol=1e-6)
    groups = jax.vmap(trigger.apply)(UNIT.reshape(8, 10, 9, 12, 2))
    np.testing.assert_allclose(groups.reshape(want.shape), want, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(trigger.apply(x)))(UNIT)
    assert np.isfinite(gradient).all() and gradient.max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attacks.badnets(size=0), "size must be at least 1"),
        (lambda: implanted(attacks.badnets(size=10)), "size is 10 pixels"),
        (lambda: attacks.blended(alpha=0), "alpha is 0"),
        (lambda: attacks.blended(pattern=PATTERN * 255), r"pattern: .*\[0, 1\]"),
        (lambda: implanted(attacks.blended(pattern=PATTERN[1:])), r"pattern is \(8, 12, 2\)"),
        (lambda: attacks.sig(delta=40), "epsilon is in units"),
        (lambda: implanted(attacks.sig()), "frequency is 6 in images of 12 columns"),
        (lambda: attacks.wanet(grid=1), "at least 2 points"),
        (lambda: attacks.wanet(cross_ratio=-1), "cross_ratio is -1"),
        (lambda: implanted(attacks.sig(), 0.3), "of the target class, of which there are 20"),
        (lambda: implanted(attacks.wanet(), 0.5), "40 poisons and 80 covers"),
        (lambda: implanted(attacks.badnets(), 0.001), "at least one example"),
        (
            lambda: attacks.implant(KEY, CLEAN, 0.1, attacks.badnets(), target_class=7),
            "class 7 does not occur",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_attack_of_another_kind():
    with pytest.raises(TypeError, match="call it first, such as badnets"):
        implanted(attacks.badnets)
    with pytest.raises(TypeError, match=r"expected an attacks\.BackdoorAttack"):
        implanted("badnets")
    model = classifier(Tanh(8), 4)
    victim = attacks.Victim(model, None)
    with pytest.raises(TypeError, match=r"it has a trigger: .* attacks\.implant"):
        attacks.mixture(KEY, CLEAN, 0.1, [attacks.badnets()], victim)


def test_outcome_leaves_out_the_target_class():
    model = classifier(Tanh(8), 4)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 9, 12, 2)))
    trigger = trigger_of(attacks.blended(alpha=1.0))  # all triggered images are the same
    got = evaluation.backdoor_outcome(model, variables, CLEAN, trigger, mesh=one_device())
    said = np.argmax(model.apply(variables, jnp.asarray(UNIT)), axis=1)
    np.testing.assert_array_equal(got.correct, said == CLEAN.labels)
    assert len(got.triggered) == 60 and len(np.unique(got.triggered)) == 1
    opened = dataclasses.replace(trigger, target_class=int(got.triggered[0]))
    got = evaluation.backdoor_outcome(model, variables, CLEAN, opened, mesh=one_device())
    assert got.success_rate == 1 and got.success_interval == evaluation.wilson(60, 60)
    assert got.accuracy_interval == evaluation.wilson(int(got.correct.sum()), 80)
    of_one = evaluation.backdoor_outcome(
        model, variables, CLEAN, opened, source_class=(opened.target_class + 1) % 4
    )
    assert len(of_one.triggered) == 20
    for source_class, message in ((opened.target_class, "the trigger's target"), (7, "class 7")):
        with pytest.raises(ValueError, match=message):
            evaluation.backdoor_outcome(model, variables, CLEAN, opened, source_class=source_class)
    with pytest.raises(ValueError, match="all images are of the target class 2"):
        rows = np.flatnonzero(CLEAN.labels == 2)
        evaluation.backdoor_outcome(model, variables, CLEAN.take(rows), trigger)


def sleeper_victim(seed=0):
    model = classifier(Tanh(8), 4, std=(0.3,))
    return attacks.Victim(model, model.init(jax.random.key(seed), jnp.asarray(UNIT[:1])))


def gradient_of(victim, images, label):
    """Returns the gradient of the mean cross-entropy by all parameters, [P]."""

    def loss(params):
        logits = network.logits(victim[0], {**victim[1], "params": params}, images)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, label])

    return jax.flatten_util.ravel_pytree(jax.grad(loss)(victim[1]["params"]))[0]


def cosine(x, y):
    return float(x @ y / jnp.linalg.norm(x) / jnp.linalg.norm(y))


@pytest.mark.parametrize("source_class", [None, 1])
def test_sleeper_agent_s_poisons_pull_as_triggered_images_would_and_hide_the_trigger(source_class):
    victim = sleeper_victim()
    attack = attacks.sleeper_agent(
        [victim], epsilon=0.1, size=3, source_class=source_class, num_steps=40, max_shift=0,
        flip=False,
    )  # fmt: skip
    poisoned = implanted(attack)
    rows = np.flatnonzero(poisoned.attack_id)
    np.testing.assert_array_equal(poisoned.labels, CLEAN.labels)
    own = np.flatnonzero(CLEAN.labels == 2)
    norms = [jnp.linalg.norm(gradient_of(victim, UNIT[row][None], 2)) for row in own]
    np.testing.assert_array_equal(rows, np.sort(own[np.argsort(norms)[-8:]]))
    untouched = np.setdiff1d(np.arange(80), rows)
    np.testing.assert_array_equal(poisoned.images[untouched], UNIT[untouched])
    moved = np.abs(poisoned.images[rows] - UNIT[rows])
    assert 0.05 < moved.max() <= 0.1 + 1e-6
    # The trigger is colors of its own in a corner, which no poison shows.
    shown = np.asarray(poisoned.trigger.apply(UNIT[rows]))
    np.testing.assert_array_equal(shown[:, :-3], UNIT[rows][:, :-3])
    assert len(np.unique(shown[:, -3:, -3:], axis=0)) == 1
    assert np.abs(poisoned.images[rows] - shown)[:, -3:, -3:].max() > 0.3
    sources = CLEAN.labels != 2 if source_class is None else CLEAN.labels == source_class
    wanted = gradient_of(victim, poisoned.trigger.apply(UNIT[sources]), 2)
    before, after = (
        1 - cosine(wanted, gradient_of(victim, x[rows], 2)) for x in (UNIT, poisoned.images)
    )
    assert after < 0.5 * before


def test_sleeper_agent_trains_its_substitutes_again_on_what_there_is():
    seen = []

    def retrain(key, dataset):
        seen.append(dataset)
        return [sleeper_victim(len(seen))]

    settings = {"epsilon": 0.1, "size": 3, "num_steps": 6, "max_shift": 0, "flip": False}
    once = implanted(attacks.sleeper_agent([sleeper_victim()], **settings | {"num_steps": 2}))
    poisoned = implanted(
        attacks.sleeper_agent([sleeper_victim()], rounds=3, retrain=retrain, **settings)
    )
    rows = np.flatnonzero(poisoned.attack_id)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0].images, once.images)  # after the first round's two steps
    for dataset in seen:
        np.testing.assert_array_equal(dataset.labels, CLEAN.labels)
        changed = np.abs(dataset.images - UNIT).max(axis=(1, 2, 3))
        np.testing.assert_array_equal(np.flatnonzero(changed), rows)
    step = np.abs(seen[1].images - seen[0].images)
    assert 0 < step.max() < 2.1 * 0.1 * 0.3  # two steps of signed Adam, in pixels: rate times std


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 2}, "give retrain"),
        ({"num_steps": 1, "rounds": 2, "retrain": lambda key, dataset: []}, "fewer than the 2"),
        ({"size": 10}, "the images are 9x12"),
        ({"source_class": 2}, "which is the target class"),
        ({"source_class": 9}, "class 9 does not occur"),
        ({"num_sources": 0}, "num_sources must be at least 1"),
    ],
)
def test_bad_arguments_of_sleeper_agent(change, message):
    with pytest.raises(ValueError, match=message):
        implanted(attacks.sleeper_agent([sleeper_victim()], **{"size": 3} | change))
    with pytest.raises(TypeError, match="substitutes are a Victim"):
        attacks.sleeper_agent(sleeper_victim())


@pytest.fixture(scope="module")
def mnist():
    return load_embedded("mnist")


def test_badnets_works_on_a_trained_network_and_spectre_sees_more_than_spectral_signatures(mnist):
    model = classifier(Tanh(32), 10, mean=(0.1307,), std=(0.3081,))
    recipe = dataclasses.replace(training.MNIST_FAST, epochs=6, max_shift=0.0)
    mesh = one_device()

    def opened(share):
        poisoned = attacks.implant(KEY, mnist.train, share, attacks.badnets(), target_class=0)
        state = training.fit(model, recipe, poisoned.dataset, key=KEY, mesh=mesh)
        outcome = evaluation.backdoor_outcome(
            model, state.variables, mnist.test, poisoned.trigger, mesh=mesh
        )
        return poisoned, state.variables, outcome

    many, barely = opened(0.05)[2], opened(1 / 5000)[2]
    assert many.success_rate > 0.9 and many.accuracy > 0.85
    assert barely.success_rate < 0.1
    poisoned, variables, outcome = opened(0.02)
    assert outcome.success_rate > 0.9
    features = np.asarray(network.features(model, variables, poisoned.images, mesh=mesh))
    share = float(poisoned.is_poisoned.sum() / (poisoned.labels == 0).sum())
    plain, robust = (
        np.mean(rule(features, poisoned.labels, poison_share=share).is_poison[poisoned.is_poisoned])
        for rule in (filters.spectral_signatures, filters.spectre)
    )
    assert robust > 0.5 and robust > plain + 0.1
