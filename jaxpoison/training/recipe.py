"""How a classifier is trained: the recipes of HINT (arXiv 2309.08549), two fast ones, and SGD."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpoison.core.settings import check_range, settle


def check_milestones(milestones: tuple[int, ...]) -> None:
    """Raises ValueError unless these are epochs."""
    if not all(isinstance(epoch, int) and epoch >= 0 for epoch in milestones):
        raise ValueError(f"milestones must be whole epochs, 0 or later, got {milestones}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent on cross-entropy; the defaults are the paper's for CIFAR-10."""

    epochs: int = 80
    """Passes over the training set."""
    batch_size: int = 128
    """Examples a step, over all devices; an epoch drops the remainder of its random order."""
    learning_rate: float = 0.1
    """Initial learning rate."""
    momentum: float = 0.9
    """Nesterov momentum; 0 for plain gradient descent."""
    weight_decay: float = 5e-4
    """Added to the gradient as weight_decay * parameter."""
    milestones: tuple[int, ...] = (30, 50, 70)
    """Epochs at which the learning rate is divided by 10."""
    max_shift: float = 4.0
    """Random translation of each image, in pixels; 0 for none."""
    flip: bool = True
    """Whether images are mirrored at random."""
    whole_pixels: bool = False
    """Whether translations are by whole pixels; others blur the image a little."""
    schedule: Literal["steps", "one_cycle"] = "steps"
    """`steps` follows the milestones. `one_cycle` moves the learning rate at each step: linearly
    up from 0 over the first quarter of training, then linearly down to 0; it has no milestones."""
    decay_vectors: bool = True
    """Whether biases and BatchNorm's parameters decay as kernels do."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes."""

    def __post_init__(self):
        settle(self)
        check_range(self, "epochs", 1, whole=True)
        check_range(self, "batch_size", 1, whole=True)
        for name in ("learning_rate", "weight_decay", "max_shift"):
            check_range(self, name, 0)
        check_range(self, "momentum", 0, 1)
        check_range(self, "label_smoothing", 0, 1)
        check_milestones(self.milestones)
        if self.schedule not in ("steps", "one_cycle"):
            raise ValueError(f"schedule must be 'steps' or 'one_cycle', got {self.schedule!r}")
        if self.schedule == "one_cycle" and self.milestones:
            raise ValueError(f"one_cycle has no milestones; remove {self.milestones}")


CIFAR10 = Recipe()
MNIST = Recipe(
    epochs=30,
    learning_rate=0.01,
    momentum=0.0,
    weight_decay=0.0,
    milestones=(),
    max_shift=0.0,
    flip=False,
)
FAST = Recipe(
    epochs=9,
    learning_rate=0.15,
    weight_decay=2e-3,
    milestones=(),
    max_shift=2.0,
    whole_pixels=True,
    schedule="one_cycle",
    decay_vectors=False,
    label_smoothing=0.1,
)
"""For `models.fast_cnn` on CIFAR-10."""
MNIST_FAST = Recipe(
    epochs=3,
    batch_size=128,
    learning_rate=0.05,
    weight_decay=1e-4,
    milestones=(),
    max_shift=2.0,
    flip=False,
    schedule="one_cycle",
)
"""For `models.mnist_cnn`."""


class Clock(NamedTuple):
    """How far training has come; the part of the optimizer's state that the learning rate follows.

    The number of steps in an epoch is no constant: defenses drop and add examples.

    Attributes:
      epoch: finished epochs, int32, shape ().
      steps_taken: in the epoch that is under way, int32, shape ().
      num_steps: of this epoch, int32, shape ().
    """

    epoch: jax.Array
    steps_taken: jax.Array
    num_steps: jax.Array


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns the recipe's optimizer; decay enters before momentum, as in PyTorch's SGD."""
    decay = []
    if recipe.weight_decay:
        decay = [optax.add_decayed_weights(recipe.weight_decay, _decaying(recipe))]
    momentum = [optax.trace(recipe.momentum, nesterov=True)] if recipe.momentum else []
    return optax.chain(*decay, *momentum, _scale_by_clock(recipe))


def _decaying(recipe):
    """Returns what tells optax which parameters decay; None for all."""
    if recipe.decay_vectors:
        return None
    return lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def at_epoch(opt_state: optax.OptState, epoch: int, num_steps: int) -> optax.OptState:
    """Returns the state of `optimizer` at the start of an epoch of `num_steps` steps."""
    epoch, num_steps = jnp.int32(epoch), jnp.int32(num_steps)
    return optax.tree.set(opt_state, epoch=epoch, steps_taken=jnp.int32(0), num_steps=num_steps)


def _scale_by_clock(recipe):
    rate = (_one_cycle if recipe.schedule == "one_cycle" else _milestones)(recipe)

    def init(params):
        del params
        return Clock(*jnp.array([0, 0, 1], jnp.int32))

    def update(updates, state, params=None):
        del params
        step = -1 * rate(state)
        updates = jax.tree.map(lambda u: jnp.array(step, u.dtype) * u, updates)
        return updates, state._replace(steps_taken=state.steps_taken + 1)

    return optax.GradientTransformation(init, update)


def _milestones(recipe):
    rate = optax.piecewise_constant_schedule(
        recipe.learning_rate, dict.fromkeys(recipe.milestones, 0.1)
    )
    return lambda clock: rate(clock.epoch)


def _one_cycle(recipe):
    def rate(clock):
        # In the middle of a step, so that none has a rate of zero.
        share = (clock.steps_taken + 0.5) / clock.num_steps
        done = (clock.epoch + share) / recipe.epochs
        return recipe.learning_rate * jnp.minimum(done / 0.25, (1 - done) / 0.75)

    return rate


def steps_per_epoch(recipe: Recipe, num_examples: int) -> int:
    """Returns the number of whole batches in the training set.

    Raises:
      ValueError: if there is not even one.
    """
    if num_examples < recipe.batch_size:
        raise ValueError(
            f"the training set has {num_examples} examples, fewer than one batch of "
            f"{recipe.batch_size}: choose a smaller batch size"
        )
    return num_examples // recipe.batch_size
