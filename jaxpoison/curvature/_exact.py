"""Exact curvatures: the Hessian, Gauss-Newton, the last linear layer, and a penalty on weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from jaxpoison.core.batches import Batch, LossFn, count_examples, split_batch, weighted_loss
from jaxpoison.core.heads import check_head, check_labels, head_logits, one_for_classes
from jaxpoison.core.trees import LinearMap, Params
from jaxpoison.curvature.base import Curvature


def hessian(loss_fn: LossFn) -> Curvature:
    """Returns the Hessian of the loss, by forward-mode over the gradient.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses[B]`.
    """
    return _Hessian(loss_fn)


@dataclasses.dataclass(frozen=True)
class _Hessian:
    losses: LossFn

    def __call__(self, params, batch, weights):
        gradient = jax.grad(lambda p: weighted_loss(self.losses, p, batch, weights))
        return jax.linearize(gradient, params)[1]


def gauss_newton(
    output_fn: Callable[[Params, Any], Any], output_loss: Callable[[Any, Any], jax.Array]
) -> Curvature:
    """Returns the generalized Gauss-Newton matrix of a loss on the outputs of a network.

    The product is J^T (H_out (J u)): a forward-mode pass, the true Hessian of the loss on the
    outputs (forward-mode over its gradient), and a reverse-mode pass.

    Args:
      output_fn: `output_fn(params, inputs) -> outputs[B, ...]`, a pytree; examples independent.
      output_loss: `output_loss(outputs, targets) -> losses[B]`. The matrix is positive
        semi-definite when this is convex in `outputs`, as cross-entropy of logits is.
    """
    return _GaussNewton(output_fn, output_loss)


@dataclasses.dataclass(frozen=True)
class _GaussNewton:
    output_fn: Callable[[Params, Any], Any]
    output_loss: Callable[[Any, Any], jax.Array]

    def __call__(self, params, batch, weights):
        inputs, targets = split_batch(batch)
        outputs, push = jax.linearize(lambda p: self.output_fn(p, inputs), params)
        gradient = jax.grad(lambda f: weighted_loss(self.output_loss, f, targets, weights))
        output_hessian = jax.linearize(gradient, outputs)[1]
        return Partial(_gauss_newton_product, push, output_hessian)

    def losses(self, params, batch):
        inputs, targets = split_batch(batch)
        return self.output_loss(self.output_fn(params, inputs), targets)


def _gauss_newton_product(push, output_hessian, u):
    tangents, pull = jax.vjp(push, u)
    return pull(output_hessian(tangents))[0]


def linear_head(params: Params, batch: Batch, weights: jax.Array) -> LinearMap:
    """The Hessian of `influence.linear_head_loss`, a `Curvature` in closed form.

        H u = [X 1]^T (w * (P * Z - P * rowsum(P * Z))),    Z = [X 1] u,    P = softmax([X 1] theta)

    which is two products with the features for each u. The Hessian of the last layer of any
    network, given its features once.

    Args:
      params: `{"kernel": [d, K], "bias": [K]}`; "bias" may be missing.
      batch: features `[N, d]` and labels `[N]`, which H does not depend on: None will do. Labels
        out of range are an error; under `jit` they make H NaN.
      weights: scalar or `[N]`.

    Raises:
      ValueError: for another head or labels, as `influence.linear_head_loss`.
    """
    features, labels = split_batch(batch)
    check_head(params, features)
    features = jnp.asarray(features, params["kernel"].dtype)
    num_examples, num_classes = len(features), params["kernel"].shape[1]
    weights = jnp.broadcast_to(weights, (num_examples,)).astype(features.dtype)
    if labels is not None:
        check_labels(labels, num_examples, num_classes)
        weights = weights * one_for_classes(labels, num_classes, weights.dtype)
    probabilities = jax.nn.softmax(head_logits(params, features))
    return Partial(_linear_head_product, features, probabilities, weights)


def _linear_head_product(features, probabilities, weights, u):
    pz = probabilities * head_logits(u, features)
    errors = pz - probabilities * jnp.sum(pz, axis=-1, keepdims=True)
    errors = weights[:, None] * errors
    # As [K, d], which XLA's CPU backend computes twice as fast as features.T @ errors. The barrier
    # keeps the compiler from turning the one into the other.
    kernel = jnp.einsum("nk,nd->kd", errors, features, precision=lax.Precision.HIGHEST)
    parts = {"kernel": lax.optimization_barrier(kernel).T, "bias": jnp.sum(errors, axis=0)}
    return jax.tree_util.tree_map_with_path(lambda path, _: parts[path[-1].key], u)


def with_l2(curvature: Curvature, strength: Any) -> Curvature:
    """Returns the curvature of the mean loss plus (strength / 2) ||theta||^2.

    For parameters found by minimizing such an objective; SGD with weight decay does, with the
    decay for strength. Decay on all parameters alike is `damping`; this is for decay on some.

    Args:
      curvature: of the loss alone.
      strength: a number, or a pytree of numbers whose structure is that of the parameters or a
        prefix of it: `{"kernel": 5e-4, "bias": 0.0}`.
    """

    return _WithL2(curvature, strength)


@dataclasses.dataclass(frozen=True)
class _WithL2:
    curvature: Curvature
    strength: Any

    def __call__(self, params, batch, weights):
        total = jnp.sum(jnp.broadcast_to(weights, (count_examples(batch, "batch"),)))
        strengths = jax.tree.map(lambda s: s * total, jax.tree.broadcast(self.strength, params))
        return Partial(_add_diagonal, self.curvature(params, batch, weights), strengths)

    @property
    def losses(self):
        return getattr(self.curvature, "losses", None)


def _add_diagonal(multiply, diagonal, u):
    return jax.tree.map(lambda c, d, x: (c + d * x).astype(x.dtype), multiply(u), diagonal, u)
