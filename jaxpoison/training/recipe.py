"""How a classifier is trained: the two recipes of HINT (arXiv 2309.08549), the optimizer."""

import dataclasses
from typing import NamedTuple

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
    """Added to the gradient as weight_decay * parameter, for all parameters."""
    milestones: tuple[int, ...] = (30, 50, 70)
    """Epochs at which the learning rate is divided by 10."""
    max_shift: float = 4.0
    """Random translation of each image, in pixels; 0 for none."""
    flip: bool = True
    """Whether images are mirrored at random."""

    def __post_init__(self):
        settle(self)
        check_range(self, "epochs", 1, whole=True)
        check_range(self, "batch_size", 1, whole=True)
        for name in ("learning_rate", "weight_decay", "max_shift"):
            check_range(self, name, 0)
        check_range(self, "momentum", 0, 1)
        check_milestones(self.milestones)


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


class Clock(NamedTuple):
    """How far training has come; the part of the optimizer's state that the learning rate follows.

    The number of steps in an epoch is no constant: defenses drop and add examples.

    Attributes:
      epoch: finished epochs, int32, shape ().
    """

    epoch: jax.Array


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns the recipe's optimizer; decay enters before momentum, as in PyTorch's SGD."""
    decay = [optax.add_decayed_weights(recipe.weight_decay)] if recipe.weight_decay else []
    momentum = [optax.trace(recipe.momentum, nesterov=True)] if recipe.momentum else []
    return optax.chain(*decay, *momentum, _scale_by_clock(recipe))


def at_epoch(opt_state: optax.OptState, epoch: int) -> optax.OptState:
    """Returns the state of `optimizer` at the start of an epoch."""
    return optax.tree.set(opt_state, epoch=jnp.int32(epoch))


def _scale_by_clock(recipe):
    rate = optax.piecewise_constant_schedule(
        recipe.learning_rate, dict.fromkeys(recipe.milestones, 0.1)
    )

    def init(params):
        del params
        return Clock(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        step = -1 * rate(state.epoch)
        return jax.tree.map(lambda u: jnp.array(step, u.dtype) * u, updates), state

    return optax.GradientTransformation(init, update)


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
