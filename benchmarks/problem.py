"""The problem on which all libraries are compared: a CNN on real images, its weights and losses.

A CNN for 28x28x1 images (3x3 convolutions 32 and 64 with stride 2, dense 128, dense 10; 421,642
parameters), trained for 16 epochs, after which the smallest eigenvalue of its Hessian is between
-0.3 and -0.9, by the rounding of the machine; embedded MNIST images, 2,048 for training, 256
trusted ones whose mean loss is of interest; damping 2, with which the Hessian is positive definite.
Larger sets repeat the images.

Operations are counted in forward passes F, less the products with derivatives to the pixels that
nobody needs (F1, of the first layer):

    forward                           F
    scores, one jvp                  3 F - F1     value, and two products for its tangent
    gradient                         3 F - F1     value, to the activations, to the weights
    Gauss-Newton product             4 F - 2 F1   at a fixed point; 5 F - 2 F1 afresh
    Hessian product                  6 F - 4 F1   at a fixed point; 8 F - 5 F1 afresh
    pixel map                        6 F - 2 F1
"""

import argparse
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison import curvature, data, influence, models
from jaxpoison.models import layers

DAMPING = 2.0


def flops(width: int = 128) -> dict[str, int]:
    """Returns operations per example, as above, for a dense layer of this width."""
    first = 2 * 14 * 14 * 9 * 32
    forward = first + 2 * (7 * 7 * 288 * 64 + 3136 * width + width * 10)
    return {
        "forward": forward,
        "scores": 3 * forward - first,
        "gradient": 3 * forward - first,
        "gauss_newton": 4 * forward - 2 * first,
        "gauss_newton_afresh": 5 * forward - 2 * first,
        "hessian": 6 * forward - 4 * first,
        "hessian_afresh": 8 * forward - 5 * first,
        "pixel_map": 6 * forward - 2 * first,
        "head_product": 2 * 2 * (width + 1) * 10,  # two matrix products with the cached features
    }


FLOPS = flops()


class SmallCnn(nn.Module):
    """The body of the network; `conv` is `layers.Conv`, or `nn.Conv` for XLA's convolutions."""

    conv: Any = layers.Conv
    dtype: Any = jnp.float32
    width: int = 128

    @nn.compact
    def __call__(self, x, train: bool):
        del train
        for width in (32, 64):
            x = self.conv(width, (3, 3), 2, padding=1, dtype=self.dtype)(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        return nn.relu(nn.Dense(self.width, dtype=self.dtype)(x))


class Problem(NamedTuple):
    """The network, its weights, and the two sets; batches are (images, labels) of JAX arrays."""

    model: models.Classifier
    params: Any
    group: tuple[jax.Array, jax.Array]
    train: tuple[jax.Array, jax.Array]

    def loss(self, params: Any, batch: Any) -> jax.Array:
        """Returns the cross-entropy of every example, through the whole network."""
        images, labels = batch
        return cross_entropy(self.outputs(params, images), labels)

    def outputs(self, params: Any, images: jax.Array) -> Any:
        """Returns the logits."""
        return self.model.apply({"params": params}, images)

    def head_loss(self, head: Any, batch: Any) -> jax.Array:
        """Returns the same losses as a function of the last layer, features computed again."""
        images, labels = batch
        return influence.linear_head_loss(head, (self.features(images), labels))

    def features(self, images: jax.Array) -> Any:
        """Returns what the last layer receives."""
        return self.model.apply({"params": self.params}, images, method="features")

    def gauss_newton(self) -> curvature.Curvature:
        """Returns the Gauss-Newton matrix of the whole network."""
        return curvature.gauss_newton(self.outputs, cross_entropy)

    def with_plain_convolutions(self) -> "Problem":
        """Returns the problem with `flax.linen.Conv`, as one writes it by hand."""
        body = self.model.body.clone(conv=nn.Conv)
        return self._replace(model=self.model.clone(body=body))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the loss of every example, float32 `[B]`."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sizes of the problem."""
    parser.add_argument("--train", type=int, default=2048, help="training examples")
    parser.add_argument("--group", type=int, default=256, help="trusted examples")
    parser.add_argument("--epochs", type=int, default=16, help="of training beforehand")
    parser.add_argument("--dtype", default="float32", help="of the network's body, or bfloat16")


def make(
    *, train: int, group: int, epochs: int = 16, dtype: str = "float32", width: int = 128
) -> Problem:
    """Returns the problem; its weights depend on `epochs` and `width`, the dense layer's, alone."""
    splits = data.load_embedded("mnist")
    model = models.Classifier(body=SmallCnn(width=width), num_features=width)
    params = _trained(model, _first(splits.train, 2048), epochs)
    body = SmallCnn(dtype=jnp.dtype(dtype), width=width)
    return Problem(
        model.clone(body=body, dtype=body.dtype),
        params,
        _first(splits.validation, group),
        _first(splits.train, train),
    )


def flat(tree: Any) -> np.ndarray:
    """Returns the leaves of a tree shaped like the parameters, or a part of them, as one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def direction(like: Any, seed: int = 0) -> Any:
    """Returns a random tree of norm one, to multiply with."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    tree = structure.unflatten(
        [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )
    norm = optax.tree.norm(tree)
    return jax.tree.map(lambda leaf: leaf / norm, tree)


def _first(dataset: data.Dataset, count: int) -> tuple[jax.Array, jax.Array]:
    index = np.arange(count) % len(dataset.labels)
    return data.to_float(dataset.images[index]), jnp.asarray(dataset.labels[index])


def _trained(model: models.Classifier, batch: tuple[jax.Array, jax.Array], epochs: int) -> Any:
    """Returns the parameters after some epochs of SGD with momentum, batches of 128."""
    images, labels = batch
    params = model.init(jax.random.key(0), images[:1])["params"]
    optimizer = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(params, state, index):
        def loss(params):
            logits: Any = model.apply({"params": params}, images[index])
            return cross_entropy(logits, labels[index])

        gradient = jax.grad(lambda params: jnp.mean(loss(params)))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.key(1 + epoch), len(labels))
        for index in order.reshape(-1, 128):
            params, state = step(params, state, index)
    return params
