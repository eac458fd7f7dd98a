"""Targeted attacks on transfer learning: a frozen extractor f, a head trained on poisoned features.

    feature_collision       each poison's feature meets the target's (arXiv 1804.00792)
    convex_polytope         a convex combination of them does (arXiv 1905.05897)
    bullseye_polytope       their mean does (arXiv 2005.00191)
    head_gradient_matching  their gradient by the head is aligned with it (arXiv 2009.02276)
    bp_toolkit, fc_toolkit  their mean meets it, as crafted by the toolkit of the latter

Each of these is a file with its objective and its settings, a `Method`; here is what runs them.
All poisons of many trials move in one compiled step; a trial's poisons do not depend on the trials
crafted with it. Substitutes are in evaluation mode, but with their dropout on: a network with
`dropout > 0` in its body is drawn again at every step, as in the code of Zhu et al. and Aghakhani
et al.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from jaxpoison.attacks.descent import projection
from jaxpoison.core import devices, loops
from jaxpoison.core.settings import check_range, plain
from jaxpoison.data import random_translate_flip
from jaxpoison.network import shared


class View(NamedTuple):
    """A trial as one substitute network sees it.

    Attributes:
      features: float32 [P, d], of the poisons.
      target: float32 [d], of the target (the mean over its views).
      head: `{"kernel": [d, K], "bias": [K]}`, the network's last layer; some have no bias.
      base_label: int32 [], the class that the target should be misclassified as.
    """

    features: jax.Array
    target: jax.Array
    head: Any
    base_label: jax.Array


class Draws(NamedTuple):
    """Random versions of each poison over which its features are averaged, new at every step.

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


Memory = Any  # what an objective carries from step to step: a pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Settings):
    """An attack on frozen extractors: its settings, and rules for the P poisons of one trial.

    The rules are pure functions of arrays. A method is a static argument of what is compiled, and
    methods of equal settings share it.

    Attributes:
      num_steps: S, gradients of each poison.
      draws: random versions of the poisons.
    """

    num_steps: int
    draws: Draws = ONCE
    restarts = 1  # random starts, of which each trial keeps the one with the lowest last objective

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "num_steps", 1, whole=True)
        object.__setattr__(self, "draws", _checked_draws(self.draws))

    def start(self, key: jax.Array, bases: jax.Array, target: jax.Array) -> jax.Array:
        """Returns the first poisons [P, H, W, C], before projection to the budget."""
        return jnp.array(bases)  # a copy: the loop donates its carry

    def memory(self, num_poisons: int, num_substitutes: int, dtype: Any) -> Memory:
        """Returns the memory of the first step."""
        return ()

    @abc.abstractmethod
    def objective(self, views: Sequence[View], memory: Memory) -> tuple[jax.Array, Memory]:
        """Returns (values [P] or [], memory); their sum is minimized."""

    @abc.abstractmethod
    def init(self, poisons: jax.Array, num_substitutes: int) -> Any:
        """Returns the state of the descent before the first step."""

    @abc.abstractmethod
    def update(
        self,
        state: Any,
        poisons: jax.Array,
        values: jax.Array,
        gradient: jax.Array,
        bases: jax.Array,
        pixel_scale: jax.Array,
        num_substitutes: int,
    ) -> tuple[Any, jax.Array]:
        """Returns the next (state, poisons), within the budget.

        Args:
          state: of the descent.
          poisons: [P, H, W, C].
          values: [P] or [], their objective.
          gradient: [P, H, W, C], of its sum.
          bases: [P, H, W, C].
          pixel_scale: [C] or [1], standard deviation of the first substitute's pixels.
          num_substitutes: number of networks.
        """

    def result(self, state: Any, poisons: jax.Array) -> jax.Array:
        """Returns the poisons to hand out at the end."""
        return poisons


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveMethod(Method):
    """A method that moves by Adam, which does not care for the scale of gradients.

    Attributes:
      learning_rate: in units of the first substitute's normalized pixels.
    """

    learning_rate: float

    def __post_init__(self):
        super().__post_init__()
        check_above_zero(self, "learning_rate")

    def optimizer(self, num_substitutes: int) -> optax.GradientTransformation:
        """Returns the rule of the steps."""
        return optax.adam(self.learning_rate)

    def init(self, poisons, num_substitutes):
        return self.optimizer(num_substitutes).init(poisons)

    def update(self, state, poisons, values, gradient, bases, pixel_scale, num_substitutes):
        # A step in normalized pixels is one in pixels times their standard deviation; the
        # gradient's own factor, the same per channel, cancels in Adam.
        updates, state = self.optimizer(num_substitutes).update(gradient, state)
        return state, projection(bases, self.epsilon)(poisons + pixel_scale * jnp.asarray(updates))


def attack(name: str, method: Method) -> TargetedAttack:
    """Returns the attack that crafts by `method`."""
    craft_by_method = functools.partial(craft, method)
    return TargetedAttack(name, method.epsilon, craft_by_method, method.for_archives())


def craft(method: Method, keys, substitutes, bases, base_labels, targets, progress=None) -> Crafted:
    """Returns the poisons of T trials, crafted in groups of trials; see `TargetedCraftFn`."""
    networks, trials = checked_trials(keys, substitutes, bases, base_labels, targets)
    compiled = shared(_compiled, method, networks)
    num_trials, num_poisons = trials.bases.shape[:2]
    group = _group_size(num_trials, num_poisons, method.batch_size)
    # Trials are spread over as many devices as divide them, so that none of them idles.
    mesh = devices.data_mesh(jax.devices()[: math.gcd(group, len(jax.devices()))])
    variables = devices.replicate([variables for _, variables in substitutes], mesh)
    images, objectives = [], []
    for first in range(0, num_trials, group):
        rows = jnp.minimum(jnp.arange(first, first + group), num_trials - 1)
        part = devices.shard_examples(Trial(*(leaf[rows] for leaf in trials)), mesh)
        results = [_run(compiled, method, variables, part, r) for r in range(method.restarts)]
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


def _group_size(num_trials, num_poisons, batch_size):
    """Returns how many trials are crafted at once: equal groups of at most `batch_size` poisons."""
    group = math.ceil(num_trials / math.ceil(num_trials * num_poisons / batch_size))
    return min(group, max(1, batch_size // num_poisons))


class _Compiled(NamedTuple):
    """The parts of crafting: `begin` and `finish` are compiled, `run` is a loop over steps."""

    begin: Any
    run: Any
    finish: Any


def _compiled(method, networks):
    return _Compiled(
        jax.jit(functools.partial(_begin, method, networks)),
        loops.scan(functools.partial(_step, method, networks)),
        jax.jit(functools.partial(_finish, method)),
    )


def _run(compiled, method, variables, trials, restart):
    """Returns (poisons [T, P, H, W, C], objective [S, T]) of one start."""
    constants, carry = compiled.begin(variables, trials, restart)
    carry, values = compiled.run(constants, carry, jnp.arange(method.num_steps))
    return compiled.finish(carry), values


def _begin(method, networks, variables, trials, restart):
    """Returns (constants, carry) of the loop over steps, for all trials."""
    begin_one = functools.partial(_begin_one, method, networks)
    (trials, features), carry = jax.vmap(begin_one, (None, 0, None))(variables, trials, restart)
    return (variables, trials, features), carry


def _begin_one(method, networks, variables, trial, restart):
    key = jax.random.fold_in(trial.key, restart)
    start_key, step_key = jax.random.split(key)
    target = trial.targets.mean(axis=0)
    poisons = projection(trial.bases, method.epsilon)(method.start(start_key, trial.bases, target))
    # The target's feature is that of the network without dropout, nearly the mean over masks; the
    # authors' codes draw one mask for it.
    features = [
        network.features(v, trial.targets).mean(axis=0)
        for network, v in zip(networks, variables, strict=True)
    ]
    memory = method.memory(len(trial.bases), len(networks), poisons.dtype)
    carry = poisons, method.init(poisons, len(networks)), memory
    return (trial._replace(key=step_key), features), carry


def _step(method, networks, constants, carry, index):
    """Returns (carry, objective [T]) after a step of all trials; a step of `loops.scan`."""
    variables, trials, targets = constants
    step_one = functools.partial(_step_one, method, networks)
    return jax.vmap(step_one, (None, 0, 0, 0, None))(variables, carry, trials, targets, index)


def _step_one(method, networks, variables, carry, trial, targets, index):
    poisons, state, memory = carry
    keys = jax.random.split(jax.random.fold_in(trial.key, index), len(networks))

    def loss(poisons):
        views = [
            View(
                _drawn_features(network, v, key, poisons, method.draws),
                target,
                network.head(v),
                trial.base_label,
            )
            for network, v, key, target in zip(networks, variables, keys, targets, strict=True)
        ]
        values, new_memory = method.objective(views, memory)
        return jnp.sum(values), (values, new_memory)

    (value, (values, memory)), gradient = jax.value_and_grad(loss, has_aux=True)(poisons)
    pixel_scale = jnp.asarray(networks[0].std, poisons.dtype)
    state, poisons = method.update(
        state, poisons, values, gradient, trial.bases, pixel_scale, len(networks)
    )
    return (poisons, state, memory), value


def _finish(method, carry):
    poisons, state, _ = carry
    return jax.vmap(method.result)(state, poisons)


def _drawn_features(network, variables, key, poisons, draws):
    """Returns the features of the poisons, mean over the draws: [P, d]."""

    def draw(key):
        dropout_key, augment_key = jax.random.split(key)
        images = poisons
        if draws.max_shift or draws.flip:
            images = random_translate_flip(
                jax.random.split(augment_key, len(images)), images,
                max_shift=draws.max_shift, fill=jnp.asarray(network.mean), flip=draws.flip,
            )  # fmt: skip
        return network.features(variables, images, rngs={"dropout": dropout_key})

    return jax.vmap(draw)(jax.random.split(key, draws.number)).mean(axis=0)


@jax.jit
def _lower(one, other):
    """Returns, of two results (poisons, objectives), for each trial the one that ended lower."""
    better = other[1][-1] < one[1][-1]
    images = jnp.where(better[:, None, None, None, None], other[0], one[0])
    return images, jnp.where(better, other[1], one[1])


def _checked_draws(draws):
    if not isinstance(draws, Draws):
        raise TypeError(f"draws are a {type(draws).__name__}; expected attacks.Draws(...)")
    draws = Draws(*map(plain, draws))
    if not isinstance(draws.number, int) or draws.number < 1 or not 0 <= draws.max_shift < math.inf:
        raise ValueError(f"draws need at least one version and a shift of at least 0: {draws}")
    return draws
