"""The second witness: what it keeps is what the network says, and a killed training goes on."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxpoison import data, models, network
from jaxpoison.audit import trained
from jaxpoison.filters.extraction import extract_charvec


@pytest.fixture(scope="module")
def images():
    return data.load_embedded("cifar10").train.take(slice(96))


@pytest.fixture(autouse=True, scope="module")
def narrow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "WIDTHS", (4, 6, 8))
        yield


@pytest.fixture(scope="module")
def training(images):
    return trained.train(images.images, images.labels, 10, seed=3, epochs=3).training


def test_shapes_and_types(training):
    assert [array.shape for array in training] == [
        *((3, 96), (3, 96), (96, 10), (96, 8)),
        *((96, 2 * 2 * (4 + 6 + 8)), (2 * 2 * (4 + 6 + 8),)),
    ]
    assert {array.dtype for array in training[:-1]} == {np.dtype(np.float32)}
    assert training.layers.dtype == np.int32
    layers, counts = np.unique(training.layers, return_counts=True)
    assert layers.tolist() == list(range(6))
    assert counts.tolist() == [8, 8, 12, 12, 16, 16]
    np.testing.assert_allclose(training.probabilities.sum(axis=1), 1, rtol=1e-5)


def test_margins_and_losses_are_those_of_the_logits(images, training, monkeypatch):
    """The last epoch's, against a pass of its own; and the mean of the probabilities."""
    kept = []
    original = trained._training
    monkeypatch.setattr(
        trained, "_training", lambda net, *rest: kept.append((net, rest[0])) or original(net, *rest)
    )
    again = trained.train(images.images, images.labels, 10, seed=3, epochs=1).training
    (net, variables), rows = kept[0], np.arange(96)
    logits = np.asarray(net.logits(variables, images.images / np.float32(255)), np.float64)
    own = logits[rows, images.labels]
    others = logits.copy()
    others[rows, images.labels] = -np.inf
    np.testing.assert_allclose(again.margins[0], own - others.max(axis=1), atol=1e-4)
    log_total = np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(again.losses[0], log_total - own, atol=1e-4)
    np.testing.assert_allclose(again.probabilities, np.exp(logits - log_total[:, None]), atol=1e-4)
    head = net.head(variables)
    np.testing.assert_allclose(
        again.features @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), logits, atol=1e-4
    )
    vectors = extract_charvec(net, variables, images.images / np.float32(255)).ravel()
    np.testing.assert_allclose(again.vectors, vectors, atol=1e-4)
    # An epoch of training lowers the loss below that of a network that knows nothing.
    assert training.losses[-1].mean() < np.log(10)


def test_a_killed_training_goes_on(images, training, tmp_path):
    class Killed(Exception):
        pass

    seen = []

    def kill(finished, epochs):
        seen.append((finished, epochs))
        if finished == 2:
            raise Killed

    def train(progress):
        return trained.train(
            images.images, images.labels, 10, seed=3, epochs=3, folder=tmp_path, progress=progress
        ).training

    with pytest.raises(Killed):
        train(kill)
    resumed = train(lambda finished, epochs: seen.append((finished, epochs)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for name, whole, part in zip(training._fields, training, resumed, strict=True):
        np.testing.assert_array_equal(whole, part, err_msg=name)
    # Another set in the same folder is an error.
    with pytest.raises(ValueError, match="another run"):
        trained.train(images.images, images.labels[::-1], 10, seed=3, epochs=3, folder=tmp_path)


def test_small_sets_take_more_steps():
    for size in (1, 20, 200, 2_500, 10_000, 50_000):
        recipe = trained.recipe_for(size)
        steps = recipe.epochs * (size // recipe.batch_size)
        assert steps >= trained.FEWEST_STEPS or recipe.epochs == trained.MOST_EPOCHS
        assert recipe.epochs >= trained.RECIPE.epochs
    assert trained.recipe_for(50_000) == trained.RECIPE
    assert trained.recipe_for(50_000, epochs=2).epochs == 2


def test_the_users_own_network():
    net = network.as_network(models.mnist_cnn(), image_shape=(28, 28, 1))
    gray = data.load_embedded("mnist").train.take(slice(20))
    variables = net.init(jax.random.key(0), (28, 28, 1))
    found = trained.of_network(net, variables, gray.images, gray.labels)
    logits = np.asarray(net.logits(variables, gray.images / np.float32(255)))
    others = np.where(np.arange(10) == gray.labels[:, None], -np.inf, logits).max(axis=1)
    assert found.margins.shape == found.losses.shape == (1, 20)
    own = logits[np.arange(20), gray.labels]
    np.testing.assert_allclose(found.margins[0], own - others, atol=1e-5)
    np.testing.assert_allclose(found.probabilities, jax.nn.softmax(logits), atol=1e-5)
    assert found.vectors.shape == (20, 280) and set(found.layers) == {0, 1}


def test_a_network_of_a_plain_function(images):
    params = np.asarray(jax.random.normal(jax.random.key(0), (3072, 10))) / 50
    net = network.from_functions(_linear, params)
    found = trained.of_network(net, net.variables, images.images, images.labels)
    assert found.features.shape == (96, 10) and found.vectors.shape == (96, 0)


def _linear(params, images):
    return images.reshape(len(images), -1) @ params


def test_bad_input(images):
    with pytest.raises(ValueError, match="at least 2 classes"):
        trained.train(images.images, np.zeros(96, np.int32), 1)
    with pytest.raises(ValueError, match="labels"):
        trained.train(images.images, images.labels, 5)
    with pytest.raises(ValueError, match="96 images but 95 labels"):
        trained.train(images.images, images.labels[1:], 10)
    with pytest.raises(ValueError, match="epochs"):
        trained.train(images.images, images.labels, 10, epochs=0)


def test_layers_are_counted_where_a_network_has_no_batch_norm():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(x.reshape(len(x), -1))

    net = network.as_network(Plain(), image_shape=(4, 4, 3))
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    found = trained.of_network(
        net, net.init(jax.random.key(0), (4, 4, 3)), x, np.zeros(5, np.int32)
    )
    assert found.features.shape == (5, 48) and found.vectors.shape == (5, 0)
