"""`jaxpoison.network`: one set of functions for models of every kind, checked against each other.

The stranger's network is written twice, in Linen and in NNX, and runs on the same weights.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxpoison import models, network
from jaxpoison.core import devices

SHAPE = (8, 8, 3)
IMAGES = jax.random.uniform(jax.random.key(0), (6, *SHAPE))


class LinenBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, training):
        y = nn.Conv(self.width, (3, 3), name="conv")(x)
        y = nn.BatchNorm(use_running_average=not training, momentum=0.9, name="norm")(y)
        return nn.relu(y) + nn.Conv(self.width, (1, 1), name="shortcut")(x)


class LinenStranger(nn.Module):
    """A residual network with a hidden layer before its head."""

    widths: tuple[int, ...] = (4, 6)

    @nn.compact
    def __call__(self, x, *, training):
        for number, width in enumerate(self.widths):
            x = LinenBlock(width, name=f"block{number}")(x, training)
        x = nn.relu(nn.Dense(5, name="hidden")(x.mean(axis=(1, 2))))
        return nn.Dense(3, name="classifier")(x)


class NnxBlock(nnx.Module):
    def __init__(self, inputs, width, rngs):
        self.conv = nnx.Conv(inputs, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.shortcut = nnx.Conv(inputs, width, (1, 1), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x))) + self.shortcut(x)


class NnxStranger(nnx.Module):
    """`LinenStranger` in NNX."""

    def __init__(self, rngs, dropout=0.0):
        self.blocks = nnx.List([NnxBlock(3, 4, rngs), NnxBlock(4, 6, rngs)])
        self.hidden = nnx.Linear(6, 5, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.classifier = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.dropout(nnx.relu(self.hidden(x.mean(axis=(1, 2))))))


def to_nnx(variables):
    """Returns Linen's variables under NNX's names."""

    def renamed(tree):
        blocks = {name[5:]: part for name, part in tree.items() if name.startswith("block")}
        others = {name: part for name, part in tree.items() if not name.startswith("block")}
        return {"blocks": blocks, **others}

    return {name: renamed(tree) for name, tree in variables.items()}


def linear_apply(params, images):
    return linear_features(params, images) @ params["w"] + params["b"]


def linear_features(params, images):
    return jnp.tanh(images.mean(axis=(1, 2)) @ params["v"])


def linear_head(params):
    return {"kernel": params["w"], "bias": params["b"]}


def linear_with_head(params, head):
    return {**params, "w": head["kernel"], "b": head["bias"]}


def classifier():
    return models.resnet18(width=4, blocks=(1, 1), num_classes=3)


def functions(**changes):
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        "v": jax.random.normal(keys[0], (3, 5)),
        "w": jax.random.normal(keys[1], (5, 3)),
        "b": jax.random.normal(keys[2], (3,)),
    }
    arguments = {"features": linear_features, "head": linear_head, "with_head": linear_with_head}
    return network.from_functions(linear_apply, params, **{**arguments, **changes})


KINDS = {
    "classifier": classifier,
    "linen": LinenStranger,
    "nnx": lambda: NnxStranger(nnx.Rngs(0)),
    "functions": functions,
}


def moved(tree):
    """Returns `tree` away from its initial zeros and ones, variances positive."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return structure.unflatten(
        [x + jax.random.uniform(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@functools.cache
def made(kind):
    net = network.as_network(KINDS[kind](), image_shape=SHAPE)
    return net, moved(net.init(jax.random.key(2), SHAPE))


@functools.cache
def pair():
    """The stranger's network in Linen and in NNX, with the same weights."""
    linen, variables = made("linen")
    return (linen, variables), (made("nnx")[0], to_nnx(variables))


def close(found, expected, tolerance=1e-6):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_features_times_head(kind):
    net, variables = made(kind)
    features, head = net.features(variables, IMAGES), net.head(variables)
    assert (net.num_classes, net.num_features) == (3, features.shape[1])
    close(net.logits(variables, IMAGES), features @ head["kernel"] + head["bias"], 1e-5)
    zero = jax.tree.map(jnp.zeros_like, head)
    other = net.with_head(variables, zero)
    assert jax.tree.structure(other) == jax.tree.structure(variables)
    close(net.logits(other, IMAGES), jnp.zeros((6, 3)))
    close(net.head(other), zero)
    assert jnp.any(net.head(variables)["kernel"] != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_equal_models_are_equal(kind):
    one = network.as_network(KINDS[kind](), image_shape=SHAPE)
    other = network.as_network(KINDS[kind](), image_shape=SHAPE)
    assert one == other
    assert hash(one) == hash(other)
    assert one != made("nnx" if kind == "classifier" else "classifier")[0]
    assert one.without_variables().variables is None
    assert one.without_variables() == one


@pytest.mark.parametrize("kind", KINDS)
def test_methods_may_be_transformed(kind):
    net, variables = made(kind)
    expected = net.logits(variables, IMAGES)
    compiled = jax.jit(lambda net, v, x: net.logits(v, x), static_argnums=0)
    close(compiled(net, variables, IMAGES), expected, 1e-5)
    single = jax.vmap(lambda x: net.logits(variables, x[None])[0])(IMAGES)
    close(single, expected, 1e-5)
    mesh = devices.data_mesh(jax.devices()[:2])
    data = PartitionSpec(devices.EXAMPLES)
    spread = jax.jit(
        jax.shard_map(net.logits, mesh=mesh, in_specs=(PartitionSpec(), data), out_specs=data)
    )
    close(spread(variables, IMAGES), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_slopes(kind):
    net, variables = made(kind)

    def loss(params):
        return jnp.sum(net.logits({**variables, "params": params}, IMAGES) ** 2)

    gradient = jax.grad(loss)(variables["params"])
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, variables["params"])
    logits = net.logits(variables, IMAGES)
    close(
        net.head({**variables, "params": gradient})["kernel"],
        2 * net.features(variables, IMAGES).T @ logits,
        1e-4,
    )


def test_classifier_runs_the_module_itself():
    net, variables = made("classifier")
    module, rngs = classifier(), {"dropout": jax.random.key(3)}
    assert jnp.array_equal(net.logits(variables, IMAGES), module.apply(variables, IMAGES))
    features = module.apply(variables, IMAGES, method="features")
    assert jnp.array_equal(net.features(variables, IMAGES), features)
    logits, updates = module.apply(
        variables, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs
    )
    found, updated = net.train_logits(variables, IMAGES, rngs=rngs)
    assert jnp.array_equal(found, logits)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, updated, updates))
    assert (net.mean, net.std) == (module.mean, module.std)
    fresh = net.init(jax.random.key(4), SHAPE)
    expected = jax.jit(module.init)(jax.random.key(4), jnp.zeros((1, *SHAPE)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, fresh, expected))


def test_dropout_follows_rngs():
    rngs = {"dropout": jax.random.key(3)}
    linen = network.as_network(models.resnet18(width=4, blocks=(1,), num_classes=3, dropout=0.5))
    nnx_net = network.as_network(NnxStranger(nnx.Rngs(0), dropout=0.5), image_shape=SHAPE)
    for net in (linen, nnx_net):
        variables = moved(net.init(jax.random.key(0), SHAPE))
        still = net.logits(variables, IMAGES)
        drawn = net.logits(variables, IMAGES, rngs=rngs)
        assert jnp.max(jnp.abs(drawn - still)) > 1e-3
        assert jnp.array_equal(drawn, net.logits(variables, IMAGES, rngs=rngs))
        other = net.logits(variables, IMAGES, rngs={"dropout": jax.random.key(4)})
        assert jnp.max(jnp.abs(drawn - other)) > 1e-3
        trained = net.train_logits(variables, IMAGES)[0]
        dropped = net.train_logits(variables, IMAGES, rngs=rngs)[0]
        assert jnp.array_equal(trained, net.train_logits(variables, IMAGES)[0])
        assert jnp.max(jnp.abs(trained - dropped)) > 1e-3


def test_nnx_agrees_with_linen():
    (linen, variables), (net, own) = pair()
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, net.variables)
    close(net.logits(own, IMAGES), linen.logits(variables, IMAGES))
    close(net.features(own, IMAGES), linen.features(variables, IMAGES))
    logits, updated = linen.train_logits(variables, IMAGES)
    found, own_updated = net.train_logits(own, IMAGES)
    close(found, logits)
    close(own_updated, to_nnx(updated))
    # In closed form: the first layer's running mean moves to that of the batch.
    first = variables["params"]["block0"]["conv"]
    inputs = nn.Conv(4, (3, 3)).apply({"params": first}, IMAGES)
    old = variables["batch_stats"]["block0"]["norm"]["mean"]
    new = own_updated["batch_stats"]["blocks"]["0"]["norm"]["mean"]
    close(new, 0.9 * old + 0.1 * inputs.mean(axis=(0, 1, 2)), 1e-5)
    assert jnp.max(jnp.abs(found - net.logits(own, IMAGES))) > 1e-3


def test_taps_are_the_layers_inputs():
    (linen, variables), (net, own) = pair()
    output, expected = linen.taps(variables, IMAGES)
    close(output, linen.logits(variables, IMAGES))
    assert list(expected) == ["block0/norm", "block1/norm"]
    first = variables["params"]["block0"]["conv"]
    close(expected["block0/norm"], nn.Conv(4, (3, 3)).apply({"params": first}, IMAGES), 1e-5)
    output, found = net.taps(own, IMAGES)
    assert list(found) == ["blocks/0/norm", "blocks/1/norm"]
    close(output, linen.logits(variables, IMAGES))
    close(list(found.values()), list(expected.values()))
    compiled = jax.jit(net.taps)(own, IMAGES)[1]
    close(compiled, found, 1e-5)
    _, dense = net.taps(own, IMAGES, select=lambda layer: isinstance(layer, nnx.Linear))
    close(dense["classifier"], net.features(own, IMAGES))
    assert list(dense) == ["hidden", "classifier"]


class NnxShared(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.again = self.linear

    def __call__(self, x):
        return self.linear(self.again(x.mean(axis=(1, 2))))


class LinenShared(nn.Module):
    @nn.compact
    def __call__(self, x):
        linear = nn.Dense(3, name="linear")
        return linear(linear(x.mean(axis=(1, 2))))


@pytest.mark.parametrize("model", [NnxShared(nnx.Rngs(0)), LinenShared()], ids=["nnx", "linen"])
def test_shared_layers_have_one_tap_for_each_call(model):
    net = network.as_network(model, image_shape=SHAPE)
    variables = net.init(jax.random.key(0), SHAPE) if net.variables is None else net.variables
    output, found = net.taps(
        variables, IMAGES, select=lambda x: isinstance(x, (nnx.Linear, nn.Dense))
    )
    (_, first), (_, second) = found.items()
    head = net.head(variables)
    close(first, IMAGES.mean(axis=(1, 2)))
    close(second, first @ head["kernel"] + head["bias"])
    close(net.features(variables, IMAGES), second)
    assert [name.split("#")[1:] for name in found] == [[], ["2"]]
    close(output, second @ head["kernel"] + head["bias"])


def test_record_sees_layer_and_arguments():
    net, variables = made("nnx")
    seen = []
    net.tapped(variables, IMAGES, lambda *call: seen.append(call), select=network.is_batch_norm)
    assert [call[0] for call in seen] == ["blocks/0/norm", "blocks/1/norm"]
    assert all(isinstance(call[1], nnx.BatchNorm) and call[3] == {} for call in seen)


def test_the_users_nnx_model_is_not_touched():
    model = NnxStranger(nnx.Rngs(0), dropout=0.5)
    graphdef, before = nnx.split(model)
    before = jax.tree.map(jnp.array, nnx.to_pure_dict(before))
    net = network.as_network(model, image_shape=SHAPE)
    net.train_logits(net.variables, IMAGES, rngs={"dropout": jax.random.key(0)})
    net.taps(net.variables, IMAGES)
    now, after = nnx.split(model)
    assert now == graphdef
    assert type(model.blocks[0].norm) is nnx.BatchNorm
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, nnx.to_pure_dict(after)))
    model.eval()
    assert network.as_network(model, image_shape=SHAPE) == net
    close(net.logits(net.variables, IMAGES), model(IMAGES))


def test_many_parts_keep_their_order():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(12)])

        def __call__(self, x):
            x = x.mean(axis=(1, 2))
            for layer in self.layers:
                x = layer(x)
            return x

    model = Deep(nnx.Rngs(0))
    net = network.as_network(model, image_shape=SHAPE)
    close(net.logits(net.variables, IMAGES), model(IMAGES))
    assert net.head_path == ("layers", "11")


def test_init_of_nnx():
    model = NnxStranger(nnx.Rngs(0))
    kept = network.from_nnx(model)
    started = kept.init(jax.random.key(5), SHAPE)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, started, kept.variables))
    fresh = network.from_nnx(model, init=lambda key: NnxStranger(nnx.Rngs(key)))
    one, other = (fresh.init(jax.random.key(seed), SHAPE) for seed in (0, 1))
    assert jax.tree.structure(one) == jax.tree.structure(kept.variables)
    assert jnp.any(one["params"]["hidden"]["kernel"] != other["params"]["hidden"]["kernel"])
    with pytest.raises(ValueError, match="outside"):
        jax.jit(lambda key: kept.init(key, SHAPE))(jax.random.key(0))
    with pytest.raises(ValueError, match="give from_nnx an init="):
        kept.without_variables().init(jax.random.key(0), SHAPE)
    wrong = network.from_nnx(model, init=lambda key: NnxShared(nnx.Rngs(key)))
    with pytest.raises(ValueError, match="params/classifier/kernel"):
        wrong.init(jax.random.key(0), SHAPE)


def test_init_is_the_same_under_any_transformation():
    """Alone it is compiled in another way than as a part of other programs."""
    net = network.as_network(LinenStranger(), image_shape=SHAPE)
    keys = jax.random.split(jax.random.key(3), 2)
    first = keys[0]

    def init(key):
        return net.init(key, SHAPE)

    apart = [init(key) for key in keys]
    close(jax.vmap(init)(keys), jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart))
    close(jax.jit(init)(first), apart[0])
    close(jax.jit(lambda: init(first))(), apart[0])  # no argument is a tracer
    nnx_net = network.from_nnx(
        NnxStranger(nnx.Rngs(0)), init=lambda key: NnxStranger(nnx.Rngs(key))
    )
    close(jax.jit(lambda: nnx_net.init(first, SHAPE))(), nnx_net.init(first, SHAPE))


def test_normalization_and_preprocessing():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.1, 0.3)

    def darker(images):
        return images / 2

    module = LinenStranger()
    net = network.from_linen(module, mean=mean, std=std, preprocess=darker)
    variables = made("linen")[1]
    seen = (IMAGES / 2 - jnp.array(mean)) / jnp.array(std)
    expected = module.apply(variables, seen, training=False)
    close(net.logits(variables, IMAGES), expected)
    own = network.from_nnx(NnxStranger(nnx.Rngs(0)), mean=mean, std=std, preprocess=darker)
    close(own.logits(to_nnx(variables), IMAGES), expected, 1e-5)
    assert own.mean == mean


TRACES: list[int] = []


def counted(net, factor, constants, batch):
    TRACES.append(1)
    return factor * net.logits(constants, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_networks_share_what_is_compiled(kind):
    variables = made(kind)[1]
    TRACES.clear()
    for _ in range(2):
        net = network.as_network(KINDS[kind](), image_shape=SHAPE)
        run = network.over_set(counted, net, 2.0, batch_size=8)
        found = run(variables, IMAGES)
    traces = len(TRACES)
    network.over_set(counted, net, 2.0, batch_size=8)(variables, IMAGES)
    assert len(TRACES) == traces > 0
    close(found, 2 * net.logits(variables, IMAGES), 1e-5)
    again = network.over_set(
        counted, network.as_network(KINDS[kind](), image_shape=SHAPE), 2.0, batch_size=8
    )
    assert again is run


@pytest.mark.parametrize("kind", KINDS)
def test_passes_over_a_set(kind):
    net, variables = made(kind)
    images = np.random.default_rng(0).integers(0, 256, (11, *SHAPE), np.uint8)
    scaled = jnp.asarray(images / np.float32(255))
    model = net if kind == "functions" else KINDS[kind]()
    logits = network.logits(model, variables, images, batch_size=8)
    close(logits, net.logits(variables, scaled), 1e-5)
    found = network.features(model, variables, scaled, batch_size=8)
    close(found, net.features(variables, scaled), 1e-5)
    predicted = network.predict(model, variables, images)
    assert predicted.dtype == jnp.int32
    assert jnp.array_equal(predicted, jnp.argmax(logits, axis=-1))


def summed(net, constants, carry, batch, present):
    logits = net.logits(constants, batch)
    return carry + jnp.sum(jnp.where(present[:, None], logits, 0), axis=0), logits[:, 0]


def test_folding_over_a_set():
    net, variables = made("functions")
    run = network.folded_over_set(summed, net, batch_size=4)
    total, first = run(variables, jnp.zeros(3), IMAGES)
    logits = net.logits(variables, IMAGES)
    close(total, logits.sum(axis=0), 1e-5)
    close(first, logits[:, 0], 1e-5)


def test_what_cannot_be_shared():
    with pytest.raises(ValueError, match="inside a function"):
        network.over_set(lambda net, constants, batch: batch, made("functions")[0])
    with pytest.raises(ValueError, match="inside a function"):
        network.shared(lambda: 1)
    assert network.shared(list, [1]) == [1]  # a list has no hash: made at each call


def test_the_cache_keeps_no_weights():
    net = made("nnx")[0]
    assert net.variables is not None
    assert network.shared(identity, net).variables is None


def identity(value):
    return value


class Softmax(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.softmax(nn.Dense(3, name="fc")(x.mean(axis=(1, 2))))


class NnxSoftmax(NnxShared):
    def __call__(self, x):
        return nnx.softmax(super().__call__(x))


class Half(nn.Module):
    """A compiled, rematerialized head without bias, cast at the end."""

    @nn.compact
    def __call__(self, x):
        block = nn.jit(nn.remat(nn.Dense))(3, use_bias=False, name="fc")
        return block(x.mean(axis=(1, 2)).astype(jnp.float32)).astype(jnp.float32)


def test_a_compiled_head_without_bias():
    net = network.as_network(Half(), image_shape=SHAPE)
    variables = net.init(jax.random.key(0), SHAPE)
    assert variables["batch_stats"] == {}
    head = net.head(variables)
    assert list(head) == ["kernel"]
    close(net.logits(variables, IMAGES), net.features(variables, IMAGES) @ head["kernel"])
    with pytest.raises(ValueError, match="kernel, bias"):
        net.with_head(variables, {**head, "bias": jnp.zeros(3)})


@pytest.mark.parametrize("model", [Softmax(), NnxSoftmax(nnx.Rngs(0))], ids=["linen", "nnx"])
def test_something_after_the_last_layer(model):
    net = network.as_network(model, image_shape=SHAPE)
    assert (net.num_classes, net.num_features) == (3, None)
    variables = net.init(jax.random.key(0), SHAPE)
    close(net.logits(variables, IMAGES).sum(axis=1), jnp.ones(6))
    for ask in (lambda: net.head(variables), lambda: net.features(variables, IMAGES)):
        with pytest.raises(ValueError, match="let it return the logits"):
            ask()


def test_the_head_may_be_named():
    net = network.from_linen(LinenStranger(), head="classifier")
    variables = made("linen")[1]
    close(net.head(variables)["bias"], variables["params"]["classifier"]["bias"])
    assert net.for_images(SHAPE) == made("linen")[0]
    with pytest.raises(ValueError, match="hidden, classifier"):
        network.from_linen(LinenStranger(), head="fc").for_images(SHAPE)
    unsure = network.from_linen(LinenStranger())
    with pytest.raises(ValueError, match="image_shape"):
        unsure.head(variables)
    close(unsure.features(variables, IMAGES), net.features(variables, IMAGES))
    hidden = network.from_nnx(NnxStranger(nnx.Rngs(0)), head="hidden").for_images(SHAPE)
    with pytest.raises(ValueError, match="let it return the logits"):
        hidden.head(hidden.variables)


def test_the_mode_must_be_clear():
    class Strange(nn.Module):
        @nn.compact
        def __call__(self, x, phase):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=phase == "predict")(x).mean((1, 2)))

    with pytest.raises(ValueError, match="train_kwargs="):
        network.from_linen(Strange())
    net = network.from_linen(
        Strange(), train_kwargs={"phase": "fit"}, eval_kwargs={"phase": "predict"}
    )
    variables = net.init(jax.random.key(0), SHAPE)
    _, updated = net.train_logits(variables, IMAGES)
    close(updated["batch_stats"]["BatchNorm_0"]["mean"], 0.01 * IMAGES.mean((0, 1, 2)), 1e-5)
    swapped = network.from_linen(
        Strange(), train_kwargs={"phase": "predict"}, eval_kwargs={"phase": "fit"}
    )
    with pytest.raises(ValueError, match="in evaluation mode"):
        swapped.logits(variables, IMAGES)

    class Moded(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x.mean((1, 2)))

    with pytest.raises(ValueError, match="argument of __call__"):
        network.from_linen(Moded(train=True))


def test_nnx_modes_that_are_arguments():
    class Ported(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.fc = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x, train):
            return self.fc(self.norm(x, use_running_average=not train).mean((1, 2)))

    net = network.as_network(Ported(nnx.Rngs(0)), image_shape=SHAPE)
    _, updated = net.train_logits(net.variables, IMAGES)
    close(updated["batch_stats"]["norm"]["mean"], 0.01 * IMAGES.mean((0, 1, 2)), 1e-5)
    wrong = network.from_nnx(
        Ported(nnx.Rngs(0)), train_kwargs={"train": False}, eval_kwargs={"train": True}
    )
    with pytest.raises(ValueError, match="in evaluation mode"):
        wrong.logits(net.variables, IMAGES)


def test_inputs_that_cannot_leave_the_model():
    class Compiled(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.fc = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return self.fc(nnx.remat(lambda norm, x: norm(x))(self.norm, x).mean((1, 2)))

    net = network.as_network(Compiled(nnx.Rngs(0)), image_shape=SHAPE)
    with pytest.raises(ValueError, match="inputs of norm"):
        net.taps(net.variables, IMAGES)
    head = net.head(net.variables)
    expected = net.features(net.variables, IMAGES) @ head["kernel"] + head["bias"]
    close(net.logits(net.variables, IMAGES), expected, 1e-5)

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(layer, carry, _):
                return layer(carry), None

            layer = nn.Dense(3, name="layer")
            loop = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return nn.Dense(3, name="fc")(loop(layer, x.mean((1, 2)), None)[0])

    linen = network.from_linen(Scanned())
    variables = linen.init(jax.random.key(0), SHAPE)
    with pytest.raises(ValueError, match="inputs of layer"):
        linen.taps(variables, IMAGES, select=lambda layer: isinstance(layer, nn.Dense))


def test_functions_that_were_not_given():
    net = functions(features=None, head=None, with_head=None)
    variables = net.variables
    close(net.logits(variables, IMAGES), made("functions")[0].logits(variables, IMAGES))
    with pytest.raises(ValueError, match="features="):
        net.features(variables, IMAGES)
    with pytest.raises(ValueError, match="head="):
        net.head(variables)
    with pytest.raises(ValueError, match="with_head="):
        net.with_head(variables, {})
    with pytest.raises(ValueError, match="no layers"):
        net.taps(variables, IMAGES)
    with pytest.raises(TypeError, match="apply must be a function"):
        network.from_functions(None, {})
    noisy = functions(train_apply=lambda params, x, rngs: linear_apply(params, x) + 1)
    close(noisy.train_logits(variables, IMAGES)[0], net.logits(variables, IMAGES) + 1)
    with pytest.raises(ValueError, match="num_classes = 4"):
        functions(num_classes=4).for_images(SHAPE)


def test_what_is_no_network():
    with pytest.raises(TypeError, match=r"LinenStranger\(...\)"):
        network.as_network(LinenStranger)
    with pytest.raises(TypeError, match="from_functions"):
        network.as_network(linear_apply)
    with pytest.raises(TypeError, match=r"flax\.nnx\.Module"):
        network.from_nnx(LinenStranger())
    with pytest.raises(ValueError, match="leave the other arguments out"):
        network.from_linen(classifier(), head="head")

    class Arrays(LinenStranger):
        table: object = None

    with pytest.raises(ValueError, match="table is an array"):
        network.from_linen(Arrays(table=np.zeros(2)))

    class Pair(LinenStranger):
        def __call__(self, x, *, training):
            return x, x

    with pytest.raises(ValueError, match=r"\[B, K\]"):
        network.from_linen(Pair()).for_images(SHAPE)
    with pytest.raises(ValueError, match=r"expected \[N, H, W, C"):
        network.logits(made("nnx")[0], {}, jnp.zeros((3, 3)))


class NnxScanned(nnx.Module):
    """Three residual blocks stacked in one, scanned over."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return NnxBlock(3, 3, rngs)

        self.blocks = blocks(rngs)
        self.fc = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.fc(run(self.blocks, x).mean(axis=(1, 2)))


def test_a_scanned_nnx_model():
    model = NnxScanned(nnx.Rngs(0))
    net = network.as_network(model, image_shape=SHAPE)
    variables = net.variables
    head, features = net.head(variables), net.features(variables, IMAGES)
    close(net.logits(variables, IMAGES), features @ head["kernel"] + head["bias"], 1e-5)
    _, updated = net.train_logits(variables, IMAGES)
    mean = updated["batch_stats"]["blocks"]["norm"]["mean"]
    assert mean.shape == (3, 3)
    assert jnp.all(jnp.any(mean != 0, axis=1))
    with pytest.raises(ValueError, match="inputs of blocks/norm"):
        net.taps(variables, IMAGES)
