import dataclasses
import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpoison import attacks, evaluation, models, solvers, training
from jaxpoison import network as networks
from jaxpoison.attacks.bullseye import bullseye
from jaxpoison.attacks.collision import collision
from jaxpoison.attacks.descent import projection
from jaxpoison.attacks.head_matching import gradient_mismatch, head_gradient
from jaxpoison.attacks.polytope import polytope, project_to_simplex, simplex_least_squares
from jaxpoison.attacks.toolkit import mean_collision
from jaxpoison.attacks.transfer import View
from jaxpoison.data import Dataset, load_embedded
from jaxpoison.data.pixels import quantize
from jaxpoison.network import as_network

EPSILON = 0.1  # 25.5 of 255: no whole number, so that plain rounding would break it
NUM_CLASSES = 4


class Body(nn.Module):
    dropout: float = 0.0
    widths: tuple[int, int] = (16, 12)

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Dense(self.widths[0])(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        return nn.relu(nn.Dense(self.widths[1])(x))


def network(seed=0, dropout=0.0):
    model = models.Classifier(
        Body(dropout), num_features=12, num_classes=NUM_CLASSES, mean=(0.5,), std=(0.25,)
    )
    return attacks.Victim(model, model.init(jax.random.key(seed), jnp.zeros((1, 6, 6, 1))))


def random_set(num_examples, seed, as_uint8=True):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_examples, 6, 6, 1), dtype=np.uint8)
    labels = (np.arange(num_examples) % NUM_CLASSES).astype(np.int32)
    return Dataset(images if as_uint8 else (images / 255).astype(np.float32), labels)


TRAIN, TEST = random_set(80, 0), random_set(40, 1)
SUBSTITUTE = network()
FEW = {"epsilon": EPSILON, "num_steps": 25}
PLAIN = {**FEW, "restarts": 2, "draws": attacks.Draws()}
ATTACKS = {
    "feature_collision": attacks.feature_collision(**FEW),
    "bullseye_polytope": attacks.bullseye_polytope(**FEW),
    "convex_polytope": attacks.convex_polytope(**FEW),
    "head_gradient_matching": attacks.head_gradient_matching(**PLAIN),
    "bp_toolkit": attacks.bp_toolkit(**PLAIN),
    "fc_toolkit": attacks.fc_toolkit(**PLAIN),
}
FIRST_STEP = attacks.bullseye_polytope(epsilon=EPSILON, num_steps=1)


def draw(num_trials=3, num_poisons=5, train=TRAIN, **settings):
    return attacks.draw_trials(
        jax.random.key(0), train, TEST, num_trials=num_trials, num_poisons=num_poisons, **settings
    )


TRIALS = draw()


@functools.cache
def poisoned(name):
    return attacks.poison(jax.random.key(1), TRAIN, TRIALS, ATTACKS[name], [SUBSTITUTE])


def one_trial(trials, index):
    return attacks.Trials(*(leaf[index : index + 1] for leaf in trials))


# Drawing trials


def test_trials_are_distinct_targets_and_poisons_of_the_base_class():
    trials = draw(20, 7)
    assert len(set(trials.target_ids)) == 20
    assert np.all(trials.base_labels != trials.target_labels)
    np.testing.assert_array_equal(trials.target_labels, TEST.labels[trials.target_ids])
    np.testing.assert_array_equal(trials.targets[:, 0], TEST.images[trials.target_ids])
    assert trials.rows.shape == (20, 7)
    assert all(len(set(rows)) == 7 for rows in trials.rows)
    np.testing.assert_array_equal(
        TRAIN.labels[trials.rows], trials.base_labels[:, None] * np.ones(7)
    )
    again = draw(20, 7)
    assert all(np.array_equal(*pair) for pair in zip(trials, again, strict=True))


def test_trials_of_a_pair_of_classes_and_of_chosen_targets():
    trials = draw(4, 5, base_class=2, target_class=1, target_ids=[1, 2, 5, 9, 13, 17])
    assert set(trials.base_labels) == {2}
    assert set(trials.target_labels) == {1}
    assert set(trials.target_ids) <= {1, 5, 9, 13, 17}


def test_each_candidate_may_have_a_class_of_its_own_to_be_misclassified_as():
    wanted = (TEST.labels + 1) % 4
    wanted[::2] = TEST.labels[::2]  # its own class: these cannot be targets
    trials = draw(10, 5, base_class=wanted)
    assert np.all(trials.target_ids % 2 == 1)
    np.testing.assert_array_equal(trials.base_labels, wanted[trials.target_ids])
    np.testing.assert_array_equal(
        TRAIN.labels[trials.rows], trials.base_labels[:, None] * np.ones(5)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_trials": 0}, "num_trials must be at least 1"),
        ({"num_poisons": 0}, "num_poisons must be at least 1"),
        ({"num_poisons": 21}, r"no class other than \d, .* has 21 examples; the largest has 20"),
        ({"base_class": 3, "num_poisons": 21}, "class 3 has 20 examples, fewer than the 21"),
        ({"base_class": 7}, "class 7 does not occur in the training set"),
        ({"base_class": 1, "target_class": 1}, "must differ"),
        ({"base_class": np.int64(1), "target_class": 1}, "must differ"),
        ({"base_class": np.zeros(3, int)}, "one for each of the 40 candidates"),
        ({"base_class": 0.5}, "must be a class"),
        ({"num_trials": 41}, "only 40 candidates"),
        ({"target_class": 2, "num_trials": 11}, "only 10 candidates"),
        ({"target_ids": [40]}, "indices in 0..39"),
        ({"target_ids": [-1]}, "indices in 0..39"),
        ({"target_ids": [0.5]}, "indices in 0..39"),
    ],
)
def test_trials_that_cannot_be_drawn(settings, message):
    with pytest.raises(ValueError, match=message):
        draw(**settings)


# Every attack


@pytest.mark.parametrize("name", ATTACKS)
def test_objective_falls_and_every_poison_moves_within_the_budget_in_8_bits(name):
    sets = poisoned(name)
    for trial, one in enumerate(sets):
        first, last = one.config["objective"]
        assert last < 0.8 * first
        assert one.images.dtype == np.uint8
        rows = np.flatnonzero(one.is_poisoned)
        np.testing.assert_array_equal(rows, TRIALS.rows[trial])
        change = one.images.astype(int) - TRAIN.images.astype(int)
        assert np.abs(change).max() == 25  # and not 26, where 25.5 rounds to
        moved = np.abs(change[rows]).max(axis=(1, 2, 3)) >= 5
        # A poison whose coefficient is zero has no part in the polytope, and stays where it is.
        assert np.all(moved) or (name == "convex_polytope" and np.sum(moved) >= 2)
        assert not change[~one.is_poisoned].any()
        np.testing.assert_array_equal(one.labels, TRAIN.labels)
        assert one.attack_names == (name,)


@pytest.mark.parametrize("name", ["feature_collision", "convex_polytope", "head_gradient_matching"])
def test_trials_crafted_together_equal_those_crafted_alone(name):
    alone = attacks.poison(
        jax.random.key(1), TRAIN, one_trial(TRIALS, 1), ATTACKS[name], [SUBSTITUTE]
    )
    together = poisoned(name)[1]
    # Signs and adaptive steps blow up the last bit, so a pixel in a thousand may differ.
    differing = alone[0].images.astype(int) != together.images.astype(int)
    assert np.mean(differing[together.is_poisoned]) < 0.01
    np.testing.assert_allclose(
        alone[0].config["objective"], together.config["objective"], rtol=1e-3
    )
    assert alone[0].target.target_id == together.target.target_id


@pytest.mark.parametrize("name", ["convex_polytope"])
def test_groups_of_trials_equal_all_at_once_and_progress_is_told(name):
    told = []
    attack = getattr(attacks, name)(batch_size=10, **FEW)
    in_groups = attacks.poison(
        jax.random.key(1), TRAIN, TRIALS, attack, [SUBSTITUTE],
        progress=lambda *news: told.append(news),
    )  # fmt: skip
    assert told == [(name, 10, 15), (name, 15, 15)]
    for one, other in zip(in_groups, poisoned(name), strict=True):
        assert np.mean(one.images != other.images) < 0.001


def test_one_device_gives_what_all_devices_give(monkeypatch):
    assert len(jax.devices()) > 1
    trials = draw(4, 3)
    attack = attacks.bullseye_polytope(epsilon=EPSILON, num_steps=10)
    several = attacks.poison(jax.random.key(1), TRAIN, trials, attack, [SUBSTITUTE])
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: first)
    attack = attacks.bullseye_polytope(epsilon=EPSILON, num_steps=10)
    alone = attacks.poison(jax.random.key(1), TRAIN, trials, attack, [SUBSTITUTE])
    for one, other in zip(several, alone, strict=True):
        assert np.mean(one.images != other.images) < 0.001


def test_float_images_are_shipped_in_8_bits_within_the_budget():
    train = random_set(80, 0, as_uint8=False)
    (one,) = attacks.poison(
        jax.random.key(1), train, one_trial(draw(train=train), 0), ATTACKS["bullseye_polytope"],
        [SUBSTITUTE],
    )  # fmt: skip
    np.testing.assert_array_equal(one.images[~one.is_poisoned], TRAIN.images[~one.is_poisoned])
    assert np.abs(one.images.astype(int) - TRAIN.images).max() == 25


def test_crafting_stays_within_the_budget_and_the_range_of_pixels():
    """Export would hide it: it moves what is outside back in, but not what was crafted against."""
    rng = np.random.default_rng(0)
    bases = np.float32(rng.random((4, 6, 6, 1)))
    inside = np.asarray(projection(jnp.asarray(bases), EPSILON)(3 * rng.normal(size=bases.shape)))
    assert inside.min() == 0 and inside.max() == 1
    moved = np.abs(inside - bases)
    np.testing.assert_allclose(moved.max(), EPSILON, rtol=1e-5)
    near = np.float32(np.clip(bases + 0.5 * EPSILON, 0, 1))
    np.testing.assert_allclose(projection(jnp.asarray(bases), EPSILON)(near), near, atol=1e-6)


def test_quantize_stays_within_any_budget():
    rng = np.random.default_rng(0)
    for epsilon in (0.5 / 255, 1 / 255, 8 / 255, 0.1, 0.3):
        for bases in (rng.random(500), rng.integers(0, 256, 500) / 255):
            bases = bases.astype(np.float32)
            images = np.clip(bases + rng.uniform(-epsilon, epsilon, 500), 0, 1).astype(np.float32)
            exported = quantize(images, bases, epsilon)
            assert exported.dtype == np.uint8
            assert np.abs(exported / 255 - bases).max() <= epsilon + 1e-5
            assert np.abs(exported / 255 - images).max() <= 1 / 255


def test_archive_keeps_target_poisons_and_configuration(tmp_path):
    one = poisoned("bullseye_polytope")[2]
    attacks.save(tmp_path / "one.npz", one, as_uint8=True)
    loaded = attacks.load(tmp_path / "one.npz", num_classes=NUM_CLASSES)
    np.testing.assert_array_equal(loaded.images, one.images)
    np.testing.assert_array_equal(loaded.is_poisoned, one.is_poisoned)
    np.testing.assert_array_equal(loaded.target.images, TEST.images[one.target.target_id][None])
    assert loaded.target[1:] == one.target[1:]
    assert loaded.target.base_label == TRIALS.base_labels[2]
    assert loaded.config == one.config
    settings = loaded.config["attacks"][0]
    assert (settings["num_steps"], settings["learning_rate"]) == (25, 0.04)
    assert settings["draws"] == {"number": 1, "max_shift": 0.0, "flip": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "both are needed"),
        ({"target_images": None}, "both are needed"),
        ({"target": np.zeros(2, np.int32)}, "three integers"),
        ({"target": np.zeros(3, np.float32)}, "three integers"),
        ({"target": np.array([9, 0, 0], np.int32)}, "out of range"),
        ({"target": np.array([0, -1, 0], np.int32)}, "out of range"),
        ({"target_images": np.zeros((1, 5, 6, 1), np.uint8)}, "the target's images are"),
        ({"target_images": np.zeros((6, 6, 1), np.uint8)}, r"target: images have shape"),
    ],
)
def test_archives_with_a_bad_target(tmp_path, change, message):
    path = tmp_path / "bad.npz"
    one = poisoned("bullseye_polytope")[0]
    entries = {
        "images": one.images,
        "labels": one.labels,
        "attack_id": one.attack_id,
        "config": np.array(json.dumps(one.config)),
        "target_images": one.target.images,
        "target": np.array(one.target[1:], np.int32),
    } | change
    np.savez(path, **{name: value for name, value in entries.items() if value is not None})
    with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
        attacks.load(path, num_classes=NUM_CLASSES)


# Bad input, told before work is lost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": TRIALS.targets[:2]}, r"expected \[T, V, H, W, C\] with T = 3"),
        ({"targets": TRIALS.targets[..., :5, :]}, r"images of \(6, 6, 1\)"),
        ({"targets": TRIALS.targets / 255 * np.float32(2)}, "targets: images are float64"),
        ({"target_labels": TRIALS.target_labels + 4}, "target_labels: 3 labels out of range"),
        ({"target_ids": TRIALS.target_ids[:1]}, r"target_ids has shape \(1,\)"),
        ({"base_labels": TRIALS.base_labels[None]}, "base_labels has shape"),
        ({"base_labels": TRIALS.target_labels}, "clean-label poisons come from the base class"),
        ({"rows": TRIALS.rows + 80}, "rows of the training set"),
        ({"rows": TRIALS.rows[:, :1].repeat(2, axis=1)}, "named twice"),
        ({"rows": TRIALS.rows[0]}, r"expected \[T, P\]"),
        ({"target_labels": TRIALS.base_labels}, "is of the base class"),
    ],
)
def test_bad_trials(change, message):
    def never(*args):
        raise AssertionError("crafting began")

    attack = attacks.TargetedAttack("never", EPSILON, never, {})
    with pytest.raises(ValueError, match=message):
        attacks.poison(jax.random.key(0), TRAIN, TRIALS._replace(**change), attack, [SUBSTITUTE])


def test_no_substitute_and_diverged_poisons():
    with pytest.raises(ValueError, match="at least one substitute"):
        attacks.poison(jax.random.key(0), TRAIN, TRIALS, ATTACKS["bp_toolkit"], [])

    def craft(keys, substitutes, bases, base_labels, targets, progress=None):
        return attacks.Crafted(bases.at[1].set(jnp.nan), jnp.ones((2, 3)))

    attack = attacks.TargetedAttack("broken", EPSILON, craft, {})
    with pytest.raises(solvers.DivergedError, match=r"broken diverged in 1 of 3 .* is trial 1"):
        attacks.poison(jax.random.key(0), TRAIN, TRIALS, attack, [SUBSTITUTE])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        *((name, {"epsilon": 8.0}, "epsilon is in units") for name in ATTACKS),
        *((name, {"num_steps": 0}, "num_steps must be at least 1") for name in ATTACKS),
        *((name, {"batch_size": 0}, "batch_size must be at least 1") for name in ATTACKS),
        *((name, {"draws": attacks.Draws(0)}, "at least one version") for name in ATTACKS),
        ("feature_collision", {"step": -1.0}, "step must be above 0"),
        ("feature_collision", {"watermark": 1.0}, r"watermark must be in \[0, 1\)"),
        ("feature_collision", {"shrink": 1.0}, r"shrink must be in \[0, 1\)"),
        ("bullseye_polytope", {"learning_rate": 0.0}, "learning_rate must be above 0"),
        ("bp_toolkit", {"restarts": 0}, "restarts must be at least 1"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(attacks, name)(**{"epsilon": EPSILON, **settings})


# Objectives


def views(num_poisons=6, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return [
        View(
            features=jax.random.uniform(keys[0], (num_poisons, 12)),
            target=jax.random.uniform(keys[1], (12,)),
            head={"kernel": jax.random.normal(keys[2], (12, NUM_CLASSES)), "bias": jnp.arange(4.0)},
            base_label=jnp.int32(2),
        )
    ]


def test_closed_form_of_the_heads_gradient_is_that_of_autodiff():
    (view,) = views()

    def loss(head, features):
        logits = features @ head["kernel"] + head["bias"]
        labels = jnp.full(len(features), view.base_label)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def mismatch(features):
        (target, poisons) = (
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
            for gradient in (
                jax.grad(loss)(view.head, view.target[None]),
                jax.grad(loss)(view.head, features),
            )
        )
        return 1 - target @ poisons / jnp.linalg.norm(target) / jnp.linalg.norm(poisons)

    closed = head_gradient(view.head, view.features, view.base_label)
    want = jax.jit(jax.grad(loss))(view.head, view.features)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(closed[name], want[name], atol=1e-6)

    def ours(features):
        return gradient_mismatch([view._replace(features=features)])

    value, gradient = jax.jit(jax.value_and_grad(ours))(view.features)
    want_value, want_gradient = jax.jit(jax.value_and_grad(mismatch))(view.features)
    np.testing.assert_allclose(value, want_value, atol=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, atol=1e-6)


def test_objectives_by_hand():
    (view,) = views()
    features, target = np.asarray(view.features), np.asarray(view.target)
    gap = np.linalg.norm(target - features.mean(0)) / np.linalg.norm(target)
    two = [view, *views(seed=1)]
    both = [float(bullseye([v])) for v in two]
    np.testing.assert_allclose(both[0], gap, rtol=1e-5)
    np.testing.assert_allclose(bullseye(two), np.mean(both), rtol=1e-5)
    np.testing.assert_allclose(bullseye([view], squared=True), gap**2 / 2, rtol=1e-5)
    uniform = jnp.full(6, 1 / 6)
    np.testing.assert_allclose(polytope([view], [uniform]), gap**2 / 2, rtol=1e-5)
    distances = ((features - target) ** 2).sum(1)
    np.testing.assert_allclose(collision([view]), distances, rtol=1e-5)
    mean = ((features.mean(0) - target) ** 2).mean()
    np.testing.assert_allclose(mean_collision([view]), mean, rtol=1e-5)


def test_an_objective_that_has_arrived_has_a_finite_gradient():
    (view,) = views()
    arrived = jnp.tile(view.target, (6, 1))
    for objective in (
        bullseye, gradient_mismatch, mean_collision,
    ):  # fmt: skip
        value, gradient = jax.jit(
            jax.value_and_grad(lambda f, of=objective: of([view._replace(features=f)]))
        )(arrived)
        assert abs(value) < 1e-6
        assert np.all(np.isfinite(gradient))


def simplex_by_enumeration(features, target):
    """The exact minimizer: least squares on the affine hull of every support, the best feasible."""
    best, lowest = None, np.inf
    for size in range(1, len(features) + 1):
        for support in map(list, itertools.combinations(range(len(features)), size)):
            rows = features[support].astype(np.float64)
            system = np.block([[rows @ rows.T, np.ones((size, 1))], [np.ones((1, size)), 0.0]])
            inner = np.linalg.lstsq(system, np.append(rows @ target, 1.0), rcond=None)[0][:-1]
            value = np.sum((target - inner @ rows) ** 2)
            if inner.min() > -1e-9 and value < lowest:
                lowest, best = value, np.zeros(len(features))
                best[support] = inner
    return best


def test_simplex_least_squares_equals_enumeration_of_supports():
    solve = jax.jit(jax.vmap(simplex_least_squares))
    keys = jax.random.split(jax.random.key(0), 20)
    features = jax.vmap(lambda key: jax.random.uniform(key, (5, 8)))(keys)
    targets = jax.random.uniform(jax.random.key(1), (20, 8))
    got = np.asarray(solve(features, targets, jnp.full((20, 5), 0.2)))
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)
    assert got.min() >= 0
    for one, rows, target in zip(got, np.asarray(features), np.asarray(targets), strict=True):
        np.testing.assert_allclose(one, simplex_by_enumeration(rows, target), atol=2e-4)


def test_projection_to_the_simplex():
    point = jax.random.normal(jax.random.key(0), (7,))
    nearest = project_to_simplex(point)
    np.testing.assert_allclose(jnp.sum(nearest), 1, rtol=1e-6)
    # The nearest point: point - nearest is the same on the support, and no larger off it.
    gap = np.asarray(point - nearest)
    support = np.asarray(nearest) > 0
    np.testing.assert_allclose(gap[support], gap[support][0], rtol=1e-5)
    assert np.all(gap[~support] <= gap[support][0])
    np.testing.assert_allclose(project_to_simplex(nearest), nearest, atol=1e-6)


# Substitutes, draws, steps


def test_several_substitutes_share_the_objective():
    attack = FIRST_STEP
    nets = [network(0), network(1)]
    both = attacks.poison(jax.random.key(1), TRAIN, TRIALS, attack, nets)
    single = [attacks.poison(jax.random.key(1), TRAIN, TRIALS, attack, [net]) for net in nets]
    for trial in range(3):
        values = [sets[trial].config["objective"][0] for sets in single]
        np.testing.assert_allclose(both[trial].config["objective"][0], np.mean(values), rtol=1e-5)
    assert both[0].config["num_substitutes"] == 2


def objective_of(attack, net):
    one = one_trial(TRIALS, 0)
    return attacks.poison(jax.random.key(1), TRAIN, one, attack, [net])[0].config["objective"][0]


def test_dropout_is_on_and_more_draws_come_nearer_to_its_mean():
    dropping = network(dropout=0.3)
    without = objective_of(FIRST_STEP, SUBSTITUTE)
    gaps = [
        abs(
            objective_of(
                attacks.bullseye_polytope(
                    epsilon=EPSILON, num_steps=1, draws=attacks.Draws(number)
                ),
                dropping,
            )
            - without
        )
        for number in (1, 300)
    ]
    assert 0 < gaps[1] < gaps[0]


def test_augmentation_moves_the_poisons():
    draws = attacks.Draws(number=8, max_shift=2.0, flip=True)
    augmented = attacks.bullseye_polytope(epsilon=EPSILON, num_steps=1, draws=draws)
    gap = objective_of(augmented, SUBSTITUTE) - objective_of(FIRST_STEP, SUBSTITUTE)
    assert abs(gap) > 1e-3


def test_first_step_of_the_bullseye_is_the_learning_rate_in_normalized_pixels():
    bases = np.full((1, 2, 6, 6, 1), 0.4, np.float32)
    targets = TEST.images[None, :1].astype(np.float32) / 255
    crafted = FIRST_STEP.craft(
        jax.random.split(jax.random.key(0), 1), [SUBSTITUTE], jnp.asarray(bases), jnp.array([1]),
        jnp.asarray(targets),
    )  # fmt: skip
    moved = np.abs(np.asarray(crafted.images) - bases)
    np.testing.assert_allclose(moved[moved > 0], 0.04 * 0.25, rtol=1e-3)
    assert np.mean(moved > 0) > 0.9


def test_restarts_keep_the_lowest_objective():
    once = attacks.bp_toolkit(**{**PLAIN, "restarts": 1})
    sets = attacks.poison(jax.random.key(1), TRAIN, TRIALS, once, [SUBSTITUTE])
    ends = [[one.config["objective"][1] for one in x] for x in (poisoned("bp_toolkit"), sets)]
    assert np.all(np.array(ends[0]) <= ends[1])
    assert ends[0] != ends[1]


def test_toolkits_bullseye_and_collision_are_one_attack():
    pairs = zip(poisoned("bp_toolkit"), poisoned("fc_toolkit"), strict=True)
    assert all(np.array_equal(one.images, other.images) for one, other in pairs)


def test_similarity_holds_collisions_near_their_bases():
    free, held = (
        attacks.poison(
            jax.random.key(1), TRAIN, TRIALS,
            attacks.feature_collision(
                epsilon=0.5, num_steps=25, step=0.05, watermark=0.0, similarity=similarity
            ),
            [SUBSTITUTE],
        )
        for similarity in (0.0, 10.0)
    )  # fmt: skip
    for one, other in zip(free, held, strict=True):
        distances = [
            np.abs(x.images[x.is_poisoned].astype(int) - TRAIN.images[x.is_poisoned]).mean()
            for x in (one, other)
        ]
        assert distances[1] < 0.7 * distances[0]


def test_views_of_a_target_are_attacked_at_their_mean():
    views = np.concatenate([TRIALS.targets, TRIALS.targets[::-1]], axis=1)
    trials = TRIALS._replace(targets=views)
    sets = attacks.poison(
        jax.random.key(1), TRAIN, trials, ATTACKS["bullseye_polytope"], [SUBSTITUTE]
    )
    model, variables = SUBSTITUTE
    for trial, one in enumerate(sets):
        targets = model.apply(variables, jnp.asarray(views[trial]) / 255, method="features")
        bases = TRAIN.images[TRIALS.rows[trial]]
        features = model.apply(variables, jnp.asarray(bases) / 255, method="features")
        target = targets.mean(0)
        want = jnp.linalg.norm(target - features.mean(0)) / jnp.linalg.norm(target)
        np.testing.assert_allclose(one.config["objective"][0], want, rtol=1e-4)
        assert one.target.images.shape == (2, 6, 6, 1)


# Heads


def clusters(num_examples=50, seed=0):
    rng = np.random.default_rng(seed)
    labels = (np.arange(num_examples) % 3).astype(np.int32)
    centers = 4 * np.eye(3, 5)
    return jnp.asarray(centers[labels] + rng.normal(size=(num_examples, 5)), jnp.float32), labels


def accuracy(head, features, labels):
    return float(np.mean(np.argmax(features @ head["kernel"] + head["bias"], -1) == labels))


@pytest.mark.parametrize("batch_size", [None, 16])
def test_heads_learn_under_jit_and_vmap(batch_size):
    features, labels = clusters()
    recipe = training.HeadRecipe(batch_size=batch_size)

    def fit(key):
        return training.fit_head(key, features, jnp.asarray(labels), num_classes=3, recipe=recipe)

    keys = jax.random.split(jax.random.key(0), 3)
    heads = jax.jit(jax.vmap(fit))(keys)
    for number in range(3):
        head = jax.tree.map(lambda leaf, number=number: leaf[number], heads)
        assert accuracy(head, *clusters(seed=1)) > 0.95
    assert np.any(heads["kernel"][0] != heads["kernel"][1])


def test_first_step_of_a_head_by_hand():
    features, labels = clusters(10)
    recipe = training.HeadRecipe(epochs=1, batch_size=None)
    key = jax.random.key(3)
    fit = jax.jit(functools.partial(training.fit_head, num_classes=3, recipe=recipe))
    head = fit(key, features, labels)
    kernel = 0.1 * jax.random.normal(jax.random.split(key)[0], (5, 3))

    def loss(head):
        logits = features @ head["kernel"] + head["bias"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    start = {"kernel": kernel, "bias": jnp.zeros(3)}
    gradient = jax.jit(jax.grad(loss))(start)
    # Adam's first step is the sign of the gradient.
    for name in start:
        np.testing.assert_allclose(
            head[name], start[name] - 0.1 * jnp.sign(gradient[name]), atol=1e-4
        )


def test_a_head_on_kept_examples_never_sees_the_others():
    features, labels = clusters(60)
    keep = np.random.default_rng(0).random(60) < 0.4
    key = jax.random.key(0)
    spoiled = jnp.where(keep[:, None], features, jnp.float32(1e3))
    fit = jax.jit(
        functools.partial(training.fit_head, key, num_classes=3), static_argnames="recipe"
    )
    one = fit(features, jnp.asarray(labels), keep=jnp.asarray(keep))
    other = fit(spoiled, jnp.asarray(np.where(keep, labels, 0)), keep=jnp.asarray(keep))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert accuracy(one, features, labels) > 0.95
    # With one full batch the order does not matter: the head is that of the subset alone.
    full = training.HeadRecipe(batch_size=None, epochs=20)
    kept = fit(features, jnp.asarray(labels), keep=jnp.asarray(keep), recipe=full)
    alone = fit(features[keep], jnp.asarray(labels)[keep], recipe=full)
    np.testing.assert_allclose(kept["kernel"], alone["kernel"], atol=1e-3)


def test_heads_refuse_what_they_cannot_learn_from():
    features, labels = clusters()
    with pytest.raises(ValueError, match=r"expected \[N, d\] and \[N\]"):
        training.fit_head(jax.random.key(0), features, jnp.asarray(labels)[:-1], num_classes=3)
    for bad, message in (
        (labels + 1, "3"),  # labels from 1
        (labels + 0.5, "whole"),
    ):
        with pytest.raises(ValueError, match=message):
            training.fit_head(jax.random.key(0), features, bad, num_classes=3)
    with pytest.raises(ValueError, match=r"keep is int32 .* one bool for each"):
        training.fit_head(
            jax.random.key(0), features, labels, num_classes=3, keep=np.ones(len(labels), np.int32)
        )
    for change in ({"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            dataclasses.replace(training.HEAD, **change)


def test_numpy_and_jax_arrays_give_the_same_head():
    features, labels = clusters()
    keep = np.arange(len(labels)) % 4 > 0
    recipe = dataclasses.replace(training.HEAD, epochs=2)

    def fit(features, labels, keep):
        return training.fit_head(
            jax.random.key(0), features, labels, num_classes=3, recipe=recipe, keep=keep
        )

    want = fit(jnp.asarray(features), jnp.asarray(labels), jnp.asarray(keep))
    for given in ((np.asarray(features), np.asarray(labels), keep), (features, list(labels), keep)):
        jax.tree.map(np.testing.assert_array_equal, fit(*given), want)


# The victim


def outcome(sets, **settings):
    return evaluation.transfer_outcome(jax.random.key(5), SUBSTITUTE, sets, TEST, **settings)


def test_outcome_is_that_of_heads_trained_one_by_one_on_what_is_kept():
    sets = poisoned("bullseye_polytope")
    keep = np.ones((3, 80), bool)
    keep[:, 0] = False
    keep[1, sets[1].is_poisoned] = False
    result = outcome(sets, keep=keep)
    model, variables = SUBSTITUTE

    @jax.jit
    def fit(target_id, images, labels, keep):
        features = model.apply(variables, images / 255.0, method="features")
        key = jax.random.fold_in(jax.random.key(5), target_id)
        return training.fit_head(key, features, labels, num_classes=NUM_CLASSES, keep=keep)

    def predict(head, images):
        logits = model.apply(
            as_network(model).with_head(variables, head), jnp.asarray(images) / 255
        )
        return np.argmax(logits, axis=-1)

    for trial, one in enumerate(sets):
        head = fit(one.target.target_id, one.images, one.labels, keep[trial])
        np.testing.assert_allclose(result.head["kernel"][trial], head["kernel"], atol=0.02)
        assert result.prediction[trial] == predict(head, one.target.images)[0]
        assert result.success[trial] == (result.prediction[trial] == one.target.base_label)
        hits = np.mean(predict(head, TEST.images) == TEST.labels)
        np.testing.assert_allclose(result.accuracy[trial], hits, atol=0.03)


def test_bad_outcomes():
    sets = poisoned("bullseye_polytope")
    with pytest.raises(ValueError, match="no poisoned set"):
        outcome([])
    with pytest.raises(ValueError, match="set 1 has no target"):
        outcome([sets[0], sets[1]._replace(target=None)])
    with pytest.raises(ValueError, match="set 1: 79 images but 80 labels"):
        outcome([sets[0], sets[1]._replace(images=sets[1].images[1:])])
    with pytest.raises(ValueError, match="keep is int64"):
        outcome(sets, keep=np.ones((3, 80), np.int64))
    with pytest.raises(ValueError, match=r"expected bool \(3, 80\)"):
        outcome(sets, keep=np.ones((3, 79), bool))


def half_size(dataset):
    blocks = dataset.images.reshape(-1, 16, 2, 16, 2, 3)
    return Dataset(np.round(blocks.mean((2, 4))).astype(np.uint8), dataset.labels)


def test_poisons_of_real_images_work_on_a_trained_extractor(tmp_path):
    splits = load_embedded("cifar10")
    pretrain, train, test = map(half_size, (splits.train, splits.validation, splits.test))
    body = Body(widths=(128, 64))
    model = models.Classifier(body, num_features=64, mean=(0.5,), std=(0.25,))
    recipe = training.Recipe(epochs=6, batch_size=128, max_shift=0, flip=False, milestones=(5,))
    variables = training.fit(model, recipe, pretrain, key=jax.random.key(0)).variables
    features = networks.features(model, variables, train.images)
    head = training.fit_head(jax.random.key(1), features, jnp.asarray(train.labels), num_classes=10)
    victim = attacks.Victim(model, as_network(model).with_head(variables, head))
    logits = model.apply(victim.variables, jnp.asarray(test.images) / 255)
    right = np.flatnonzero(np.argmax(logits, axis=-1) == test.labels)
    trials = attacks.draw_trials(
        jax.random.key(2), train, test, num_trials=6, num_poisons=20, target_ids=right
    )
    attack = attacks.bullseye_polytope(epsilon=16 / 255, num_steps=60)
    sets = attacks.poison(jax.random.key(3), train, trials, attack, [victim])
    attacks.save(tmp_path / "0.npz", sets[0], as_uint8=True)
    sets[0] = attacks.load(tmp_path / "0.npz", num_classes=10)
    clean = [one._replace(images=train.images) for one in sets]
    before, after = (
        evaluation.transfer_outcome(jax.random.key(4), victim, x, test) for x in (clean, sets)
    )
    assert np.mean(before.success) <= 0.2
    assert np.mean(after.success) >= 0.7
    assert abs(np.mean(after.accuracy) - np.mean(before.accuracy)) < 0.05


# Transfer learning by `fit`


@pytest.mark.parametrize("bn_frozen", [True, False])
@pytest.mark.parametrize("unfrozen", [(), ("stage1_block0",)], ids=["head", "last stage"])
def test_fit_trains_what_is_not_frozen(bn_frozen, unfrozen):
    model = models.resnet18(width=4, blocks=(1, 1))
    train = Dataset(
        np.random.default_rng(0).random((16, 8, 8, 3)).astype(np.float32),
        (np.arange(16) % 10).astype(np.int32),
    )
    trained = model.init(jax.random.key(9), train.images[:1])
    recipe = training.Recipe(epochs=1, batch_size=8, weight_decay=0.1)
    transfer = training.Transfer(trained, bn_frozen, unfrozen)
    state = training.fit(model, recipe, train, key=jax.random.key(0), transfer=transfer)

    def same(one, other):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return all(np.array_equal(*pair) for pair in pairs)

    for name, part in state.params["body"].items():
        assert same(part, trained["params"]["body"][name]) == (name not in unfrozen), name
    assert same(state.batch_stats, trained["batch_stats"]) == bn_frozen
    assert not same(state.params["head"], trained["params"]["head"])


def test_fit_refuses_to_train_parts_that_there_are_not():
    model = models.resnet18(width=4, blocks=(1,))
    train = Dataset(np.zeros((8, 8, 8, 3), np.uint8), np.arange(8, dtype=np.int32))
    trained = model.init(jax.random.key(9), jnp.zeros((1, 8, 8, 3)))
    transfer = training.Transfer(trained, unfrozen=("stage7",))
    with pytest.raises(ValueError, match=r"no parts stage7 .* body/stage0_block0/conv1, .* head"):
        training.fit(
            model, training.Recipe(batch_size=8), train, key=jax.random.key(0), transfer=transfer
        )


def test_fit_refuses_another_networks_extractor():
    model, other = (models.resnet18(width=width, blocks=(1,)) for width in (4, 5))
    train = Dataset(np.zeros((8, 8, 8, 3), np.uint8), np.arange(8, dtype=np.int32))
    trained = other.init(jax.random.key(9), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="do not fit the model"):
        training.fit(
            model, training.Recipe(batch_size=8), train, key=jax.random.key(0),
            transfer=training.Transfer(trained),
        )  # fmt: skip


# Networks of set-up A


@pytest.mark.parametrize(
    ("model", "published", "num_features"),
    [
        (models.resnet50(), 23_520_842, 2048),
        (models.mobilenet_v2(), 2_296_922, 1280),
        (models.densenet121(), 6_956_298, 1024),
    ],
    ids=["resnet50", "mobilenet_v2", "densenet121"],
)
def test_numbers_of_parameters_and_features(model, published, num_features):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == published
    assert model.num_features == num_features
    assert variables["params"]["head"]["kernel"].shape == (num_features, 10)


NARROW = {
    "resnet50": models.resnet50(width=2, blocks=(1,), num_classes=7, dropout=0.5),
    "resnet18": models.resnet18(width=2, blocks=(1,), num_classes=7, dropout=0.5),
    "mobilenet_v2": models.mobilenet_v2(
        width=0.1, stages=((1, 16, 1, 1), (2, 24, 2, 2)), num_classes=7, dropout=0.5
    ),
    "densenet121": models.densenet121(growth=3, blocks=(1, 1), num_classes=7, dropout=0.5),
}


@pytest.mark.parametrize("name", NARROW)
def test_narrow_networks_split_into_body_and_head_and_drop_out_on_request(name):
    model = NARROW[name]
    images = jax.random.uniform(jax.random.key(0), (3, 8, 8, 3))

    @jax.jit
    def outputs(key):
        variables = model.init(key, images)
        rngs = {"dropout": jax.random.key(1)}
        features = [
            model.apply(variables, images, method="features", rngs=drawn) for drawn in (None, rngs)
        ]
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return variables, *features, logits, updates

    variables, features, dropped, logits, updates = outputs(jax.random.key(2))
    assert features.shape == (3, model.num_features)
    assert logits.shape == (3, 7)
    assert np.abs(features - dropped).max() > 1e-4
    moved = jax.tree.map(
        lambda old, new: bool(np.any(old != new)), variables["batch_stats"], updates["batch_stats"]
    )
    assert all(jax.tree.leaves(moved))
    assert set(variables["params"]) == {"body", "head"}
    assert variables["params"]["head"]["kernel"].shape == (model.num_features, 7)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_on_cpu_equals_xlas(stride):
    from jaxpoison.models.mobilenet import depthwise_conv

    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.random.normal(keys[0], (2, 7, 8, 5))
    kernel = jax.random.normal(keys[1], (3, 3, 1, 5))
    padding = ((1, 1), (1, 1))
    got = depthwise_conv(images, kernel, (stride, stride), padding)
    want = jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), padding, feature_group_count=5,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-5)
