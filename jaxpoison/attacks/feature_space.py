"""What poisons of a frozen extractor minimise, as functions of features; and the convex polytope.

For each substitute network m: features f_m(x_j) of the P poisons, and the feature f_m(x^t) of the
target. None of these functions knows about pixels or networks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class View(NamedTuple):
    """A trial as one substitute network sees it.

    Attributes:
      features: float32 [P, d], of the poisons.
      target: float32 [d], of the target (the mean over its views).
      head: `{"kernel": [d, K], "bias": [K]}`, the network's last layer.
      base_label: int32 [], the class that the target is to be taken for.
    """

    features: jax.Array
    target: jax.Array
    head: Any
    base_label: jax.Array


def collision(views: Sequence[View]) -> jax.Array:
    """Returns sum_m |f_m(x_j) - f_m(x^t)|^2 for each poison j, [P] (arXiv 1804.00792)."""
    return sum((jnp.sum((v.features - v.target) ** 2, axis=-1) for v in views), start=jnp.zeros(()))


def bullseye(views: Sequence[View], *, squared: bool = False) -> jax.Array:
    """Returns the mean over m of |f_m(x^t) - mean_j f_m(x_j)| / |f_m(x^t)|, [] (arXiv 2005.00191).

    Args:
      views: one for each substitute.
      squared: half the squared ratio, as the paper writes, and not the authors' code.
    """
    gaps = jnp.stack([_relative(v.target - jnp.mean(v.features, axis=0), v.target) for v in views])
    return jnp.mean(gaps**2 / 2 if squared else gaps)


def polytope(views: Sequence[View], coefficients: Sequence[jax.Array]) -> jax.Array:
    """Returns the mean over m of |f_m(x^t) - sum_j c_mj f_m(x_j)|^2 / (2 |f_m(x^t)|^2), [].

    Zhu et al. (arXiv 1905.05897); c_m in the simplex is fitted by `simplex_least_squares`.
    """
    gaps = [
        _relative(v.target - c @ v.features, v.target)
        for v, c in zip(views, coefficients, strict=True)
    ]
    return jnp.mean(jnp.stack(gaps) ** 2 / 2)


def mean_collision(views: Sequence[View]) -> jax.Array:
    """Returns the mean over m and over the d features of (mean_j f_m(x_j) - f_m(x^t))^2, [].

    What the toolkit of Geiping et al. (arXiv 2009.02276) minimises, whether it is asked for
    bullseye polytope or for feature collision: with one target the two are the same.
    """
    return jnp.mean(
        jnp.stack([jnp.mean((jnp.mean(v.features, axis=0) - v.target) ** 2) for v in views])
    )


def gradient_mismatch(views: Sequence[View]) -> jax.Array:
    """Returns the mean over m of 1 - cos(g(x^t, b), sum_j g(x_j, b)), [] (arXiv 2009.02276).

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


def head_gradient(head: Any, features: jax.Array, label: jax.Array) -> Any:
    """Returns the gradient by `head` of the mean cross-entropy of one label, shaped like `head`.

    Args:
      head: `{"kernel": [d, K], "bias": [K]}`.
      features: float32 [P, d].
      label: int32 [].
    """
    logits = features @ head["kernel"] + head["bias"]
    errors = jax.nn.softmax(logits) - jax.nn.one_hot(label, logits.shape[-1])
    return {"kernel": features.T @ errors / len(errors), "bias": jnp.mean(errors, axis=0)}


def simplex_least_squares(
    features: jax.Array,
    target: jax.Array,
    start: jax.Array,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 500,
) -> jax.Array:
    """Returns the c >= 0 with sum 1 that minimises |target - c @ features|^2, float32 [P].

    Accelerated projected gradient descent, restarted where it would rise (Beck and Teboulle 2009;
    O'Donoghue and Candes 2015), until a step moves c by less than `tolerance` of its length.

    Args:
      features: float32 [P, d].
      target: float32 [d].
      start: float32 [P], in the simplex; that of a nearby problem saves steps.
      tolerance: see above.
      max_steps: where to stop at the latest.
    """
    gram, linear = features @ features.T, features @ target
    # No eigenvalue exceeds the largest absolute row sum. The features of networks that end in ReLU
    # are non-negative, and for them the bound is nearly the largest eigenvalue itself.
    size = 1 / jnp.maximum(jnp.max(jnp.sum(jnp.abs(gram), axis=1)), 1e-30)

    def unfinished(state):
        _, _, _, moved, step = state
        return (moved > tolerance) & (step < max_steps)

    def advance(state):
        c, ahead, momentum, _, step = state
        new = project_to_simplex(ahead - size * (gram @ ahead - linear))
        rising = jnp.vdot(ahead - new, new - c) > 0
        next_momentum = jnp.where(rising, 1.0, (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2)
        pace = jnp.where(rising, 0.0, (momentum - 1) / next_momentum)
        moved = jnp.linalg.norm(new - c) / jnp.linalg.norm(c)
        return new, new + pace * (new - c), next_momentum, moved, step + 1

    begin = (start, start, jnp.ones(()), jnp.full((), jnp.inf), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(unfinished, advance, begin)[0]


def project_to_simplex(point: jax.Array) -> jax.Array:
    """Returns the nearest point with non-negative entries of sum 1 (Duchi et al. 2008), [P]."""
    largest_first = -jnp.sort(-point)
    excess = jnp.cumsum(largest_first) - 1
    count = jnp.arange(1, len(point) + 1)
    support = jnp.sum(largest_first * count > excess)
    return jnp.maximum(point - excess[support - 1] / support, 0)


def _relative(gap, target):
    # The norm of nothing has no gradient: 0/0 would spread NaN through a trial that has arrived.
    return jnp.sqrt(jnp.sum(gap**2) + 1e-20) / jnp.maximum(jnp.linalg.norm(target), 1e-10)


def _cosine(a, b):
    dot, aa, bb = (
        sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True))
        for p, q in ((a, b), (a, a), (b, b))
    )
    return dot / jnp.sqrt(jnp.maximum(aa * bb, 1e-30))
