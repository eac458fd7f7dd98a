"""Characteristic vectors against float64 statistics of the same activations."""

import itertools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bn_networks import (
    ChannelsFirst,
    Convolutional,
    Dense,
    Frames,
    Norm,
    Padded,
    Shared,
    reference,
    tiny_resnet,
    variables_of,
)
from jax.sharding import NamedSharding, PartitionSpec

from jaxpoison import filters
from jaxpoison.core import devices
from jaxpoison.filters import extraction


def images(n=5, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 8, 6, 3)).astype(np.float32)


def extract(model, variables, x, **kwargs):
    return jax.jit(lambda v, x: filters.extract_charvec(model, v, x, **kwargs))(variables, x)


def assert_close(charvec, path, mean, var, rtol=1e-5):
    """Within `rtol` of the block's size: single means may be near 0."""
    block = charvec.blocks[charvec.paths.index(path)]
    for got, want in ((block.mean, mean), (block.var, var)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


NETWORKS = {
    "plain": (Convolutional(), 3, 48),
    "remat": (Convolutional("remat"), 3, 48),
    "jit": (Convolutional("jit"), 3, 48),
    "scan": (Convolutional("scan"), 3, 48),
    "axis_name": (Convolutional(norm=Norm(axis_name="data")), 3, 48),
    "shared": (Shared(), 2, 48),
    "channels_first": (ChannelsFirst(), 1, 48),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_are_those_of_float64_and_outputs_unchanged(name):
    model, num_layers, first_size = NETWORKS[name]
    x = images()
    variables = variables_of(model, x)
    output, charvec = jax.jit(lambda v, x: filters.apply_and_extract(model, v, x))(variables, x)
    plain = jax.jit(model.apply)(variables, x)
    np.testing.assert_array_equal(output, plain)
    assert len(charvec.blocks) == num_layers
    assert charvec.sizes[0] == first_size
    channels = 1 if name == "channels_first" else -1
    for path, calls in reference(model, variables, x).items():
        if name == "scan":
            (steps,) = calls
            calls = list(steps)
        for number, inputs in enumerate(calls):
            inputs = np.moveaxis(inputs, channels, -1).reshape(len(x), -1, 4)
            suffix = f"[{number}]" if name == "scan" else f"#{number + 1}" if number else ""
            layer = f"{path}/BatchNorm_0{suffix}"
            assert_close(charvec, layer, inputs.mean(1), inputs.var(1))


def test_a_resnet():  # every BatchNorm follows a convolution
    x = np.random.default_rng(0).random((3, 8, 8, 3), dtype=np.float32)
    variables = variables_of(tiny_resnet(), x)
    charvec = extract(tiny_resnet(), variables, x)
    with jax.enable_x64(True):
        wide = tiny_resnet(dtype=jnp.float64)
        doubled = jax.tree.map(lambda a: a.astype(np.float64), (variables, x))
        _, updates = jax.jit(
            lambda v, x: wide.apply(v, x, capture_intermediates=True, mutable=["intermediates"])
        )(*doubled)
        outputs = jax.tree.map(np.asarray, updates["intermediates"]["body"])
    block0, block1 = outputs["stage0_block0"], outputs["stage1_block0"]
    before = [  # in the order of the forward pass
        ("stem_norm", outputs["stem"]),
        ("stage0_block0/norm1", block0["conv1"]),
        ("stage0_block0/norm2", block0["conv2"]),
        ("stage1_block0/norm1", block1["conv1"]),
        ("stage1_block0/norm2", block1["conv2"]),
        ("stage1_block0/norm_shortcut", block1["conv_shortcut"]),
    ]
    assert charvec.paths == tuple(f"body/{path}" for path, _ in before)
    assert charvec.sizes == (64, 64, 64, 16, 16, 16)
    for path, intermediate in before:
        (array,) = intermediate["__call__"]
        assert_close(charvec, f"body/{path}", array.mean((1, 2)), array.var((1, 2)))
    assert charvec.ravel().shape == (3, 2 * (4 + 4 + 4 + 8 + 8 + 8))
    np.testing.assert_array_equal(charvec.ravel()[:, 4:8], charvec.blocks[0].var)


def test_bfloat16_activations_are_reduced_in_float32():
    x = 10 + 0.05 * images()  # a large mean: bfloat16 sums would lose the variance
    model = Norm()
    variables = model.init(jax.random.key(0), x, False)
    x = jnp.asarray(x, jnp.bfloat16)
    charvec = extract(model, variables, x, train=False)
    rounded = np.asarray(x, np.float64)
    assert_close(charvec, "BatchNorm_0", rounded.mean((1, 2)), rounded.var((1, 2)))


def test_variance_takes_two_passes():
    x = (10 + 0.05 * images()).astype(np.float32)
    model = Norm()
    charvec = extract(model, model.init(jax.random.key(0), x, False), x, train=False)
    want = x.astype(np.float64).var((1, 2))
    np.testing.assert_allclose(charvec.blocks[0].var, want, rtol=1e-5)
    one_pass = (x**2).mean((1, 2)) - x.mean((1, 2)) ** 2
    assert np.abs(one_pass / want - 1).max() > 1e-3  # what would go wrong


def test_dense_networks_have_one_position_and_no_variance():
    x = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    variables = variables_of(Dense(), x)
    charvec = extract(Dense(), variables, x)
    assert charvec.sizes == (1, 1)
    for path, (inputs,) in reference(Dense(), variables, x).items():
        assert_close(charvec, f"{path}/BatchNorm_0", inputs, np.zeros_like(inputs))


def test_merged_axes_are_taken_apart_again():
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 5, 2)).astype(np.float32)
    variables = variables_of(Frames(), x)
    output, charvec = jax.jit(lambda v, x: filters.apply_and_extract(Frames(), v, x))(variables, x)
    assert charvec.sizes == (4 * 5 * 5,)
    ((path, (inputs,)),) = reference(Frames(), variables, x).items()
    inputs = inputs.reshape(3, -1, 4)
    assert_close(charvec, f"{path}/BatchNorm_0", inputs.mean(1), inputs.var(1))
    np.testing.assert_allclose(output, jax.jit(Frames().apply)(variables, x), rtol=1e-5, atol=1e-6)


def test_padding_is_left_out_by_the_mask_of_the_layer():
    x = np.random.default_rng(0).standard_normal((4, 6, 2)).astype(np.float32)
    x[1, 3:] = 0
    variables = variables_of(Padded(), x)
    charvec = extract(Padded(), variables, x)
    ((path, (inputs,)),) = reference(Padded(), variables, x).items()
    kept = [inputs[0], inputs[1, :3], inputs[2], inputs[3]]
    mean, var = np.stack([a.mean(0) for a in kept]), np.stack([a.var(0) for a in kept])
    assert_close(charvec, f"{path}/BatchNorm_0", mean, var)


@pytest.mark.parametrize(("lift", "momentum"), [("none", 0.9), ("scan", 0.999)])
def test_self_statistics_are_the_update_of_a_batchnorm_without_momentum(lift, momentum):
    x = images(3)
    model, twin = (Convolutional(lift, Norm(momentum=m)) for m in (momentum, 0.0))
    variables = variables_of(model, x)
    charvec = extract(model, variables, x, stats="self", train=True)
    for n in range(len(x)):
        _, updates = jax.jit(lambda v, x: twin.apply(v, x, train=True, mutable=["batch_stats"]))(
            variables, x[n : n + 1]
        )
        want = updates["batch_stats"]
        for path, block in zip(charvec.paths, charvec.blocks, strict=True):
            name, _, step = path.partition("[")
            stats = want
            for part in name.split("/"):
                stats = stats[part]
            index = int(step[:-1]) if step else ...
            np.testing.assert_allclose(block.mean[n], stats["mean"][index], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(block.var[n], stats["var"][index], rtol=1e-6, atol=1e-6)


def test_self_statistics_of_a_shared_layer_are_kept_apart():
    x = images(2)
    variables = variables_of(Shared(), x)
    charvec = extract(Shared(), variables, x, stats="self", train=True)
    assert charvec.paths == ("Norm_0/BatchNorm_0", "Norm_0/BatchNorm_0#2")
    for n in range(2):  # the first call sees the input of the network that is not normalized yet
        calls = reference(Shared(), variables, x[n : n + 1])["Norm_0"]
        np.testing.assert_allclose(charvec.blocks[0].mean[n], calls[0].mean((0, 1, 2)), rtol=1e-5)
        assert np.abs(charvec.blocks[1].mean[n] - charvec.blocks[0].mean[n]).max() > 0.1


def test_under_vmap_grad_and_sharding():
    model, x = Convolutional(), images(8)
    variables = variables_of(model, x)
    want = extract(model, variables, x).ravel()
    stacked = jax.vmap(lambda x: filters.extract_charvec(model, variables, x))(
        x.reshape(2, 4, 8, 6, 3)
    )
    np.testing.assert_allclose(stacked.ravel().reshape(8, -1), want, rtol=1e-5, atol=1e-6)
    mesh = devices.data_mesh(jax.devices()[:4])
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    sharded = extract(model, devices.replicate(variables, mesh), placed)
    np.testing.assert_allclose(sharded.ravel(), want, rtol=1e-5, atol=1e-6)
    mapped = jax.jit(
        jax.shard_map(
            lambda v, x: filters.extract_charvec(model, v, x).ravel(),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec("data"),
        )
    )(variables, x)
    np.testing.assert_allclose(mapped, want, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    with jax.enable_x64(True):
        model, x = Convolutional(), images(2).astype(np.float64)
        variables = jax.tree.map(np.float64, variables_of(model, x))

        @jax.jit
        def value(x):
            return jnp.sum(jnp.sin(filters.extract_charvec(model, variables, x).ravel()))

        direction = images(2, seed=1)
        slope = jnp.sum(jax.jit(jax.grad(value))(x) * direction)
        step = 1e-6
        change = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(slope, change, rtol=1e-5)


def test_layers_that_were_compiled_before_are_measured_nevertheless():
    model, x = Convolutional("jit"), images(2)
    variables = variables_of(model, x)
    before = jax.jit(model.apply)(variables, x)
    first = extract(model, variables, x)
    again = extract(model, variables, x, predicate=lambda layer: isinstance(layer, nn.BatchNorm))
    np.testing.assert_array_equal(first.ravel(), again.ravel())
    assert first.paths == again.paths and len(first.paths) == 3
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, x), before)


def test_layers_that_a_stale_compilation_hides_are_an_error(monkeypatch):
    model, x = Convolutional("jit"), images(2)
    variables = variables_of(model, x)
    monkeypatch.setattr(extraction, "_trace_numbers", itertools.repeat("stale"))
    model.apply(variables, x, mutable=["characteristic_stale"])  # as if it had been seen before
    with pytest.raises(ValueError, match="was compiled before the extraction"):
        filters.extract_charvec(model, variables, x)


def test_a_network_without_batchnorm_needs_a_predicate():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.Dense(4)(x)).mean(1)

    x = np.random.default_rng(0).standard_normal((3, 5, 2)).astype(np.float32)
    variables = Other().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="predicate=lambda layer"):
        filters.extract_charvec(Other(), variables, x)
    charvec = extract(Other(), variables, x, predicate=lambda m: isinstance(m, nn.LayerNorm))
    tokens = x @ np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    assert_close(charvec, "LayerNorm_0", tokens.mean(1), tokens.var(1))


class Bound(nn.Module):
    """Scans a block of which nothing but parameters is lifted."""

    axes: dict | None = None

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.LayerNorm()(nn.Dense(2)(x)), None

        axes = {"params": 0, **(self.axes or {})}
        return nn.scan(Step, axes, length=2, split_rngs={"params": True})()(x, None)[0]


def test_a_scan_that_returns_nothing_is_an_error_that_says_what_to_lift():
    x = np.random.default_rng(0).standard_normal((3, 5, 2)).astype(np.float32)
    predicate = lambda layer: isinstance(layer, nn.LayerNorm)  # noqa: E731
    variables = Bound().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"variable_axes=\{'batch_stats': 0\}"):
        filters.extract_charvec(Bound(), variables, x, predicate=predicate)
    charvec = extract(Bound({"batch_stats": 0}), variables, x, predicate=predicate)
    assert [path[-3:] for path in charvec.paths] == ["[0]", "[1]"]


def test_a_scan_that_shares_its_statistics_between_steps_is_an_error():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.BatchNorm(True)(x), None

    class Shares(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = ("params", "batch_stats")
            rngs = {"params": False}
            scanned = nn.scan(Step, variable_broadcast=shared, split_rngs=rngs, length=2)
            return scanned()(x, None)[0]

    x = images(2)
    variables = Shares().init(jax.random.key(0), x)
    Shares().apply(variables, x)
    with pytest.raises(ValueError, match="nothing can be returned from the layers ScanStep_0"):
        filters.extract_charvec(Shares(), variables, x)


def test_the_wrong_mode_is_an_error():
    model, x = Convolutional(), images(2)
    variables = variables_of(model, x)
    with pytest.raises(ValueError, match=r"runs in training mode.*train=False"):
        filters.extract_charvec(model, variables, x, train=True)
    with pytest.raises(ValueError, match=r"runs in evaluation mode.*train=True"):
        filters.extract_charvec(model, variables, x, stats="self")
    with pytest.raises(ValueError, match="mutable= is set by the extraction"):
        filters.extract_charvec(model, variables, x, mutable=["batch_stats"])
    with pytest.raises(ValueError, match='stats must be "input" or "self"'):
        filters.extract_charvec(model, variables, x, stats="train")
    synchronised = Convolutional(norm=Norm(axis_name="data"))
    with pytest.raises(ValueError, match="without axis_name"):
        filters.extract_charvec(synchronised, variables, x, stats="self", train=True)


def test_layers_that_are_not_called_or_not_known_are_left_out_with_a_warning():
    class Homemade(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1])
            var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1])
            return (x - mean.value) / jnp.sqrt(var.value)

    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x, deep=True):
            x = Homemade()(nn.BatchNorm(True)(x))
            return nn.BatchNorm(True, name="late")(x) if deep else x

    x = images(2)
    variables = Mixed().init(jax.random.key(0), x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        charvec = filters.extract_charvec(Mixed(), variables, x, deep=False)
    assert charvec.paths == ("BatchNorm_0",)
    assert "does not call are left out: late" in str(seen[0].message)
    assert "no nn.BatchNorm are left out: Homemade_0" in str(seen[1].message)


def test_an_axis_of_examples_is_no_axis_of_channels():
    x = images(2)
    model = nn.BatchNorm(True, axis=0)
    with pytest.raises(ValueError, match="axis 0 is that of the examples"):
        filters.extract_charvec(model, model.init(jax.random.key(0), x), x)
