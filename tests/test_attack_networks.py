"""Every attack on networks of any kind: compiled once, the same in Linen and NNX, and under x64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpoison import attacks, network
from jaxpoison.data import Dataset

EPSILON = 0.1
SHAPE = (3, 3, 3)  # no side can be halved, so that DeepConfuse's U-Net has one size
TRACES = []


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Spreading such small work over eight devices would be most of its cost."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: first)


class Linen(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x, train=False):
        TRACES.append(x.shape)
        x = nn.tanh(nn.Dense(self.width, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(4, name="last")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(27, 6, rngs=rngs)
        self.last = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.hidden(x.reshape(len(x), -1))))


@functools.cache
def variables():
    return network.as_network(Linen()).init(jax.random.key(0), SHAPE)


def linen():
    return attacks.Victim(Linen(), variables())


def random_set(num_examples=32, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_examples, *SHAPE), dtype=np.uint8)
    return Dataset(images, (np.arange(num_examples) % 4).astype(np.int32))


TRAIN = random_set()
FEW = {"epsilon": EPSILON, "num_steps": 2}
BEST_OF_ONE = {**FEW, "restarts": 1}
MAKE = {
    "pgd": lambda: attacks.pgd(**FEW),
    "dap": lambda: attacks.dap(**FEW),
    "durp": lambda: attacks.durp(epsilon=EPSILON),
    "deep_confuse": lambda: attacks.deep_confuse(
        epsilon=EPSILON,
        config=attacks.DeepConfuseConfig(trials=1, passes=1, batch_size=16, width=2),
    ),
    "feature_collision": lambda: attacks.feature_collision(**FEW),
    "bullseye_polytope": lambda: attacks.bullseye_polytope(**FEW),
    "convex_polytope": lambda: attacks.convex_polytope(**FEW),
    "head_gradient_matching": lambda: attacks.head_gradient_matching(**BEST_OF_ONE),
    "bp_toolkit": lambda: attacks.bp_toolkit(**BEST_OF_ONE),
    "fc_toolkit": lambda: attacks.fc_toolkit(**BEST_OF_ONE),
    "gradient_matching": lambda: attacks.gradient_matching(**BEST_OF_ONE, max_shift=1.0),
    "metapoison": lambda: attacks.metapoison(
        TRAIN,
        epsilon=0.05,
        config=attacks.MetaPoisonConfig(
            num_steps=1,
            unroll=1,
            surrogates=1,
            lifetime=2,
            batch_size=16,
            poisons_per_batch=3,
            color=0.02,
            color_points=2,
        ),
    ),
}


def craft(name, victim):
    """Returns poisons by an attack made for this call."""
    attack = MAKE[name]()
    if isinstance(attack, attacks.Attack):
        images = jnp.asarray(TRAIN.images, jnp.float32) / 255
        return attack.craft(jax.random.key(1), victim, images, TRAIN.labels)
    trials = attacks.draw_trials(
        jax.random.key(0), TRAIN, random_set(8, 1), num_trials=1, num_poisons=3
    )
    bases, targets = (
        jnp.asarray(pixels, jnp.float32) / 255
        for pixels in (TRAIN.images[trials.rows], trials.targets)
    )
    keys = jax.random.split(jax.random.key(1), 1)
    return attack.craft(keys, [victim], bases, trials.base_labels, targets).images


@pytest.mark.parametrize("name", MAKE)
def test_a_second_attack_of_the_same_settings_traces_nothing_and_x64_changes_nothing(name):
    first = craft(name, linen())
    assert TRACES
    before = len(TRACES)
    # Another attack, another module and another array of weights, equal to the first ones.
    copied = jax.tree.map(jnp.array, variables())
    again = craft(name, attacks.Victim(Linen(), copied))
    assert len(TRACES) == before
    np.testing.assert_array_equal(again, first)
    with jax.enable_x64(True):
        wide = craft(name, linen())
    assert wide.dtype == first.dtype == jnp.float32
    # The same draws; where a gradient is nearly zero, rounding decides on its sign.
    assert np.mean(np.abs(np.asarray(wide) - np.asarray(first)) > 1e-4) < 0.02


@pytest.mark.parametrize("name", ["pgd", "gradient_matching", "head_gradient_matching"])
def test_nnx_gives_what_linen_gives(name):
    model = Nnx(nnx.Rngs(0))
    for layer, weights in variables()["params"].items():
        for part, value in weights.items():
            getattr(getattr(model, layer), part)[...] = value
    own = network.as_network(model, image_shape=SHAPE)
    for victim in (attacks.Victim(own, own.variables), attacks.Victim(model, own.variables)):
        np.testing.assert_allclose(craft(name, victim), craft(name, linen()), atol=1e-6)


def test_attacks_that_train_networks_say_that_nnx_needs_to_make_new_ones():
    model = Nnx(nnx.Rngs(0))
    own = network.as_network(model, image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"cannot make variables.*init="):
        craft("deep_confuse", attacks.Victim(model, own.variables))
