"""Centroids and distances against float64 NumPy, SciPy and scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from jaxpoison import filters

WIDTHS, SIZES = (4, 6, 3), (16, 9, 1)  # channels and positions of three layers
K = 3


def vectors(n=40, seed=0, spread=1.0):
    """Returns (CharVec, labels) of classes that overlap; the last layer has no variance."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % K).astype(np.int32)
    blocks = []
    for width, size in zip(WIDTHS, SIZES, strict=True):
        center = np.random.default_rng(width).standard_normal((K, width))
        mean = center[labels] + spread * rng.standard_normal((n, width))
        var = (1 + center[labels] ** 2) * rng.chisquare(8, (n, width)) / 8
        var = np.zeros_like(var) if size == 1 else var
        blocks.append(filters.Block(*(jnp.asarray(a, jnp.float32) for a in (mean, var))))
    paths = tuple(f"layer{i}" for i in range(len(WIDTHS)))
    return filters.CharVec(tuple(blocks), paths, SIZES), jnp.asarray(labels)


def rows(charvec, chosen):
    return jax.tree.map(lambda a: a[chosen], charvec)


def numpy_blocks(charvec):
    """Returns [(mean, var), ...] in float64."""
    return [tuple(np.asarray(a, np.float64) for a in block) for block in charvec.blocks]


def numpy_centroids(charvec, labels, variance="pooled", weights=None):
    """Returns [(m, V), ...] by eq. 4, one class at a time."""
    labels = np.asarray(labels)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    out = []
    for mean, var in numpy_blocks(charvec):
        m, v = np.zeros((K, mean.shape[1])), np.zeros((K, mean.shape[1]))
        for k in range(K):
            w = weights[labels == k]
            m[k] = np.average(mean[labels == k], axis=0, weights=w)
            v[k] = np.average(var[labels == k], axis=0, weights=w)
            if variance == "pooled":
                v[k] += np.average((mean[labels == k] - m[k]) ** 2, axis=0, weights=w)
        out.append((m, v))
    return out


@functools.cache
def compiled(fn, **static):
    return jax.jit(functools.partial(fn, **static))


def fit(charvec, labels, weights=None, num_classes=K, **static):
    fn = compiled(filters.fit_centroids, num_classes=num_classes, **static)
    return fn(charvec, jnp.asarray(labels), weights=weights)


def distances_to(charvec, centroids, left_out=None, **static):
    fn = compiled(filters.centroid_distances, **static)
    return fn(charvec, centroids, left_out=left_out)


def assert_blocks_close(got, want, rtol=1e-5):
    for mine, theirs in zip(got, want, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("variance", ["pooled", "mean"])
def test_means_are_those_of_equation_4(variance):
    charvec, labels = vectors()
    got = fit(charvec, labels, variance=variance)
    assert_blocks_close(got.blocks, numpy_centroids(charvec, labels, variance))
    np.testing.assert_array_equal(got.count, np.bincount(labels))


def test_a_pooled_variance_is_that_of_the_class_as_one_batch():
    rng = np.random.default_rng(0)
    activations = rng.standard_normal((12, 16, 4)) + rng.standard_normal((12, 1, 4))
    block = filters.Block(*(jnp.float32(f(activations, axis=1)) for f in (np.mean, np.var)))
    charvec = filters.CharVec((block,), ("layer",), (16,))
    got = fit(charvec, jnp.zeros(12, int), num_classes=1)
    np.testing.assert_allclose(got.blocks[0].var[0], activations.var((0, 1)), rtol=1e-5)


def test_weights_leave_examples_out():
    charvec, labels = vectors()
    weights = np.random.default_rng(1).uniform(0, 1, 40) * (np.arange(40) % 4 > 0)
    got = fit(charvec, labels, weights=jnp.float32(weights))
    assert_blocks_close(got.blocks, numpy_centroids(charvec, labels, weights=weights))
    present = weights > 0
    for estimator in ("median", "trimmed", "geometric_median"):
        got = fit(charvec, labels, weights=jnp.asarray(present), estimator=estimator)
        want = fit(rows(charvec, present), labels[present], estimator=estimator)
        assert_blocks_close(got.blocks, want.blocks)


def test_parts_add_up_to_the_whole():
    charvec, labels = vectors()
    want = fit(charvec, labels)
    parts = [slice(0, 7), slice(7, 8), slice(8, 40)]
    got = functools.reduce(
        lambda a, b: a + b, [fit(rows(charvec, part), labels[part]) for part in parts]
    )
    assert_blocks_close(got.blocks, want.blocks, rtol=1e-6)
    assert_blocks_close(got.spread, want.spread, rtol=1e-6)
    np.testing.assert_array_equal(got.count, want.count)


def test_large_offsets_do_not_drown_the_spread():
    charvec, labels = vectors(spread=0.05)
    charvec = jax.tree.map(lambda a: a + 20, charvec)
    halves = [fit(rows(charvec, part), labels[part]) for part in (slice(0, 20), slice(20, 40))]
    got = halves[0] + halves[1]
    want = numpy_centroids(charvec, labels)
    spread = [v - numpy_centroids(charvec, labels, "mean")[i][1] for i, (_, v) in enumerate(want)]
    for mine, theirs in zip(got.spread, spread, strict=True):
        np.testing.assert_allclose(mine.mean, theirs, rtol=1e-4)


def test_robust_estimators():
    charvec, labels = vectors()
    mean, var = numpy_blocks(charvec)[0]
    centroids = {
        name: fit(charvec, labels, estimator=name)
        for name in ("median", "trimmed", "geometric_median")
    }
    for k in range(K):
        mine = np.asarray(labels) == k
        want = {
            "median": (np.median(mean[mine], 0), np.median(var[mine], 0)),
            "trimmed": tuple(scipy.stats.trim_mean(a[mine], 0.25) for a in (mean, var)),
        }
        for name, (m, v) in want.items():
            sd = (
                scipy.stats.median_abs_deviation(mean[mine], center=lambda *_, m=m, **__: m)
                * 1.4826
            )
            np.testing.assert_allclose(centroids[name].blocks[0].mean[k], m, rtol=1e-5)
            np.testing.assert_allclose(centroids[name].blocks[0].var[k], v + sd**2, rtol=1e-4)
        for array, got in ((mean, "mean"), (var, "var")):
            best = scipy.optimize.minimize(
                lambda c, a=array[mine]: np.linalg.norm(a - c, axis=1).sum(),
                array[mine].mean(0),
                tol=1e-10,
            )
            center = centroids["geometric_median"].center[0]
            np.testing.assert_allclose(getattr(center, got)[k], best.x, rtol=1e-3, atol=1e-3)


def test_robust_estimators_stand_a_minority_of_outliers():
    charvec, labels = vectors()
    clean = fit(charvec, labels)
    hit = np.flatnonzero(np.asarray(labels) == 0)[:3]
    spoiled = jax.tree.map(lambda a: a.at[hit].add(1e3), charvec)
    for estimator, bound in (
        ("mean", None),
        ("median", 2),
        ("trimmed", 2),
        ("geometric_median", 2),
    ):
        moved = fit(spoiled, labels, estimator=estimator)
        distance = np.abs(moved.center[0].mean[0] - clean.center[0].mean[0]).max()
        assert distance > 100 if bound is None else distance < bound


def test_an_example_is_left_out_of_its_centroid_exactly():
    charvec, labels = vectors(20)
    for variance in ("pooled", "mean"):
        centroids = fit(charvec, labels, variance=variance)
        got = jax.jit(lambda c, v, y: c.without(v, y).blocks)(centroids, charvec, labels)
        for n in range(20):
            others = np.arange(20) != n
            want = numpy_centroids(rows(charvec, others), labels[others], variance)
            own = [(m[labels[n]], v[labels[n]]) for m, v in want]
            assert_blocks_close([(m[n], v[n]) for m, v in got], own, rtol=1e-5)


def test_leaving_out_the_only_example_leaves_an_infinite_distance():
    charvec, labels = vectors(7)
    labels = jnp.where(jnp.arange(7) == 2, K, labels)
    centroids = fit(charvec, labels, num_classes=K + 1)
    distances = distances_to(charvec, centroids, left_out=labels)
    assert np.isinf(distances[2, K])
    assert np.isfinite(np.delete(np.asarray(distances).ravel(), 2 * (K + 1) + K)).all()


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def numpy_distances(charvec, labels, metric, weights):
    """Returns [N, K] block by block; `weights` [(of mean, of var), ...] sum to 1."""
    centroids = numpy_centroids(charvec, labels)
    total = 0
    for block, (x_block, c_block) in enumerate(zip(numpy_blocks(charvec), centroids, strict=True)):
        for kind in range(2):
            if weights[block][kind] == 0:
                continue
            x, c = x_block[kind], c_block[kind]
            match metric:
                case "cosine":
                    d = 1 - unit(x) @ unit(c).T
                case "l2":
                    d = np.linalg.norm(x[:, None] - c, axis=-1) / np.sqrt(x.shape[1])
                case "z":
                    center = np.stack([x[labels == k].mean(0) for k in range(K)])
                    s = np.sqrt(((x - center[labels]) ** 2).mean(0))
                    d = (((x[:, None] - c) / s) ** 2).mean(-1)
            total = total + weights[block][kind] * d
    return total


@pytest.mark.parametrize("metric", ["cosine", "l2", "z"])
@pytest.mark.parametrize(("gamma", "beta"), [("uniform", 0.5), ("linear", 0.2), ((0, 2, 1), 0.7)])
def test_distances(metric, gamma, beta):
    charvec, labels = vectors()
    got = distances_to(charvec, fit(charvec, labels), metric=metric, gamma=gamma, beta=beta)
    raw = {"uniform": (1, 1, 1), "linear": (1, 2, 3)}.get(gamma, gamma)
    weights = np.array(
        [[g * beta, g * (1 - beta) * (size > 1)] for g, size in zip(raw, SIZES, strict=True)]
    )
    want = numpy_distances(charvec, np.asarray(labels), metric, weights / weights.sum())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert got.dtype == jnp.float32


def test_one_layer_alone_and_rescaled_layers():
    charvec, labels = vectors()
    layer = filters.CharVec(charvec.blocks[1:2], charvec.paths[1:2], charvec.sizes[1:2])
    scaled = filters.CharVec(
        (charvec.blocks[0], jax.tree.map(lambda a: 10 * a, charvec.blocks[1]), charvec.blocks[2]),
        charvec.paths,
        charvec.sizes,
    )
    for metric in ("cosine", "l2", "z", "maha"):

        @functools.partial(jax.jit, static_argnames=("metric", "gamma"))
        def verdict(charvec, metric=metric, gamma="uniform"):
            centroids = filters.fit_centroids(charvec, labels, K)
            if metric == "maha":
                metric = filters.fit_mahalanobis(charvec, labels, centroids, gamma=gamma)
            return filters.nearest_centroid_filter(
                charvec, labels, centroids, metric=metric, gamma=gamma
            )

        chosen, alone = verdict(charvec, gamma=(0, 1, 0)), verdict(layer)
        np.testing.assert_allclose(chosen.distances, alone.distances, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(chosen.is_poison, alone.is_poison)
    for metric in ("cosine", "z"):
        want = distances_to(charvec, fit(charvec, labels), metric=metric, beta=1)
        got = distances_to(scaled, fit(scaled, labels), metric=metric, beta=1)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    want = distances_to(charvec, fit(charvec, labels, variance="mean"))
    got = distances_to(scaled, fit(scaled, labels, variance="mean"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_layer_weights():
    np.testing.assert_allclose(filters.layer_weights("uniform", 4), [0.25] * 4)
    np.testing.assert_allclose(filters.layer_weights("linear", 4), [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(filters.layer_weights("last_2", 4), [0, 0, 0.5, 0.5])
    np.testing.assert_allclose(filters.layer_weights([1, 0, 3, 0], 4), [0.25, 0, 0.75, 0])
    known = jnp.array([1.0, 0, 3, 0])
    np.testing.assert_allclose(
        jax.jit(lambda: filters.layer_weights(known, 4))(), [0.25, 0, 0.75, 0]
    )
    for bad in ("last_5", "last_0", "first", "fisher"):
        with pytest.raises(ValueError, match='"last_1" to "last_4"'):
            filters.layer_weights(bad, 4)
    with pytest.raises(ValueError, match="one weight for each of 4 layers"):
        filters.layer_weights([1, 2], 4)
    for bad in ([0, 0, 0, 0], [1, -1, 1, 1]):
        with pytest.raises(ValueError, match="must not be negative"):
            filters.layer_weights(bad, 4)


def test_fisher_weights_are_ratios_of_mean_squares():
    charvec, labels = vectors(60)
    y = np.asarray(labels)
    want = []
    for (mean, var), size in zip(numpy_blocks(charvec), SIZES, strict=True):
        ratios = []
        for x in (mean, var)[: 1 + (size > 1)]:
            groups = [x[y == k] for k in range(K)]
            between = sum(len(g) * ((g.mean(0) - x.mean(0)) ** 2).sum() for g in groups) / (K - 1)
            within = sum(((g - g.mean(0)) ** 2).sum() for g in groups) / (len(x) - K)
            ratios.append(max(0, between / within - 1))
        want.append(np.mean(ratios))
    got = filters.fisher_weights(fit(charvec, labels))
    np.testing.assert_allclose(got, np.array(want) / np.sum(want), rtol=1e-4)


def test_mahalanobis_is_the_dense_inverse_with_scikit_learns_shrinkage():
    covariance = pytest.importorskip("sklearn.covariance")
    rng = np.random.default_rng(0)
    n, width = 30, 32
    labels = np.arange(n) % K
    shared = rng.standard_normal((width, 4)) @ rng.standard_normal((4, width)) / 2
    mean, var = (rng.standard_normal((n, width)) @ (np.eye(width) + shared) for _ in range(2))
    block = filters.Block(jnp.float32(mean + labels[:, None]), jnp.float32(var))
    charvec = filters.CharVec((block,), ("layer",), (4,))
    centroids = fit(charvec, labels, variance="mean")
    metric = compiled(filters.fit_mahalanobis)(charvec, labels, centroids)
    got = jax.jit(filters.centroid_distances)(charvec, centroids, metric=metric)

    x = np.concatenate([np.asarray(a, np.float64) for a in block], axis=1)  # D = 64
    center = np.stack([x[labels == k].mean(0) for k in range(K)])
    residuals = x - center[labels]
    s = np.sqrt((residuals**2).mean(0))
    shrunk, rho = covariance.ledoit_wolf(residuals / s, assume_centered=True)
    np.testing.assert_allclose(metric.shrinkage, rho, rtol=1e-4)
    u = (x[:, None] - center) / s
    want = np.einsum("nki,ij,nkj->nk", u, np.linalg.inv(shrunk), u)
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_an_empty_class_is_infinitely_far_and_never_nan():
    charvec, labels = vectors()
    without = jnp.where(labels == 1, 0, labels)
    for metric in ("cosine", "l2", "z"):
        distances = distances_to(charvec, fit(charvec, without), metric=metric)
        assert np.isinf(distances[:, 1]).all() and np.isfinite(distances[:, [0, 2]]).all()
    for estimator in ("median", "trimmed", "geometric_median"):
        centroids = fit(charvec, without, estimator=estimator)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(centroids))


def test_a_block_of_zeros_is_as_far_from_every_class():
    charvec, labels = vectors()
    dead = jax.tree.map(lambda a: a.at[3].set(0), charvec)
    centroids = fit(charvec, labels)
    distances = distances_to(dead, centroids)
    np.testing.assert_allclose(distances[3], np.ones(K), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda v: filters.centroid_distances(v, centroids).sum()))(dead)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))


def test_trusted_centroids_are_pulled_by_tau():
    charvec, labels = vectors()
    trusted, dataset = fit(rows(charvec, slice(0, 9)), labels[:9]), fit(charvec, labels)
    got = jax.jit(filters.shrink)(trusted, dataset, 5.0).blocks
    n = np.asarray(trusted.count)[:, None]
    want = [
        tuple((n * a + 5 * b) / (n + 5) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(
            numpy_centroids(rows(charvec, slice(0, 9)), labels[:9]),
            numpy_centroids(charvec, labels),
            strict=True,
        )
    ]
    assert_blocks_close(got, want)


def test_a_verdict_is_flagged_beyond_the_margin_and_ties_are_kept():
    block = filters.Block(jnp.array([[0.0], [1.0], [1.2], [2.0], [jnp.nan]]), jnp.zeros((5, 1)))
    charvec = filters.CharVec((block,), ("layer",), (1,))
    centers = filters.CharVec(
        (filters.Block(jnp.array([[0.0], [2.0]]), jnp.zeros((2, 1))),), ("layer",), (1,)
    )
    centroids = fit(centers, jnp.arange(2), num_classes=2)
    labels = jnp.zeros(5, int)

    @functools.partial(jax.jit, static_argnames="margin")
    def verdict(margin):
        return filters.nearest_centroid_filter(
            charvec, labels, centroids, metric="l2", margin=margin
        )

    result = verdict(margin=0.0)
    np.testing.assert_allclose(result.score[:4], [-2, 0, 0.4, 2], atol=1e-6)
    assert result.is_poison.tolist() == [False, False, True, True, True]  # NaN is never kept
    assert result.real_label[:4].tolist() == [0, 0, 1, 1]
    assert verdict(margin=1.0).is_poison.tolist() == [False, False, False, True, True]
    assert result.config["margin"] == 0 and result.config["metric"] == "l2"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_poisons_are_flagged_beyond_the_shift_that_theory_gives(share):
    n, width = 200, 50
    rng = np.random.default_rng(0)
    poisons = round(share * n)
    base, target = np.zeros(width), np.ones(width)

    def flagged(shift):
        x = np.concatenate([np.tile(base, (n, 1)), np.tile(target, (n, 1))])
        x += 1e-3 * rng.standard_normal(x.shape)
        probe = shift * (target - base) + 1e-3 * rng.standard_normal((max(poisons, 1), width))
        x[: max(poisons, 1)] = probe
        labels = jnp.repeat(jnp.arange(2), n)
        block = filters.Block(jnp.float32(x), jnp.zeros(x.shape))
        charvec = filters.CharVec((block,), ("layer",), (1,))
        # At p = 0 a single probe, which takes no part in the centroid.
        weights = jnp.ones(2 * n) if poisons else jnp.ones(2 * n).at[0].set(0)
        centroids = fit(charvec, labels, weights, num_classes=2)
        result = compiled(filters.nearest_centroid_filter, metric="l2")(charvec, labels, centroids)
        assert not np.asarray(result.is_poison)[max(poisons, 1) :].any()
        return np.asarray(result.is_poison)[: max(poisons, 1)].mean()

    limit = filters.detectable_shift(share)
    np.testing.assert_allclose(limit, 1 / (2 - share))
    assert flagged(limit - 0.02) == 0
    assert flagged(limit + 0.02) == 1
    np.testing.assert_allclose(filters.p_max(limit), share, atol=1e-12)


def test_limits_outside_their_range():
    assert filters.p_max(0.4) == 0 and filters.p_max(1.0) == 1
    assert filters.detectable_shift(1.0) == 1
    with pytest.raises(ValueError, match=r"in \[0, 1\], not 1.5"):
        filters.detectable_shift(1.5)
    with pytest.raises(ValueError, match=r"in \(0, 1\], not 0"):
        filters.p_max(0)


def test_bad_settings():
    charvec, labels = vectors()
    centroids = fit(charvec, labels)
    with pytest.raises(ValueError, match="estimator must be one of mean, median"):
        filters.fit_centroids(charvec, labels, K, estimator="mode")
    with pytest.raises(ValueError, match="variance must be one of pooled, mean"):
        filters.fit_centroids(charvec, labels, K, variance="total")
    with pytest.raises(ValueError, match="expected one for each of 40"):
        filters.fit_centroids(charvec, labels[:3], K)
    with pytest.raises(ValueError, match="metric must be cosine, l2, z or"):
        filters.centroid_distances(charvec, centroids, metric="maha")
    with pytest.raises(ValueError, match="share of the means"):
        filters.centroid_distances(charvec, centroids, beta=2)
    other = filters.CharVec(charvec.blocks, charvec.paths, (4, 4, 4))
    with pytest.raises(ValueError, match=r"layer0 .4 positions.*same network"):
        filters.centroid_distances(other, centroids)
    dense = filters.CharVec(charvec.blocks[2:], charvec.paths[2:], charvec.sizes[2:])
    with pytest.raises(ValueError, match="choose beta = 1"):
        filters.centroid_distances(dense, fit(dense, labels), beta=0)
    robust = fit(charvec, labels, estimator="median")
    with pytest.raises(ValueError, match='only centroids with estimator "mean"'):
        robust + robust
    with pytest.raises(ValueError, match='needs estimator "mean"'):
        filters.centroid_distances(charvec, robust, left_out=labels)
    with pytest.raises(ValueError, match="one class only"):
        filters.nearest_centroid_filter(
            charvec, 0 * labels, fit(charvec, 0 * labels, num_classes=1)
        )
