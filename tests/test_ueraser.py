"""UEraser: what its augmentation does to images, and that it trains on the hardest view."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import Tanh, classifier
from scipy import ndimage

from jaxpoison import data, defenses
from jaxpoison.data import Dataset
from jaxpoison.defenses import _ueraser
from jaxpoison.training.state import TrainState

MODEL = classifier(Tanh(8), 10)
KEY = jax.random.key(0)


@functools.cache
def images():
    return data.to_float(jnp.asarray(data.load_embedded("cifar10").train.images[:64]))


def test_a_plasma_is_smooth_and_spans_its_range():
    plasmas = np.stack([_ueraser.plasma(jax.random.key(seed), 32, 24) for seed in range(40)])
    assert plasmas.shape == (40, 32, 24)
    np.testing.assert_allclose(plasmas.min(axis=(1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(plasmas.max(axis=(1, 2)), 1, atol=1e-6)
    steps = np.abs(np.diff(plasmas, axis=1)).mean()
    assert 3 * steps < np.abs(plasmas[:, 16:] - plasmas[:, :16]).mean()
    assert plasmas.std(axis=0).min() > 0.1  # another one each time, everywhere


@pytest.mark.parametrize(
    ("matrix", "shift"),
    [
        (np.eye(2), (0, 0)),
        (np.eye(2), (-3.5, 2)),
        ([[1, 0.3], [0, 1]], (0, 0)),
        ([[0, -1], [1, 0]], (0, 0)),
    ],
)
def test_warp_is_scipy_s_affine_transform(matrix, shift):
    image = np.asarray(images()[0, :, :20])
    got = _ueraser.warp(jnp.asarray(image), jnp.asarray(matrix), jnp.asarray(shift, float))
    center = (np.array(image.shape[:2]) - 1) / 2
    offset = center - np.asarray(matrix) @ center + shift
    want = np.stack(
        [
            ndimage.affine_transform(channel, matrix, offset, order=1, cval=0)
            for channel in np.moveaxis(image, -1, 0)
        ],
        axis=-1,
    )
    # Beyond the outermost centers SciPy fills at once, JAX over one pixel.
    inside = ndimage.affine_transform(np.ones(image.shape[:2]), matrix, offset, order=1) == 1
    np.testing.assert_allclose(np.asarray(got)[inside], want[inside], atol=1e-5)
    assert inside.mean() > 0.5


def test_each_image_is_augmented_in_its_own_way_and_stays_in_range():
    same = jnp.tile(images()[:1], (256, 1, 1, 1))
    after = np.asarray(jax.jit(_ueraser.augment)(KEY, same))
    assert after.min() >= 0 and after.max() <= 1 and np.isfinite(after).all()
    flat = after.reshape(256, -1)
    assert len(np.unique(flat, axis=0)) == 256
    # Channels change places in five of six orders of half of the images.
    gray = jnp.tile(images()[:1, ..., :1], (256, 1, 1, 3))
    assert np.ptp(np.asarray(_ueraser.augment(KEY, gray)), axis=-1).max() < 1e-5


def test_every_operation_changes_an_image_and_none_at_strength_zero():
    image = images()[3]
    for number, color in enumerate(_ueraser.COLORS):
        assert np.abs(color(image, 0.8, -0.8) - image).max() > 0.02
        if number < 4:
            np.testing.assert_allclose(color(image, 0.0, 0.0), image, atol=1e-6)
    gray = np.asarray(image).mean(-1, keepdims=True)
    np.testing.assert_allclose(
        _ueraser.COLORS[2](image, 1.0, -1.0), gray + 0.1 * (np.asarray(image) - gray), atol=1e-6
    )


def test_the_view_of_the_largest_loss_is_taken():
    variables = MODEL.init(jax.random.key(1), images()[:1])
    state = TrainState(jnp.int32(0), variables["params"], variables.get("batch_stats", {}), ())
    batch = Dataset(images(), jnp.arange(64) % 10)
    got = defenses.ueraser(MODEL, 4).on_batch((), KEY, state, batch)
    np.testing.assert_array_equal(got.labels, batch.labels)
    views = [_ueraser.augment(key, batch.images) for key in jax.random.split(KEY, 4)]
    losses = np.stack(
        [
            optax.softmax_cross_entropy_with_integer_labels(
                MODEL.apply(variables, view), batch.labels
            )
            for view in views
        ]
    )
    want = np.stack(views)[losses.argmax(0), np.arange(64)]
    np.testing.assert_allclose(got.images, want, atol=1e-6)
    assert len(set(losses.argmax(0).tolist())) == 4
    single = defenses.ueraser(MODEL, 1).on_batch((), KEY, state, batch)
    np.testing.assert_allclose(single.images, _ueraser.augment(KEY, batch.images), atol=1e-6)
