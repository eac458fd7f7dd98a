"""How a classifier is trained: the two recipes of HINT (arXiv 2309.08549), the optimiser."""

import dataclasses

import optax


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


def optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """Returns the recipe's optimiser; decay enters before momentum, as in PyTorch's SGD."""
    schedule = optax.piecewise_constant_schedule(
        recipe.learning_rate, {epoch * steps_per_epoch: 0.1 for epoch in recipe.milestones}
    )
    decay = [optax.add_decayed_weights(recipe.weight_decay)] if recipe.weight_decay else []
    momentum = recipe.momentum or None
    return optax.chain(*decay, optax.sgd(schedule, momentum, nesterov=momentum is not None))


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
