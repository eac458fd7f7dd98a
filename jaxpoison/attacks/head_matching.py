"""Gradient matching by the last layer only (after Geiping et al., arXiv 2009.02276)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.attacks import transfer
from jaxpoison.attacks.base import TargetedAttack
from jaxpoison.attacks.toolkit import ToolkitMethod
from jaxpoison.attacks.transfer import AUGMENTED, Draws, View


def head_gradient_matching(
    *,
    epsilon: float,
    num_steps: int = 250,
    learning_rate: float = 0.1,
    restarts: int = 8,
    draws: Draws = AUGMENTED,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns the attack whose poisons pull the head as the target with the base label would.

    Gradient matching by the last layer only, see `gradient_mismatch`; the rest as in the toolkit of
    its authors: signed Adam from random noise, the learning rate cut to a tenth after 3/8, 5/8 and
    7/8 of the steps, the best of several restarts. The head is that of the substitutes' variables:
    give those that a victim would train (`training.fit_head`).

    Args:
      epsilon: budget, in units of [0, 1].
      num_steps: S.
      learning_rate: in units of the first substitute's normalized pixels, divided by the number of
        substitutes.
      restarts: random starts, of which each trial keeps the one with the lowest last objective.
      draws: random versions of the poisons.
      batch_size: poisons crafted at once, in whole trials and at least one.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    method = HeadGradientMatching(
        epsilon=epsilon, num_steps=num_steps, learning_rate=learning_rate, restarts=restarts,
        draws=draws, batch_size=batch_size,
    )  # fmt: skip
    return transfer.attack("head_gradient_matching", method)


def gradient_mismatch(views: Sequence[View]) -> jax.Array:
    """Returns the mean over m of 1 - cos(g(x^t, b), sum_j g(x_j, b)), [].

    g(x, b) is the gradient of the cross-entropy of label b by the last layer's kernel and bias. It
    has the closed form f(x) (softmax(z) - e_b)^T and softmax(z) - e_b, z the logits, so matching it
    needs one derivative, by the pixels, and none by parameters.
    """
    return jnp.mean(
        jnp.stack(
            [
                1
                - _cosine(
                    head_gradient(v.head, v.target[None], v.base_label),
                    head_gradient(v.head, v.features, v.base_label),
                )
                for v in views
            ]
        )
    )


def head_gradient(head: Any, features: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
    """Returns the gradient by `head` of the mean cross-entropy of one label, shaped like `head`.

    Args:
      head: `{"kernel": [d, K], "bias": [K]}`, or without a bias.
      features: float32 [P, d].
      label: int32 [].
    """
    logits = features @ head["kernel"] + head.get("bias", 0.0)
    errors = jax.nn.softmax(logits) - jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
    gradient = {"kernel": features.T @ errors / len(errors), "bias": jnp.mean(errors, axis=0)}
    return {name: gradient[name] for name in head}


class HeadGradientMatching(ToolkitMethod):
    """See `head_gradient_matching`."""

    def objective(self, views, memory):
        return gradient_mismatch(views), memory


def _cosine(a, b):
    dot, aa, bb = (
        sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True))
        for p, q in ((a, b), (a, a), (b, b))
    )
    return dot / jnp.sqrt(jnp.maximum(aa * bb, 1e-30))
