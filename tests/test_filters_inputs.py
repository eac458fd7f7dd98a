"""What users hand to filters: types of other libraries, odd sizes, extreme values, NNX modules."""

import json
import tracemalloc
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bn_networks import ChannelsFirst, variables_of
from flax import nnx

from jaxpoison import data, filters, network
from jaxpoison.core import devices
from jaxpoison.filters.features import by_class
from jaxpoison.filters.spectral import principal_components

pytestmark = pytest.mark.filterwarnings(
    "ignore::jaxpoison.filters.ContaminationWarning", "ignore:layers with a single position"
)
ONE = devices.data_mesh(jax.devices()[:1])
NAMES = np.array(["cat", "dog", "frog"])
DETECTORS = (
    filters.deep_knn,
    filters.spectral_signatures,
    filters.activation_clustering,
    filters.l2_centroid,
    filters.feature_centroid,
)


class Net(nn.Module):
    """Convolution, BatchNorm, mean, logits."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


Y = np.arange(18) % 3
X = (np.random.default_rng(0).random((18, 6, 6, 3)) + np.eye(3)[Y, None, None]).astype(np.float32)
VARIABLES = variables_of(Net(), X[:1])
FEATURES = np.random.default_rng(1).normal(size=(18, 12)) + 3 * np.eye(3, 12)[Y]


def make(model=None, variables=VARIABLES, **kwargs):
    return filters.CharacteristicVectorFilter(
        Net() if model is None else model, variables, mesh=ONE, **kwargs
    )


def want():
    return make().fit_filter(X, Y)


def same(result):
    np.testing.assert_array_equal(result.distances, want().distances)
    return result


def test_labels_of_all_libraries_are_the_same_classes():
    pd = pytest.importorskip("pandas")
    for y in (
        NAMES[Y],
        pd.Series(NAMES[Y]),
        pd.Series(NAMES[Y]).astype("category"),
        NAMES[Y].astype(object),
        NAMES[Y].astype(np.dtypes.StringDType()),
    ):
        result = filters.feature_centroid(FEATURES, y)
        assert result.classes.tolist() == NAMES.tolist()
        np.testing.assert_array_equal(result.label_indices, Y)
        np.testing.assert_array_equal(NAMES[result.real_label_indices], result.real_label)
    for bad, message in (
        (["a", None, "b"], "example 1"),
        ([1, "b", 2], "int for example 0 and str"),
    ):
        with pytest.raises(ValueError, match=message):
            filters.feature_centroid(FEATURES[:3], np.array(bad, object))


def test_frames_come_in_and_go_out():
    pd = pytest.importorskip("pandas")
    y = pd.Series(NAMES[Y], index=[f"img{n}.png" for n in range(18)])
    result = filters.feature_centroid(pd.DataFrame(FEATURES), y)
    frame = result.to_frame()
    assert frame.index.tolist() == y.index.tolist()
    assert frame["label"].tolist() == y.tolist()
    np.testing.assert_array_equal(frame["is_poison"], result.is_poison)
    spectral = filters.spectral_signatures(FEATURES, Y).to_frame()
    assert list(spectral.columns) == ["label", "is_poison", "score"]
    assert spectral.index.tolist() == list(range(18))


def test_sparse_class_ids_cost_nothing():
    ids = np.array([-(2**63), 7, 2**63 - 1])[Y]
    tracemalloc.start()
    with pytest.warns(UserWarning, match="3 classes among -9223372036854775808") as seen:
        result = make().fit_filter(X, ids)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert max(len(str(each.message)) for each in seen if "gaps" in str(each.message)) < 200
    np.testing.assert_array_equal(result.label_indices, Y)


def test_sets_and_pairs_are_taken_as_what_they_are():
    dataset = data.Dataset(X, Y.astype(np.int32), np.arange(100, 118, dtype=np.int32))
    assert same(make().fit_filter(dataset)).ids.tolist() == list(range(100, 118))
    same(make().fit_filter((X, Y)))
    same(make().fit_filter(list(X), Y))
    same(make().fit_filter([data.Dataset(X, Y)]))
    trusted = make(centroids="trusted")
    by_pair = trusted.fit_filter(X, Y, (X, Y))
    np.testing.assert_array_equal(trusted.fit_filter(X, Y, dataset).score, by_pair.score)
    kept, labels = trusted.fit_resample(dataset, trusted=dataset)
    assert len(kept) == len(labels) == len(trusted.sample_indices_)
    raw = np.round(np.clip(X, 0, 1) * 255).astype(np.uint8)
    scaled = make().fit_filter(raw.astype(np.float32) / 255, Y)
    result = make().fit_filter(data.Dataset(raw, Y))  # the meaning of its pixels is known
    np.testing.assert_allclose(result.score, scaled.score, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, None, TypeError, "its labels are missing"),
        ({"x": X, "y": Y}, None, TypeError, "X is a dict of x, y"),
        (data.Dataset(X, Y), Y, TypeError, "has its labels: leave y out"),
        ([X, X], None, TypeError, "batch 0 is an array of shape"),
        ([{"image": X, "label": Y}], None, TypeError, "batch 0 is a dict of image, label"),
        (3, Y, TypeError, "expected examples"),
        (np.array(["a"] * 18), Y, ValueError, "X has dtype"),
        (np.array([None] * 18), Y, ValueError, "X has dtype object"),
        ((X * 255).astype(np.uint8), Y, ValueError, "e.g. jaxpoison.data.to_float"),
        ((X * 255).astype(np.int32), Y, ValueError, "images as integers .int32"),
        (np.zeros((18, 3, 6, 6), np.float32), Y, ValueError, r"transpose\(0, 2, 3, 1\)"),
        (FEATURES, Y, ValueError, r"Net cannot run on examples of \(12,\)"),
        (X[..., :1], Y, ValueError, r"needs params/Conv_0/kernel \(3, 3, 1, 4\).*\(3, 3, 3, 4\)"),
        ([*X[:9], *np.zeros((9, 8, 8, 3))], Y, ValueError, r"example 9 has shape \(8, 8, 3\)"),
        (
            [(X, Y), (np.zeros((3, 8, 8, 3)), Y[:3])], None, ValueError,
            r"batch 1 has images of \(8, 8, 3\), those before \(6, 6, 3\): resize them",
        ),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_used_are_named(x, y, error, message):
    with pytest.raises(error, match=message) as caught:
        make().fit_filter(x, y)
    assert len(str(caught.value)) < 500


def test_trusted_examples_and_variables_that_cannot_be_used():
    with pytest.raises(TypeError, match=r"trusted is an array of shape \(18, 6, 6, 3\) without"):
        make(centroids="trusted").fit(X, Y, X)
    with pytest.raises(ValueError, match=r"images of \(8, 8, 3\).*those of images of \(6, 6, 3\)"):
        make().fit(X, Y).filter(np.zeros((18, 8, 8, 3), np.float32), Y)
    with pytest.raises(ValueError, match="expected the collections of Net"):
        make(variables=VARIABLES["params"]).fit(X, Y)
    other = variables_of(ChannelsFirst(), X[:1])
    with pytest.raises(
        ValueError, match=r"needs batch_stats/BatchNorm_0/mean \(4,\).*nothing there"
    ):
        make(variables=other).fit(X, Y)
    with pytest.raises(TypeError, match="variables of the Net are missing"):
        filters.CharacteristicVectorFilter(Net(), mesh=ONE).fit(X, Y)
    with pytest.raises(TypeError, match="a function is no network"):
        filters.CharacteristicVectorFilter(lambda x: x, {}, mesh=ONE).fit(X, Y)


def test_vectors_take_the_place_of_examples():
    model = make()
    vectors = model.extract(X)
    same(model.fit_filter(vectors, Y))
    trusted = make(centroids="trusted", metric="z", gamma="fisher")
    result = trusted.fit_filter(vectors, Y, (vectors, Y))
    np.testing.assert_array_equal(result.score, trusted.fit_filter(X, Y, (X, Y)).score)
    pure = jax.jit(filters.filter_vectors, static_argnums=2, static_argnames="settings")(
        vectors, Y, 3, trusted=(vectors, Y), settings=trusted.settings
    )
    np.testing.assert_allclose(pure.score, result.score, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="trusted examples were not given"):
        filters.filter_vectors(vectors, Y, 3, settings=trusted.settings)


# Settings and files.


def test_settings_are_numbers_that_json_can_hold():
    settings = filters.FilterSettings(
        beta=np.float32(0.25), margin=jnp.float32(0.5), gamma=[1, 2], batch_size=np.int64(8),
        exclude_self=np.bool_(True),
    )  # fmt: skip
    assert hash(settings) == hash(filters.FilterSettings(
        beta=0.25, margin=0.5, gamma=(1, 2), batch_size=8, exclude_self=True))  # fmt: skip
    assert json.loads(json.dumps(vars(settings)))["gamma"] == [1, 2]
    result = filters.deep_knn(FEATURES, Y, k=np.int32(3), exclude_self=np.True_)
    assert json.dumps(result.config)
    for bad, error in (
        ({"beta": "half"}, TypeError), ({"batch_size": 2.5}, ValueError),
        ({"exclude_self": 1}, TypeError), ({"metric": ["l2"]}, ValueError),
        ({"gamma": [[1, 2]]}, TypeError), ({"bta": 1}, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=next(iter(bad))):
            make(**bad)


def test_files_in_the_home_folder_and_wrong_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fitted = make().fit(X, NAMES[Y].astype(np.dtypes.StringDType()))
    fitted.save("~/filter.npz")
    load = filters.CharacteristicVectorFilter.load
    loaded = load("~/filter.npz", Net(), VARIABLES, mesh=ONE)
    np.testing.assert_array_equal(loaded.filter(X, NAMES[Y]).score, want().score)
    with pytest.raises(ValueError, match=r"images of \(8, 8, 3\)"):
        loaded.filter(np.zeros((18, 8, 8, 3)), NAMES[Y])
    for wrong in ({"margin": 0.1}, {"aply_kwargs": {}}):
        with pytest.raises(TypeError, match=f"not {next(iter(wrong))}"):
            load("~/filter.npz", Net(), VARIABLES, **wrong)
    path = tmp_path / "filter.npz"
    with np.load(path) as archive:
        entries = dict(archive)
    entries.pop("array_1")
    np.savez(path, **entries)
    with pytest.raises(ValueError, match=r"filter\.npz is not a readable filter: 'array_1'"):
        load(path, Net(), VARIABLES)


# NNX.


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def nnx_twin():
    """Returns the NNX network with the weights of the Linen one."""
    model, params, stats = NnxNet(nnx.Rngs(0)), VARIABLES["params"], VARIABLES["batch_stats"]
    for layer, name in (
        (model.conv, "Conv_0"),
        (model.norm, "BatchNorm_0"),
        (model.head, "Dense_0"),
    ):
        for kind, array in (params[name] | stats.get(name, {})).items():
            getattr(layer, kind)[...] = jnp.asarray(array)
    return model


def test_an_nnx_network_gives_what_the_same_weights_give_in_linen():
    model, linen = nnx_twin(), want()
    net = network.from_nnx(model)
    for given in (
        (model, None), (model, nnx.state(model)), (NnxNet(nnx.Rngs(1)), nnx.state(model)),
        (net, net.variables), (network.from_linen(Net()), VARIABLES),
    ):  # fmt: skip
        result = make(*given).fit_filter(X, Y)
        np.testing.assert_allclose(result.distances, linen.distances, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(result.is_poison, linen.is_poison)
    output, vectors = filters.apply_and_extract(net, net.variables, X)
    assert vectors.paths == ("norm",) and vectors.sizes == (36,)
    np.testing.assert_allclose(output, Net().apply(VARIABLES, X), rtol=1e-5, atol=1e-6)
    assert not model.norm.use_running_average  # the user's module stays as it was
    with pytest.raises(ValueError, match='stats="self" is for Flax Linen'):
        make(net, net.variables, stats="self").fit(X, Y)


# Widths, numbers of classes, extreme values, double precision.


def test_wide_features_have_the_components_of_a_singular_value_decomposition():
    x = np.random.default_rng(0).normal(size=(9, 300)).astype(np.float32)
    around = x - x.mean(0)
    u, s, _ = np.linalg.svd(around.astype(np.float64), full_matrices=False)
    found = principal_components(jnp.asarray(around), 12)
    np.testing.assert_allclose(np.abs(found[:, :8]), np.abs(u * s)[:, :8], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found[:, 8:], 0)  # nine points have eight directions


def test_no_matrix_of_features_by_features_is_made():
    x = np.random.default_rng(0).normal(size=(18, 30_000)).astype(np.float32)  # d x d: 3.6 GB
    x[:, 0] *= 1000  # a direction that is clearly the first
    wide, narrow = (
        filters.spectral_signatures(a, Y, poison_share=0.2)
        for a in (x, x @ np.linalg.qr(x.T.astype(np.float64))[0])
    )
    np.testing.assert_allclose(wide.score, narrow.score, rtol=1e-3)
    assert filters.activation_clustering(x, Y).is_poison.any()


def test_classes_of_all_sizes_come_back_in_their_order():
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(40), np.arange(1, 41)))
    x = np.random.default_rng(1).normal(size=(len(y), 3)).astype(np.float32)
    total, size = by_class(_sums, x, labels=y)
    sums = np.stack([x[y == label].sum(0) for label in range(40)])
    np.testing.assert_allclose(total, sums[y], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(size, y + 1)


def _sums(members, x):
    total = jnp.sum(jnp.where(members[:, None], x, 0), axis=0)
    return jnp.broadcast_to(total, x.shape), jnp.full(len(x), jnp.sum(members))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_features_whose_squares_leave_the_range_are_refused(scale):
    for detector in (*DETECTORS, filters.confident_learning):
        with pytest.raises(ValueError, match="float32 does not hold its square"):
            detector(scale * FEATURES, Y)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("exponent", [80, -80])
def test_distances_of_extreme_vectors_are_those_of_ordinary_ones(metric, exponent):
    vectors = make().extract(X)
    means = filters.CharVec(
        tuple(filters.Block(b.mean, 0 * b.var) for b in vectors.blocks), vectors.paths, (1,)
    )
    extreme = jax.tree.map(lambda a: a * np.float32(2.0**exponent), means)

    @jax.jit
    def distances(vectors):
        centroids = filters.fit_centroids(vectors, Y, 3, variance="mean")
        return filters.centroid_distances(vectors, centroids, metric=metric)

    unit = 1 if metric == "cosine" else np.float32(2.0**exponent)
    np.testing.assert_allclose(distances(extreme) / unit, distances(means), rtol=1e-5)


def test_activations_too_large_for_centroids_are_refused():
    vectors = jax.tree.map(lambda a: a * np.float32(2.0**100), make().extract(X))
    with pytest.raises(ValueError, match="the centroids are not finite"):
        make().fit(vectors, Y)


def test_labels_out_of_range_are_found():
    vectors = make().extract(X)
    wrong = np.where(np.arange(18) == 5, 3, Y)
    for call in (filters.fit_centroids, filters.filter_vectors):
        with pytest.raises(ValueError, match="label 3 of example 5"):
            call(vectors, wrong, 3)
        with pytest.raises(ValueError, match="expected integers"):
            call(vectors, Y + 0.5, 3)
    judged = jax.jit(filters.filter_vectors, static_argnums=2)(vectors, wrong, 3)
    assert np.isnan(judged.score).all() and judged.is_poison.all()
    centroids = filters.fit_centroids(vectors, Y, 3)
    score = jax.jit(filters.nearest_centroid_filter)(vectors, wrong, centroids).score
    assert np.flatnonzero(np.isnan(score)).tolist() == [5]


def test_all_filters_run_in_double_precision():
    with jax.enable_x64(True):
        for kwargs in ({}, {"metric": "z", "exclude_self": True}, {"estimator": "geometric_median"},
                       {"estimator": "trimmed", "metric": "l2"}, {"metric": "maha"}):  # fmt: skip
            result = make(**kwargs).fit_filter(X, Y)
            assert result.distances.dtype == np.float32
            if not kwargs:
                np.testing.assert_allclose(result.distances, want().distances, rtol=1e-5)
        make(centroids="trusted", tau=1.0, gamma="fisher").fit([(X, Y)], trusted=(X, Y))
        for detector in DETECTORS:
            assert detector(FEATURES, Y).score.dtype == np.float32


def test_modes_are_found_in_the_signature():
    class Strict(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return Net()(x, train)

    variables = {kind: {"Net_0": tree} for kind, tree in VARIABLES.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", filters.ContaminationWarning)
        same(make(Strict(), variables).fit_filter(X, Y))
