"""The foreign embedding of the audit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpoison import models, network
from jaxpoison.audit import witness


def images_of(count, side=24):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def embedded():
    return witness.embed(images_of(5))


def test_rows_are_of_unit_length(embedded):
    assert embedded.dtype == np.float32 and len(embedded) == 5
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)


def test_an_image_has_one_embedding_whatever_its_batch(embedded):
    images = images_of(5)
    np.testing.assert_allclose(witness.embed(images[3:4]), embedded[3:4], atol=1e-5)
    # More than a batch, and a last one that is not full.
    many = np.concatenate([images[::-1], np.repeat(images[:1], 16 * jax.device_count(), axis=0)])
    found = witness.embed(many)
    assert len(found) == len(many)
    np.testing.assert_allclose(found[:5], embedded[::-1], atol=1e-5)
    assert witness.embed(images[:0]).shape == (0, embedded.shape[1])


def test_the_traceable_form_is_the_same_and_leads_to_a_collision(embedded):
    variables = witness.lite0_variables()

    @jax.jit  # once: it is compiled for half a minute
    @functools.partial(jax.value_and_grad, has_aux=True)
    def near(images):
        features = witness.lite0_features(variables, images)
        return jnp.sum(features[0] * embedded[0]), features

    other = jnp.asarray(images_of(2)[1:], jnp.float32) / 255
    (value, features), gradient = near(other)
    np.testing.assert_allclose(features, embedded[1:2], atol=1e-5)
    assert gradient.shape == other.shape and np.isfinite(gradient).all()
    step = 0.02 * gradient / jnp.linalg.norm(gradient)
    assert near(other + step)[0][0] > value
    # At 0 a root has no slope, and a flat image has nothing but such roots.
    assert np.isfinite(near(jnp.full_like(other, 0.5))[1]).all()


def test_whitening_is_an_affine_map_to_unit_covariance():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(9000, 4)) @ rng.normal(size=(4, 4)) + 3).astype(np.float32)
    white = witness.whitening(rows, shrinkage=0)
    np.testing.assert_allclose(np.cov(((rows - white.mean) @ white.matrix).T), np.eye(4), atol=1e-3)
    found = white(rows[:5])
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    same = np.ones((7, 3), np.float32)  # a set without any variance
    assert np.isfinite(witness.whitening(same)(same)).all()
    with pytest.raises(ValueError, match="no rows"):
        witness.whitening(rows[:0])


def test_another_network_takes_its_place():
    model = models.mnist_cnn()
    images = images_of(3, 28)
    mnist = network.from_linen(model)
    variables = mnist.init(jax.random.key(0), (28, 28, 3))
    found = witness.of_network(mnist, variables)(images)
    features = np.asarray(network.features(mnist, variables, images))
    want = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(found, want, atol=1e-5)
    with pytest.raises(ValueError, match="has no variables"):
        witness.of_network(mnist)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((2, 8, 9, 3), np.uint8), r"shape \(2, 8, 9, 3\); expected \[B, S, S, 3\]"),
        (np.zeros((2, 8, 8), np.uint8), r"shape \(2, 8, 8\)"),
        (np.zeros((2, 8, 8, 3), np.float32), "type float32; expected uint8"),
    ],
)
def test_other_arrays_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        witness.embed(images)
