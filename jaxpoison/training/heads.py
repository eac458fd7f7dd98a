"""A new head on a frozen extractor: the victim of transfer learning, trained whole under `jit`.

The head is the last linear layer. Its features do not change while it is trained, so they are
computed once, and all epochs are one compiled scan over matrix products. Every function here may
be put under `vmap`, over poisoned sets or over seeds.
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from jaxpoison import loops, parallel
from jaxpoison.data import to_float
from jaxpoison.models import Classifier


@dataclasses.dataclass(frozen=True)
class HeadRecipe:
    """Adam on cross-entropy; the defaults are those of Zhu et al. (arXiv 1905.05897).

    The filter's paper (arXiv 2403.13523) uses them too.
    """

    epochs: int = 60
    """Passes over the training set."""
    batch_size: int | None = 64
    """Examples a step; the last batch of an epoch holds what is left. None: all of them."""
    learning_rate: float = 0.1
    """Adam's learning rate."""
    milestones: tuple[int, ...] = (30, 45)
    """Epochs at which the learning rate is divided by 10."""
    initial_scale: float = 0.1
    """Standard deviation of the initial kernel; the bias starts at zero."""


HEAD = HeadRecipe()


def features(model: Classifier, variables: Any, images: Any, *, batch_size: int = 512) -> jax.Array:
    """Returns what the frozen extractor gives to the head, float32 [N, d].

    Args:
      model: the network.
      variables: its `params` and `batch_stats`; BatchNorm uses the running statistics.
      images: [N, H, W, C], uint8 or float32 in [0, 1].
      batch_size: most images in one pass.
    """
    mesh = parallel.data_mesh()
    run = _extractor(cast(Hashable, model), batch_size, mesh)
    return run(parallel.replicate(variables, mesh), parallel.replicate(jnp.asarray(images), mesh))


def fit_head(
    key: jax.Array,
    features: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    recipe: HeadRecipe = HEAD,
    keep: jax.Array | None = None,
) -> Any:
    """Returns a head, `{"kernel": [d, K], "bias": [K]}`, trained from new initial values.

    Args:
      key: PRNG key of the initial values and of the order of the examples.
      features: float32 [N, d].
      labels: int32 [N].
      num_classes: K.
      recipe: how to train.
      keep: bool [N], the examples to train on, e.g. those a filter keeps; default all. The steps
        are those of a training set that never held the others.

    Raises:
      ValueError: if features and labels do not fit each other, or the recipe is no recipe.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features {features.shape} and labels {labels.shape}: expected [N, d] and [N], N > 0"
        )
    if recipe.epochs < 1 or (recipe.batch_size is not None and recipe.batch_size < 1):
        raise ValueError(f"epochs and batch_size must be at least 1: {recipe}")
    num_examples, width = features.shape
    keep = jnp.ones(num_examples, bool) if keep is None else keep
    size = min(recipe.batch_size or num_examples, num_examples)
    num_batches = -(-num_examples // size)
    init_key, order_key = jax.random.split(key)
    kernel = recipe.initial_scale * jax.random.normal(init_key, (width, num_classes))
    head = {"kernel": kernel, "bias": jnp.zeros(num_classes)}
    # The learning rate is applied outside, so that it follows epochs and not steps taken.
    rule = optax.scale_by_adam()
    rate = optax.piecewise_constant_schedule(
        recipe.learning_rate, dict.fromkeys(recipe.milestones, 0.1)
    )

    def loss_fn(head, rows, weights):
        logits = features[rows] @ head["kernel"] + head["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1)

    def step(carry, batch):
        rows, weights, learning_rate = batch
        head, state = carry
        updates, new_state = rule.update(jax.grad(loss_fn)(head, rows, weights), state)
        moved = jax.tree.map(lambda p, u: p - learning_rate * u, head, updates)
        # A batch of which nothing is kept is no step at all.
        taken = jnp.sum(weights) > 0
        return jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), (moved, new_state), (head, state)
        ), ()

    def epoch(carry, number):
        draw = jax.random.uniform(jax.random.fold_in(order_key, number), (num_examples,))
        order = jnp.argsort(jnp.where(keep, draw, draw + 1))  # what is kept comes first
        padding = num_batches * size - num_examples
        rows = jnp.pad(order, (0, padding)).reshape(num_batches, size)
        weights = jnp.pad(keep[order].astype(jnp.float32), (0, padding)).reshape(num_batches, size)
        rates = jnp.full(num_batches, rate(number))
        carry, _ = jax.lax.scan(step, carry, (rows, weights, rates))
        return carry, ()

    (head, _), _ = jax.lax.scan(epoch, (head, rule.init(head)), jnp.arange(recipe.epochs))
    return head


def with_head(variables: Any, head: Any) -> Any:
    """Returns a network's variables with another head."""
    return {**variables, "params": {**variables["params"], "head": head}}


@functools.lru_cache(maxsize=16)  # a function of its own would be compiled anew at each call
def _extractor(model, batch_size, mesh):
    def extract(variables, images):
        return model.apply(variables, to_float(images), method="features")

    return loops.map_batches(extract, batch_size=batch_size, mesh=mesh)
