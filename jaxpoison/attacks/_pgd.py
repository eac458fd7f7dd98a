"""PGD and DAP, untargeted attacks with clean labels: x' in [0,1], |x' - x| <= epsilon per pixel.

    PGD   x' <- project(x' + step sign grad  CE(f(x'), y)),          from a random start
    DAP   x' <- project(x' - step sign grad  CE(f(x'), y + 1 mod K)), from x

PGD: Madry et al. 2018 (arXiv 1706.06083), used as training poison by Fowl et al. 2021
(arXiv 2106.10807). DAP: type P1 of Tao et al. 2021 (arXiv 2102.04716). f is a network trained on
clean data, in evaluation mode.
"""

import jax
import jax.numpy as jnp
import optax

from jaxpoison.attacks.base import Attack, check_epsilon
from jaxpoison.core import devices, loops


def pgd(
    *, epsilon: float, step: float | None = None, num_steps: int = 10, batch_size: int = 512
) -> Attack:
    """Returns projected gradient ascent on the cross-entropy of the true label.

    Args:
      epsilon: budget, in units of [0, 1].
      step: size of a step; default 2/255, or epsilon / 4 where that cannot cross the budget in
        `num_steps` (as on MNIST with epsilon = 0.3).
      num_steps: gradient steps.
      batch_size: most images crafted at once.
    """
    check_epsilon(epsilon)
    if step is None:
        step = 2 / 255 if num_steps * 2 / 255 >= epsilon else epsilon / 4

    def start(key, images):
        noise = jax.random.uniform(key, images.shape, minval=-epsilon, maxval=epsilon)
        return jnp.clip(images + noise, 0.0, 1.0)

    craft = _signed_descent(
        start, lambda labels, num_classes: (labels, -1.0), epsilon, step, num_steps, batch_size
    )
    return Attack("pgd", epsilon, craft, {"step": step, "num_steps": num_steps})


def dap(
    *, epsilon: float, step: float | None = None, num_steps: int = 100, batch_size: int = 512
) -> Attack:
    """Returns descent on the cross-entropy of the next label: adversarial examples of class y + 1.

    Args:
      epsilon: budget, in units of [0, 1].
      step: size of a step; default epsilon / 5.
      num_steps: gradient steps.
      batch_size: images crafted at once.
    """
    check_epsilon(epsilon)
    step = epsilon / 5 if step is None else step
    craft = _signed_descent(
        lambda key, images: jnp.array(images),  # a copy: the loop donates its carry
        lambda labels, num_classes: ((labels + 1) % num_classes, 1.0),
        epsilon,
        step,
        num_steps,
        batch_size,
    )
    return Attack("dap", epsilon, craft, {"step": step, "num_steps": num_steps})


def _signed_descent(start, objective, epsilon, step, num_steps, batch_size):
    """Returns the `CraftFn` that descends sign * CE(f(x'), y'), with y', sign = objective(y, K)."""

    def craft(key, victim, images, labels, progress=None):
        mesh = devices.data_mesh()
        targets, sign = objective(labels, victim.model.num_classes)

        def move(constants, current, _):
            variables, images, targets = constants
            images, current = devices.constrain_examples((images, current), mesh)

            def loss(x):
                logits = victim.model.apply(variables, x)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
                return sign * jnp.sum(losses)

            moved = current - step * jnp.sign(jax.grad(loss)(current))
            moved = jnp.clip(moved, images - epsilon, images + epsilon)
            return jnp.clip(moved, 0.0, 1.0), ()

        descend = loops.scan(move)
        variables = devices.replicate(victim.variables, mesh)
        num_images = len(images)
        size, _ = loops.even_batches(num_images, batch_size, mesh)
        crafted = []
        for first in range(0, num_images, size):
            rows = jnp.minimum(jnp.arange(first, first + size), num_images - 1)
            begin = start(jax.random.fold_in(key, first), images[rows])
            batch, begin = devices.shard_examples(((images[rows], targets[rows]), begin), mesh)
            done, _ = descend((variables, *batch), begin, jnp.arange(num_steps))
            crafted.append(done[: num_images - first])
            if progress is not None:
                jax.block_until_ready(done)
                progress(min(first + size, num_images), num_images)
        return jnp.concatenate(crafted)

    return craft
