"""Attacks with clean labels that descend a loss over pixels: PGD, DAP and adversarial poisons.

    x' <- project(x' - step sign grad L(x')),      |x' - x| <= epsilon in every pixel  (linf)
    x' <- project(x' - step grad L / |grad L|),    |x' - x|_2 <= epsilon in every image  (l2)

with x' in [0, 1]. f is a network trained on clean data, in evaluation mode, and L is

    pgd             -CE(f(x'), y)             from a random start; Madry et al. 2018
    dap              CE(f(x'), y + 1 mod K)   from x; type P1 of Tao et al. 2021
    error_max       -CE(f(a(x')), y)          Fowl et al. 2021, untargeted
    class_targeted   CE(f(a(x')), y + 1 mod K)   Fowl et al. 2021, also known as TAP

where a moves and flips at random. Papers: arXiv 1706.06083, 2102.04716, 2106.10807.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxpoison.attacks.base import (
    Attack,
    Settings,
    check_epsilon,
    checked_images,
    typed_key,
)
from jaxpoison.core import devices, loops
from jaxpoison.core.settings import check_range
from jaxpoison.data import balls
from jaxpoison.data.augment import random_translate_flip
from jaxpoison.network import shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Descent(Settings):
    """Settings of one descent; see the factories below."""

    norm: balls.Norm
    step: float
    num_steps: int
    goal: Literal["away", "next"]
    start: Literal["clean", "uniform", "normal"]
    max_shift: float = 0.0
    flip: bool = False
    restarts: int = 1

    def __post_init__(self):
        balls.check_norm(self.norm)
        super().__post_init__()
        check_range(self, "step", 0)
        check_range(self, "num_steps", 1, whole=True)
        check_range(self, "max_shift", 0)
        check_range(self, "restarts", 1, whole=True)

    @property
    def most(self) -> float:
        """The largest budget that makes sense."""
        return balls.largest_budget(self.norm)


def pgd(
    *,
    epsilon: float,
    norm: balls.Norm = "linf",
    step: float | None = None,
    num_steps: int = 10,
    batch_size: int = 512,
) -> Attack:
    """Returns projected gradient ascent on the cross-entropy of the true label.

    Args:
      epsilon: budget, in units of [0, 1]: of each pixel, or with norm="l2" the length of an image's
        change.
      norm: "linf" or "l2".
      step: size of a step, in the same norm; default 2/255, or epsilon / 4 where that cannot cross
        the budget in `num_steps` (as on MNIST with epsilon = 0.3) and for "l2".
      num_steps: gradient steps, at least 1.
      batch_size: most images crafted at once.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    balls.check_norm(norm)
    check_epsilon(epsilon, balls.largest_budget(norm))
    if step is None:
        crosses = norm == "linf" and num_steps * 2 / 255 >= epsilon
        step = 2 / 255 if crosses else epsilon / 4
    settings = _Descent(
        epsilon=epsilon, norm=norm, step=step, num_steps=num_steps, goal="away", start="uniform",
        batch_size=batch_size,
    )  # fmt: skip
    return _attack("pgd", settings)


def dap(
    *,
    epsilon: float,
    norm: balls.Norm = "linf",
    step: float | None = None,
    num_steps: int = 100,
    batch_size: int = 512,
) -> Attack:
    """Returns descent on the cross-entropy of the next label: adversarial examples of class y + 1.

    Tao et al. use epsilon = 0.5 with norm="l2" and a VGG-16 (`models.vgg16`) on CIFAR-10.

    Args:
      epsilon: budget, in units of [0, 1]; see `pgd`.
      norm: "linf" or "l2".
      step: size of a step, in the same norm; default epsilon / 5.
      num_steps: gradient steps, at least 1.
      batch_size: most images crafted at once.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    balls.check_norm(norm)
    check_epsilon(epsilon, balls.largest_budget(norm))
    settings = _Descent(
        epsilon=epsilon, norm=norm, step=epsilon / 5 if step is None else step,
        num_steps=num_steps, goal="next", start="clean", batch_size=batch_size,
    )  # fmt: skip
    return _attack("dap", settings)


def error_max(
    *,
    epsilon: float,
    num_steps: int = 250,
    restarts: int = 1,
    max_shift: float = 4.0,
    flip: bool = True,
    batch_size: int = 512,
) -> Attack:
    """Returns the error-maximizing poisons of Fowl et al.: `pgd` through random augmentation.

    Steps are of the gradient's sign times 0.05 epsilon, from N(0, epsilon^2) clipped to the budget.

    Args:
      epsilon: budget of each pixel, in units of [0, 1].
      num_steps: gradient steps, at least 1; theirs are 250.
      restarts: of which each image keeps the one of the lowest last loss; theirs are 8.
      max_shift: largest random shift, in pixels.
      flip: whether to flip at random.
      batch_size: most images crafted at once.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    return _fowl("error_max", "away", epsilon, num_steps, restarts, max_shift, flip, batch_size)


def class_targeted(
    *,
    epsilon: float,
    num_steps: int = 250,
    restarts: int = 1,
    max_shift: float = 4.0,
    flip: bool = True,
    batch_size: int = 512,
) -> Attack:
    """Returns the class-targeted poisons of Fowl et al. (TAP): towards the next label.

    Their strongest; arguments and errors as of `error_max`.
    """
    return _fowl(
        "class_targeted", "next", epsilon, num_steps, restarts, max_shift, flip, batch_size
    )


def _fowl(name, goal, epsilon, num_steps, restarts, max_shift, flip, batch_size):
    check_epsilon(epsilon)
    settings = _Descent(
        epsilon=epsilon, norm="linf", step=0.05 * epsilon, num_steps=num_steps, goal=goal,
        start="normal", max_shift=max_shift, flip=flip, restarts=restarts, batch_size=batch_size,
    )  # fmt: skip
    return _attack(name, settings)


def _attack(name, settings):
    craft = functools.partial(_craft, settings)
    return Attack(name, settings.epsilon, craft, settings.for_archives())


def _craft(settings, key, victim, images, labels, progress=None):
    network, images, labels = checked_images(victim, images, labels)
    key = typed_key(key)
    mesh = devices.data_mesh()
    descend = shared(_compiled, settings, network, mesh)
    assert network.num_classes is not None  # `network_of` has seen to it
    targets = labels if settings.goal == "away" else (labels + 1) % network.num_classes
    variables = devices.replicate(victim[1], mesh)
    num_images = len(images)
    size, _ = loops.even_batches(num_images, settings.batch_size, mesh)
    steps = jnp.arange(settings.num_steps)
    crafted = []
    for first in range(0, num_images, size):
        rows = jnp.minimum(jnp.arange(first, first + size), num_images - 1)
        found = []
        for restart in range(settings.restarts):
            # The first start is that of a single one.
            begin_key = jax.random.fold_in(key, first + restart * num_images)
            begin = _start(settings, begin_key, images[rows])
            batch, begin = devices.shard_examples(((images[rows], targets[rows]), begin), mesh)
            keys = jax.random.fold_in(begin_key, 1), rows
            done, losses = descend((variables, *batch, keys), begin, steps)
            found.append((done, losses[-1]))
        best, _ = functools.reduce(_lower, found)
        crafted.append(best[: num_images - first])
        if progress is not None:
            jax.block_until_ready(crafted[-1])
            progress(min(first + size, num_images), num_images)
    return jnp.concatenate(crafted)


def _start(settings, key, images):
    """Returns where the descent of a batch begins; a copy, for the loop donates its carry."""
    if settings.start == "clean":
        return jnp.array(images)
    if settings.start == "uniform":
        change = balls.random_change(key, images, settings.epsilon, settings.norm)
    else:
        change = settings.epsilon * jax.random.normal(key, images.shape, images.dtype)
        change = balls.project(change, settings.epsilon, settings.norm)
    return jnp.clip(images + change, 0.0, 1.0)


@jax.jit
def _lower(one, other):
    """Returns of two results (images, losses) the one of the lower loss, image by image."""
    better = other[1] < one[1]
    images = jnp.where(better[:, None, None, None], other[0], one[0])
    return images, jnp.minimum(one[1], other[1])


def _compiled(settings, network, mesh):
    return loops.scan(functools.partial(_move, settings, network, mesh))


def _move(settings, network, mesh, constants, current, index):
    """Returns the images after one step, and their losses before it; a step of `loops.scan`."""
    variables, images, targets, (key, rows) = constants
    images, current = devices.constrain_examples((images, current), mesh)

    def loss(x):
        if settings.max_shift or settings.flip:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, index), rows)
            x = random_translate_flip(
                keys, x, max_shift=settings.max_shift, fill=jnp.asarray(network.mean),
                flip=settings.flip,
            )  # fmt: skip
        logits = network.logits(variables, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        losses = -losses if settings.goal == "away" else losses
        return jnp.sum(losses), losses

    gradient, losses = jax.grad(loss, has_aux=True)(current)
    moved = current - settings.step * balls.steepest(gradient, settings.norm)
    change = balls.project(moved - images, settings.epsilon, settings.norm)
    return jnp.clip(images + change, 0.0, 1.0), losses
