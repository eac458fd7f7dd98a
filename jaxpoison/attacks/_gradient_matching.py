"""Gradient matching, "Witches' Brew" (Geiping et al., arXiv 2009.02276): a victim from scratch.

    minimize  1 - <g_t, g> / (|g_t| |g|),    g_t = grad_theta CE(f(x^t), b),
                                             g   = sum_j grad_theta CE(f(a(x_j)), b)

over the poisons x_j of class b, for all parameters theta of a trained surrogate f in evaluation
mode: a step that training takes for the poisons is one that moves the target to class b. a is the
random translation and flip of training, drawn again at every step and differentiated through.

The gradient by the pixels needs no gradient of a gradient. With u the derivative of the objective
by g, held constant, it is grad_x of the directional derivative of the loss along u:

    grad_x objective = grad_x  d/dt sum_j CE(f_{theta + t u}(a(x_j)), b) at t = 0,

one forward-mode and one reverse pass over the poisons, which are independent of each other and so
may come in batches.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpoison.attacks.base import (
    Crafted,
    Settings,
    TargetedAttack,
    Trial,
    check_above_zero,
    checked_trials,
)
from jaxpoison.attacks.descent import normal_start, projection, signed_adam
from jaxpoison.core import devices, loops
from jaxpoison.core.settings import check_range
from jaxpoison.data import random_translate_flip
from jaxpoison.network import Network, shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientMatching(Settings):
    """Settings of `gradient_matching`, which are a static argument of what it compiles."""

    num_steps: int
    learning_rate: float
    restarts: int
    max_shift: float
    flip: bool

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "num_steps", 1, whole=True)
        check_range(self, "restarts", 1, whole=True)
        check_range(self, "max_shift", 0)
        check_above_zero(self, "learning_rate")


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
    ensemble: the objective is the mean over them. Trials are crafted one at a time, each step one
    compiled program; a trial costs restarts * num_steps gradients of each poison and substitute.

    Args:
      epsilon: budget, in units of [0, 1]; HINT's authors take 16/255.
      num_steps: S, of each start.
      learning_rate: in units of the first substitute's normalized pixels, divided by the number of
        substitutes.
      restarts: random starts, of which each trial keeps the one with the lowest last objective.
      max_shift: random translation in pixels, 0 for none.
      flip: whether half of the poisons are mirrored.
      batch_size: most poisons in one pass; less saves memory, and changes nothing else.

    Raises:
      TypeError, ValueError: for settings out of range.
    """
    settings = GradientMatching(
        epsilon=epsilon, num_steps=num_steps, learning_rate=learning_rate, restarts=restarts,
        max_shift=max_shift, flip=flip, batch_size=batch_size,
    )  # fmt: skip
    return TargetedAttack(
        "gradient_matching",
        settings.epsilon,
        functools.partial(craft, settings),
        settings.for_archives(),
    )


def craft(
    settings: GradientMatching,
    keys,
    substitutes,
    bases,
    base_labels,
    targets,
    progress=None,
    starts=None,
) -> Crafted:
    """Returns the poisons of T trials, one trial after another; see `TargetedCraftFn`.

    With `starts`, shaped like `bases`, every descent begins there instead of at random.
    """
    networks, trials = checked_trials(keys, substitutes, bases, base_labels, targets)
    mesh = devices.data_mesh()
    begin, run = shared(_compiled, settings, networks, mesh)
    variables = [variables for _, variables in substitutes]
    num_trials, num_poisons = trials.bases.shape[:2]
    images, objectives = [], []
    for index in range(num_trials):
        trial = Trial(*(leaf[index] for leaf in trials))
        start = None if starts is None else starts[index]
        placed = devices.replicate((variables, trial, start), mesh)
        results = []
        for restart in range(settings.restarts):
            constants, carry = begin(*placed, restart)
            (poisons, _), values = run(constants, carry, jnp.arange(settings.num_steps))
            results.append((float(values[-1]), poisons, values))
        # One that is not finite never wins over one that is.
        _, poisons, values = min(results, key=lambda result: (result[0] != result[0], result[0]))
        images.append(poisons)
        objectives.append(values)
        if progress is not None:
            progress((index + 1) * num_poisons, num_trials * num_poisons)
    gather = jax.devices()[0]
    images, objectives = jax.device_put((images, objectives), gather)
    return Crafted(jnp.stack(images), jnp.stack(objectives, axis=1))


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


def _compiled(settings, networks, mesh):
    """Returns (begin, run) for one start of one trial; `run` is a compiled loop over steps."""
    return (
        jax.jit(functools.partial(_begin, settings, networks)),
        loops.scan(functools.partial(_step, settings, networks, mesh)),
    )


def _optimizer(settings, networks):
    return signed_adam(settings.learning_rate / len(networks), settings.num_steps)


def _begin(settings, networks, variables, trial, start, restart):
    """Returns (constants, carry) of the loop over steps."""
    start_key, step_key = jax.random.split(jax.random.fold_in(trial.key, restart))
    if start is None:
        start = normal_start(start_key, trial.bases, settings.epsilon)
    poisons = projection(trial.bases, settings.epsilon)(start)
    wanted = [
        jax.grad(functools.partial(_target_loss, network, one, trial))(one["params"])
        for network, one in zip(networks, variables, strict=True)
    ]
    constants = (variables, wanted, trial._replace(key=step_key))
    return constants, (poisons, _optimizer(settings, networks).init(poisons))


def _step(settings, networks, mesh, constants, carry, index):
    """Returns (carry, objective) after a step of the poisons; a step of `loops.scan`."""
    variables, wanted, trial = constants
    poisons, state = carry
    num_poisons = len(poisons)
    size, number = loops.even_batches(num_poisons, settings.batch_size, mesh)
    places = jnp.arange(size * number, dtype=jnp.int32)
    rows = jnp.minimum(places, num_poisons - 1).reshape(number, size)
    weights = (places < num_poisons).reshape(number, size)
    trial = trial._replace(key=jax.random.fold_in(trial.key, index))
    values, gradients = zip(
        *(
            mismatch(
                functools.partial(_poison_loss, settings, network, mesh, one, trial),
                one["params"], target, poisons[rows], (rows, weights),
            )
            for network, one, target in zip(networks, variables, wanted, strict=True)
        ),
        strict=True,
    )  # fmt: skip
    gradient = functools.reduce(jnp.add, gradients).reshape(-1, *poisons.shape[1:])
    updates, state = _optimizer(settings, networks).update(gradient[:num_poisons], state)
    # A step in normalized pixels is one in pixels times their standard deviation.
    moved = poisons + jnp.asarray(networks[0].std, poisons.dtype) * jnp.asarray(updates)
    poisons = projection(trial.bases, settings.epsilon)(moved)
    return (poisons, state), jnp.mean(jnp.stack(values))


def _target_loss(network, variables, trial, params):
    """Returns the mean cross-entropy of the base label over the target's views, []."""
    return jnp.mean(_losses(network, variables, params, trial.targets, trial.base_label))


def _poison_loss(settings, network, mesh, variables, trial, params, images, batch):
    """Returns the sum of the cross-entropy over a batch of poisons, [].

    Args:
      settings: of the attack.
      network: a substitute.
      mesh: devices over which the batch is spread.
      variables: of the substitute.
      trial: with the key of this step.
      params: by which gradients are taken.
      images: float32 [B, H, W, C], the poisons.
      batch: their rows int32 [B], which the augmentation follows, and weights bool [B].
    """
    rows, weights = devices.constrain_examples(batch, mesh)
    images = devices.constrain_examples(images, mesh)
    if settings.max_shift or settings.flip:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(trial.key, rows)
        images = random_translate_flip(
            keys, images, max_shift=settings.max_shift, fill=jnp.asarray(network.mean),
            flip=settings.flip,
        )  # fmt: skip
    return jnp.sum(weights * _losses(network, variables, params, images, trial.base_label))


def _losses(network: Network, variables, params, images, label) -> jax.Array:
    """Returns the cross-entropy of one label for each image, [B]."""
    logits = network.logits({**variables, "params": params}, images)
    labels = jnp.full(len(images), label)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
