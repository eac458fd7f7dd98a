"""The rival filters against scikit-learn and cleanlab on the same features."""

import sys

import numpy as np
import pytest

from jaxpoison import filters

N, D, K = 90, 12, 3


def features(seed=0, distance=1.5):
    """Returns features of overlapping classes of unequal sizes, and labels 10, 20, 30."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.permutation(np.repeat(np.arange(K), (40, 30, 20))))
    centers = distance * np.random.default_rng(7).standard_normal((K, D))
    scales = np.geomspace(3, 0.5, D)
    order = rng.permutation(N)
    x = centers[labels] + scales * rng.standard_normal((N, D))
    return x.astype(np.float32)[order], (10 * (labels + 1))[order]


@pytest.mark.parametrize("k", [1, 7, None])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_deep_knn_votes_as_scikit_learns_neighbours_do(k, exclude_self):
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = features()
    x += 1000  # far from the origin
    result = filters.deep_knn(x, y, k=k, exclude_self=exclude_self)
    k = result.config["k"]
    assert k in (1, 7, 2 * 40 - 1)
    model = neighbors.NearestNeighbors(n_neighbors=k).fit(x.astype(np.float64))
    nearest = model.kneighbors(None if exclude_self else x, return_distance=False)
    votes = (y[nearest][..., None] == [10, 20, 30]).sum(1)
    own = votes[np.arange(N), y // 10 - 1]
    np.testing.assert_allclose(result.distances, 1 - votes / k, atol=1e-6)
    np.testing.assert_array_equal(result.is_poison, own < votes.max(1))
    kept = ~np.asarray(result.is_poison)
    np.testing.assert_array_equal(result.real_label[kept], y[kept])
    np.testing.assert_array_equal(result.real_label[~kept], 10 * (votes[~kept].argmax(1) + 1))


@pytest.mark.parametrize("centered", [True, False])
def test_spectral_scores_are_projections_on_the_first_singular_vector(centered):
    x, y = features()
    result = filters.spectral_signatures(x, y, poison_share=0.1, centered=centered)
    for label, drop in ((10, 6), (20, 4), (30, 3)):  # 1.5 * .1 * (40, 30, 20), rounded down
        mine = y == label
        around = x[mine].astype(np.float64) - x[mine].astype(np.float64).mean(0)
        v = np.linalg.svd(around, full_matrices=False)[2][0]
        score = ((around if centered else x[mine]) @ v) ** 2
        np.testing.assert_allclose(result.score[mine], score, rtol=1e-3, atol=1e-3)
        want = score >= np.sort(score)[-drop]
        np.testing.assert_array_equal(result.is_poison[mine], want)
    assert result.real_label is None and result.distances is None


def test_a_share_of_two_thirds_keeps_one_example_of_each_class():
    x, y = features()
    for share in (2 / 3, 1.0):
        result = filters.spectral_signatures(x, y, poison_share=share)
        assert result.per_class["flagged"].tolist() == [39, 29, 19]
    assert not filters.spectral_signatures(x, y, poison_share=0.0).is_poison.any()


def test_l2_centroid_drops_the_furthest_of_each_class():
    x, y = features()
    x64 = x.astype(np.float64)
    centers = np.stack([x64[y == label].mean(0) for label in (10, 20, 30)])
    sphere = filters.l2_centroid(x, y, share=0.05)
    slab = filters.l2_centroid(x, y, share=0.3, rule="slab")
    for number, label in enumerate((10, 20, 30)):
        mine = y == label
        around = x64[mine] - centers[number]
        np.testing.assert_allclose(sphere.score[mine], np.linalg.norm(around, axis=1), rtol=1e-4)
        between = centers[number] - np.delete(centers, number, axis=0)
        nearest = between[np.linalg.norm(between, axis=1).argmin()]
        along = np.abs(around @ nearest) / np.linalg.norm(nearest)
        np.testing.assert_allclose(slab.score[mine], along, rtol=1e-3, atol=1e-3)
    assert sphere.per_class["flagged"].tolist() == [2, 1, 1]
    assert slab.per_class["flagged"].tolist() == [12, 9, 6]
    for result in (sphere, slab):
        for label in (10, 20, 30):
            mine, hit = y == label, np.asarray(result.is_poison)
            assert result.score[mine & hit].min() >= result.score[mine & ~hit].max()


def test_feature_centroid_is_scikit_learns_nearest_centroid():
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = features(distance=0.7)
    model = neighbors.NearestCentroid().fit(x, y)
    result = filters.feature_centroid(x, y)
    np.testing.assert_array_equal(result.real_label, model.predict(x))
    np.testing.assert_array_equal(result.is_poison, model.predict(x) != y)
    clean = features(seed=1, distance=0.7)
    trusted = filters.feature_centroid(x, y, trusted=clean)
    model = neighbors.NearestCentroid().fit(*clean)
    np.testing.assert_array_equal(trusted.real_label, model.predict(x))
    assert trusted.config["trusted"] and not result.config["trusted"]
    wider = (np.concatenate([clean[0], x[:5] + 100]), np.concatenate([clean[1], [5] * 5]))
    result = filters.feature_centroid(x, y, trusted=wider)
    np.testing.assert_array_equal(result.real_label, trusted.real_label)
    np.testing.assert_array_equal(result.labels, y)
    with pytest.raises(ValueError, match=r"no trusted features of the labels \[30\]"):
        filters.feature_centroid(x, y, trusted=(x[y < 30], y[y < 30]))


def test_activation_clustering_is_pca_and_two_means():
    cluster = pytest.importorskip("sklearn.cluster")
    decomposition = pytest.importorskip("sklearn.decomposition")
    metrics = pytest.importorskip("sklearn.metrics")
    x, y = features()
    planted = np.zeros(N, bool)
    for label, count in ((10, 8), (20, 12)):  # a tight group apart, in two of the classes
        rows = np.flatnonzero(y == label)[:count]
        planted[rows] = True
        x[rows] = x[rows].mean(0) + 12 + 0.1 * x[rows]
    result = filters.activation_clustering(x, y, num_components=4)
    for label in (10, 20, 30):
        mine = y == label
        reduced = decomposition.PCA(4).fit_transform(x[mine].astype(np.float64))
        means = cluster.KMeans(2, n_init=10, random_state=0).fit(reduced)
        smaller = means.labels_ == np.bincount(means.labels_).argmin()
        if label < 30:
            np.testing.assert_array_equal(smaller, planted[mine])
            np.testing.assert_array_equal(result.is_poison[mine], smaller)
            gap = [np.square(reduced - c).sum(1) for c in means.cluster_centers_]
            np.testing.assert_allclose(
                np.abs(result.score[mine]), np.abs(gap[0] - gap[1]), rtol=1e-3
            )
            silhouette = metrics.silhouette_score(reduced, means.labels_)
            for offset, flagged in ((-0.01, True), (0.01, False)):
                choosy = filters.activation_clustering(
                    x, y, num_components=4, min_silhouette=silhouette + offset
                )
                assert choosy.is_poison[mine].any() == flagged
    assert result.is_poison[y == 30].any()  # a clean class loses its smaller half
    small = filters.activation_clustering(x, y, num_components=4, max_relative_size=0.35)
    assert small.is_poison[y == 10].sum() == 8
    assert not small.is_poison[y == 20].any()  # 12 of 30 are more than .35


def test_confident_learning_is_cleanlabs():
    pytest.importorskip("cleanlab")
    from cleanlab.filter import find_label_issues

    x, y = features(distance=2.5)
    wrong = np.flatnonzero(y == 10)[:4]
    y[wrong] = 20
    result = filters.confident_learning(x, y)
    probabilities = 1 - np.asarray(result.distances, np.float64)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    want = find_label_issues(y // 10 - 1, probabilities, n_jobs=1)
    np.testing.assert_array_equal(result.to_cleanlab(), want)
    assert set(wrong) <= set(np.flatnonzero(want)) and want.sum() < 12
    with pytest.raises(ValueError, match="size of the smallest class, 20"):
        filters.confident_learning(x, y, num_folds=21)


def test_without_cleanlab_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(ImportError, match=r"jaxpoison\[experiments\]"):
        filters.confident_learning(*features())


FILTERS = [
    filters.deep_knn,
    filters.spectral_signatures,
    filters.activation_clustering,
    filters.l2_centroid,
    filters.feature_centroid,
]


@pytest.mark.parametrize("rival", FILTERS, ids=lambda rival: rival.__name__)
def test_every_rival_names_itself_and_takes_labels_as_they_come(rival):
    x, y = features()
    result = rival(x, y)
    assert result.config["filter"] == rival.__name__
    assert result.classes.tolist() == [10, 20, 30]
    assert result.score.dtype == np.float32
    np.testing.assert_array_equal(result.labels, y)
    named = rival(x, np.array(["ten", "twenty", "x-thirty"])[y // 10 - 1])
    np.testing.assert_array_equal(named.is_poison, result.is_poison)
    order = np.random.default_rng(0).permutation(N)
    shuffled = rival(x[order], y[order])
    np.testing.assert_array_equal(shuffled.is_poison, np.asarray(result.is_poison)[order])


def test_bad_input():
    x, y = features()
    spoiled = x.copy()
    spoiled[[4, 9], 2] = np.nan
    for bad_x, bad_y, message in (
        (x[:, :, None], y, r"features have shape \(90, 12, 1\)"),
        (x[:5], y, r"features have shape \(5, 12\); expected \[N, d\] for 90"),
        (spoiled, y, r"2 examples are not finite, the first at indices \[4, 9\]"),
        (x, 0 * y, "all labels are 0"),
        (x, np.ones((N, 2)), "one-hot rows with a single 1"),
    ):
        with pytest.raises(ValueError, match=message):
            filters.deep_knn(bad_x, bad_y)
    for call, message in (
        (lambda: filters.deep_knn(x, y, k=90), "k must be between 1 and 89"),
        (lambda: filters.deep_knn(x, y, k=0, exclude_self=False), "between 1 and 90"),
        (lambda: filters.spectral_signatures(x, y, poison_share=1.2), "poison_share must be"),
        (lambda: filters.l2_centroid(x, y, share=-1), "share must be in"),
        (lambda: filters.l2_centroid(x, y, rule="cube"), "rule must be"),
        (lambda: filters.activation_clustering(x, y, num_components=13), "between 1 and 12"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
