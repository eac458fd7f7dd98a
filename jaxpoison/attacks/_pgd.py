"""PGD and DAP, untargeted attacks with clean labels: x' in [0,1], |x' - x| <= epsilon per pixel.

    PGD   x' <- project(x' + step sign grad  CE(f(x'), y)),          from a random start
    DAP   x' <- project(x' - step sign grad  CE(f(x'), y + 1 mod K)), from x

PGD: Madry et al. 2018 (arXiv 1706.06083), used as training poison by Fowl et al. 2021
(arXiv 2106.10807). DAP: type P1 of Tao et al. 2021 (arXiv 2102.04716). f is a network trained on
clean data, in evaluation mode.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from jaxpoison.attacks.base import Attack, Settings, check_epsilon, checked_images
from jaxpoison.attacks.descent import uniform_noise
from jaxpoison.core import devices, loops
from jaxpoison.core.settings import check_range
from jaxpoison.network import shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Signed(Settings):
    step: float
    num_steps: int

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "step", 0)
        check_range(self, "num_steps", 1, whole=True)


class _Pgd(_Signed):
    sign = -1.0  # of the loss that is descended

    def objective(self, labels, num_classes):
        return labels

    def start(self, key, images):
        return jnp.clip(images + uniform_noise(key, images, self.epsilon), 0.0, 1.0)


class _Dap(_Signed):
    sign = 1.0

    def objective(self, labels, num_classes):
        return (labels + 1) % num_classes

    def start(self, key, images):
        return jnp.array(images)  # a copy: the loop donates its carry


def pgd(
    *, epsilon: float, step: float | None = None, num_steps: int = 10, batch_size: int = 512
) -> Attack:
    """Returns projected gradient ascent on the cross-entropy of the true label.

    Args:
      epsilon: budget, in units of [0, 1].
      step: size of a step; default 2/255, or epsilon / 4 where that cannot cross the budget in
        `num_steps` (as on MNIST with epsilon = 0.3).
      num_steps: gradient steps, at least 1.
      batch_size: most images crafted at once.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    check_epsilon(epsilon)
    if step is None:
        step = 2 / 255 if num_steps * 2 / 255 >= epsilon else epsilon / 4
    return _attack(
        "pgd", _Pgd(epsilon=epsilon, step=step, num_steps=num_steps, batch_size=batch_size)
    )


def dap(
    *, epsilon: float, step: float | None = None, num_steps: int = 100, batch_size: int = 512
) -> Attack:
    """Returns descent on the cross-entropy of the next label: adversarial examples of class y + 1.

    Args:
      epsilon: budget, in units of [0, 1].
      step: size of a step; default epsilon / 5.
      num_steps: gradient steps, at least 1.
      batch_size: most images crafted at once.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    check_epsilon(epsilon)
    step = epsilon / 5 if step is None else step
    return _attack(
        "dap", _Dap(epsilon=epsilon, step=step, num_steps=num_steps, batch_size=batch_size)
    )


def _attack(name, settings):
    craft = functools.partial(_craft, settings)
    return Attack(name, settings.epsilon, craft, settings.for_archives())


def _craft(settings, key, victim, images, labels, progress=None):
    network, images, labels = checked_images(victim, images, labels)
    mesh = devices.data_mesh()
    descend = shared(_compiled, settings, network, mesh)
    targets = settings.objective(labels, network.num_classes)
    variables = devices.replicate(victim[1], mesh)
    num_images = len(images)
    size, _ = loops.even_batches(num_images, settings.batch_size, mesh)
    crafted = []
    for first in range(0, num_images, size):
        rows = jnp.minimum(jnp.arange(first, first + size), num_images - 1)
        begin = settings.start(jax.random.fold_in(key, first), images[rows])
        batch, begin = devices.shard_examples(((images[rows], targets[rows]), begin), mesh)
        done, _ = descend((variables, *batch), begin, jnp.arange(settings.num_steps))
        crafted.append(done[: num_images - first])
        if progress is not None:
            jax.block_until_ready(done)
            progress(min(first + size, num_images), num_images)
    return jnp.concatenate(crafted)


def _compiled(settings, network, mesh):
    return loops.scan(functools.partial(_move, settings, network, mesh))


def _move(settings, network, mesh, constants, current, _):
    """Returns the images after one step; a step of `loops.scan`."""
    variables, images, targets = constants
    images, current = devices.constrain_examples((images, current), mesh)

    def loss(x):
        logits = network.logits(variables, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return settings.sign * jnp.sum(losses)

    moved = current - settings.step * jnp.sign(jax.grad(loss)(current))
    moved = jnp.clip(moved, images - settings.epsilon, images + settings.epsilon)
    return jnp.clip(moved, 0.0, 1.0), ()
