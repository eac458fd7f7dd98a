"""Targeted attacks on transfer learning: a frozen extractor f, a head trained on poisoned features.

    feature_collision       each poison's feature meets the target's (arXiv 1804.00792)
    convex_polytope         a convex combination of them does (arXiv 1905.05897)
    bullseye_polytope       their mean does (arXiv 2005.00191)
    head_gradient_matching  their gradient by the head is aligned with it (arXiv 2009.02276)
    bp_toolkit, fc_toolkit  their mean meets it, as crafted by the toolkit of the latter

The objectives are in `feature_space`. All poisons of many trials move in one compiled step; a
trial's poisons do not depend on the trials beside it. Substitutes are in evaluation mode, but with
their dropout on: a network with `dropout > 0` in its body is drawn anew at every step, as in the
code of Zhu et al. and Aghakhani et al.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpoison.attacks import feature_space
from jaxpoison.attacks.base import Crafted, TargetedAttack, TargetedCraftFn, check_epsilon
from jaxpoison.attacks.descent import check_positive, normal_start, projection, signed_adam
from jaxpoison.attacks.feature_space import View
from jaxpoison.core import devices, loops
from jaxpoison.data import random_translate_flip


class Draws(NamedTuple):
    """Random versions of each poison over which its features are averaged, anew at every step.

    Attributes:
      number: versions; each has its own dropout mask and augmentation (3 is "BP-3x").
      max_shift: random translation in pixels, 0 for none.
      flip: whether half of them are mirrored.
    """

    number: int = 1
    max_shift: float = 0.0
    flip: bool = False


ONCE = Draws()
AUGMENTED = Draws(max_shift=4.0, flip=True)


def feature_collision(
    *,
    epsilon: float,
    num_steps: int = 120,
    step: float = 0.1,
    shrink: float = 0.2,
    watermark: float = 0.3,
    similarity: float = 0.0,
    draws: Draws = ONCE,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns the attack in which each poison by itself collides with the target.

    Gradient descent on sum_m |f_m(x_j) - f_m(x^t)|^2 (+ `similarity` |x_j - x_j^b|^2, whose step
    is implicit), from a blend of base and target. The defaults are those of the benchmark of
    Schwarzschild et al. (arXiv 2006.12557), but for the first step, there 1e-3, with which poisons
    for a narrow ResNet do not arrive. Unlike there, a step that raises the objective is taken back
    before the step is shortened, and every poison has a step of its own.

    Args:
      epsilon: budget, in units of [0, 1].
      num_steps: S, gradients of each poison.
      step: size of the first steps, as a factor of the gradient in units of pixels in [0, 1]. It
        has to suit the extractor; where poisons hardly move, the objective in the result shows it.
      shrink: factor of the step after it raised the objective, in (0, 1).
      watermark: share of the target in the blend at the start, in [0, 1).
      similarity: weight of the distance to the base; Shafahi et al. set 0.25 (d / pixels)^2 in
        place of a budget.
      draws: random versions of the poisons.
      batch_size: poisons crafted at once, in whole trials and at least one.
    """
    check_epsilon(epsilon)
    _check_share("watermark", watermark)
    _check_share("shrink", shrink)
    check_positive(step=step, num_steps=num_steps)
    _check_draws(draws)

    def start(key, bases, target):
        return (1 - watermark) * bases + watermark * target

    method = _Method(
        start=start,
        objective=lambda views, memory: (feature_space.collision(views), memory),
        memory=_no_memory,
        descent=_cautious_descent(step, shrink, similarity),
        num_steps=num_steps,
        draws=draws,
        restarts=1,
    )
    settings = {
        "num_steps": num_steps,
        "step": step,
        "shrink": shrink,
        "watermark": watermark,
        "similarity": similarity,
        "draws": draws._asdict(),
    }
    return TargetedAttack(
        "feature_collision", epsilon, _crafting(method, epsilon, batch_size), settings
    )


def bullseye_polytope(
    *,
    epsilon: float,
    num_steps: int = 1200,
    learning_rate: float = 0.04,
    squared: bool = False,
    draws: Draws = ONCE,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns the attack that puts the target at the mean of the poisons' features.

    Adam from the base images; see `feature_space.bullseye`. Several views of a target are
    attacked at the mean of their features (the authors' multi-target mode).

    Args:
      epsilon: budget, in units of [0, 1]; the authors' is 0.1.
      num_steps: S. The authors' script for transfer takes 800, their default is 4,000.
      learning_rate: Adam's, in units of the first substitute's normalised pixels.
      squared: as `feature_space.bullseye` says.
      draws: random versions of the poisons.
      batch_size: poisons crafted at once, in whole trials and at least one.
    """
    check_epsilon(epsilon)
    check_positive(learning_rate=learning_rate, num_steps=num_steps)
    _check_draws(draws)
    method = _Method(
        start=_at_the_bases,
        objective=lambda views, memory: (
            feature_space.bullseye(views, squared=squared),
            memory,
        ),
        memory=_no_memory,
        descent=_adam(lambda _: optax.adam(learning_rate)),
        num_steps=num_steps,
        draws=draws,
        restarts=1,
    )
    settings = {
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "squared": squared,
        "draws": draws._asdict(),
    }
    return TargetedAttack(
        "bullseye_polytope", epsilon, _crafting(method, epsilon, batch_size), settings
    )


def convex_polytope(
    *,
    epsilon: float,
    num_steps: int = 1200,
    learning_rate: float = 0.04,
    tolerance: float = 1e-6,
    draws: Draws = ONCE,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns the attack that puts the target into the convex hull of the poisons' features.

    Every step fits the coefficients of each substitute, from those of the step before, and then
    moves the poisons by Adam, from the base images.

    Args:
      epsilon: budget, in units of [0, 1]; the authors' is 0.1.
      num_steps: S; the authors' is 4,000.
      learning_rate: Adam's, in units of the first substitute's normalised pixels.
      tolerance: of the coefficients, see `feature_space.simplex_least_squares`.
      draws: random versions of the poisons.
      batch_size: poisons crafted at once, in whole trials and at least one.
    """
    check_epsilon(epsilon)
    check_positive(learning_rate=learning_rate, num_steps=num_steps, tolerance=tolerance)
    _check_draws(draws)

    def memory(num_poisons, num_substitutes):
        return tuple(jnp.full(num_poisons, 1 / num_poisons) for _ in range(num_substitutes))

    def objective(views, coefficients):
        fitted = tuple(
            feature_space.simplex_least_squares(
                jax.lax.stop_gradient(v.features), v.target, c, tolerance=tolerance
            )
            for v, c in zip(views, coefficients, strict=True)
        )
        return feature_space.polytope(views, fitted), fitted

    method = _Method(
        start=_at_the_bases,
        objective=objective,
        memory=memory,
        descent=_adam(lambda _: optax.adam(learning_rate)),
        num_steps=num_steps,
        draws=draws,
        restarts=1,
    )
    settings = {
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "tolerance": tolerance,
        "draws": draws._asdict(),
    }
    return TargetedAttack(
        "convex_polytope", epsilon, _crafting(method, epsilon, batch_size), settings
    )


def head_gradient_matching(
    *,
    epsilon: float,
    num_steps: int = 250,
    learning_rate: float = 0.1,
    restarts: int = 8,
    draws: Draws = AUGMENTED,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns the attack whose poisons pull the head as the target with the base label would.

    Gradient matching by the last layer only, see `feature_space.gradient_mismatch`; the rest as in
    the toolkit of its authors: signed Adam from random noise, the learning rate cut to a tenth
    after 3/8, 5/8 and 7/8 of the steps, the best of several restarts. The head is that of the
    substitutes' variables: give those that a victim would train (`training.fit_head`).

    Args:
      epsilon: budget, in units of [0, 1].
      num_steps: S.
      learning_rate: in units of the first substitute's normalised pixels, divided by the number of
        substitutes.
      restarts: random starts, of which each trial keeps the one with the lowest last objective.
      draws: random versions of the poisons.
      batch_size: poisons crafted at once, in whole trials and at least one.
    """
    return _toolkit(
        "head_gradient_matching", feature_space.gradient_mismatch, epsilon, num_steps,
        learning_rate, restarts, draws, batch_size,
    )  # fmt: skip


def bp_toolkit(
    *,
    epsilon: float,
    num_steps: int = 4000,
    learning_rate: float = 0.1,
    restarts: int = 8,
    draws: Draws = AUGMENTED,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns bullseye polytope as HINT's authors ran it, with the toolkit of Geiping et al.

    Signed Adam on `feature_space.mean_collision`; arguments as of `head_gradient_matching`. For a
    target of one view it is `fc_toolkit` with four times the steps.
    """
    return _toolkit(
        "bp_toolkit", feature_space.mean_collision, epsilon, num_steps, learning_rate, restarts,
        draws, batch_size,
    )  # fmt: skip


def fc_toolkit(
    *,
    epsilon: float,
    num_steps: int = 1000,
    learning_rate: float = 0.1,
    restarts: int = 8,
    draws: Draws = AUGMENTED,
    batch_size: int = 512,
) -> TargetedAttack:
    """Returns feature collision as HINT's authors ran it: see `bp_toolkit`."""
    return _toolkit(
        "fc_toolkit", feature_space.mean_collision, epsilon, num_steps, learning_rate, restarts,
        draws, batch_size,
    )  # fmt: skip


Memory = Any  # what an objective carries from step to step: a pytree, here the coefficients


class _Descent(NamedTuple):
    """How poisons [P, H, W, C] move; `bases`, `project` and `pixel_scale` [C] belong to the trial.

    Attributes:
      init: `init(poisons) -> state`.
      update: `update(state, poisons, values, gradient, bases, project, pixel_scale)` returns the
        next state and poisons; `values` [P] or [] are of `poisons`.
      result: `result(state, poisons) -> poisons`, what to hand out at the end.
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, jax.Array]]
    result: Callable[[Any, jax.Array], jax.Array]


class _Method(NamedTuple):
    """An attack on one trial, without its budget.

    Attributes:
      start: `start(key, bases, target) -> poisons`, before projection to the budget.
      objective: `objective(views, memory) -> (values [P] or [], memory)`; their sum is minimised.
      memory: `memory(P, number of substitutes)`, the memory of the first step.
      descent: as a function of the number of substitutes.
    """

    start: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    objective: Callable[[Sequence[View], Memory], tuple[jax.Array, Memory]]
    memory: Callable[[int, int], Memory]
    descent: Callable[[int], _Descent]
    num_steps: int
    draws: Draws
    restarts: int


def _toolkit(
    name, objective, epsilon, num_steps, learning_rate, restarts, draws, batch_size
) -> TargetedAttack:
    check_epsilon(epsilon)
    check_positive(learning_rate=learning_rate, num_steps=num_steps, restarts=restarts)
    _check_draws(draws)

    method = _Method(
        start=lambda key, bases, target: normal_start(key, bases, epsilon),
        objective=lambda views, memory: (objective(views), memory),
        memory=_no_memory,
        descent=_adam(lambda number: signed_adam(learning_rate / number, num_steps)),
        num_steps=num_steps,
        draws=draws,
        restarts=restarts,
    )
    settings = {
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "restarts": restarts,
        "draws": draws._asdict(),
    }
    return TargetedAttack(name, epsilon, _crafting(method, epsilon, batch_size), settings)


def _at_the_bases(key, bases, target):
    return jnp.array(bases)  # a copy: the loop donates its carry


def _no_memory(num_poisons, num_substitutes):
    return ()


def _adam(optimizer) -> Callable[[int], _Descent]:
    """Returns descent by an optimiser that does not care for the scale of gradients."""

    def descent(num_substitutes):
        rule = optimizer(num_substitutes)

        def update(state, poisons, values, gradient, bases, project, pixel_scale):
            # A step in normalised pixels is one in pixels times their standard deviation; the
            # gradient's own factor, the same per channel, cancels in Adam.
            updates, state = rule.update(gradient, state)
            return state, project(poisons + pixel_scale * updates)

        return _Descent(rule.init, update, lambda state, poisons: poisons)

    return descent


class _Cautious(NamedTuple):
    """The best of each poison so far, where to go from there, and how far."""

    poisons: jax.Array  # [P, H, W, C]
    values: jax.Array  # [P]
    gradient: jax.Array  # [P, H, W, C]
    step: jax.Array  # [P]


def _cautious_descent(step, shrink, similarity) -> Callable[[int], _Descent]:
    """Returns gradient descent in which a poison never stays where its objective rose."""

    def init(poisons):
        infinite = jnp.full(len(poisons), jnp.inf)
        steps = jnp.full(len(poisons), step, jnp.float32)
        # Copies, since the loop donates its carry.
        return _Cautious(jnp.array(poisons), infinite, jnp.zeros_like(poisons), steps)

    def update(state, poisons, values, gradient, bases, project, pixel_scale):
        values = values + similarity * jnp.sum((poisons - bases) ** 2, axis=(1, 2, 3))
        fell = values <= state.values
        across = fell[:, None, None, None]
        state = _Cautious(
            jnp.where(across, poisons, state.poisons),
            jnp.where(fell, values, state.values),
            jnp.where(across, gradient, state.gradient),
            jnp.where(fell, state.step, shrink * state.step),
        )
        size = state.step[:, None, None, None]
        forward = state.poisons - size * state.gradient
        # The distance to the base is descended implicitly: forward-backward splitting.
        weight = 2 * size * similarity
        return state, project((forward + weight * bases) / (1 + weight))

    # The last move has not been judged, and is left out.
    return lambda _: _Descent(init, update, lambda state, poisons: state.poisons)


def _crafting(method: _Method, epsilon: float, batch_size: int) -> TargetedCraftFn:
    """Returns the `TargetedCraftFn` that runs `method` on groups of trials."""
    check_positive(batch_size=batch_size)
    compiled = functools.cache(lambda models: _compiled(method, models, epsilon))

    def craft(keys, substitutes, bases, base_labels, targets, progress=None):
        begin, run, finish = compiled(tuple(substitute.model for substitute in substitutes))
        num_trials, num_poisons = bases.shape[:2]
        group = math.ceil(num_trials / math.ceil(num_trials * num_poisons / batch_size))
        group = min(group, max(1, batch_size // num_poisons))
        # Trials are spread over as many devices as divide them, so that none of them idles.
        mesh = devices.data_mesh(jax.devices()[: math.gcd(group, len(jax.devices()))])
        variables = devices.replicate([s.variables for s in substitutes], mesh)
        images, objectives = [], []
        for first in range(0, num_trials, group):
            rows = jnp.minimum(jnp.arange(first, first + group), num_trials - 1)
            trials = devices.shard_examples(
                _Trial(keys[rows], bases[rows], base_labels[rows], targets[rows]), mesh
            )
            results = []
            for restart in range(method.restarts):
                constants, carry = begin(variables, trials, restart)
                carry, values = run(constants, carry, jnp.arange(method.num_steps))
                results.append((finish(carry), values))
            best_images, best_values = functools.reduce(_lower, results)
            wanted = num_trials - first
            images.append(best_images[:wanted])
            objectives.append(best_values[:, :wanted])
            if progress is not None:
                jax.block_until_ready(images[-1])
                done_trials = min(first + group, num_trials)
                progress(done_trials * num_poisons, num_trials * num_poisons)
        gather = jax.devices()[0]
        images, objectives = jax.device_put((images, objectives), gather)
        return Crafted(jnp.concatenate(images), jnp.concatenate(objectives, axis=1))

    return craft


class _Trial(NamedTuple):
    """What defines one trial, or many with a leading axis."""

    key: jax.Array
    bases: jax.Array  # [P, H, W, C]
    base_label: jax.Array  # []
    targets: jax.Array  # [V, H, W, C]


def _compiled(method: _Method, models, epsilon):
    """Returns (begin, run, finish) over many trials; `run` is a compiled loop over steps."""
    descent = method.descent(len(models))

    def begin_one(variables, trial, restart):
        key = jax.random.fold_in(trial.key, restart)
        start_key, step_key = jax.random.split(key)
        project = projection(trial.bases, epsilon)
        poisons = project(method.start(start_key, trial.bases, trial.targets.mean(axis=0)))
        # The target's feature is that of the network without dropout, nearly the mean over masks;
        # the authors' codes draw one mask for it.
        features = [
            _features(model, v, trial.targets).mean(axis=0)
            for model, v in zip(models, variables, strict=True)
        ]
        memory = method.memory(len(trial.bases), len(models))
        return (trial._replace(key=step_key), features), (poisons, descent.init(poisons), memory)

    def begin(variables, trials, restart):
        (trials, features), carry = jax.vmap(begin_one, (None, 0, None))(variables, trials, restart)
        return (variables, trials, features), carry

    def step_one(variables, carry, trial, targets, index):
        poisons, state, memory = carry
        keys = jax.random.split(jax.random.fold_in(trial.key, index), len(models))

        def loss(poisons):
            views = [
                View(
                    _drawn_features(model, v, key, poisons, method.draws),
                    target,
                    v["params"]["head"],
                    trial.base_label,
                )
                for model, v, key, target in zip(models, variables, keys, targets, strict=True)
            ]
            values, new_memory = method.objective(views, memory)
            return jnp.sum(values), (values, new_memory)

        (value, (values, memory)), gradient = jax.value_and_grad(loss, has_aux=True)(poisons)
        state, poisons = descent.update(
            state, poisons, values, gradient, trial.bases, projection(trial.bases, epsilon),
            jnp.asarray(models[0].std),
        )  # fmt: skip
        return (poisons, state, memory), value

    def step(constants, carry, index):
        variables, trials, targets = constants
        return jax.vmap(step_one, (None, 0, 0, 0, None))(variables, carry, trials, targets, index)

    def finish(carry):
        poisons, state, _ = carry
        return jax.vmap(descent.result)(state, poisons)

    return jax.jit(begin), loops.scan(step), jax.jit(finish)


def _features(model, variables, images, **options):
    return model.apply(variables, images, method="features", **options)


def _drawn_features(model, variables, key, poisons, draws):
    """Returns the features of the poisons, mean over the draws: [P, d]."""

    def draw(key):
        dropout_key, augment_key = jax.random.split(key)
        images = poisons
        if draws.max_shift or draws.flip:
            images = random_translate_flip(
                jax.random.split(augment_key, len(images)), images,
                max_shift=draws.max_shift, fill=jnp.asarray(model.mean), flip=draws.flip,
            )  # fmt: skip
        return _features(model, variables, images, rngs={"dropout": dropout_key})

    return jax.vmap(draw)(jax.random.split(key, draws.number)).mean(axis=0)


@jax.jit
def _lower(one, other):
    """Returns, of two results (poisons, objectives), for each trial the one that ended lower."""
    better = other[1][-1] < one[1][-1]
    images = jnp.where(better[:, None, None, None, None], other[0], one[0])
    return images, jnp.where(better, other[1], one[1])


def _check_share(name, value):
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), not {value}")


def _check_draws(draws):
    if draws.number < 1 or draws.max_shift < 0:
        raise ValueError(f"draws need at least one version and a shift of at least 0: {draws}")
