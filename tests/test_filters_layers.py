"""Clusters over all layers and trusted attribution, against NumPy, scikit-learn and retraining."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpoison import filters
from jaxpoison.filters.attribution import attributions
from jaxpoison.filters.extraction import Block
from jaxpoison.filters.layers import abnormality


def vectors(num_poisons=12, count=200, seed=0):
    """Three layers; poisons are abnormal in the first two, and the last one is noise of classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, count)
    is_poison = np.arange(count) < num_poisons
    blocks = []
    for layer, width in enumerate((5, 7, 6)):
        mean, var = rng.normal(size=(count, width)), rng.normal(size=(count, width)) ** 2
        if layer < 2:
            mean[is_poison, layer] += 60
        else:
            mean += np.where(rng.random((count, 1)) < 0.5, 500, 0)
        blocks.append(Block(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32)))
    return filters.CharVec(tuple(blocks), ("a", "b", "c"), (4, 4, 4)), y, is_poison


def test_abnormality_is_the_furthest_channel_in_robust_deviations():
    found, _, _ = vectors(count=21)
    want = np.zeros((21, 3))
    for layer, block in enumerate(found.blocks):
        for column in np.concatenate(block, axis=1).T.astype(np.float64):
            away = np.abs(column - np.median(column))
            want[:, layer] = np.maximum(want[:, layer], away / (1.4826 * np.median(away)))
    np.testing.assert_allclose(abnormality(found), np.log1p(want), rtol=1e-4)


def test_clusters_are_two_means_in_the_layers_that_split_most_clearly():
    cluster = pytest.importorskip("sklearn.cluster")
    found, y, is_poison = vectors()
    result = filters.layer_clustering(found, y)
    np.testing.assert_array_equal(result.is_poison, is_poison)
    assert (result.config["layers"], result.config["of"]) == (2, 3)
    values = abnormality(found)[:, :2].astype(np.float64)
    means = cluster.KMeans(2, n_init=10, random_state=0).fit(values)
    smaller = means.labels_ == np.bincount(means.labels_).argmin()
    np.testing.assert_array_equal(result.is_poison, smaller)
    gap = [np.square(values - center).sum(1) for center in means.cluster_centers_]
    np.testing.assert_allclose(np.abs(result.score), np.abs(gap[0] - gap[1]), rtol=1e-3, atol=1e-4)


def test_order_labels_and_scales_of_channels_do_not_matter():
    found, y, is_poison = vectors()
    order = np.random.default_rng(1).permutation(len(y))
    blocks = tuple(Block(3 * block.mean[order] - 5, 9 * block.var[order]) for block in found.blocks)
    moved = filters.CharVec(blocks, found.paths, found.sizes)
    names = np.array(["a", "b", "c", "d"])[y][order]
    again = filters.layer_clustering(moved, names)
    np.testing.assert_array_equal(again.is_poison, is_poison[order])
    assert again.config["filter"] == "layer_clustering" and again.labels.tolist() == names.tolist()


def test_a_set_without_spread_has_no_clusters():
    same = filters.CharVec((Block(jnp.ones((20, 3)), jnp.ones((20, 3))),), ("a",), (4,))
    result = filters.layer_clustering(same, np.arange(20) % 2)
    assert not result.is_poison.any() and not result.score.any()
    with pytest.raises(TypeError, match="expected a CharVec"):
        filters.layer_clustering(np.ones((20, 3)), np.arange(20) % 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected \[N, d\] for 10 labels"):
        filters.layer_clustering(same, np.arange(10) % 2)


def features(count, seed, num_poisons=0):
    """Three classes along axes; poisons of label 0 look like class 1 and share another axis."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = 3 * np.eye(6)[y] + 0.5 * rng.normal(size=(count, 6))
    x[:num_poisons] = [0, 1.5, 0, 0, 6, 0] + 0.5 * rng.normal(size=(num_poisons, 6))
    y[:num_poisons] = 0
    return x.astype(np.float32), y


def test_attributions_are_the_predictions_of_ridge_regression():
    x, t = (
        np.random.default_rng(0).normal(size=(7, 4)),
        np.random.default_rng(1).normal(size=(9, 4)),
    )
    targets = np.eye(3)[np.arange(9) % 3]
    penalty = 0.1 * np.mean(np.sum(t**2, axis=1) + 1)

    def fit(rows):
        inputs = np.concatenate([t[rows], np.ones((len(rows), 1))], axis=1)
        gram = inputs.T @ inputs + penalty * np.eye(5)
        return np.linalg.solve(gram, inputs.T @ targets[rows])

    explained, left_out = attributions(x, t, targets, 0.1)
    everything = fit(np.arange(9))
    np.testing.assert_allclose(explained, np.c_[x, np.ones(7)] @ everything, rtol=1e-9)
    for row in range(9):  # retraining without the row
        without = fit(np.delete(np.arange(9), row))
        np.testing.assert_allclose(left_out[row], np.r_[t[row], 1] @ without, rtol=1e-8)


def test_poisons_are_what_trusted_examples_do_not_explain():
    x, y = features(300, 0, num_poisons=20)
    result = filters.trusted_attribution(x, y, trusted=features(60, 1))
    assert result.is_poison[:20].all() and result.is_poison[20:].mean() < 0.15
    assert (result.real_label[:20] != 0).mean() > 0.9
    threshold = result.config["threshold"]
    np.testing.assert_array_equal(result.is_poison, result.score > np.float32(threshold))
    own = np.take_along_axis(np.asarray(result.distances), y[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(result.score, own)


def test_the_threshold_keeps_the_promised_share_of_honest_examples():
    x, y = features(2_000, 2)
    shares = [
        filters.trusted_attribution(x, y, trusted=features(300, 3), false_alarms=aim)
        .is_poison.mean()
        for aim in (0.2, 0.05)
    ]  # fmt: skip
    assert abs(shares[0] - 0.2) < 0.06 and abs(shares[1] - 0.05) < 0.03
    nobody = filters.trusted_attribution(x, y, trusted=features(300, 3), false_alarms=0.0)
    assert nobody.is_poison.mean() < 0.02


def test_bad_trusted_features():
    x, y = features(30, 0)
    known, labels = features(30, 1)
    for trusted, message in (
        ((known[:, :5], labels), "have 5 columns, the others 6"),
        ((known[labels < 2], labels[labels < 2]), r"no trusted features of the labels \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            filters.trusted_attribution(x, y, trusted=trusted)
    with pytest.raises(TypeError, match="without labels"):
        filters.trusted_attribution(x, y, trusted=known)
    for settings, message in (
        ({"false_alarms": 2}, "false_alarms must be in"),
        ({"damping": 0}, "damping must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            filters.trusted_attribution(x, y, trusted=(known, labels), **settings)
