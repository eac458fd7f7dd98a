"""Losses that know a root of their Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import core


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns softmax cross-entropy in nats, `[B]`, summed over positions.

    One label an example, or one a token: then the loss of a text is its -log probability.

    Its attribute `root(logits, labels, signs)` multiplies by a root L of its Hessian over the
    logits, L L^T = diag(p) - p p^T at each position, without the matrix. That makes `ekfac` and
    `kfac` possible for outputs of any size. A loss of your own may have such an attribute, which
    takes outputs and targets with leading axis B and `signs` shaped like the outputs.

    Args:
      logits: float `[B, ..., K]`.
      labels: int `[B, ...]`, from 0 to K - 1. A negative one leaves its position out, as padding.

    Raises:
      ValueError: for labels of another shape or dtype; outside `jit` also for those of K or more,
        whose losses and derivatives are NaN under `jit`.
    """
    logits, labels = jnp.asarray(logits), _checked(logits, labels)
    kept = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), kept, axis=-1)[..., 0]
    losses = jnp.where(labels < 0, 0, -log_p) * _counted(labels, logits)
    return losses.reshape(len(losses), -1).sum(axis=1)


def _root(logits, labels, signs):
    """L = diag(sqrt p) - p sqrt(p)^T."""
    p = jax.nn.softmax(logits)
    columns = jnp.sqrt(p) * signs
    columns -= p * jnp.sum(columns, axis=-1, keepdims=True)
    return columns * _counted(jnp.asarray(labels), logits)[..., None]


cross_entropy.root = _root  # pyright: ignore[reportFunctionMemberAccess]


def _counted(labels, logits):
    """Returns 1 for a class, 0 for padding, NaN for others: a factor, for derivatives as well."""
    valid = jnp.where(labels < logits.shape[-1], 1.0, jnp.nan)
    return jnp.where(labels < 0, 0.0, valid).astype(logits.dtype)


def _checked(logits, labels):
    """Returns the labels as an array."""
    shape, num_classes = jnp.shape(logits)[:-1], jnp.shape(logits)[-1]
    if jnp.shape(labels) != shape or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(
            f"labels must be int {shape}, one for each row of logits {jnp.shape(logits)}, got "
            f"{jnp.result_type(labels)} {jnp.shape(labels)}"
        )
    if isinstance(labels, core.Tracer) or not getattr(labels, "is_fully_addressable", True):
        return jnp.asarray(labels)
    if np.size(labels) and (largest := int(np.max(labels))) >= num_classes:
        raise ValueError(
            f"labels go up to {largest}, but logits {jnp.shape(logits)} have {num_classes} "
            f"classes, 0 to {num_classes - 1}; a position to leave out has a negative label"
        )
    return jnp.asarray(labels)
