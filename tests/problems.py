"""Small problems with answers known densely in float64, and the ways to call a function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpoison import influence


class Problem(NamedTuple):
    """A model with data; `loss_fn = output_loss(output_fn(params, inputs), targets)`."""

    output_fn: Callable[[Any, Any], jax.Array]
    output_loss: Callable[[jax.Array, Any], jax.Array]
    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    group: tuple[Any, Any]
    train: tuple[Any, Any]


def cross_entropy(logits, labels):
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _labeled(key, num_examples, dim, num_classes):
    feature_key, label_key = jax.random.split(key)
    features = jax.random.normal(feature_key, (num_examples, dim))
    return features, jax.random.randint(label_key, (num_examples,), 0, num_classes)


def softmax_head(num_train=64, num_group=16, dim=6, num_classes=3) -> Problem:
    """A last linear layer; its Hessian is positive semi-definite and singular."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel": jax.random.normal(keys[0], (dim, num_classes)),
        "bias": jnp.linspace(-0.5, 0.5, num_classes),
    }
    return Problem(
        output_fn=lambda p, x: x @ p["kernel"] + p["bias"],
        output_loss=cross_entropy,
        loss_fn=influence.linear_head_loss,
        params=params,
        group=_labeled(keys[1], num_group, dim, num_classes),
        train=_labeled(keys[2], num_train, dim, num_classes),
    )


def mnist_head(num_train=304, num_group=48) -> Problem:
    """The last layer of the MNIST CNN, 1600 -> 10, over sparse, non-negative, skewed features."""
    keys = jax.random.split(jax.random.key(1), 4)
    prototypes = jax.random.exponential(keys[0], (10, 1600))

    def draw(key, num_examples):
        noise_key, drop_key, label_key = jax.random.split(key, 3)
        labels = jax.random.randint(label_key, (num_examples,), 0, 10)
        noise = jax.random.exponential(noise_key, (num_examples, 1600))
        kept = jax.random.bernoulli(drop_key, 0.4, noise.shape)
        return kept * (prototypes[labels] + noise) / 2, labels

    kernel = jax.random.normal(keys[1], (1600, 10)) / 40
    return softmax_head()._replace(
        params={"kernel": kernel, "bias": jnp.zeros(10)},
        group=draw(keys[2], num_group),
        train=draw(keys[3], num_train),
    )


def small_network(num_train=64, num_group=16) -> Problem:
    """A two-layer network; its Hessian is indefinite."""
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        "hidden": (jax.random.normal(keys[0], (5, 8)), jnp.zeros(8)),
        "out": {"kernel": jax.random.normal(keys[1], (8, 3))},
    }

    def output_fn(p, x):
        kernel, bias = p["hidden"]
        return jnp.tanh(x @ kernel + bias) @ p["out"]["kernel"]

    def loss_fn(p, batch):
        inputs, labels = batch
        return cross_entropy(output_fn(p, inputs), labels)

    return Problem(
        output_fn=output_fn,
        output_loss=cross_entropy,
        loss_fn=loss_fn,
        params=params,
        group=_labeled(keys[2], num_group, 5, 3),
        train=_labeled(keys[3], num_train, 5, 3),
    )


def float64(tree):
    """Returns `tree` as NumPy arrays, floats in float64; use under `jax.enable_x64(True)`."""

    def cast(x):
        x = np.asarray(x)
        return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(cast, tree)


class Dense(NamedTuple):
    """Float64 matrices of a problem, in the order of `ravel_pytree(params)`."""

    hessian: np.ndarray  # [P, P], mean over train
    gauss_newton: np.ndarray  # [P, P], mean over train
    gradient: np.ndarray  # [P], of the mean loss of the group
    train_gradients: np.ndarray  # [N, P]
    mixed: np.ndarray  # [N, *inputs, P], d^2 l_i / dx dtheta

    def solve(self, damping, matrix=None):
        matrix = self.hessian if matrix is None else matrix
        return np.linalg.solve(matrix + damping * np.eye(len(matrix)), self.gradient)


@functools.cache
def dense(problem_fn: Callable[[], Problem]) -> Dense:
    """Returns the matrices of `problem_fn()`, by autodiff of one example at a time."""
    with jax.enable_x64(False):  # callers may have it on, and other numbers would be drawn
        problem = problem_fn()
    with jax.enable_x64(True):
        params, group, train = map(float64, (problem.params, problem.group, problem.train))
        flat, unravel = ravel_pytree(params)

        def loss(p, x, y):  # of one example
            return problem.loss_fn(unravel(p), (x[None], y[None]))[0]

        def outputs(p, x):
            return problem.output_fn(unravel(p), x[None])[0]

        def gauss_newton(x, y):
            jacobian = jax.jacobian(outputs)(flat, x)
            inner = jax.hessian(lambda f: problem.output_loss(f[None], y[None])[0])
            return jacobian.T @ inner(outputs(flat, x)) @ jacobian

        def matrices(group, train):
            over = functools.partial(jax.vmap, in_axes=(None, 0, 0))
            gradients = over(jax.grad(loss))
            return Dense(
                hessian=over(jax.hessian(loss))(flat, *train).mean(0),
                gauss_newton=jax.vmap(gauss_newton)(*train).mean(0),
                gradient=gradients(flat, *group).mean(0),
                train_gradients=gradients(flat, *train),
                mixed=over(jax.jacfwd(jax.grad(loss, argnums=1)))(flat, *train),
            )

        return Dense(*map(np.asarray, jax.jit(matrices)(group, train)))


def ravel(tree) -> np.ndarray:
    """Returns the leaves of `tree` as one vector."""
    return np.asarray(ravel_pytree(tree)[0])


def relative_error(got, want) -> float:
    """Returns ||got - want|| / ||want|| in float64."""
    got, want = (np.asarray(x, np.float64).ravel() for x in (got, want))
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# Ways to call `fn(params, group, train, axis_name) -> values equal on all devices`. Each returns
# what `fn` does on one device when the data sets are whole.


def auto_mesh(num_devices=8):
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def eager(fn, params, group, train):
    return fn(params, group, train, None)


def jit(fn, params, group, train):
    return jax.jit(lambda p, g, t: fn(p, g, t, None))(params, group, train)


def vmap(fn, params, group, train):
    """Over a stack of models: the one asked for, and a different one beside it."""
    stack = jax.tree.map(lambda x: jnp.stack([x, 1 - x]), params)
    both = jax.jit(jax.vmap(lambda p: fn(p, group, train, None)))(stack)
    return jax.tree.map(lambda x: x[0], both)


def sharded_jit(fn, params, group, train, num_devices=8):
    mesh = auto_mesh(num_devices)
    group, train = jax.device_put((group, train), NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(lambda p, g, t: fn(p, g, t, None))(params, group, train)


def fully_sharded(fn, params, group, train, num_devices=8):
    """Parameters are in parts as well, along the first axis that can be split (FSDP)."""
    mesh = auto_mesh(num_devices)

    def split(x):
        axes = [axis for axis, size in enumerate(x.shape) if size % num_devices == 0]
        spec = PartitionSpec(*[None] * axes[0], "data") if axes else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    group, train = jax.device_put((group, train), NamedSharding(mesh, PartitionSpec("data")))
    return jax.jit(lambda p, g, t: fn(p, g, t, None))(jax.tree.map(split, params), group, train)


def shard_map(fn, params, group, train, num_devices=8, check_vma=True):
    mapped = jax.shard_map(
        lambda p, g, t: fn(p, g, t, "data"),
        mesh=auto_mesh(num_devices),
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    return jax.jit(mapped)(params, group, train)


def shard_map_unchecked(fn, params, group, train, num_devices=8):
    return shard_map(fn, params, group, train, num_devices, check_vma=False)


def _stacked_shards(tree, num_devices=8):
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), tree)


def pmap(fn, params, group, train):
    mapped = jax.pmap(lambda p, g, t: fn(p, g, t, "data"), axis_name="data", in_axes=(None, 0, 0))
    out = mapped(params, *map(_stacked_shards, (group, train)))
    return jax.tree.map(lambda x: x[3], out)


def named_vmap(fn, params, group, train):
    mapped = jax.vmap(lambda p, g, t: fn(p, g, t, "data"), axis_name="data", in_axes=(None, 0, 0))
    out = jax.jit(mapped)(params, *map(_stacked_shards, (group, train)))
    return jax.tree.map(lambda x: x[3], out)


COMPOSITIONS = [
    eager,
    jit,
    vmap,
    sharded_jit,
    fully_sharded,
    shard_map,
    shard_map_unchecked,
    pmap,
    named_vmap,
]
