"""Gradient matching, "Witches' Brew" (Geiping et al., arXiv 2009.02276): a victim from scratch.

    minimise  1 - <g_t, g> / (|g_t| |g|),    g_t = grad_theta CE(f(x^t), b),
                                             g   = sum_j grad_theta CE(f(a(x_j)), b)

over the poisons x_j of class b, for all parameters theta of a trained surrogate f in evaluation
mode: a step that training takes for the poisons is one that takes the target for class b. a is the
random translation and flip of training, drawn anew at every step and differentiated through.

The gradient by the pixels needs no gradient of a gradient. With u the derivative of the objective
by g, held constant, it is grad_x of the directional derivative of the loss along u:

    grad_x objective = grad_x  d/dt sum_j CE(f_{theta + t u}(a(x_j)), b) at t = 0,

one forward-mode and one reverse pass over the poisons, which are independent of each other and so
may come in batches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpoison.attacks.base import Crafted, TargetedAttack, check_epsilon
from jaxpoison.attacks.descent import check_positive, normal_start, projection, signed_adam
from jaxpoison.core import devices, loops
from jaxpoison.data import random_translate_flip


def gradient_matching(
    *,
    epsilon: float,
    num_steps: int = 250,
    learning_rate: float = 0.1,
    restarts: int = 8,
    max_shift: float = 4.0,
    flip: bool = True,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns the attack whose poisons pull a network as the target with the base label would.

    The defaults are those of the authors' toolkit: signed Adam from random noise, its rate cut to a
    tenth after 3/8, 5/8 and 7/8 of the steps, the best of eight starts. Several substitutes are an
    ensemble: the objective is the mean over them. Poisons of one trial at a time, each step one
    compiled program; a trial costs restarts * num_steps gradients of each poison and substitute.

    Args:
      epsilon: budget, in units of [0, 1]; HINT's authors take 16/255.
      num_steps: S, of each start.
      learning_rate: in units of the first substitute's normalised pixels, divided by the number of
        substitutes.
      restarts: random starts, of which each trial keeps the one with the lowest last objective.
      max_shift: random translation in pixels, 0 for none.
      flip: whether half of the poisons are mirrored.
      batch_size: most poisons in one pass; less saves memory, and changes nothing else.

    Raises:
      ValueError: for settings out of range.
    """
    check_epsilon(epsilon)
    check_positive(
        num_steps=num_steps, learning_rate=learning_rate, restarts=restarts, batch_size=batch_size
    )
    if max_shift < 0:
        raise ValueError(f"max_shift must be at least 0, not {max_shift}")
    augment = _Augment(max_shift, flip) if max_shift or flip else None
    compiled = functools.cache(
        lambda models, mesh: _compiled(
            models, mesh, epsilon, learning_rate, num_steps, augment, batch_size
        )
    )

    def craft(keys, substitutes, bases, base_labels, targets, progress=None):
        mesh = devices.data_mesh()
        models = tuple(substitute.model for substitute in substitutes)
        begin, run = compiled(models, mesh)
        variables = [substitute.variables for substitute in substitutes]
        num_trials, num_poisons = bases.shape[:2]
        images, objectives = [], []
        for index in range(num_trials):
            trial = _Trial(keys[index], bases[index], base_labels[index], targets[index])
            placed = devices.replicate((variables, trial), mesh)
            results = []
            for restart in range(restarts):
                constants, carry = begin(*placed, restart)
                (poisons, _), values = run(constants, carry, jnp.arange(num_steps))
                results.append((float(values[-1]), poisons, values))
            # One that is not finite never wins over one that is.
            _, poisons, values = min(
                results, key=lambda result: (result[0] != result[0], result[0])
            )
            images.append(poisons)
            objectives.append(values)
            if progress is not None:
                progress((index + 1) * num_poisons, num_trials * num_poisons)
        gather = jax.devices()[0]
        images, objectives = jax.device_put((images, objectives), gather)
        return Crafted(jnp.stack(images), jnp.stack(objectives, axis=1))

    settings = {
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "restarts": restarts,
        "max_shift": max_shift,
        "flip": flip,
    }
    return TargetedAttack("gradient_matching", epsilon, craft, settings)


def mismatch(
    loss_fn: Callable[[Any, jax.Array, Any], jax.Array],
    params: Any,
    wanted: Any,
    images: jax.Array,
    others: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns 1 - cos(wanted, g), [], and its gradient by `images`; g: that of all losses.

    Args:
      loss_fn: `loss_fn(params, images, others)`, the sum of the losses of one batch, [].
      params: pytree by which gradients are taken.
      wanted: a gradient, shaped like `params`.
      images: float [b, B, ...], b batches.
      others: what else `loss_fn` takes, leading axis b.
    """

    def add(total, batch):
        gradient = jax.grad(loss_fn)(params, *batch)
        return jax.tree.map(jnp.add, total, gradient), ()

    zeros = jax.tree.map(jnp.zeros_like, params)
    found, _ = loops.inner_scan(add, zeros, (images, others))
    # The norm of nothing has no gradient: a floor, below which no step is wanted anyway.
    norm, wanted_norm = (jnp.maximum(optax.tree.norm(tree), 1e-20) for tree in (found, wanted))
    cosine = jnp.asarray(optax.tree.vdot(wanted, found)) / (norm * wanted_norm)
    direction = jax.tree.map(
        lambda w, g: (cosine * g / norm - w / wanted_norm) / norm, wanted, found
    )

    def differentiate(carry, batch):
        images, others = batch

        def slope(images):
            return jax.jvp(lambda p: loss_fn(p, images, others), (params,), (direction,))[1]

        return carry, jax.grad(slope)(images)

    _, gradient = loops.inner_scan(differentiate, (), (images, others))
    return 1 - cosine, gradient


class _Augment(NamedTuple):
    """How poisons are moved at random."""

    max_shift: float
    flip: bool


class _Trial(NamedTuple):
    """What defines a trial."""

    key: jax.Array
    bases: jax.Array  # [P, H, W, C]
    base_label: jax.Array  # []
    targets: jax.Array  # [V, H, W, C]


def _compiled(models, mesh, epsilon, learning_rate, num_steps, augment, batch_size):
    """Returns (begin, run) for one start of one trial; `run` is a compiled loop over steps."""
    optimizer = signed_adam(learning_rate / len(models), num_steps)

    def losses(model, variables, params, images, label):
        logits = model.apply({**variables, "params": params}, images)
        labels = jnp.full(len(images), label)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    @jax.jit
    def begin(variables, trial, restart):
        start_key, step_key = jax.random.split(jax.random.fold_in(trial.key, restart))
        poisons = projection(trial.bases, epsilon)(normal_start(start_key, trial.bases, epsilon))

        def gradient(model, one):
            def loss(params):
                return jnp.mean(losses(model, one, params, trial.targets, trial.base_label))

            return jax.grad(loss)(one["params"])

        wanted = [gradient(model, one) for model, one in zip(models, variables, strict=True)]
        constants = (variables, wanted, trial._replace(key=step_key))
        return constants, (poisons, optimizer.init(poisons))

    def step(constants, carry, index):
        variables, wanted, trial = constants
        poisons, state = carry
        num_poisons = len(poisons)
        size, number = loops.even_batches(num_poisons, batch_size, mesh)
        rows = jnp.minimum(jnp.arange(size * number), num_poisons - 1).reshape(number, size)
        weights = (jnp.arange(size * number) < num_poisons).reshape(number, size)
        step_key = jax.random.fold_in(trial.key, index)

        def loss(model, one, params, images, batch):
            rows, weights = devices.constrain_examples(batch, mesh)
            images = devices.constrain_examples(images, mesh)
            if augment is not None:
                keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, rows)
                images = random_translate_flip(
                    keys, images, fill=jnp.asarray(model.mean), **augment._asdict()
                )
            return jnp.sum(weights * losses(model, one, params, images, trial.base_label))

        values, gradients = zip(
            *(
                mismatch(
                    functools.partial(loss, model, one), one["params"], target, poisons[rows],
                    (rows, weights),
                )
                for model, one, target in zip(models, variables, wanted, strict=True)
            ),
            strict=True,
        )  # fmt: skip
        gradient = functools.reduce(jnp.add, gradients).reshape(-1, *poisons.shape[1:])
        updates, state = optimizer.update(gradient[:num_poisons], state)
        # A step in normalised pixels is one in pixels times their standard deviation.
        moved = poisons + jnp.asarray(models[0].std) * jnp.asarray(updates)
        poisons = projection(trial.bases, epsilon)(moved)
        return (poisons, state), jnp.mean(jnp.stack(values))

    return begin, loops.scan(step)
