"""A new head on a frozen extractor: the victim of transfer learning, trained whole under `jit`.

The head is the last linear layer. Its features do not change while it is trained, so they are
computed once, and all epochs are one compiled scan over matrix products. Every function here may
be put under `vmap`, over poisoned sets or over seeds.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import core

from jaxpoison.core import devices
from jaxpoison.core.settings import check_range, settle
from jaxpoison.data import as_dataset, check
from jaxpoison.data.labels import as_class_numbers
from jaxpoison.network import as_network, features
from jaxpoison.training.hooks import (
    Defense,
    checked,
    checked_info,
    keep_batch,
    keep_result,
    with_ids,
)
from jaxpoison.training.recipe import check_milestones
from jaxpoison.training.state import TrainState


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

    def __post_init__(self):
        settle(self)
        check_range(self, "epochs", 1, whole=True)
        if self.batch_size is not None:
            check_range(self, "batch_size", 1, whole=True)
        check_range(self, "learning_rate", 0)
        check_range(self, "initial_scale", 0)
        check_milestones(self.milestones)


HEAD = HeadRecipe()


def fit_head(
    key: jax.Array,
    features: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    recipe: HeadRecipe = HEAD,
    keep: jax.Array | None = None,
    bias: bool = True,
) -> Any:
    """Returns a head, `{"kernel": [d, K], "bias": [K]}`, trained from new initial values.

    Args:
      key: PRNG key of the initial values and of the order of the examples.
      features: float32 [N, d], as `network.features` returns them; NumPy or JAX.
      labels: [N], class numbers in [0, K).
      num_classes: K.
      recipe: how to train.
      keep: bool [N], the examples to train on, e.g. those a filter keeps; default all. The steps
        are those of a training set that never held the others.
      bias: whether the head has one.

    Raises:
      ValueError: if features, labels and `keep` do not fit each other, or (outside `jit`) a label
        is not a class number.
    """
    features, labels, keep = _checked(features, labels, keep, num_classes)
    init_key, order_key = jax.random.split(key)
    epoch = _epoch(order_key, features, labels, keep, recipe)
    shapes: dict[str, Any] = {"kernel": (features.shape[1], num_classes)}
    shapes |= {"bias": (num_classes,)} if bias else {}
    like = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    carry = _start(init_key, like, recipe)
    (head, _), _ = jax.lax.scan(
        lambda carry, number: (epoch(carry, number), ()), carry, jnp.arange(recipe.epochs)
    )
    return head


def fit_defended_head(
    key: jax.Array,
    model: Any,
    variables: Any,
    train: Any,
    defense: Defense,
    *,
    recipe: HeadRecipe = HEAD,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """Returns a head trained under a defense, `{"kernel": [d, K], "bias": [K]}`.

    As `training.fit` with a frozen extractor, but without augmentation: features are computed again
    only where the defense has changed the images, so that a run takes a few forward passes. With a
    defense that does nothing the head is that of `fit_head` for the same key.

    Args:
      key: PRNG key of the initial values, of the order of the examples and of the defense.
      model: a `Network`, or what `network.as_network` takes.
      variables: its `params` and `batch_stats`; the head among them is not used.
      train: N images and labels, as `data.as_dataset` takes them.
      defense: its `init` and `on_epoch` are called.
      recipe: how to train.
      mesh: devices to use, the defense's too; default all.

    Raises:
      ValueError: for bad images or labels, or a defense that acts on the batch of a step (FRIENDS,
        adversarial training, random noise) or after training (a head refit): those need
        `training.fit(transfer=...)`.
    """
    train = as_dataset(train)
    check(train)
    network = as_network(model, image_shape=train.images.shape[1:])
    check(train, network.num_classes)
    checked(defense)
    for hook, nothing in (("on_batch", keep_batch), ("finish", keep_result)):
        if getattr(defense, hook) is not nothing:
            raise ValueError(
                f"the defense has a hook {hook}, which fit_defended_head cannot honor: use "
                "training.fit(..., transfer=Transfer(variables))"
            )
    num_examples = len(train.labels)
    mesh = devices.data_mesh() if mesh is None else mesh
    init_key, order_key = jax.random.split(key)
    start = _start(init_key, network.head(variables), recipe)
    train, variables, carry = devices.replicate((with_ids(train), variables, start), mesh)
    state = defense.init(jax.random.fold_in(key, 1), train, recipe.epochs)
    inputs: tuple[jax.Array, ...] = ()
    for number in range(recipe.epochs):
        full = network.with_head(variables, carry[0])
        current = TrainState(
            jnp.int32(number), full["params"], full.get("batch_stats", {}), carry[1]
        )
        state, dataset, info = defense.on_epoch(state, number, current, train)
        if number == 0 or checked_info(info).changed:
            found = features(network, variables, dataset.images, mesh=mesh)
            # What the defense dropped is filled up, so that no other shape is compiled.
            missing = num_examples - len(found)
            inputs = (
                jnp.pad(found, ((0, missing), (0, 0))),
                jnp.pad(jnp.asarray(dataset.labels), (0, missing)),
                jnp.arange(num_examples) < len(found),
            )
        carry = _run_epoch(order_key, *inputs, carry, number, recipe=recipe)
    return carry[0]


def _checked(features, labels, keep, num_classes):
    """Returns all three as JAX arrays."""
    features = jnp.asarray(features)
    if not isinstance(labels, core.Tracer):
        labels = as_class_numbers(labels, num_classes)
    labels = jnp.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features {features.shape} and labels {labels.shape}: expected [N, d] and [N], N > 0"
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(f"features are {features.dtype}; expected floating point")
    keep = jnp.ones(len(labels), bool) if keep is None else jnp.asarray(keep)
    if keep.shape != labels.shape or keep.dtype != bool:
        raise ValueError(
            f"keep is {keep.dtype} {keep.shape}; expected one bool for each of {len(labels)} "
            "examples, such as result.keep_mask"
        )
    return features, labels, keep


# The learning rate is applied outside, so that it follows epochs and not steps taken.
_RULE = optax.scale_by_adam()


def _start(key, like, recipe):
    """Returns (head, state of the optimizer) before the first step; shapes are those of `like`."""
    head = {name: jnp.zeros(part.shape, jnp.float32) for name, part in like.items()}
    head["kernel"] = recipe.initial_scale * jax.random.normal(key, like["kernel"].shape)
    return head, _RULE.init(head)


def _epoch(key, features, labels, keep, recipe):
    """Returns `epoch(carry, number) -> carry`, one pass over what is kept."""
    num_examples = len(features)
    size = min(recipe.batch_size or num_examples, num_examples)
    num_batches = -(-num_examples // size)
    rate = optax.piecewise_constant_schedule(
        recipe.learning_rate, dict.fromkeys(recipe.milestones, 0.1)
    )

    def loss_fn(head, rows, weights):
        logits = features[rows] @ head["kernel"] + head.get("bias", 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
        return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1)

    def step(carry, batch):
        rows, weights, learning_rate = batch
        head, state = carry
        updates, new_state = _RULE.update(jax.grad(loss_fn)(head, rows, weights), state)
        moved = jax.tree.map(lambda p, u: p - learning_rate * u, head, updates)
        # A batch of which nothing is kept is no step at all.
        taken = jnp.sum(weights) > 0
        return jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), (moved, new_state), (head, state)
        ), ()

    def epoch(carry, number):
        draw = jax.random.uniform(jax.random.fold_in(key, number), (num_examples,))
        order = jnp.argsort(jnp.where(keep, draw, draw + 1))  # what is kept comes first
        padding = num_batches * size - num_examples
        rows = jnp.pad(order, (0, padding)).reshape(num_batches, size)
        weights = jnp.pad(keep[order].astype(jnp.float32), (0, padding)).reshape(num_batches, size)
        rates = jnp.full(num_batches, rate(number))
        return jax.lax.scan(step, carry, (rows, weights, rates))[0]

    return epoch


@functools.partial(jax.jit, static_argnames="recipe")
def _run_epoch(key, features, labels, keep, carry, number, *, recipe):
    return _epoch(key, features, labels, keep, recipe)(carry, number)
