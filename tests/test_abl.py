"""Anti-backdoor learning: each of its parts by its definition, and a backdoor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import Normed, Tanh, classifier, one_device

from jaxpoison import attacks, defenses, evaluation, training
from jaxpoison.data import Dataset, load_embedded
from jaxpoison.network import as_network
from jaxpoison.training import _fit
from jaxpoison.training.hooks import with_ids

KEY = jax.random.key(0)
MODEL = classifier(Normed(4), 3)
CONFIG = defenses.AblConfig(turn=2, ratio=0.1, unlearning_epochs=3, unlearning_rate=0.01)
RECIPE = dataclasses.replace(
    training.MNIST_FAST, epochs=3, batch_size=10, max_shift=0.0, learning_rate=0.1
)


def random_set(num_examples=40):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_examples, 6, 6, 1), dtype=np.uint8)
    return with_ids(Dataset(images, rng.integers(0, 3, num_examples, dtype=np.int32)))


TRAIN = random_set()


def defense(model=MODEL, config=CONFIG):
    return defenses.anti_backdoor(model, config, mesh=one_device())


def state_and_defense():
    optimizer = optax.sgd(0.1)
    state = training.init_state(MODEL, optimizer, KEY, (6, 6, 1))
    ours = defense()
    return state, ours, ours.init(KEY, TRAIN, 3)


def losses(variables, images, labels, train=False):
    images = jnp.asarray(images, jnp.float32) / 255
    network = as_network(MODEL)
    said = (
        network.train_logits(variables, images)[0] if train else network.logits(variables, images)
    )
    return -np.asarray(jax.nn.log_softmax(said))[np.arange(len(labels)), labels]


def test_the_gradient_of_a_batch_is_that_of_signed_losses():
    state, ours, memory = state_and_defense()
    batch = TRAIN._replace(images=jnp.asarray(TRAIN.images, jnp.float32) / 255)
    own = losses(state.variables, TRAIN.images, TRAIN.labels, train=True)
    gamma = float(np.median(own))
    signed = dataclasses.replace(ours.on_batch, gamma=gamma)(memory, KEY, state, batch)
    network = as_network(MODEL)

    def by_labels(params):
        said, _ = network.train_logits(state.variables | {"params": params}, batch.images)
        return jnp.mean(_fit.losses_and_hits(said, signed.labels)[0])

    def by_definition(params):
        said, _ = network.train_logits(state.variables | {"params": params}, batch.images)
        each = optax.softmax_cross_entropy_with_integer_labels(said, TRAIN.labels)
        return jnp.mean(jnp.sign(own - gamma) * each)

    assert 10 < (own < gamma).sum() < 30
    for got, want in zip(
        jax.tree.leaves(jax.grad(by_labels)(state.params)),
        jax.tree.leaves(jax.grad(by_definition)(state.params)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    off = memory._replace(is_local=jnp.array(False))
    plain = ours.on_batch(off, KEY, state, batch)
    np.testing.assert_array_equal(plain.labels, np.eye(3)[TRAIN.labels])
    said = network.logits(state.variables, batch.images)
    hits = _fit.losses_and_hits(said, signed.labels)[1]
    np.testing.assert_array_equal(hits, np.argmax(said, axis=1) == TRAIN.labels)


def test_the_lowest_losses_are_isolated_and_left_out():
    state, ours, memory = state_and_defense()
    same, dataset, _ = ours.on_epoch(memory, 1, state, TRAIN)
    assert same is memory and dataset is TRAIN
    order = np.random.default_rng(1).permutation(40)
    memory, dataset, info = ours.on_epoch(memory, 2, state, TRAIN.take(order))
    easiest = np.argsort(losses(state.variables, TRAIN.images, TRAIN.labels))[:4]
    assert set(info.chosen) == set(easiest) and info.changed
    assert not memory.is_local
    np.testing.assert_array_equal(memory.examples.images, TRAIN.images[info.chosen])
    np.testing.assert_array_equal(memory.examples.labels, TRAIN.labels[info.chosen])
    assert set(dataset.ids) == set(range(40)) - set(easiest)
    _, later, info = ours.on_epoch(memory, 3, state, TRAIN)
    assert set(later.ids) == set(dataset.ids) and not info.changed


def test_unlearning_is_ascent_with_momentum():
    state, ours, memory = state_and_defense()
    memory, _, _ = ours.on_epoch(memory, 2, state, TRAIN)
    images = jnp.asarray(memory.examples.images, jnp.float32) / 255
    params, stats, velocity = state.params, state.batch_stats, None
    network = as_network(MODEL)
    for _ in range(3):  # four examples are one batch

        def loss(params, stats=stats):
            said, updates = network.train_logits({"params": params, "batch_stats": stats}, images)
            own = optax.softmax_cross_entropy_with_integer_labels(said, memory.examples.labels)
            return jnp.mean(own), updates["batch_stats"]

        gradient, stats = jax.grad(loss, has_aux=True)(params)
        if velocity is None:
            velocity = gradient
        else:
            velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        params = jax.tree.map(lambda p, v: p + 0.01 * v, params, velocity)
    after = ours.finish(memory, state)
    for got, want in zip(
        jax.tree.leaves(after.variables),
        jax.tree.leaves({"params": params, "batch_stats": stats}),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    none = defense(config=dataclasses.replace(CONFIG, unlearning_epochs=0))
    assert none.finish(memory, state) is state


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"acts before epoch 2 .* a run of 2 epochs never"):
        defense().init(KEY, TRAIN, 2)
    with pytest.raises(TypeError, match="expected a AblConfig"):
        defense(config=0.01)
    for wrong in ({"turn": 0}, {"ratio": 0.0}, {"gamma": -1.0}, {"unlearning_rate": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            defenses.AblConfig(**wrong)


def test_a_backdoor_is_isolated():
    """Isolation finds poisons; five steps of ascent do not close this small network's backdoor."""
    mnist = load_embedded("mnist")
    model = classifier(Tanh(32), 10, mean=(0.1307,), std=(0.3081,))
    recipe = dataclasses.replace(RECIPE, epochs=6, batch_size=128, learning_rate=0.05)
    poisoned = attacks.implant(KEY, mnist.train, 0.05, attacks.badnets(), target_class=0)
    ours = defense(model, defenses.AblConfig(turn=2))
    chosen = []

    def on_epoch(*args):
        out = ours.on_epoch(*args)
        if out[2].chosen is not None:
            chosen.append(out[2].chosen)
        return out

    watched = ours._replace(on_epoch=on_epoch)
    state = training.fit(
        model, recipe, poisoned.dataset, key=KEY, defense=watched, mesh=one_device()
    )
    outcome = evaluation.backdoor_outcome(
        model, state.variables, mnist.test, poisoned.trigger, mesh=one_device()
    )
    assert len(chosen[0]) == 50
    assert poisoned.is_poisoned[chosen[0]].mean() > 0.4  # of all examples, 0.05 are
    assert outcome.accuracy > 0.88
