"""How a classifier is trained: the recipes of HINT (arXiv 2309.08549), two fast ones, and SGD."""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison.core.settings import check_range, settle

Schedule = Literal["steps", "one_cycle", "linear"]
Optimizer = Literal["sgd", "muon"]


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
    schedule: Schedule = "steps"
    """`steps` follows the milestones. The others move the learning rate at each step and have no
    milestones: `one_cycle` linearly up from 0 over the first quarter of training, then linearly
    down to 0; `linear` down to 0 from the start."""
    optimizer: Optimizer = "sgd"
    """`muon` orthogonalizes the momentum of each convolution kernel, by `optax.contrib`, and keeps
    the norm of the kernel at the square root of its output channels, as K. Jordan's airbench does
    (arXiv 2404.00498); all other parameters follow gradient descent at `other_rate`. The learning
    rate is then the relative change of a kernel in a step."""
    other_rate: float | None = None
    """With `muon`, initial learning rate of what is no convolution kernel."""
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
        if (self.optimizer == "muon") != (self.other_rate is not None):
            raise ValueError(
                f"optimizer {self.optimizer!r} with other_rate {self.other_rate}: `muon` needs "
                "other_rate, such as 0.2, and only `muon` has it"
            )
        check_range(self, "momentum", 0, 1)
        check_range(self, "label_smoothing", 0, 1)
        check_milestones(self.milestones)
        for name, known in (("schedule", Schedule), ("optimizer", Optimizer)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name} must be one of {get_args(known)}, got {getattr(self, name)!r}"
                )
        if self.schedule != "steps" and self.milestones:
            raise ValueError(f"{self.schedule} has no milestones; remove {self.milestones}")


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
    epochs=18,
    batch_size=512,
    learning_rate=0.12,
    momentum=0.8,
    weight_decay=1e-3,
    milestones=(),
    max_shift=2.0,
    whole_pixels=True,
    schedule="linear",
    optimizer="muon",
    other_rate=0.2,
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

    epoch: jax.typing.ArrayLike
    steps_taken: jax.typing.ArrayLike
    num_steps: jax.typing.ArrayLike


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns the recipe's optimizer; decay enters before momentum, as in PyTorch's SGD."""
    if recipe.optimizer == "sgd":
        return _sgd(recipe, recipe.learning_rate)
    return optax.partition(
        {"kernel": _muon(recipe), "other": _sgd(recipe, recipe.other_rate)},
        lambda params: jax.tree.map(lambda leaf: "kernel" if leaf.ndim == 4 else "other", params),
    )


def _sgd(recipe, learning_rate):
    decay = []
    if recipe.weight_decay:
        decay = [optax.add_decayed_weights(recipe.weight_decay, _decaying(recipe))]
    momentum = [optax.trace(recipe.momentum, nesterov=True)] if recipe.momentum else []
    return optax.chain(*decay, *momentum, _scale_by_clock(recipe, learning_rate))


def _decaying(recipe):
    """Returns what tells optax which parameters decay; None for all."""
    if recipe.decay_vectors:
        return None
    return lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _muon(recipe):
    """For convolution kernels [height, width, inputs, outputs]; norms are fixed, so no decay."""
    as_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=recipe.momentum,
            weight_dimension_numbers=lambda kernels: jax.tree.map(lambda _: as_matrix, kernels),
        ),
        _scale_by_clock(recipe, recipe.learning_rate),
        optax.stateless(lambda updates, kernels: jax.tree.map(_from_norm, updates, kernels)),
    )


def _from_norm(update, kernel):
    """Returns the update that starts from the kernel at its norm, as a change of the kernel."""
    scale = jnp.sqrt(kernel.shape[-1]) / jnp.linalg.norm(kernel)
    return update + (scale - 1) * kernel


def at_epoch(opt_state: optax.OptState, epoch: int, num_steps: int) -> optax.OptState:
    """Returns the state of `optimizer` at the start of an epoch of `num_steps` steps."""
    # Of NumPy: each clock of several gets buffers of its own, which a loop may donate.
    now = Clock(np.int32(epoch), np.int32(0), np.int32(num_steps))
    return optax.tree.set(opt_state, **now._asdict())


def _scale_by_clock(recipe, learning_rate):
    share = _RATES[recipe.schedule](recipe)

    def init(params):
        del params
        return Clock(*jnp.array([0, 0, 1], jnp.int32))

    def update(updates, state, params=None):
        del params
        step = -learning_rate * share(state)
        updates = jax.tree.map(lambda u: jnp.array(step, u.dtype) * u, updates)
        return updates, state._replace(steps_taken=state.steps_taken + 1)

    return optax.GradientTransformation(init, update)


def _milestones(recipe):
    share = optax.piecewise_constant_schedule(1.0, dict.fromkeys(recipe.milestones, 0.1))
    return lambda clock: share(clock.epoch)


def _one_cycle(recipe):
    def share(clock):
        done = _done(recipe, clock)
        return jnp.minimum(done / 0.25, (1 - done) / 0.75)

    return share


def _linear(recipe):
    return lambda clock: 1 - _done(recipe, clock)


def _done(recipe, clock):
    """Returns the share of training that is done, in the middle of a step: none is at rate 0."""
    return (clock.epoch + (clock.steps_taken + 0.5) / clock.num_steps) / recipe.epochs


_RATES = {"steps": _milestones, "one_cycle": _one_cycle, "linear": _linear}


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
