"""What every defense owes: compiled once, at home in 64 bits, refusals before any work."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import Normed, classifier, one_device

from jaxpoison import defenses, network, training
from jaxpoison.core import devices
from jaxpoison.data import Dataset
from jaxpoison.defenses import AblConfig, EpicConfig, FatConfig, FriendsConfig, HintConfig
from jaxpoison.training import TrainState
from jaxpoison.training.hooks import keep_batch, with_ids

K, SHAPE = 3, (4, 4, 3)
RECIPE = training.Recipe(epochs=3, batch_size=8, milestones=(), max_shift=0.0, flip=False)
HINT = HintConfig(gamma=0.5, schedule=(1, 2))
TRACES = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: TRACES.append(event) if "trace" in event else None
)


def model():
    return classifier(Normed(2), K, mean=(0.5,), std=(0.3,))


def random_set(num_examples, seed=0, shape=SHAPE):
    images = np.random.default_rng(seed).random((num_examples, *shape), np.float32)
    return Dataset(images, (np.arange(num_examples) % K).astype(np.int32))


TRAIN, TRUSTED = random_set(24), random_set(6, 1)


MAKE = {
    "hint": lambda: defenses.hint(model(), TRUSTED, HINT, mesh=one_device()),
    "friends": lambda: defenses.friends(
        model(), FriendsConfig(epoch=1, num_steps=2), mesh=one_device()
    ),
    "epic": lambda: defenses.epic(
        model(), EpicConfig(fraction=0.5, start=1, every=1), mesh=one_device()
    ),
    "adversarial_training": lambda: defenses.adversarial_training(
        model(), FatConfig(num_steps=1, tau_epochs=[1, 2])
    ),
    "random_noise": lambda: defenses.random_noise(0.1, "uniform"),
    "fixed_noise": lambda: defenses.fixed_noise(0.1, 0.5),
    "jpeg": defenses.jpeg,
    "gray": defenses.gray,
    "bit_depth": defenses.bit_depth,
    "orthogonal_projection": defenses.orthogonal_projection,
    "ueraser": lambda: defenses.ueraser(model(), 2),
    "mixup": lambda: defenses.mixup(K),
    "cutmix": lambda: defenses.cutmix(K),
    "anti_backdoor": lambda: defenses.anti_backdoor(
        model(), AblConfig(turn=1, ratio=0.2), mesh=one_device()
    ),
    "add_trusted": lambda: defenses.add_trusted(TRUSTED, mesh=one_device()),
    "recommended": lambda: defenses.recommended(TRUSTED, mesh=one_device()),
    "refit_head": lambda: defenses.refit_head(
        model(), TRUSTED, training.HeadRecipe(epochs=2, milestones=())
    ),
}


@functools.cache
def state():
    variables = model().init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    return TrainState(jnp.int32(0), variables["params"], variables["batch_stats"], ())


def call_hooks(defense):
    """Returns the images of an epoch and of a batch, its labels, and the last weights."""
    mesh = one_device()
    dataset, given = devices.replicate((with_ids(TRAIN), state()), mesh)
    own = defense.init(jax.random.key(1), dataset, 3)
    own, dataset, _ = defense.on_epoch(own, 1, given, dataset)
    batch = Dataset(jnp.asarray(TRAIN.images[:8]), jnp.asarray(TRAIN.labels[:8]))
    batch = defense.on_batch(own, jax.random.key(2), given, batch)
    return dataset, batch, defense.finish(own, given)


@pytest.mark.parametrize("name", MAKE)
def test_a_factory_called_twice_compiles_nothing_twice(name):
    first = MAKE[name]()
    call_hooks(first)
    before = len(TRACES)
    second = MAKE[name]()
    # A network outside of `jit` is traced.
    if name in ("adversarial_training", "ueraser", "anti_backdoor"):
        assert second.on_batch == first.on_batch
        second = second._replace(on_batch=keep_batch)
    call_hooks(second)
    assert len(TRACES) == before > 0
    # `training.fit` keeps its compiled step by the hook that is traced into it.
    assert MAKE[name]().on_batch == first.on_batch
    assert hash(MAKE[name]().on_batch) == hash(first.on_batch)


def test_other_settings_are_another_hook():
    one, other = (defenses.random_noise(size).on_batch for size in (0.1, 0.2))
    assert one != other
    one, other = (
        defenses.adversarial_training(model(), FatConfig(epsilon=size)).on_batch
        for size in (0.1, 0.2)
    )
    assert one != other


@pytest.mark.parametrize("name", MAKE)
def test_64_bits_change_no_type(name):
    with jax.enable_x64(True):
        dataset, batch, finished = call_hooks(MAKE[name]())
    assert dataset.images.dtype in (np.float32, np.uint8)
    assert (dataset.labels.dtype, dataset.ids.dtype) == (np.int32, np.int32)
    assert batch.images.dtype == np.float32 and batch.labels.dtype in (np.int32, np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(finished.params)} == {np.dtype(np.float32)}


def test_all_defenses_in_one_run_of_64_bits():
    names = [name for name in MAKE if name not in ("recommended", "cutmix")]
    with jax.enable_x64(True):
        defense = defenses.chain(*(MAKE[name]() for name in names))
        end = training.fit(
            model(), RECIPE, TRAIN, key=jax.random.key(0), defense=defense, mesh=one_device()
        )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(end.params))


def never(epochs_of_run):
    raise AssertionError("training began")


@pytest.mark.parametrize(
    ("make", "num_epochs", "message"),
    [
        (
            lambda: defenses.hint(model(), TRUSTED),
            5,
            "HINT acts before epoch 5, 15, 40 ",
        ),
        (lambda: defenses.friends(model()), 5, "FRIENDS acts before epoch 5 "),
        # start = 10, but the first epoch from there that 4 divides is 12
        (lambda: defenses.epic(model()), 12, "EPIC acts before epoch 12, 16, 20, ... "),
    ],
    ids=["hint", "friends", "epic"],
)
def test_a_schedule_that_is_never_reached_is_an_error(make, num_epochs, message):
    recipe = dataclasses.replace(RECIPE, epochs=num_epochs)
    with pytest.raises(ValueError, match=message) as error:
        training.fit(
            model(), recipe, TRAIN, key=jax.random.key(0), defense=make(), mesh=one_device(),
            report=lambda epoch, metrics: never(epoch),
        )  # fmt: skip
    assert f"a run of {num_epochs} epochs never reaches" in str(error.value)
    assert "choose earlier epochs or train longer" in str(error.value)
    make().init(jax.random.key(0), with_ids(TRAIN), num_epochs + 1)  # one more would do


TRUSTED_BY = {
    "hint": lambda trusted: defenses.hint(model(), trusted, HINT),
    "refit_head": lambda trusted: defenses.refit_head(model(), trusted),
    "add_trusted": defenses.add_trusted,
    "recommended": defenses.recommended,
    "chain": lambda trusted: defenses.chain(defenses.jpeg(), defenses.recommended(trusted)),
    "hint, any module": lambda trusted: defenses.hint(Stranger(), trusted, HINT),
}


@pytest.mark.parametrize("name", TRUSTED_BY)
@pytest.mark.parametrize(
    ("trusted", "message"),
    [
        (TRUSTED._replace(labels=TRUSTED.labels + 1),
         "trusted set: 2 labels out of range, the first is label 3 of example 2"),
        (random_set(6, 1, (5, 5, 3)),
         r"trusted images are \(5, 5, 3\), training images \(4, 4, 3\)"),
    ],
    ids=["labels", "size"],
)  # fmt: skip
def test_a_trusted_set_that_does_not_fit_is_refused_before_training(name, trusted, message):
    with pytest.raises(ValueError, match=message):
        training.fit(
            model(), RECIPE, TRAIN, key=jax.random.key(0), defense=TRUSTED_BY[name](trusted),
            report=lambda epoch, metrics: never(epoch),
        )  # fmt: skip


def test_a_trusted_set_may_hold_a_class_that_the_network_knows_and_training_lacks():
    two = TRAIN.take(TRAIN.labels < 2)
    for name in ("hint", "refit_head"):
        TRUSTED_BY[name](TRUSTED).init(jax.random.key(0), with_ids(two), 3)


def test_pairs_and_lists_are_sets():
    pair = (TRUSTED.images.tolist(), TRUSTED.labels.tolist())
    for name in ("hint", "refit_head", "recommended"):
        TRUSTED_BY[name](pair).init(jax.random.key(0), with_ids(TRAIN), 3)


@pytest.mark.parametrize("scalar", [np.float32, np.float64, jnp.float32])
def test_settings_of_any_kind_become_plain(scalar):
    for plain, given in [
        (HintConfig(ratio=0.25, beta=0.5, schedule=(5, 15)),
         HintConfig(ratio=scalar(0.25), beta=scalar(0.5), schedule=[np.int64(5), jnp.int32(15)])),
        (FriendsConfig(epoch=3, mu=0.5), FriendsConfig(epoch=np.int32(3), mu=scalar(0.5))),
        (EpicConfig(fraction=0.5), EpicConfig(fraction=scalar(0.5))),
        (FatConfig(tau_epochs=(1, 2)), FatConfig(tau_epochs=[np.int8(1), 2])),
    ]:  # fmt: skip
        assert given == plain and hash(given) == hash(plain)
        assert json.dumps(dataclasses.asdict(given)) == json.dumps(dataclasses.asdict(plain))
    assert defenses.random_noise(scalar(0.5)).on_batch == defenses.random_noise(0.5).on_batch
    assert defenses.mixup(np.int64(3), scalar(0.5)).on_batch == defenses.mixup(3, 0.5).on_batch
    defenses.jpeg(np.int32(10)), defenses.fixed_noise(scalar(0.1), scalar(0.5))
    defenses.add_trusted(TRUSTED, repeats=np.int64(2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HintConfig(schedule=5), ValueError, r"schedule .* such as \(5, 15\); got 5"),
        (lambda: HintConfig(schedule=(5.0,)), ValueError, "schedule"),
        (lambda: HintConfig(schedule={5, 15}), ValueError, "schedule"),
        (lambda: HintConfig(ratio="half"), TypeError, "HintConfig: ratio must be a number"),
        (lambda: HintConfig(gamma=np.ones(2)), TypeError, "gamma must be a number"),
        (lambda: HintConfig(late_epoch=4.5), TypeError, "late_epoch must be a whole number"),
        (lambda: FriendsConfig(epoch=-1), ValueError, "epoch must be at least 0"),
        (lambda: FriendsConfig(learning_rate=np.nan), ValueError, "learning_rate"),
        (lambda: EpicConfig(every=0), ValueError, "every must be at least 1"),
        (lambda: EpicConfig(fraction=0), ValueError, "fraction must be above 0"),
        (lambda: EpicConfig(start=5, every=4, last=7), ValueError, "never act"),
        (lambda: FatConfig(tau_epochs=(1.5,)), ValueError, "tau_epochs"),
        (lambda: defenses.hint(model(), TRUSTED, {"ratio": 0.5}), TypeError,
         "config is a dict; expected a HintConfig"),
        (lambda: defenses.hint(model(), TRUSTED, FatConfig()), TypeError, "expected a HintConfig"),
        (lambda: defenses.hint(model(), TRUSTED, HintConfig), TypeError, "expected a HintConfig"),
        (lambda: defenses.friends(model(), HintConfig()), TypeError, "expected a FriendsConfig"),
        (lambda: defenses.epic(model(), 0.1), TypeError, "expected a EpicConfig"),
        (lambda: defenses.adversarial_training(model(), 0.25), TypeError, "expected a FatConfig"),
        (lambda: defenses.refit_head(model(), TRUSTED, RECIPE), TypeError, "expected a HeadRecipe"),
        (lambda: defenses.hint(TRUSTED, model()), TypeError, "a Dataset is no network"),
        (lambda: defenses.epic(Stranger), TypeError, "pass an instance"),
        (lambda: defenses.hint(model(), TRUSTED.images), TypeError, "trusted set is a ndarray"),
        (lambda: defenses.mixup(2).init(jax.random.key(0), TRAIN, 3), ValueError, "label 2"),
        (lambda: defenses.mixup(2.5), TypeError, "num_classes"),
        (lambda: defenses.ueraser(model(), 0), ValueError, "num_views must be at least 1"),
        (lambda: defenses.ueraser(model(), 2.0), TypeError, "num_views must be a whole number"),
        (lambda: defenses.jpeg(9.5), ValueError, "whole number from 1 to 95"),
    ],
)  # fmt: skip
def test_settings_of_a_wrong_kind_are_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Stranger(nn.Module):
    """A residual network as others write them: BatchNorm, and a head of another name."""

    bias: bool = True

    @nn.compact
    def __call__(self, x, training: bool = False):
        y = nn.Conv(4, (3, 3), name="conv")(x)
        y = nn.BatchNorm(use_running_average=not training, name="norm")(y)
        x = nn.relu(y) + nn.Conv(4, (1, 1), name="shortcut")(x)
        return nn.Dense(K, use_bias=self.bias, name="fc")(x.mean(axis=(1, 2)))


class NnxStranger(nnx.Module):
    """`Stranger` in NNX."""

    def __init__(self, rngs, bias=True):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.shortcut = nnx.Conv(3, 4, (1, 1), rngs=rngs)
        self.fc = nnx.Linear(4, K, use_bias=bias, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))) + self.shortcut(x)
        return self.fc(x.mean(axis=(1, 2)))


@functools.cache
def stranger_variables(bias=True):
    """Weights away from their initial values, for both."""
    variables = network.as_network(Stranger(bias)).init(jax.random.key(0), SHAPE)
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return structure.unflatten(
        [x + jax.random.uniform(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def updates(defense, variables, epochs):
    mesh = one_device()
    train_state = TrainState(jnp.int32(0), variables["params"], variables["batch_stats"], ())
    dataset, train_state = devices.replicate((with_ids(TRAIN), train_state), mesh)
    own, infos = defense.init(jax.random.key(1), dataset, 3), []
    for epoch in epochs:
        own, changed, info = defense.on_epoch(own, epoch, train_state, dataset)
        infos.append(info)
    return np.asarray(changed.images), infos


MODELS = {"linen": Stranger, "nnx": lambda bias: NnxStranger(nnx.Rngs(0), bias)}


@pytest.mark.parametrize("name", ["hint", "friends", "epic"])
def test_an_nnx_resnet_is_defended_as_the_same_weights_in_linen(name):
    make = {
        "hint": lambda net: defenses.hint(net, TRUSTED, HINT, mesh=one_device()),
        "friends": lambda net: defenses.friends(
            net, FriendsConfig(epoch=1, num_steps=3), mesh=one_device()
        ),
        "epic": lambda net: defenses.epic(
            net, EpicConfig(fraction=0.5, start=1, every=1), mesh=one_device()
        ),
    }[name]
    (one, infos), (other, _) = (
        updates(make(MODELS[kind](True)), stranger_variables(), (1, 2)) for kind in MODELS
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert infos[0].changed
    if name != "epic":
        assert np.abs(one - TRAIN.images).max() > 0.01


def test_a_defended_run_of_an_nnx_resnet():
    chosen = []
    net = network.from_nnx(NnxStranger(nnx.Rngs(0)), init=lambda key: NnxStranger(nnx.Rngs(key)))
    defense = defenses.chain(
        defenses.hint(net, TRUSTED, HINT, mesh=one_device()), defenses.refit_head(net, TRUSTED)
    )
    end = training.fit(
        net, RECIPE, TRAIN, key=jax.random.key(0), defense=defense, mesh=one_device(),
        report=lambda epoch, metrics: chosen.append("chosen" in metrics),
    )  # fmt: skip
    assert chosen == [False, True, True]
    assert end.params["fc"]["kernel"].shape == (4, K)


def test_a_head_free_of_bias_is_refit_without_one():
    net = network.as_network(Stranger(bias=False))
    defense = defenses.refit_head(net, TRUSTED)
    variables = stranger_variables(False)
    given = TrainState(jnp.int32(0), variables["params"], variables["batch_stats"], ())
    own = defense.init(jax.random.key(0), with_ids(TRAIN), 3)
    params = defense.finish(own, given).params
    assert params["fc"].keys() == {"kernel"}
    assert np.any(params["fc"]["kernel"] != variables["params"]["fc"]["kernel"])


def test_hint_acts_on_a_head_free_of_bias():
    (one, _), (other, _) = (
        updates(
            defenses.hint(MODELS[kind](False), TRUSTED, HINT, mesh=one_device()),
            stranger_variables(False),
            (1, 2),
        )
        for kind in MODELS
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(one - TRAIN.images).max() > 0.01


@pytest.mark.parametrize("solver", ["cg", "cholesky", "lissa", "identity"])
def test_hint_makes_no_nan_on_its_way(solver):
    config = dataclasses.replace(HINT, solver=solver, mass=0.6, storage="uint8_floor")
    defense = defenses.hint(model(), TRUSTED, config, mesh=one_device())
    with jax.debug_nans(True):
        _, infos = updates(defense, state().variables, (1, 2))
    assert all(np.isfinite(value) for info in infos for value in info.metrics.values())


def test_the_other_defenses_make_no_nan_on_their_way():
    with jax.debug_nans(True):
        for name in MAKE.keys() - {"hint"}:
            call_hooks(MAKE[name]())
