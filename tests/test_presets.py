"""Each setting taken from a text, against its rule written out in NumPy, float64.

The network is linear in its normalized input u = (x - mean) / std, so all derivatives are closed
forms, and std is far from 1: a step in the wrong units is wrong by a factor of 3 to 400.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import one_device

from jaxpoison import models
from jaxpoison.core import devices
from jaxpoison.data import Dataset
from jaxpoison.defenses import (
    PAPER,
    RELEASED_CODE,
    EpicConfig,
    FatConfig,
    HintConfig,
    adversarial_training,
    epic,
    friends,
    hint,
)
from jaxpoison.training import TrainState
from jaxpoison.training.hooks import with_ids

SIDE, K = 3, 3
MEAN, STD = np.array([0.5, 0.45, 0.4]), np.array([0.2, 0.05, 3.0])
WIDTH = SIDE * SIDE * 3


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x.reshape(len(x), -1)


MODEL = models.Classifier(Flat(), WIDTH, K, mean=tuple(MEAN), std=tuple(STD))


def random_set(num_examples, seed, low=0, high=256):
    rng = np.random.default_rng(seed)
    images = rng.integers(low, high, (num_examples, SIDE, SIDE, 3)).astype(np.uint8)
    return Dataset(images, (np.arange(num_examples) % K).astype(np.int32))


TRAIN, TRUSTED = random_set(60, 0), random_set(12, 1)


def state(seed, size):
    """Weights of this size, as the training state that a defense is given."""
    rng = np.random.default_rng(seed)
    kernel = size * rng.normal(size=(WIDTH, K)).astype(np.float32)
    head = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(rng.normal(size=K), jnp.float32)}
    params = {"body": {}, "head": head}
    return TrainState(jnp.int32(0), params, {}, ())


class Numpy:
    """The network, in float64."""

    def __init__(self, train_state):
        head = train_state.params["head"]
        self.W, self.b = (np.asarray(head[name], np.float64) for name in ("kernel", "bias"))

    def inputs(self, x):
        return ((x - MEAN) / STD).reshape(len(x), -1)

    def p(self, x):
        logits = self.inputs(x) @ self.W + self.b
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def by_input(self, by_logits):
        """From the derivative by the logits [N, K] to that by the normalized input u."""
        return (by_logits @ self.W.T).reshape(-1, SIDE, SIDE, 3)

    def by_pixel(self, by_logits):
        return self.by_input(by_logits) / STD

    def gradients(self, x, y):
        """Of each example's loss by kernel and bias, [N, (d + 1) K]."""
        u = np.c_[self.inputs(x), np.ones(len(x))]
        return (u[:, :, None] * (self.p(x) - np.eye(K)[y])[:, None]).reshape(len(x), -1)

    def ihvp(self, x, trusted, damping):
        u, p = np.c_[self.inputs(x), np.ones(len(x))], self.p(x)
        inner = np.einsum("nk,kl->nkl", p, np.eye(K)) - p[:, :, None] * p[:, None]
        size = u.shape[1] * K
        H = np.einsum("ni,nkl,nj->ikjl", u, inner, u).reshape(size, size) / len(x)
        return np.linalg.solve(H + damping * np.eye(size), self.gradients(*trusted).mean(0))

    def influence_by_input(self, s, x, y):
        """I_pert = -d<s, gradient>/du, of the normalized input u."""
        S = s.reshape(WIDTH + 1, K)
        u, p = np.c_[self.inputs(x), np.ones(len(x))], self.p(x)
        a = u @ S
        through_p = p * a - p * (p * a).sum(1, keepdims=True)
        direct = ((p - np.eye(K)[y]) @ S[:-1].T).reshape(-1, SIDE, SIDE, 3)
        return -(direct + self.by_input(through_p))


def pixels(dataset):
    return dataset.images / 255.0, dataset.labels


def by_hand(config, states, step_of):
    """Algorithms 1 to 3; `step_of(epoch, I_pert by u)` is the step that the text asks for."""
    (x, y), trusted = pixels(TRAIN), pixels(TRUSTED)
    chosen, noise = None, None
    for epoch, train_state in states.items():
        net = Numpy(train_state)
        if chosen is None:
            s = net.ihvp(x, trusted, 0.5)
            sizes = np.abs(net.gradients(x, y) @ s)
            chosen = np.sort(np.argsort(-sizes)[:30])
            noise = np.zeros_like(x[chosen])
        else:
            current = x.copy()
            current[chosen] += noise
            s = net.ihvp(current[chosen] if config is RELEASED_CODE else current, trusted, 0.5)
        step = step_of(epoch, net.influence_by_input(s, x[chosen] + noise, y[chosen]))
        beta = 16 / 255 if config is RELEASED_CODE else 0.062
        moved = np.clip(x[chosen] + np.clip(noise - step, -beta, beta), 0, 1)
        if config is RELEASED_CODE:
            moved = np.floor(255 * moved + 1e-3) / 255
        noise = moved - x[chosen]
    return chosen, noise


def run_hint(config, states):
    # LiSSA's mini-batches would hide small errors; what it solves is tested with the solvers.
    config = dataclasses.replace(config, solver="cg")
    defense = hint(MODEL, TRUSTED, config, mesh=one_device())
    dataset = devices.replicate(with_ids(TRAIN), one_device())
    own = defense.init(jax.random.key(0), dataset, 80)
    for epoch in range(41):
        given = states.get(epoch)
        own, _, info = defense.on_epoch(own, epoch, given, dataset)
        assert info.changed == (given is not None)
    return np.asarray(own.chosen), np.asarray(own.noise)


STATES = {epoch: state(epoch, 0.2) for epoch in (5, 15, 40)}


def test_the_papers_preset():
    """HINT, eq. 9 and section V: gamma 0.1 by the pixel, |noise| <= 0.062, r = 0.5, {5, 15, 40}."""
    chosen, noise = run_hint(PAPER, STATES)
    want, expected = by_hand(PAPER, STATES, lambda epoch, by_u: 0.1 * by_u / STD)
    np.testing.assert_array_equal(chosen, want)
    np.testing.assert_allclose(noise, expected, atol=1e-5)
    assert 0.02 < np.mean(np.abs(expected) < 0.06) < 0.98  # not all at the bound


def test_the_preset_of_the_released_code():
    """Their code differentiates by the normalized input and adds the result to the pixel."""
    chosen, noise = run_hint(RELEASED_CODE, STATES)
    want, expected = by_hand(
        RELEASED_CODE, STATES, lambda epoch, by_u: (0.01 if epoch >= 40 else 0.1) * by_u
    )
    np.testing.assert_array_equal(chosen, want)
    off = np.abs(noise - expected)  # a pixel on the edge of two levels may fall either way
    assert (off > 1e-5).mean() < 0.01 and off.max() < 1.1 / 255
    assert 0.02 < np.mean(np.abs(expected) < 0.06) < 0.98
    for channel in range(3):  # in each channel something has moved
        assert np.abs(expected[..., channel]).max() > 3 / 255
    assert (RELEASED_CODE.solver, RELEASED_CODE.damping) == ("lissa", 0.5)


def test_normalized_steps_are_std_times_those_by_the_pixel():
    config = HintConfig(gamma=1e-4, beta=1.0, schedule=(5,))
    (chosen, by_pixel), (_, normalized) = (
        run_hint(dataclasses.replace(config, coordinates=kind), {5: STATES[5]})
        for kind in ("pixel", "normalized")
    )
    free = np.abs(TRAIN.images[chosen] - 127.5) < 100  # not cut off at 0 or 1
    inside = free & (np.abs(normalized) > 1e-4)
    np.testing.assert_allclose(normalized[inside], (STD * by_pixel)[inside], rtol=0.02)
    assert inside.any((0, 1, 2)).all()


def test_the_preset_of_friends():
    """The authors' loop: 30 steps of SGD at 100, in pixels, on batches of 128."""
    train = random_set(60, 2, 3, 253)
    mesh = one_device()
    net_state = state(1, 0.02)
    defense = friends(MODEL, mesh=mesh, batch_size=60)
    dataset = devices.replicate(with_ids(train), mesh)
    own = defense.init(jax.random.key(3), dataset, 80)
    own, _, _ = defense.on_epoch(own, 5, net_state, dataset)
    key = jax.random.fold_in(jax.random.key(3), 0)
    noise = np.asarray(jax.random.uniform(key, train.images.shape, minval=-8 / 255, maxval=8 / 255))
    noise = noise.astype(np.float64)
    net, (x, _) = Numpy(net_state), pixels(train)
    velocity, zeta, reference = np.zeros_like(noise), 16 / 255, net.p(x)
    for step in range(30):
        bounded = np.clip(noise, -zeta, zeta)
        moved = np.clip(x + bounded, 0, 1)
        gradient = net.by_pixel(net.p(moved) - reference) * ((x + bounded > 0) & (x + bounded < 1))
        gradient = (gradient - 2 * bounded / WIDTH) / 128 * (np.abs(noise) < zeta)
        velocity = 0.9 * velocity + gradient
        noise -= 100 * 0.1 ** ((step >= 15) + (step >= 21)) * (gradient + 0.9 * velocity)
    np.testing.assert_allclose(own.noise, np.clip(noise, -zeta, zeta), atol=2e-4)
    free = np.abs(noise) < zeta
    assert 0.1 < free.mean() < 0.9
    # And in training: +-16/255 on each pixel, at every step.
    batch = Dataset(jnp.zeros((5, SIDE, SIDE, 3)), jnp.zeros(5, jnp.int32))
    fresh = defense.on_batch(own, jax.random.key(0), net_state, batch).images
    np.testing.assert_allclose(np.abs(fresh), 16 / 255, rtol=1e-6)


def test_the_preset_of_epic():
    """Every 4 epochs from the tenth to the last milestone; a tenth of each class are medoids."""
    assert list(EpicConfig().epochs) == [e for e in range(80) if e % 4 == 0 and 10 <= e <= 70]
    mesh, net_state = one_device(), state(1, 0.05)
    defense = epic(MODEL, mesh=mesh)
    dataset = devices.replicate(with_ids(TRAIN), mesh)
    own = defense.init(jax.random.key(0), dataset, 80)
    own, _, _ = defense.on_epoch(own, 12, net_state, dataset)
    (x, y), dropped = pixels(TRAIN), []
    proxies = Numpy(net_state).p(x) - np.eye(K)[y]
    for label in range(K):
        rows = np.flatnonzero(y == label)
        distances = np.linalg.norm(proxies[rows][:, None] - proxies[rows][None], axis=-1)
        similarity = np.exp(-distances / K)
        medoids = []
        for _ in range(2):  # a tenth of 20
            best = similarity[:, medoids].max(1) if medoids else np.zeros(20)
            gains = np.maximum(similarity - best[:, None], 0).sum(0)
            gains[medoids] = -1
            medoids.append(int(np.argmax(gains)))
        nearest = np.argmax(similarity[:, medoids], axis=1)
        dropped += [rows[m] for i, m in enumerate(medoids) if (nearest == i).sum() == 1]
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(own.kept)), sorted(dropped))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_preset_of_friendly_adversarial_training(norm):
    """FAT's ascent, in pixels: epsilon / 5 (L2) or 0.007 / 0.031 epsilon a step, ten steps."""
    config = FatConfig(norm=norm, epsilon=0.25 if norm == "l2" else 0.031)
    assert FatConfig() == FatConfig(norm="l2", epsilon=0.25, num_steps=10, jitter=0.001)
    net_state, train = state(2, 0.05), random_set(30, 4, 10, 245)
    (x, y), net = pixels(train), Numpy(net_state)
    batch = Dataset(jnp.asarray(x, jnp.float32), jnp.asarray(y))
    defense = adversarial_training(MODEL, config)
    got = jax.jit(defense.on_batch)(jnp.int32(1), jax.random.key(5), net_state, batch).images
    start_key, steps_key = jax.random.split(jax.random.key(5))

    def norms(d):
        return np.sqrt((d**2).sum((1, 2, 3), keepdims=True))

    def project(d):
        if norm == "linf":
            return np.clip(d, -0.031, 0.031)
        return d * np.minimum(1, 0.25 / norms(d))

    if norm == "l2":
        start = np.asarray(jax.random.normal(start_key, x.shape), np.float64)
        start *= 0.25 / norms(start)
    else:
        start = np.asarray(jax.random.uniform(start_key, x.shape, minval=-0.031, maxval=0.031))
    moved = np.clip(x + start, 0, 1)
    patience, active = np.ones(30, int), np.ones(30, bool)
    for key in jax.random.split(steps_key, 10):
        p = net.p(moved)
        wrong = p.argmax(1) != y
        gradient = net.by_pixel(p - np.eye(K)[y])
        active &= ~(wrong & (patience == 0))
        patience -= wrong
        step = 0.05 * gradient / norms(gradient) if norm == "l2" else 0.007 * np.sign(gradient)
        jitter = 0.001 * np.asarray(jax.random.normal(key, x.shape))
        new = np.clip(x + project(moved + step + jitter - x), 0, 1)
        moved = np.where(active[:, None, None, None], new, moved)
    np.testing.assert_allclose(got, moved, atol=1e-5)
    assert 0 < active.mean() < 1
