import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxpoison import attacks, evaluation, models, training
from jaxpoison.attacks._deep_confuse import (
    Plan,
    compiled,
    confusion,
    start_classifier,
    unet_for,
)
from jaxpoison.attacks._gradient_matching import mismatch
from jaxpoison.attacks._metapoison import RGB_FROM_YUV, margin, recolor, roughness, unrolled_loss
from jaxpoison.attacks.descent import normal_start, projection
from jaxpoison.core import devices
from jaxpoison.data import Dataset, load_embedded
from jaxpoison.defenses import Defense
from jaxpoison.models import unet
from jaxpoison.network import as_network
from jaxpoison.training._fit import epoch_order
from jaxpoison.training.hooks import Info, with_ids

EPSILON = 0.1  # 25.5 of 255: no whole number, so that plain rounding would break it
NUM_CLASSES = 4


class Body(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x, train: bool):
        x = models.layers.Conv(self.width, (3, 3), 2, 1, use_bias=False)(x)
        x = models.layers.BatchNorm(use_running_average=not train)(x)
        return nn.relu(x).reshape(len(x), -1)


MODEL = models.Classifier(
    Body(), num_features=96, num_classes=NUM_CLASSES, mean=(0.5,), std=(0.25,)
)
PLAIN = training.Recipe(
    epochs=4, batch_size=16, learning_rate=0.02, milestones=(), max_shift=0.0, flip=False
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Spreading such small work over eight devices would be most of its cost; one test does it."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: first)


@functools.cache
def real(part="train"):
    """8x8 crops of real images of four classes."""
    images, labels, _ = getattr(load_embedded("cifar10"), part)
    rows = np.flatnonzero(labels < NUM_CLASSES)[:96]
    return Dataset(images[rows, 12:20, 12:20], labels[rows])


def network(seed=0):
    return attacks.Victim(MODEL, MODEL.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 3))))


def trials(num_trials=2, num_poisons=6):
    return attacks.draw_trials(
        jax.random.key(0), real(), real("test"), num_trials=num_trials, num_poisons=num_poisons
    )


def one_trial(index):
    return attacks.Trials(*(leaf[index : index + 1] for leaf in trials()))


def unit(images):
    return jnp.asarray(images, jnp.float32) / 255


def check_poisons(sets, drawn, epsilon, least=5):
    """Asserts what every clean-label attack owes: rows, labels, the budget in 8 bits, movement."""
    for one, rows in zip(sets, drawn.rows, strict=True):
        assert one.images.dtype == np.uint8
        np.testing.assert_array_equal(np.flatnonzero(one.is_poisoned), rows)
        np.testing.assert_array_equal(one.labels, real().labels)
        change = np.abs(one.images.astype(int) - real().images)
        assert change.max() <= 255 * epsilon + 1e-3
        assert np.all(change[rows].max(axis=(1, 2, 3)) >= least)
        assert not change[~one.is_poisoned].any()


# Gradient matching

MATCHING = attacks.gradient_matching(
    epsilon=EPSILON, num_steps=20, restarts=2, max_shift=0.0, flip=False
)


def match(attack=MATCHING, drawn=None, seed=1, substitutes=1):
    return attacks.poison(
        jax.random.key(seed),
        real(),
        trials() if drawn is None else drawn,
        attack,
        [network(seed) for seed in range(substitutes)],
    )


@functools.cache
def matched():
    return match()


def smooth_loss(params, images, labels):
    hidden = jnp.tanh(images.reshape(len(images), -1) @ params["first"])
    logits = hidden @ params["second"]
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def assert_slope_is_a_difference_quotient(function, point, gradient, rng):
    """Along one random direction; in float64."""
    direction = jnp.asarray(rng.normal(size=point.shape))
    ahead, behind = (function(point + step * direction) for step in (1e-5, -1e-5))
    slope = jnp.vdot(gradient, direction)
    assert abs(slope) > 1e-4
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)


def test_mismatch_agrees_with_finite_differences_and_batches_do_not_matter():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {"first": rng.normal(size=(12, 5)), "second": rng.normal(size=(5, 3))}
        wanted = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        params = jax.tree.map(jnp.asarray, params)
        images = jnp.asarray(rng.normal(size=(6, 2, 2, 3)))
        labels = jnp.asarray([0, 1, 2, 1, 0, 1])
        run = jax.jit(functools.partial(mismatch, smooth_loss))

        value, gradient = run(params, wanted, images[None], labels[None])
        g = jax.grad(smooth_loss)(params, images, labels)
        flat, flat_wanted = (ravel_pytree(tree)[0] for tree in (g, wanted))
        cosine = flat @ flat_wanted / jnp.linalg.norm(flat) / jnp.linalg.norm(flat_wanted)
        np.testing.assert_allclose(value, 1 - cosine, rtol=1e-12)
        direction = jnp.asarray(rng.normal(size=images.shape))
        ahead, behind = (
            run(params, wanted, (images + step * direction)[None], labels[None])[0]
            for step in (1e-5, -1e-5)
        )
        slope = jnp.vdot(gradient[0], direction)
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)

        batches = run(params, wanted, images.reshape(3, 2, 2, 2, 3), labels.reshape(3, 2))
        np.testing.assert_allclose(batches[0], value, rtol=1e-12)
        np.testing.assert_allclose(batches[1].reshape(images.shape), gradient[0], rtol=1e-9)


def test_a_step_of_matching_is_that_of_the_gradient_of_a_gradient():
    drawn = trials()
    bases, targets = unit(real().images[drawn.rows]), unit(drawn.targets)
    keys = jax.random.split(jax.random.key(0), 2)
    victims = [network(0), network(1)]

    attack = attacks.gradient_matching(
        epsilon=EPSILON, num_steps=1, restarts=1, learning_rate=0.01, max_shift=0.0, flip=False,
        batch_size=4,
    )  # fmt: skip
    moved = attack.craft(keys, victims, bases, jnp.asarray(drawn.base_labels), targets)
    starts = []
    for key, base in zip(keys, bases, strict=True):
        start_key, _ = jax.random.split(jax.random.fold_in(key, 0))
        starts.append(projection(base, EPSILON)(normal_start(start_key, base, EPSILON)))
    assert 0.4 * EPSILON < jnp.std(jnp.stack(starts) - bases) < EPSILON

    def loss(params, batch_stats, images, label):
        logits = MODEL.apply({"params": params, "batch_stats": batch_stats}, images)
        labels = jnp.full(len(images), label)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    @jax.jit
    @jax.value_and_grad
    def objective(images, target, label):
        values = []
        for _, variables in victims:
            rest = variables["params"], variables["batch_stats"]
            g, wanted = (ravel_pytree(jax.grad(loss)(*rest, x, label))[0] for x in (images, target))
            values.append(1 - g @ wanted / jnp.linalg.norm(g) / jnp.linalg.norm(wanted))
        return jnp.mean(jnp.stack(values))

    for trial in range(2):
        value, gradient = objective(starts[trial], targets[trial], drawn.base_labels[trial])
        np.testing.assert_allclose(moved.objective[0, trial], value, rtol=1e-4)
        # A rate of 0.01 for two networks, in units of a standard deviation of 0.25.
        want = starts[trial] - 0.25 * 0.005 * jnp.sign(gradient)
        want = jnp.clip(want, bases[trial] - EPSILON, bases[trial] + EPSILON)
        large = jnp.abs(gradient) > 1e-6 * jnp.max(jnp.abs(gradient))
        got = jnp.where(large, moved.images[trial], jnp.clip(want, 0, 1))
        assert jnp.mean(large) > 0.9
        np.testing.assert_allclose(got, jnp.clip(want, 0, 1), atol=1e-6)


def test_matching_falls_within_the_budget_and_keeps_labels(tmp_path):
    check_poisons(matched(), trials(), EPSILON)
    for one in matched():
        first, last = one.config["objective"]
        assert last < 0.6 * first
        attacks.save(tmp_path / "one.npz", one, as_uint8=True)
        loaded = attacks.load(tmp_path / "one.npz", num_classes=NUM_CLASSES)
        np.testing.assert_array_equal(loaded.images, one.images)
        assert loaded.config == one.config
        assert loaded.target[1:] == one.target[1:]


def test_matching_follows_its_key_and_not_the_trials_beside_it():
    alone = match(drawn=one_trial(1))[0]
    np.testing.assert_array_equal(alone.images, matched()[1].images)
    assert alone.config == matched()[1].config
    other = match(drawn=one_trial(1), seed=2)[0]
    assert np.mean(other.images != alone.images) > 0.02


def test_more_starts_never_end_higher_and_progress_is_told():
    once = attacks.gradient_matching(
        epsilon=EPSILON, num_steps=20, restarts=1, max_shift=0.0, flip=False
    )
    told = []
    sets = attacks.poison(
        jax.random.key(1), real(), trials(), once, [network()],
        progress=lambda *news: told.append(news),
    )  # fmt: skip
    for few, many in zip(sets, matched(), strict=True):
        assert many.config["objective"][1] <= few.config["objective"][1]
    assert told == [("gradient_matching", 6, 12), ("gradient_matching", 12, 12)]


def test_matching_under_augmentation_on_all_devices(monkeypatch):
    monkeypatch.undo()
    assert len(jax.devices()) > 1  # six poisons are filled up to eight
    attack = attacks.gradient_matching(epsilon=EPSILON, num_steps=4, restarts=1, max_shift=1.0)
    drawn = one_trial(0)

    def craft():
        return attack.craft(
            jax.random.split(jax.random.key(0), 1),
            [network()],
            unit(real().images[drawn.rows]),
            jnp.asarray(drawn.base_labels),
            unit(drawn.targets),
        )

    several = craft()
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: first)
    alone = craft()
    np.testing.assert_allclose(alone.objective[0], several.objective[0], rtol=1e-5)
    assert jnp.mean(jnp.abs(alone.images - several.images) > 1e-4) < 0.02
    still = attacks.gradient_matching(
        epsilon=EPSILON, num_steps=3, restarts=1, max_shift=1.0, learning_rate=1e-12
    )
    (one,) = match(still, drawn)
    first, last = one.config["objective"]
    assert abs(last - first) > 1e-3  # the poisons stood still, the draws did not


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 8.0}, "epsilon is in units"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_shift": -1.0}, "max_shift must be at least 0"),
    ],
)
def test_bad_settings_of_matching(settings, message):
    with pytest.raises(ValueError, match=message):
        attacks.gradient_matching(**{"epsilon": EPSILON, **settings})


# MetaPoison

META = attacks.MetaPoisonConfig(
    num_steps=6, rise=2, surrogates=2, lifetime=4, warm_up=1, batch_size=16, poisons_per_batch=3
)


@functools.cache
def meta_attack(**changes):
    config = dataclasses.replace(META, **changes)
    return attacks.metapoison(real(), epsilon=EPSILON, config=config)


def meta(drawn, seed=1, **changes):
    attack = meta_attack(**changes)
    return attacks.poison(jax.random.key(seed), real(), drawn, attack, [network()])


@functools.cache
def meta_poisoned():
    return meta(trials())


def normalizing_network(params, images):
    """A smooth network whose examples meet in batch statistics."""
    hidden = images.reshape(len(images), -1) @ params["first"]
    hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 0.1)
    return jnp.tanh(hidden) @ params["second"]


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_unrolled_gradient_is_the_slope_of_literal_retraining(num_steps):
    with jax.enable_x64(True):
        rng = np.random.default_rng(num_steps)
        params = {"first": rng.normal(size=(12, 5)), "second": rng.normal(size=(5, 3))}
        params = jax.tree.map(jnp.asarray, params)
        images = jnp.asarray(rng.random((num_steps + 1, 6, 2, 2, 3)))
        labels = jnp.asarray(rng.integers(0, 3, (num_steps + 1, 6)))
        poisons, targets = (
            jnp.asarray(rng.random((2, 2, 2, 3))),
            jnp.asarray(rng.random((1, 2, 2, 3))),
        )

        def retrained(poisons):
            """Trains step by step, and asks for the target after each step."""
            weights, margins = params, []
            for step in range(num_steps):
                x = jnp.concatenate([poisons, images[step, 2:], targets[: min(step, 1)]])
                y = jnp.concatenate([jnp.ones(2, int), labels[step, 2:]])

                def loss(weights, x=x, y=y):
                    logits = normalizing_network(weights, x)[:6]
                    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

                gradient = jax.jit(jax.grad(loss))(weights)
                weights = jax.tree.map(lambda w, g: w - 0.3 * g, weights, gradient)
                # Beside the images of the batch that comes next.
                following = images[step + 1]
                if step + 1 < num_steps:
                    following = following.at[:2].set(poisons)
                z = normalizing_network(weights, jnp.concatenate([following, targets]))[-1]
                margins.append(max(z[0], z[2]) - z[1])
            return np.mean(margins)

        def ours(poisons):
            return unrolled_loss(
                normalizing_network, params, 0.3, images, labels, poisons, 1, targets
            )

        value, gradient = jax.jit(jax.value_and_grad(ours))(poisons)
        np.testing.assert_allclose(value, retrained(poisons), rtol=1e-12)
        assert_slope_is_a_difference_quotient(retrained, poisons, gradient, rng)


def test_the_margin_is_negative_where_the_target_is_classified_as_the_base_class():
    logits = jnp.array([[1.0, 3.0, 2.0], [1.0, -1.0, 2.5], [-500.0, 0.0, -400.0]])
    np.testing.assert_allclose(margin(logits, jnp.int32(1)), [-1.0, 3.5, -100.0])


def test_metapoison_works_within_the_budget_and_follows_its_key():
    check_poisons(meta_poisoned(), trials(), EPSILON)
    # The same surrogates on the same batches, with poisons that stand still.
    for one, still in zip(meta_poisoned(), meta(trials(), learning_rate=1e-9), strict=True):
        assert one.config["objective"][0] == pytest.approx(still.config["objective"][0], rel=1e-4)
        assert one.config["objective"][1] < still.config["objective"][1] - 0.01
    alone = meta(one_trial(1))[0]
    np.testing.assert_array_equal(alone.images, meta_poisoned()[1].images)
    other = meta(one_trial(1), seed=2)[0]
    assert np.mean(other.images != alone.images) > 0.02


def test_metapoison_with_colors_stays_within_the_sum_of_both_budgets():
    config = dataclasses.replace(META, num_steps=2, surrogates=1, color=0.04, color_points=4)
    attack = attacks.metapoison(real(), epsilon=0.02, config=config)
    assert 0.02 + 0.12 < attack.epsilon < 0.02 + 0.13
    sets = attacks.poison(jax.random.key(1), real(), one_trial(0), attack, [network()])
    check_poisons(sets, one_trial(0), attack.epsilon)
    change = sets[0].images.astype(int) - real().images
    assert np.abs(change).max() > 255 * 0.02 + 1  # beyond what the pixels' own budget allows


def test_a_map_of_colors_moves_what_it_says():
    image = unit(real().images[0])
    np.testing.assert_array_equal(recolor(image, jnp.zeros((5, 5, 5, 3))), image)
    shifted = recolor(image, jnp.zeros((5, 5, 5, 3)).at[..., 0].set(0.03))
    np.testing.assert_allclose(shifted, image + 0.03, atol=1e-6)  # brightness alone
    red = recolor(image, jnp.zeros((5, 5, 5, 3)).at[..., 2].set(0.03)) - image
    np.testing.assert_allclose(
        red, jnp.broadcast_to(0.03 * jnp.array([1.13983, -0.5806, 0.0]), red.shape), atol=1e-6
    )
    # What is linear in the color, interpolation keeps: a tenth of the brightness.
    brightness = jnp.linspace(0, 0.1, 5)[:, None, None]
    slope = jnp.zeros((5, 5, 5, 3)).at[..., 0].set(jnp.broadcast_to(brightness, (5, 5, 5)))
    luma = image @ jnp.linalg.inv(jnp.asarray(RGB_FROM_YUV))[0]
    np.testing.assert_allclose(recolor(image, slope), image + 0.1 * luma[..., None], atol=1e-5)
    assert roughness(jnp.full((2, 5, 5, 5, 3), 0.3)) == 0
    np.testing.assert_allclose(roughness(slope), 25 * 4 * 0.025**2, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unroll": 0}, "unroll must be at least 1"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"surrogates": 0}, "surrogates must be at least 1"),
        ({"color": -0.1}, "color must be at least 0"),
        ({"color": 0.1, "color_points": 1}, "color_points must be at least 2"),
        ({"poisons_per_batch": 16}, "room for clean images"),
        ({"batch_size": 97}, "not be larger than the 96"),
    ],
)
def test_bad_settings_of_metapoison(changes, message):
    with pytest.raises(ValueError, match=message):
        meta(one_trial(0), **changes)


def test_metapoison_that_does_not_fit_the_data():
    with pytest.raises(ValueError, match=r"6 poisons, 3 in a batch, need 2 batches; .* has 1"):
        meta(one_trial(0), batch_size=96)
    grey = Dataset(real().images[..., :1], real().labels)
    with pytest.raises(ValueError, match="three channels"):
        attacks.metapoison(grey, epsilon=0.1, config=dataclasses.replace(META, color=0.04))
    with pytest.raises(ValueError, match="epsilon is in units"):
        attacks.metapoison(real(), epsilon=8)


# DeepConfuse

CONFUSE = attacks.DeepConfuseConfig(
    trials=2, passes=2, batch_size=16, width=4, generator_rate=0.01, classifier_rate=0.1
)


def confuse(config=CONFUSE, seed=1, rows=slice(None)):
    images, labels = unit(real().images[rows]), real().labels[rows]
    attack = attacks.deep_confuse(epsilon=EPSILON, config=config)
    return np.asarray(attack.craft(jax.random.key(seed), network(), images, labels))


@functools.cache
def confused():
    return confuse()


def test_the_generators_gradient_is_the_slope_of_the_loss_after_a_literal_step():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {"first": rng.normal(size=(12, 5)), "second": rng.normal(size=(5, 3))}
        params = jax.tree.map(jnp.asarray, params)
        clean = jnp.asarray(rng.random((6, 2, 2, 3)))
        poisoned = clean + 0.1 * jnp.asarray(rng.normal(size=clean.shape))
        labels = jnp.asarray(rng.integers(0, 3, 6))
        rule = optax.sgd(0.4)

        @jax.jit
        def literally(poisoned):
            def loss(weights, images):
                logits = normalizing_network(weights, images)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            updates, _ = rule.update(jax.grad(loss)(params, poisoned), rule.init(params))
            return loss(optax.apply_updates(params, updates), clean)

        value, gradient = jax.jit(
            jax.value_and_grad(
                lambda x: confusion(normalizing_network, params, 0.4, x, clean, labels)
            )
        )(poisoned)
        np.testing.assert_allclose(value, literally(poisoned), rtol=1e-12)
        assert_slope_is_a_difference_quotient(literally, poisoned, gradient, rng)


def test_the_replay_walks_the_trajectory_of_training_on_the_old_generators_images():
    plan = Plan(as_network(MODEL), (8, 8, 3), devices.data_mesh(), EPSILON, CONFUSE)
    run = compiled(plan)
    key = jax.random.key(5)
    clean = Dataset(unit(real().images), jnp.asarray(real().labels))
    old = run.generator(key, clean.images[:1])
    poisoned = Dataset(run.generate(old.variables, clean.images), clean.labels)
    order = jnp.concatenate([epoch_order(key, number, 96, 16) for number in range(3)])

    def replay(learning):
        generator, classifier, harm = old, start_classifier(plan, run.descent, key), []
        for rows in order:
            carry = jax.tree.map(jnp.array, generator), classifier
            (moved, classifier), values = run.learn((clean, poisoned, key), carry, rows[None])
            generator = moved if learning else old
            harm.append(values[0])
        return generator, classifier, jnp.stack(harm)

    generator, classifier, harm = replay(learning=True)

    # The same images, as any training set.
    rule, state = optax.sgd(CONFUSE.classifier_rate), start_classifier(plan, run.descent, key)

    @jax.jit
    def step(params, batch_stats, rows):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = MODEL.apply(
                variables, poisoned.images[rows], train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, poisoned.labels[rows])
            return losses.mean(), updates["batch_stats"]

        gradient, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, _ = rule.update(gradient, rule.init(params))
        return optax.apply_updates(params, updates), batch_stats

    params, batch_stats = state.params, state.batch_stats
    for rows in order:
        params, batch_stats = step(params, batch_stats, rows)
    for mine, theirs in ((classifier.params, params), (classifier.batch_stats, batch_stats)):
        assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), mine, theirs))
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), generator.params, old.params)
    assert min(jax.tree.leaves(moved)) > 0  # every layer of the generator has learned

    # Beside a generator that stands still, on the same trajectory: it does more harm.
    _, same, less = replay(learning=False)
    np.testing.assert_array_equal(
        same.params["head"]["kernel"], classifier.params["head"]["kernel"]
    )
    np.testing.assert_array_equal(harm[0], less[0])
    assert jnp.mean(harm[-6:]) > jnp.mean(less[-6:]) + 0.01


def test_confusing_images_stay_within_the_budget_and_follow_their_key():
    change = np.abs(confused() - real().images / np.float32(255))
    assert change.max() <= EPSILON + 1e-6
    assert np.all(change.max(axis=(1, 2, 3)) > 0.1 * EPSILON)
    assert confused().min() >= 0 and confused().max() <= 1
    np.testing.assert_array_equal(confuse(), confused())
    assert np.mean(np.abs(confuse(seed=2) - confused()) > 1e-3) > 0.5


def test_the_mixture_of_all_four_attacks():
    list_of_attacks = [
        attacks.pgd(epsilon=EPSILON, num_steps=2),
        attacks.dap(epsilon=EPSILON, num_steps=2),
        attacks.durp(epsilon=EPSILON),
        attacks.deep_confuse(epsilon=EPSILON, config=dataclasses.replace(CONFUSE, trials=1)),
    ]
    mixed = attacks.mixture(jax.random.key(0), real(), 1.0, list_of_attacks, network())
    assert mixed.attack_names == ("pgd", "dap", "durp", "dc")
    assert np.bincount(mixed.attack_id).tolist() == [0, 24, 24, 24, 24]
    np.testing.assert_array_equal(mixed.labels, real().labels)
    change = np.abs(mixed.images - real().images / np.float32(255))
    assert change.max() <= EPSILON + 1e-6
    assert mixed.config["attacks"][3]["trials"] == 1


def test_the_u_net_has_as_many_sizes_as_halving_allows_and_keeps_corners():
    widths = {(8, 8, 3): 4, (28, 28, 1): 3, (5, 6, 1): 1, (32, 32, 3): 4}
    for shape, sizes in widths.items():
        assert unet_for(shape, 4).widths == tuple(4 * 2**level for level in range(sizes))
    x = jnp.arange(12.0).reshape(1, 2, 3, 2)
    large = unet.upsample_2x(x)
    assert large.shape == (1, 4, 6, 2)
    for i in (0, -1):
        for j in (0, -1):
            np.testing.assert_allclose(large[0, i, j], x[0, i, j], atol=1e-6)
    np.testing.assert_allclose(large[0, :, 0, 0], np.linspace(0, 6, 4), atol=1e-6)
    np.testing.assert_allclose(large[0, 0, :, 0], np.linspace(0, 4, 6), atol=1e-6)


@pytest.mark.parametrize("name", ["trials", "passes", "batch_size", "width", "generator_rate"])
def test_bad_settings_of_deep_confuse(name):
    least = "above 0" if name == "generator_rate" else "at least 1"
    with pytest.raises(ValueError, match=f"{name} must be {least}"):
        attacks.DeepConfuseConfig(**{name: 0})
    with pytest.raises(ValueError, match="epsilon is in units"):
        attacks.deep_confuse(epsilon=0.0)


# Victims from scratch


def planted():
    """A set in which the target stands many times with the base label: an attack that works."""
    drawn = trials(1, 20)
    images = real().images.copy()
    images[drawn.rows[0]] = drawn.targets[0]
    target = attacks.Target(
        drawn.targets[0],
        int(drawn.target_labels[0]),
        int(drawn.base_labels[0]),
        int(drawn.target_ids[0]),
    )
    attack_id = np.isin(np.arange(len(images)), drawn.rows[0]).astype(np.int8)
    config = {"attacks": [{"name": "planted"}]}
    return attacks.PoisonedDataset(images, real().labels, attack_id, config, target)


def test_a_planted_target_succeeds_unless_the_defense_removes_it():
    def judge(*sets, **options):
        return evaluation.scratch_outcome(
            jax.random.key(3), MODEL, PLAIN, sets, real("test"), **options
        )

    told = []
    outcome = judge(planted(), report=lambda trial, epoch, metrics: told.append((trial, epoch)))
    assert outcome.success.tolist() == [True]
    assert outcome.prediction.tolist() == [planted().target.base_label]
    assert outcome.probabilities[0].argmax() == outcome.prediction[0]
    assert outcome.probabilities[0].max() > 0.5
    assert outcome.interval == evaluation.wilson(1, 1)
    assert told == [(0, epoch) for epoch in range(4)]

    restore = Defense(on_epoch=lambda state, *rest: (state, with_ids(real()), Info()))
    defended = judge(planted(), defense=restore)
    assert not defended.success.any()
    key = jax.random.fold_in(jax.random.key(3), planted().target.target_id)
    state = training.fit(MODEL, PLAIN, real(), key=key)
    logits = MODEL.apply(state.variables, unit(real("test").images))
    accuracy = np.mean(np.argmax(logits, axis=1) == real("test").labels)
    np.testing.assert_allclose(defended.accuracy[0], accuracy, atol=1e-6)
    logits = MODEL.apply(state.variables, unit(planted().target.images))
    np.testing.assert_allclose(defended.probabilities, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)


def test_sets_that_cannot_be_judged():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="no poisoned set"):
        evaluation.scratch_outcome(key, MODEL, PLAIN, [], real("test"))
    with pytest.raises(ValueError, match="set 1 has no target"):
        evaluation.scratch_outcome(
            key, MODEL, PLAIN, [planted(), planted()._replace(target=None)], real("test")
        )


def test_wilson_intervals():
    for (successes, number), want in {
        (0, 5): (0.0, 0.4345),
        (5, 5): (0.5655, 1.0),
        (10, 20): (0.2993, 0.7007),
    }.items():
        np.testing.assert_allclose(evaluation.wilson(successes, number), want, atol=1e-4)
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3.
    for (successes, number), want in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        np.testing.assert_allclose(evaluation.wilson(successes, number), want, atol=5e-5)
    # Its ends are the rates p at which the found rate is just z standard deviations away.
    for p in evaluation.wilson(3, 17):
        np.testing.assert_allclose(abs(3 / 17 - p) / np.sqrt(p * (1 - p) / 17), 1.96, rtol=1e-6)
    for bad in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="is no rate"):
            evaluation.wilson(*bad)
