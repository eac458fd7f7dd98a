"""Exact curvatures: the Hessian, Gauss-Newton, the last linear layer, and a penalty on weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from jaxpoison.core.batches import Batch, LossFn, count_examples, split_batch, weighted_loss
from jaxpoison.core.trees import LinearMap, Params
from jaxpoison.curvature._product import Curvature


def hessian(loss_fn: LossFn) -> Curvature:
    """Returns the Hessian of the loss, by forward-mode over the gradient.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses[B]`.
    """

    def curvature(params, batch, weights):
        gradient = jax.grad(lambda p: weighted_loss(loss_fn, p, batch, weights))
        return jax.linearize(gradient, params)[1]

    return curvature


def gauss_newton(
    output_fn: Callable[[Params, Any], Any], output_loss: Callable[[Any, Any], jax.Array]
) -> Curvature:
    """Returns the generalised Gauss-Newton matrix of a loss on the outputs of a network.

    The product is J^T (H_out (J u)): a forward-mode pass, the true Hessian of the loss on the
    outputs (forward-mode over its gradient), and a reverse-mode pass.

    Args:
      output_fn: `output_fn(params, inputs) -> outputs[B, ...]`, a pytree; examples independent.
      output_loss: `output_loss(outputs, targets) -> losses[B]`. The matrix is positive
        semi-definite when this is convex in `outputs`, as cross-entropy of logits is.
    """

    def curvature(params, batch, weights):
        inputs, targets = split_batch(batch)
        outputs, push = jax.linearize(lambda p: output_fn(p, inputs), params)
        gradient = jax.grad(lambda f: weighted_loss(output_loss, f, targets, weights))
        output_hessian = jax.linearize(gradient, outputs)[1]

        return Partial(_gauss_newton_product, push, output_hessian)

    return curvature


def _gauss_newton_product(push, output_hessian, u):
    tangents, pull = jax.vjp(push, u)
    return pull(output_hessian(tangents))[0]


def linear_head(params: Params, batch: Batch, weights: jax.Array) -> LinearMap:
    """The Hessian of `influence.linear_head_loss`, a `Curvature` in closed form.

        H u = [X 1]^T (w * (P * Z - P * rowsum(P * Z))),    Z = [X 1] u,    P = softmax([X 1] theta)

    which is two products with the features for each u. The Hessian of the last layer of any
    network, given its features once.

    Args:
      params: `{"kernel": [d, K], "bias": [K]}`.
      batch: features `[N, d]` and labels, which H does not depend on.
      weights: scalar or `[N]`.
    """
    features, _ = split_batch(batch)
    features = jnp.asarray(features, params["kernel"].dtype)
    probabilities = jax.nn.softmax(_affine(features, params))
    weights = jnp.broadcast_to(weights, features.shape[:1]).astype(features.dtype)
    return Partial(_linear_head_product, features, probabilities, weights)


def _linear_head_product(features, probabilities, weights, u):
    pz = probabilities * _affine(features, u)
    errors = pz - probabilities * jnp.sum(pz, axis=-1, keepdims=True)
    errors = weights[:, None] * errors
    # As [K, d], which XLA's CPU backend computes twice as fast as features.T @ errors. The barrier
    # keeps the compiler from turning the one into the other.
    kernel = jnp.einsum("nk,nd->kd", errors, features, precision=lax.Precision.HIGHEST)
    return {"kernel": lax.optimization_barrier(kernel).T, "bias": jnp.sum(errors, axis=0)}


def _affine(features, head):
    # Full precision: in TF32 or bfloat16 a solver cannot pass a residual of about 1e-3.
    return jnp.matmul(features, head["kernel"], precision=lax.Precision.HIGHEST) + head["bias"]


def with_l2(curvature: Curvature, strength: Any) -> Curvature:
    """Returns the curvature of the mean loss plus (strength / 2) ||theta||^2.

    For parameters found by minimising such an objective; SGD with weight decay does, with the
    decay for strength. Decay on all parameters alike is `damping`; this is for decay on some.

    Args:
      curvature: of the loss alone.
      strength: a number, or a pytree of numbers whose structure is that of the parameters or a
        prefix of it: `{"kernel": 5e-4, "bias": 0.0}`.
    """

    def regularised(params, batch, weights):
        total = jnp.sum(jnp.broadcast_to(weights, (count_examples(batch, "batch"),)))
        strengths = jax.tree.map(lambda s: s * total, jax.tree.broadcast(strength, params))
        return Partial(_add_diagonal, curvature(params, batch, weights), strengths)

    return regularised


def _add_diagonal(multiply, diagonal, u):
    return jax.tree.map(lambda c, d, x: (c + d * x).astype(x.dtype), multiply(u), diagonal, u)
