"""The filter as an object: data in all forms, devices, errors, adapters and files."""

import functools
import json
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bn_networks import Convolutional, Dense, Shared, variables_of

from jaxpoison import filters
from jaxpoison.core import devices
from jaxpoison.filters import characteristic
from jaxpoison.filters.limits import ContaminationWarning

ONE = devices.data_mesh(jax.devices()[:1])
N = 45


def images(n=N, seed=0):
    """Returns images of three classes (each a direction in color space) and labels 2, 3, 4."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3)
    x = 0.7 * rng.standard_normal((n, 6, 6, 3)) + 0.5 * np.eye(3)[labels][:, None, None]
    return x.astype(np.float32), labels + 2


MODEL = Convolutional()
X, Y = images()
TRUSTED = images(30, seed=1)
VARIABLES = variables_of(MODEL, X[:2])


def make(**kwargs):
    return filters.CharacteristicVectorFilter(
        **{"model": MODEL, "variables": VARIABLES, "batch_size": 16, "mesh": ONE, **kwargs}
    )


@pytest.fixture
def no_warning():
    """Most tests filter data with itself, and know it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContaminationWarning)
        yield


@functools.cache
def vectors(which="data"):
    x = {"data": X, "trusted": TRUSTED[0]}[which]
    return jax.jit(lambda v, x: filters.extract_charvec(MODEL, v, x))(VARIABLES, x)


def verdict(x_vectors, y, reference, reference_y, **kwargs):
    """The functions that the object is made of, all at once."""

    @jax.jit
    def run(x_vectors, y, reference, reference_y):
        centroids = filters.fit_centroids(reference, reference_y, 3)
        return filters.nearest_centroid_filter(x_vectors, y, centroids, **kwargs)

    return run(x_vectors, y - 2, reference, reference_y - 2)


def assert_same(result, want, rtol=1e-5):
    np.testing.assert_array_equal(result.is_poison, want.is_poison)
    np.testing.assert_allclose(result.distances, want.distances, rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(result.score, want.score, rtol=rtol, atol=1e-6)


def test_it_is_the_functions_it_is_made_of(no_warning):
    want = verdict(vectors(), Y, vectors(), Y)
    result = make().fit_filter(X, Y)
    assert_same(result, want)
    np.testing.assert_array_equal(result.real_label, np.asarray(want.real_label) + 2)
    np.testing.assert_array_equal(result.labels, Y)
    np.testing.assert_array_equal(result.classes, [2, 3, 4])
    assert 0 < result.is_poison.sum() < N / 2  # the classes overlap
    kwargs = {"metric": "z", "gamma": "linear", "beta": 0.3, "margin": 0.1, "exclude_self": True}
    assert_same(make(**kwargs).fit_filter(X, Y), verdict(vectors(), Y, vectors(), Y, **kwargs))


def test_trusted_centroids():
    want = verdict(vectors(), Y, vectors("trusted"), TRUSTED[1])
    assert_same(make(centroids="trusted").fit_filter(X, Y, TRUSTED), want)
    found = make(centroids="trusted").fit(X, Y, trusted=TRUSTED)
    assert_same(found.filter(X, Y), want)
    part = found.filter(X[:30], Y[:30])
    np.testing.assert_allclose(part.score, want.score[:30], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("metric", "gamma"), [("cosine", "fisher"), ("z", (1.0, 2.0, 3.0)), ("maha", "fisher")]
)
def test_scale_covariance_and_weights_are_those_of_the_trusted(metric, gamma):
    reference, y = vectors("trusted"), TRUSTED[1] - 2

    @jax.jit
    def run(reference, charvec):
        centroids = filters.fit_centroids(reference, y, 3)
        weights = filters.fisher_weights(centroids) if gamma == "fisher" else gamma
        if metric == "maha":
            with_metric = filters.fit_mahalanobis(reference, y, centroids, gamma=weights)
        else:
            with_metric = metric
        return weights, filters.centroid_distances(
            charvec, centroids, metric=with_metric, gamma=weights
        )

    weights, want = run(reference, vectors())
    result = make(centroids="trusted", metric=metric, gamma=gamma).fit_filter(X, Y, TRUSTED)
    np.testing.assert_allclose(result.distances, want, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(result.config["layer_weights"], weights / np.sum(weights), rtol=1e-4)


def test_tau_pulls_trusted_centroids_to_the_data():
    got = make(centroids="trusted", tau=4.0).fit(X, Y, TRUSTED).centroids_
    fit = jax.jit(filters.fit_centroids, static_argnums=2)
    want = filters.shrink(fit(vectors("trusted"), TRUSTED[1] - 2, 3), fit(vectors(), Y - 2, 3), 4.0)
    for mine, theirs in zip(got.blocks, want.blocks, strict=True):
        np.testing.assert_allclose(mine.mean, theirs.mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mine.var, theirs.var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_the_same_on_any_number_of_devices(num_devices, no_warning):  # 45 and 16 do not divide
    mesh = devices.data_mesh(jax.devices()[:num_devices])
    want = verdict(vectors(), Y, vectors(), Y)
    model = make(mesh=mesh)
    result = model.fit(X, Y).filter(X, Y)  # sums over batches and devices
    np.testing.assert_array_equal(result.real_label, np.asarray(want.real_label) + 2)
    assert_same(result, want)
    whole = jax.jit(filters.fit_centroids, static_argnums=2)(vectors(), Y - 2, 3)
    for mine, theirs in zip(model.centroids_.blocks, whole.blocks, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


def test_batch_sizes_and_order_do_not_matter(no_warning):
    want = make().fit(X, Y).filter(X, Y)
    assert_same(make(batch_size=7).fit(X, Y).filter(X, Y), want)
    order = np.random.default_rng(0).permutation(N)
    shuffled = make().fit(X[order], Y[order]).filter(X[order], Y[order])
    np.testing.assert_array_equal(shuffled.is_poison, want.is_poison[order])
    np.testing.assert_allclose(shuffled.distances, want.distances[order], rtol=1e-5, atol=1e-6)


class Batches:
    """(examples, labels) batches, sorted by class, that count how often they are read."""

    def __init__(self, size=15):
        self.size, self.times = size, 0
        self.order = np.argsort(Y, kind="stable")

    def __iter__(self):
        self.times += 1
        for start in range(0, N, self.size):
            rows = self.order[start : start + self.size]
            yield X[rows], Y[rows]


def test_batches_are_read_twice_and_give_what_arrays_give(no_warning):
    batches = Batches()
    want = make().fit_filter(X[batches.order], Y[batches.order])
    result = make().fit_filter(batches)  # each batch brings labels that were not seen before
    assert batches.times == 2
    assert_same(result, want)
    np.testing.assert_array_equal(result.labels, Y[batches.order])
    assert_same(make().fit_filter(iter(Batches())), want)  # once: vectors are kept
    assert_same(make(estimator="median").fit_filter(Batches()), make(estimator="median").fit_filter(
        X[batches.order], Y[batches.order]))  # fmt: skip
    trusted = make(centroids="trusted").fit_filter(Batches(), trusted=TRUSTED)
    assert_same(trusted, make(centroids="trusted").fit(X, Y, TRUSTED).filter(Batches()))


def test_large_sets_are_passed_twice_and_vectors_in_memory_warned_of(no_warning, monkeypatch):
    want = make().fit_filter(X, Y)
    monkeypatch.setattr(characteristic, "CACHE_BYTES", 1000)
    assert_same(make().fit_filter(X, Y), want)
    with pytest.warns(UserWarning, match="45 characteristic vectors take"):
        make(estimator="median").fit_filter(X, Y)
    with pytest.warns(UserWarning, match="45 characteristic vectors take"):
        make().fit_filter(iter(Batches()))


def test_labels_in_all_forms(no_warning):
    want = make().fit_filter(X, Y)
    assert_same(make().fit_filter(X, np.eye(3)[Y - 2]), want)
    names = np.array(["cat", "dog", "emu"])[Y - 2]
    named = make().fit_filter(X, names)
    assert_same(named, want)
    np.testing.assert_array_equal(
        named.real_label, np.array(["cat", "dog", "emu"])[want.real_label - 2]
    )
    assert_same(make().fit_filter(jnp.asarray(X), (Y - 2).tolist()), want)
    with pytest.warns(UserWarning, match=r"gaps: 3 classes among 2\.\.9, 4 is none of them"):
        gap = make().fit_filter(X, np.where(Y == 4, 9, Y))
    assert_same(gap, want)
    assert gap.classes.tolist() == [2, 3, 9]


def test_uint8_images_are_converted_in_each_batch(no_warning):
    raw = np.clip(60 * X + 100, 0, 255).astype(np.uint8)
    want = make().fit_filter(raw.astype(np.float32) / 255, Y)
    result = make(preprocess=lambda x: x.astype(jnp.float32) / 255).fit_filter(raw, Y)
    assert_same(result, want)


def test_self_statistics_and_other_arguments_of_the_network(no_warning):
    result = make(stats="self", apply_kwargs={"train": True}).fit_filter(X, Y)
    assert result.config["stats"] == "self"
    assert np.any(result.score != make().fit_filter(X, Y).score)
    keys = {"rngs": {"dropout": jax.random.key(0)}}  # cannot be hashed
    assert_same(make(apply_kwargs=keys).fit_filter(X, Y), make().fit_filter(X, Y))


def test_a_network_that_was_fitted_before_is_not_compiled_again(no_warning):
    make().fit_filter(X, Y)
    traces = []

    def predicate(layer):
        traces.append(layer)
        return isinstance(layer, nn.BatchNorm)

    make(predicate=predicate).fit_filter(X, Y)
    seen = len(traces)
    other = jax.tree.map(lambda a: a + 0.01, VARIABLES)
    make(predicate=predicate, variables=other).fit_filter(X[::-1], Y[::-1])
    assert len(traces) == seen > 0


# What it warns of, and what it refuses.


def test_centroids_of_the_data_come_with_a_warning_and_trusted_ones_without():
    for call in ("fit", "fit_filter"):
        with pytest.warns(
            ContaminationWarning, match=r"s > 1 / \(2 - p\).*five or more of each"
        ) as seen:
            getattr(make(), call)(X, Y)
        assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(centroids="trusted").fit_filter(X, Y, TRUSTED)


def test_a_class_that_loses_most_of_its_examples_is_warned_of():
    wrong = np.where(Y == 4, np.where(np.arange(N) % 5, 2, 4), Y)
    flipped = np.where(Y == 3, 4, wrong)
    with pytest.warns(
        ContaminationWarning, match=r"more than half of a class was flagged \(4: 1\d of"
    ):
        result = make(centroids="trusted").fit_filter(X, flipped, TRUSTED)
    table = result.per_class
    assert table["class"].tolist() == [2, 3, 4]
    assert table["n"].sum() == N and table["flagged"].sum() == result.is_poison.sum()
    assert table["share"][1] == 0 and table["share"][2] > 0.5
    with pytest.warns(ContaminationWarning, match=r"2: 15 of 15 \(all\)"):
        make(centroids="trusted", margin=-10.0).fit_filter(X, Y, TRUSTED)


def test_layers_with_one_position_are_warned_of_once(no_warning):
    x = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    y = np.arange(12) % 2
    model = make(model=Dense(), variables=variables_of(Dense(), x[:2]))
    with pytest.warns(UserWarning, match=r"single position.*Norm_0/BatchNorm_0, Norm_1") as seen:
        model.fit(x + y[:, None], y)
    assert sum("single position" in str(each.message) for each in seen) == 1


def test_classes_that_are_too_small(no_warning):
    lonely = np.where(np.arange(N) == 7, 5, Y)
    for kwargs in ({}, {"estimator": "median"}):
        with pytest.raises(ValueError, match=r"too few examples for a centroid \(5: 1\)"):
            make(**kwargs).fit(X, lonely)
    assert not make(min_class_size=1).fit_filter(X, lonely).is_poison[7]
    with pytest.raises(ValueError, match="at least 2 of each class"):
        make(centroids="trusted", metric="z").fit(X, Y, (TRUSTED[0][:4], np.array([2, 3, 4, 4])))


def test_trusted_examples_that_lack_a_class():
    some = TRUSTED[1] != 4
    few = TRUSTED[0][some], TRUSTED[1][some]
    for call in ("fit", "fit_filter"):
        with pytest.raises(ValueError, match=r"no centroids for the labels \[4\].*add trusted"):
            getattr(make(centroids="trusted"), call)(X, Y, few)
    with pytest.raises(ValueError, match=r"no centroids for the labels \[4\]"):
        make(centroids="trusted").fit_filter(Batches(), trusted=few)
    pulled = make(centroids="trusted", tau=1.0).fit(X, Y, few)
    assert pulled.classes_.tolist() == [2, 3, 4]
    assert np.isfinite(pulled.filter(X, Y).distances).all()
    with pytest.raises(ValueError, match='centroids="trusted" needs trusted'):
        make(centroids="trusted").fit(X, Y)
    with pytest.raises(ValueError, match='centroids="dataset" would not use them'):
        make().fit(X, Y, TRUSTED)


def test_activations_that_are_not_finite_are_named(no_warning):
    spoiled = X.copy()
    spoiled[[3, 40]] = np.nan
    message = r"of 2 examples are not finite, the first at indices \[3, 40\]"
    for kwargs in ({}, {"estimator": "median"}):
        with pytest.raises(ValueError, match=message):
            make(**kwargs).fit(spoiled, Y)
    with pytest.raises(ValueError, match=message):
        make().fit_filter(spoiled, Y)
    with pytest.raises(ValueError, match=message):
        make().fit(X, Y).filter(spoiled, Y)
    huge = X.copy()
    huge[44] = 3e38
    with pytest.raises(ValueError, match=r"indices \[44\]"):
        make().fit([(huge[:40], Y[:40]), (huge[40:], Y[40:])])


def test_networks_that_cannot_be_measured_or_need_care(no_warning):
    class NoNorm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(3, (3, 3))(x).mean((1, 2))

    bare = NoNorm().init(jax.random.key(0), X[:1])
    with pytest.raises(ValueError, match="predicate="):
        make(model=NoNorm(), variables=bare).fit(X, Y)
    with pytest.raises(ValueError, match="runs in training mode"):
        make(apply_kwargs={"train": True}).fit(X, Y)
    for model, layers in ((Convolutional("scan"), 3), (Shared(), 2)):
        fitted = make(model=model, variables=variables_of(model, X[:2])).fit(X, Y)
        assert len(fitted.centroids_.paths) == layers


class Homemade(nn.Module):
    """Normalizes by the batch, always."""

    @nn.compact
    def __call__(self, x):
        return (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))


class Mixing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Homemade()(nn.Conv(3, (3, 3))(Homemade()(nn.Conv(3, (3, 3))(x)))).mean((1, 2))


@pytest.mark.parametrize("estimator", ["mean", "median"])
def test_homemade_layers_that_mix_examples_are_found_out(estimator, no_warning):
    model = make(
        model=Mixing(),
        variables=Mixing().init(jax.random.key(0), X[:1]),
        predicate=lambda layer: isinstance(layer, Homemade),
        estimator=estimator,
    )
    for call in (model.fit, model.fit_filter):
        with pytest.raises(ValueError, match="depends on the other examples"):
            call(X, Y)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"metric": "euclid"}, "metric must be one of cosine, l2, z, maha"),
        ({"centroids": "mean"}, "centroids must be one of dataset, trusted"),
        ({"tau": -1}, r"tau must be in \[0, inf\]"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"min_class_size": 0}, "min_class_size must be at least 1"),
        ({"margin": float("nan")}, "margin must be in .* and finite"),
        ({"gamma": "fisher"}, "an attacker would choose the weights"),
        ({"tau": 1}, "an attacker would choose the weights"),
        ({"exclude_self": True, "estimator": "median"}, "exclude_self=True is for"),
        ({"exclude_self": True, "centroids": "trusted"}, "exclude_self=True is for"),
        ({"gamma": "last_4"}, '"last_1" to "last_3"'),
        ({"beta": 1.5}, r"beta must be in \[0, 1\]"),
        ({"stats": "other"}, "stats must be"),
    ],
)
def test_bad_settings(kwargs, message, no_warning):
    trusted = TRUSTED if kwargs.get("centroids") == "trusted" else None
    with pytest.raises(ValueError, match=message):
        make(**kwargs).fit_filter(X, Y, trusted)


def test_bad_data(no_warning):
    for x, y, message in (
        (X, None, "its labels are missing"),
        (X, Y[:4], "X has 45 examples, but there are 4 labels"),
        (X[:0], Y[:0], "one label for each of N >= 1"),
        (X, np.ones((N, 2)), "one-hot rows with a single 1"),
        (X, np.where(Y == 2, np.nan, Y), "15 labels are not finite"),
        (X, np.where(Y == 2, None, Y), "15 labels are missing"),
        (X, 0 * Y, "one class only"),
        ([], None, "empty iterable"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make().fit_filter(x, y)
    with pytest.raises(ValueError, match="call fit"):
        make().filter(X, Y)
    with pytest.raises(ValueError, match="empty iterable"):
        make().fit(X, Y).filter([])
    with pytest.raises(ValueError, match=r"no centroids for the labels \[7\].*fit on all classes"):
        make().fit(X, Y).filter(X, np.where(Y == 2, 7, Y))


def test_mahalanobis_of_large_sets_is_refused(no_warning, monkeypatch):
    monkeypatch.setattr(characteristic, "MOST_EXAMPLES_OF_MAHA", 20)
    with pytest.raises(ValueError, match="matrices of 45 x 45"):
        make(metric="maha").fit(X, Y)


# Other libraries, and files.


def some_result():
    return make(centroids="trusted").fit_filter(X, Y, TRUSTED)


def test_polarities_of_other_libraries():
    result = some_result()
    flagged = np.asarray(result.is_poison)
    assert flagged.any()
    report, is_clean = result.to_art()
    assert is_clean == [0 if hit else 1 for hit in flagged]  # ART: 1 = clean
    assert json.loads(json.dumps(report))["flagged"] == result.per_class["flagged"].tolist()
    assert result.to_cleanlab().dtype == bool
    np.testing.assert_array_equal(result.to_cleanlab(), flagged)  # cleanlab: True = issue
    np.testing.assert_array_equal(result.to_sklearn(), np.where(flagged, -1, 1))
    normal = result.decision_function()
    np.testing.assert_array_equal(normal, -result.score)
    assert normal[~flagged].min() >= 0 > normal[flagged].max()
    assert result.keep_indices.dtype == np.int64
    assert sorted([*result.keep_indices, *np.flatnonzero(flagged)]) == list(range(N))
    ranked = result.ranked_indices()
    assert set(ranked[: flagged.sum()]) == set(np.flatnonzero(flagged))
    probabilities = result.pred_probs()
    np.testing.assert_allclose(probabilities.sum(1), 1)
    np.testing.assert_array_equal(result.classes[probabilities.argmax(1)], result.real_label)
    rival = filters.spectral_signatures(X.reshape(N, -1), Y)
    with pytest.raises(ValueError, match="spectral_signatures has no distances"):
        rival.pred_probs()


def test_resampling_keeps_what_was_not_flagged():
    model = make(centroids="trusted")
    kept_x, kept_y = model.fit_resample(X, Y, TRUSTED)
    np.testing.assert_array_equal(model.sample_indices_, some_result().keep_indices)
    np.testing.assert_array_equal(kept_x, X[model.sample_indices_])
    np.testing.assert_array_equal(kept_y, Y[model.sample_indices_])


def test_scikit_learn_clones_it():
    base = pytest.importorskip("sklearn.base")
    copy = base.clone(make(beta=0.25))
    assert copy.settings.beta == 0.25 and copy.model == MODEL and not hasattr(copy, "centroids_")
    assert copy.set_params(beta=0.75).get_params()["settings"].beta == 0.75
    with pytest.raises(TypeError, match="unknown parameters: alpha"):
        copy.set_params(alpha=1)


def test_cleanlab_takes_its_probabilities():
    pytest.importorskip("cleanlab")
    from cleanlab.filter import find_label_issues

    result = some_result()
    issues = find_label_issues(np.asarray(result.labels) - 2, result.pred_probs(), n_jobs=1)
    assert np.mean(issues == result.to_cleanlab()) > 0.8


def test_hugging_face_and_grain_select_by_its_indices():
    result = some_result()
    kept = Y[result.keep_indices].tolist()
    datasets = pytest.importorskip("datasets")
    selected = datasets.Dataset.from_dict({"label": Y.tolist()}).select(result.keep_indices)
    assert selected["label"][:] == kept


def test_grain_selects_by_its_indices():
    grain = pytest.importorskip("grain")
    result = some_result()
    source = list(zip(X, Y, strict=True))
    ds = grain.MapDataset.source(result.keep_indices).map(lambda index: source[int(index)])
    assert [label for _, label in ds] == Y[result.keep_indices].tolist()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"metric": "maha", "gamma": "fisher"},
        {"estimator": "geometric_median", "variance": "mean", "gamma": [1, 2, 1], "margin": 0.01},
    ],
)
def test_files_hold_all_but_the_network(kwargs, tmp_path):
    fitted = make(centroids="trusted", **kwargs).fit(X, Y, TRUSTED)
    fitted.save(tmp_path / "filter.npz")
    with np.load(tmp_path / "filter.npz", allow_pickle=False) as archive:  # no pickled objects
        config = json.loads(str(archive["config"]))
    assert config["settings"]["centroids"] == "trusted"
    loaded = filters.CharacteristicVectorFilter.load(
        tmp_path / "filter.npz", MODEL, VARIABLES, mesh=ONE
    )
    want, got = fitted.filter(X, Y), loaded.filter(X, Y)
    assert_same(got, want, rtol=1e-6)
    assert got.config == want.config
    np.testing.assert_array_equal(got.real_label, want.real_label)
    assert not list(tmp_path.glob("*.unfinished"))
    other = filters.CharacteristicVectorFilter.load(
        tmp_path / "filter.npz", Shared(), variables_of(Shared(), X[:2]), mesh=ONE
    )
    with pytest.raises(ValueError, match="must come from the same network"):
        other.filter(X, Y)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "filter.npz"
    load = functools.partial(filters.CharacteristicVectorFilter.load, path, MODEL, VARIABLES)
    with pytest.raises(FileNotFoundError):
        load()
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"filter\.npz cannot be read as a saved"):
        load()
    np.savez(path, images=np.zeros(3))
    with pytest.raises(ValueError, match=r"filter\.npz lacks config"):
        load()
    with pytest.raises(ValueError, match=r"call fit .or fit_filter. first"):
        make().save(path)
