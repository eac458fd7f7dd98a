import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import Strided, classifier

from jaxpoison import models, network, solvers, training
from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset, load_embedded
from jaxpoison.defenses import Defense
from jaxpoison.training._fit import epoch_order, losses_and_hits, train_step
from jaxpoison.training.hooks import Info, chain, none
from jaxpoison.training.recipe import at_epoch, optimizer, steps_per_epoch

QUICK = training.Recipe(
    epochs=1, batch_size=8, learning_rate=0.05, milestones=(), max_shift=1.0, flip=True
)


class LinearBody(nn.Module):
    """Pixels as features, through one matrix: small enough to count and compile in no time."""

    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


def conv_model():
    return classifier(Strided(6), std=(0.25,))


def linear_model():
    return models.Classifier(LinearBody(), num_features=4, num_classes=3)


def random_set(num_examples=27, size=8, num_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return Dataset(
        rng.random((num_examples, size, size, 3), dtype=np.float32),
        rng.integers(0, num_classes, num_examples, dtype=np.int32),
    )


def assert_trees_close(got, want, **tolerance):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **tolerance), got, want)


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 5e-4), (0.9, 0.0), (0.0, 0.1), (0.0, 0.0)])
def test_optimizer_is_pytorchs_nesterov_sgd_with_milestones(momentum, decay):
    recipe = training.Recipe(
        learning_rate=0.3, momentum=momentum, weight_decay=decay, milestones=(1, 3)
    )
    transform = optimizer(recipe)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(2, 3)).astype(np.float32)}
    state = transform.init(params)
    weights, velocity = params["w"].astype(np.float64), 0.0
    for step in range(8):
        gradient = rng.normal(size=(2, 3)).astype(np.float32)
        state = at_epoch(state, step // 2, 2)
        updates, state = transform.update({"w": gradient}, state, params)
        params = optax.apply_updates(params, updates)
        full = gradient + decay * weights
        velocity = momentum * velocity + full
        learning_rate = 0.3 * 0.1 ** sum(step // 2 >= epoch for epoch in (1, 3))
        weights = weights - learning_rate * (full + momentum * velocity)
        np.testing.assert_allclose(params["w"], weights, rtol=1e-5, atol=1e-6)


def test_vectors_may_be_left_out_of_the_decay():
    recipe = training.Recipe(learning_rate=1, momentum=0, weight_decay=0.1, decay_vectors=False)
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    transform = optimizer(recipe)
    updates, _ = transform.update(
        jax.tree.map(jnp.zeros_like, params), transform.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], -0.3, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_the_papers_recipes():
    assert dataclasses.astuple(training.CIFAR10) == (
        80, 128, 0.1, 0.9, 5e-4, (30, 50, 70), 4.0, True, False, "steps", "sgd", None, True, 0.0,
    )  # fmt: skip
    assert dataclasses.astuple(training.MNIST) == (
        30, 128, 0.01, 0.0, 0.0, (), 0.0, False, False, "steps", "sgd", None, True, 0.0,
    )  # fmt: skip


def test_one_cycle_rises_for_a_quarter_and_falls_to_nothing_whatever_an_epoch_holds():
    recipe = training.Recipe(
        epochs=4, learning_rate=0.8, momentum=0, weight_decay=0, milestones=(), schedule="one_cycle"
    )
    transform = optimizer(recipe)
    state, rates, times = transform.init(jnp.float32(1)), [], []
    for epoch, num_steps in enumerate([5, 2, 8, 4]):  # defenses drop and add examples
        state = at_epoch(state, epoch, num_steps)
        for step in range(num_steps):
            update, state = transform.update(jnp.float32(1), state)
            rates.append(-float(update))
            times.append((epoch + (step + 0.5) / num_steps) / 4)
    np.testing.assert_allclose(rates, 0.8 * np.interp(times, [0, 0.25, 1], [0, 1, 0]), rtol=1e-6)


MUON = training.Recipe(
    epochs=4, learning_rate=0.3, momentum=0.8, weight_decay=0, milestones=(), schedule="linear",
    optimizer="muon", other_rate=0.5,
)  # fmt: skip


def test_muon_turns_kernels_by_the_rate_along_the_gradients_singular_vectors():
    rng = np.random.default_rng(0)
    kernel, gradient = (rng.normal(size=(3, 3, 2, 5)).astype(np.float32) for _ in range(2))
    params, transform = {"kernel": kernel}, optimizer(MUON)
    state = at_epoch(transform.init(params), 1, 2)  # at 5 / 16 of training
    updates, _ = transform.update({"kernel": gradient}, state, params)
    new = optax.apply_updates(params, updates)["kernel"].reshape(18, 5)
    turned = (kernel.reshape(18, 5) * np.sqrt(5) / np.linalg.norm(kernel) - new) / (0.3 * 11 / 16)
    left, _, right = np.linalg.svd(gradient.reshape(18, 5), full_matrices=False)
    inside = left.T @ turned @ right.T
    # Five Newton-Schulz iterations leave singular values near 1, not at it.
    assert np.all((np.diag(inside) > 0.6) & (np.diag(inside) < 1.3))
    np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0, atol=1e-4)
    np.testing.assert_allclose(left @ inside @ right, turned, atol=1e-4)


def test_muon_leaves_all_but_convolutions_to_gradient_descent():
    params = {"kernel": jnp.ones((1, 1, 2, 2)), "head": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    transform, plain = optimizer(MUON), optimizer(
        dataclasses.replace(MUON, optimizer="sgd", learning_rate=0.5, other_rate=None)
    )  # fmt: skip
    others = {name: params[name] for name in ("head", "bias")}
    state, reference = transform.init(params), plain.init(others)
    for epoch, num_steps in enumerate([2, 3]):
        state, reference = (at_epoch(x, epoch, num_steps) for x in (state, reference))
        for _ in range(num_steps):
            updates, state = transform.update(params, state, params)
            wanted, reference = plain.update(others, reference, others)
            for name in others:
                np.testing.assert_array_equal(updates[name], wanted[name])


@pytest.mark.parametrize("change", [{"other_rate": None}, {"optimizer": "sgd"}])
def test_muon_and_it_alone_has_two_rates(change):
    with pytest.raises(ValueError, match="other_rate"):
        dataclasses.replace(MUON, **change)


@pytest.mark.parametrize("shares", [False, True])
def test_smoothed_labels_are_shared_out_evenly(shares):
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    labels = np.array([2, 0, 1, 1])
    wanted = 0.7 * np.eye(3)[labels] + 0.3 / 3
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    given = jnp.asarray(np.eye(3, dtype=np.float32)[labels] if shares else labels)
    losses, hits = losses_and_hits(jnp.asarray(logits), given, 0.3)
    np.testing.assert_allclose(losses, -(wanted * log_p).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(hits, logits.argmax(1) == labels)


def test_order_of_an_epoch_has_no_repeats_and_drops_the_remainder():
    key = jax.random.key(0)
    order = np.asarray(epoch_order(key, 3, 29, 4))
    assert order.shape == (7, 4)
    assert len(set(order.ravel())) == 28
    assert set(order.ravel()) < set(range(29))
    np.testing.assert_array_equal(order, epoch_order(key, 3, 29, 4))
    assert np.any(order != epoch_order(key, 4, 29, 4))
    assert np.any(order != epoch_order(jax.random.key(1), 3, 29, 4))
    dropped = {*range(29)} - set(order.ravel())
    assert any(dropped != {*range(29)} - set(np.ravel(epoch_order(key, e, 29, 4))) for e in (4, 5))


class SeeingBody(nn.Module):
    """Keeps the batch that it was trained on where running statistics would be."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train: bool):
        seen = self.variable("batch_stats", "seen", jnp.zeros, self.shape)
        if train:
            seen.value = x
        return x.reshape(x.shape[0], -1)


def seen_batches(num_devices, recipe, num_steps=3):
    """Returns the images that each step trained on; every step takes the same examples."""
    mesh = devices.data_mesh(jax.devices()[:num_devices])
    model = models.Classifier(SeeingBody((8, 6, 6, 3)), num_features=108, num_classes=3)
    transform = optimizer(recipe)
    state = training.init_state(model, transform, jax.random.key(0), (6, 6, 3))
    step = jax.jit(train_step(model, recipe, transform, mesh))
    state = devices.replicate(state, mesh)
    train = devices.replicate(random_set(8, 6), mesh)
    seen = []
    for _ in range(num_steps):
        state, _ = step((train, (), jax.random.key(5)), state, jnp.arange(8))
        seen.append(np.asarray(state.batch_stats["body"]["seen"]))
    return seen


def test_augmentation_changes_with_the_step_and_not_with_the_devices():
    one, eight = seen_batches(1, QUICK), seen_batches(8, QUICK)
    assert_trees_close(eight, one, atol=1e-6)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        changed = np.abs(one[i] - one[j]).max(axis=(1, 2, 3))
        assert (changed > 1e-3).all()  # every example is drawn again at every step


def test_no_augmentation_leaves_images_as_they_are():
    recipe = dataclasses.replace(QUICK, max_shift=0.0, flip=False)
    for images in seen_batches(2, recipe, num_steps=1):
        np.testing.assert_array_equal(images, random_set(8, 6).images)


def test_training_is_the_same_on_every_number_of_devices():
    def train(num_devices):
        mesh = devices.data_mesh(jax.devices()[:num_devices])
        return training.fit(conv_model(), QUICK, random_set(), key=jax.random.key(0), mesh=mesh)

    one = train(1)
    assert int(one.step) == 3
    start = training.init_state(
        conv_model(), optimizer(QUICK), jax.random.split(jax.random.key(0), 3)[0], (8, 8, 3)
    )
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), one.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-2
    for num_devices in (2, 4, 8):
        assert_trees_close(train(num_devices), one, atol=1e-5)


def test_one_step_of_fit_is_a_step_along_the_gradient():
    recipe = dataclasses.replace(QUICK, momentum=0.0, weight_decay=0.0, max_shift=0.0, flip=False)
    model, train = linear_model(), random_set(8, 4)
    state = training.fit(model, recipe, train, key=jax.random.key(0))
    init_key = jax.random.split(jax.random.key(0), 3)[0]
    params = model.init(init_key, train.images)["params"]

    def loss(params):
        logits = model.apply({"params": params}, train.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, train.labels).mean()

    want = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params))
    assert_trees_close(state.params, want, atol=1e-6)


def test_learns_real_digits_and_reports():
    digits = load_embedded("mnist")
    train, test = (
        Dataset(part.images[:n, ::2, ::2], part.labels[:n])
        for part, n in [(digits.train, 1000), (digits.test, 300)]
    )
    model = models.Classifier(LinearBody(), num_features=4, num_classes=10)
    recipe = training.Recipe(
        epochs=20, batch_size=40, milestones=(15,), max_shift=0.0, flip=False, learning_rate=0.05
    )
    log = []
    state = training.fit(
        model, recipe, train, test=test, key=jax.random.key(0),
        report=lambda epoch, metrics: log.append((epoch, metrics)),
    )  # fmt: skip
    assert [epoch for epoch, _ in log] == list(range(20))
    first, last = log[0][1], log[-1][1]
    assert set(last) == {"loss", "train_accuracy", "test_accuracy", "seconds", "defense_seconds"}
    assert all(isinstance(value, float) for value in last.values())
    assert last["loss"] < 0.5 * first["loss"]
    assert last["test_accuracy"] > 0.7 > 0.1 + first["train_accuracy"]
    predicted = jnp.argmax(model.apply(state.variables, test.images / np.float32(255)), axis=-1)
    assert last["test_accuracy"] == pytest.approx(float(np.mean(predicted == test.labels)))


def test_accuracy_is_the_share_of_right_predictions():
    model, test = linear_model(), random_set(13, 4)
    variables = model.init(jax.random.key(0), test.images)
    right = np.argmax(model.apply(variables, test.images), axis=-1) == test.labels
    for num_devices, batch_size in [(1, 5), (8, 8), (8, 100)]:
        mesh = devices.data_mesh(jax.devices()[:num_devices])
        found = network.accuracy(
            model, variables, test.images, test.labels, batch_size=batch_size, mesh=mesh
        )
        assert found == pytest.approx(right.mean())


def test_a_loss_that_is_not_finite_is_an_error():
    recipe = dataclasses.replace(QUICK, learning_rate=1e30)
    with pytest.raises(solvers.DivergedError, match=r"after epoch 0.*smaller learning rate"):
        training.fit(linear_model(), recipe, random_set(27, 4), key=jax.random.key(0))


def test_fit_with_two_clocks_is_the_optimizer_by_hand():
    """Both clocks count, and the loop that consumes its carry takes them."""
    recipe = dataclasses.replace(MUON, epochs=2, batch_size=8, max_shift=0.0, flip=False)
    train, key = random_set(16), jax.random.key(3)
    state = training.fit(conv_model(), recipe, train, key=key)
    times = optax.tree.get_all_with_path(state.opt_state, "steps_taken")
    assert len(times) == 2 and all(int(steps) == 2 for _, steps in times)
    one = training.fit(conv_model(), dataclasses.replace(recipe, learning_rate=0), train, key=key)
    kernels = [leaf for leaf in jax.tree.leaves(one.params) if leaf.ndim == 4]
    for kernel in kernels:  # not turned, but at their norm
        np.testing.assert_allclose(np.linalg.norm(kernel), np.sqrt(kernel.shape[-1]), rtol=1e-5)
    assert kernels


def test_sizes_that_do_not_fit_are_errors():
    fit = functools.partial(training.fit, linear_model(), key=jax.random.key(0))
    with pytest.raises(ValueError, match="12 examples does not divide by 8 devices"):
        fit(dataclasses.replace(QUICK, batch_size=12), random_set(27, 4))
    with pytest.raises(ValueError, match="7 examples, fewer than one batch of 8"):
        fit(QUICK, random_set(7, 4))
    with pytest.raises(ValueError, match="7 examples"):
        steps_per_epoch(QUICK, 7)
    with pytest.raises(ValueError, match=r"training set.*out of range"):
        fit(QUICK, random_set(27, 4, num_classes=9))
    with pytest.raises(ValueError, match=r"test set.*out of range"):
        fit(QUICK, random_set(27, 4), test=random_set(20, 4, num_classes=9))
    with pytest.raises(ValueError, match="9 examples does not divide by 2 devices"):
        devices.shard_examples(np.zeros((9, 2)), devices.data_mesh(jax.devices()[:2]))


def test_the_step_compiles_once_per_shape():
    traced = []

    def on_batch(state, key, train_state, batch):
        traced.append(batch.images.shape)
        return batch

    def on_epoch(state, epoch, train_state, dataset):
        if epoch >= 3:  # fewer examples from here on
            dataset = dataset.take(slice(16))
        return state, dataset, Info(changed=epoch == 3)

    recipe = dataclasses.replace(QUICK, epochs=6)
    defense = Defense(on_epoch=on_epoch, on_batch=on_batch)
    for seed in range(2):  # the second run finds all compiled
        state = training.fit(
            linear_model(), recipe, random_set(27, 4), key=jax.random.key(seed), defense=defense
        )
        assert int(state.step) == 3 * 3 + 3 * 2
        assert traced == [(8, 4, 4, 3)] * 2


def test_a_defense_that_leaves_less_than_a_batch_is_an_error():
    defense = Defense(
        on_epoch=lambda state, epoch, train_state, dataset: (state, dataset.take(slice(5)), Info())
    )
    with pytest.raises(ValueError, match="left 5 examples, fewer than one batch of 8"):
        training.fit(
            linear_model(), QUICK, random_set(27, 4), key=jax.random.key(0), defense=defense
        )


def test_what_a_defense_tells_is_reported():
    def on_epoch(state, epoch, train_state, dataset):
        info = Info({"count": state}, dataset.ids[:epoch]) if epoch else Info()
        return state + 1, dataset, info

    log = []
    defense = Defense(lambda key, dataset, num_epochs: jnp.zeros(()), on_epoch)
    training.fit(
        linear_model(), dataclasses.replace(QUICK, epochs=3), random_set(27, 4),
        key=jax.random.key(0), defense=defense, report=lambda epoch, m: log.append(m),
    )  # fmt: skip
    assert "count" not in log[0]
    assert [m["count"] for m in log[1:]] == [1.0, 2.0]
    assert [int(m["chosen"].sum()) for m in log[1:]] == [1, 2]
    assert log[2]["chosen"].shape == (27,)


def test_the_same_key_gives_the_same_weights_and_another_key_others():
    def train(seed):
        return training.fit(
            linear_model(), QUICK, random_set(27, 4), key=jax.random.key(seed),
            defense=Defense(),
        ).params  # fmt: skip

    first = train(0)
    jax.tree.map(np.testing.assert_array_equal, train(0), first)
    assert np.any(train(1)["head"]["kernel"] != first["head"]["kernel"])


def test_the_host_drives_steps_on_cpu_only(monkeypatch):
    for backend, want in [("cpu", True), ("gpu", False), ("tpu", False)]:
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert loops.steps_from_host() == want


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"epochs": 0}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"batch_size": 20.0}, TypeError),
        ({"learning_rate": -0.1}, ValueError),
        ({"learning_rate": float("nan")}, ValueError),
        ({"momentum": 1.5}, ValueError),
        ({"weight_decay": -1.0}, ValueError),
        ({"max_shift": -2.0}, ValueError),
        ({"max_shift": float("inf")}, ValueError),
        ({"milestones": (-1,)}, ValueError),
        ({"milestones": (1.5,)}, ValueError),
        ({"label_smoothing": 1.5}, ValueError),
        ({"schedule": "cosine"}, ValueError),
        ({"optimizer": "adam"}, ValueError),
    ],
)
def test_recipes_that_are_none(change, error):
    (name,) = change
    with pytest.raises(error, match=name):
        dataclasses.replace(QUICK, **change)


def test_one_cycle_has_no_milestones():
    with pytest.raises(ValueError, match="no milestones"):
        training.Recipe(schedule="one_cycle", milestones=(3,))


def test_recipes_take_lists_and_scalars_of_numpy_and_jax():
    plain = training.Recipe(epochs=3, learning_rate=0.5, milestones=(1, 2))
    given = training.Recipe(
        epochs=np.int64(3), learning_rate=jnp.float32(0.5), milestones=[1, np.int32(2)]
    )
    assert given == plain and hash(given) == hash(plain)
    assert json.dumps(dataclasses.asdict(given)) == json.dumps(dataclasses.asdict(plain))


def test_what_a_hook_keeps_of_the_training_state_survives():
    kept = []

    def on_epoch(state, epoch, train_state, dataset):
        kept.append((train_state, jax.tree.map(np.asarray, train_state)))
        return train_state.params, dataset, Info()

    init = training.init_state(
        linear_model(), optimizer(QUICK), jax.random.key(1), (4, 4, 3)
    ).params
    defense = Defense(lambda key, dataset, num_epochs: init, on_epoch)
    training.fit(linear_model(), QUICK, random_set(27, 4), key=jax.random.key(0), defense=defense)
    for now, then in kept:
        jax.tree.map(np.testing.assert_array_equal, now, then)


@pytest.mark.parametrize("kind", ["pair", "list", "jax", "floats"])
def test_fit_takes_what_can_only_mean_one_thing(kind):
    train = random_set(27, 4)
    given = {
        "pair": tuple(train[:2]),
        "list": train._replace(labels=train.labels.tolist()),
        "jax": train._replace(images=jnp.asarray(train.images)),
        "floats": train._replace(labels=train.labels.astype(np.float64)),
    }[kind]
    fit = functools.partial(training.fit, linear_model(), QUICK, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, fit(given), fit(train))


def test_what_is_no_network_or_no_data_set():
    train = random_set(27, 4)
    with pytest.raises(TypeError, match="is a class: pass an instance"):
        training.fit(SeeingBody, QUICK, train, key=jax.random.key(0))
    with pytest.raises(TypeError, match="training set"):
        training.fit(linear_model(), QUICK, train.images, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"N, C, H, W"):
        moved = train._replace(images=np.moveaxis(random_set(27, 8).images, -1, 1))
        training.fit(linear_model(), QUICK, moved, key=jax.random.key(0))


def test_hooks_of_another_form_are_errors_before_training():
    fit = functools.partial(
        training.fit, linear_model(), QUICK, random_set(27, 4), key=jax.random.key(0)
    )
    with pytest.raises(TypeError, match=r"defense is none; expected a training\.hooks\.Defense"):
        fit(defense=none)
    with pytest.raises(TypeError, match=r"expected init\(key, dataset, num_epochs\)"):
        fit(defense=Defense(lambda key, dataset: ()))
    with pytest.raises(TypeError, match=r"on_epoch returned a dict as info; expected .*Info"):
        fit(defense=Defense(on_epoch=lambda state, epoch, train_state, dataset: ((), dataset, {})))


@pytest.mark.parametrize("hook", ["on_batch", "finish"])
def test_a_hook_that_a_loop_cannot_honor_is_an_error(hook):
    model, train = linear_model(), random_set(27, 4)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    defense = Defense(**{hook: lambda *arguments: arguments[-1]})
    for given in (defense, chain(none(), defense)):
        with pytest.raises(ValueError, match=f"has a hook {hook}.*training.fit"):
            training.fit_defended_head(jax.random.key(0), model, variables, train, given)
