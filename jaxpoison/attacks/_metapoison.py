"""MetaPoison (Huang et al., arXiv 2004.00225): poisons that work through steps of training.

    minimize  mean over surrogates and k = 1..K of  CW(f(x^t; theta_k), b),
              theta_{k+1} = theta_k - rate grad_theta mean CE(batch_k with the poisons in it)

by back-propagation through the K steps. CW(z, b) = max(max_{c != b} z_c - z_b, -100): negative
where the target is classified as b. The surrogates stand at different epochs of their training, go
on by one epoch of clean images with every step of the poisons, and start again from new weights
when they have reached the last: so the poisons suit any network that is trained, not one.

This is the paper's algorithm, with the poisons in every unrolled batch. The authors' code keeps
those of the second batch from the gradient; its own comment calls that batch clean.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpoison.attacks.base import (
    Crafted,
    TargetedAttack,
    check_above_zero,
    check_epsilon,
    checked_trials,
)
from jaxpoison.core import devices, loops
from jaxpoison.core.settings import check_range, plain, settle
from jaxpoison.data import Dataset, as_dataset, balls, check, to_float
from jaxpoison.network import Network, shared
from jaxpoison.training._fit import epoch_order, train_step
from jaxpoison.training.recipe import Recipe
from jaxpoison.training.state import TrainState, init_state

RGB_FROM_YUV = ((1.0, 0.0, 1.13983), (1.0, -0.39465, -0.5806), (1.0, 2.03211, 0.0))
YUV_LOW, YUV_HIGH = (0.0, -0.436, -0.615), (1.0, 0.436, 0.615)


@dataclasses.dataclass(frozen=True)
class MetaPoisonConfig:
    """Settings of the attack; the defaults are those of the authors' code."""

    num_steps: int = 60
    """Steps of the poisons; the rate is cut to a tenth after one and after two thirds of them."""
    learning_rate: float = 200 / 255
    """Adam's, in units of [0, 1]; far beyond the budget, so that steps act by their signs."""
    rise: int = 5
    """First steps of the poisons, in which the rate rises as the square of their number."""
    unroll: int = 2
    """K, the steps of training that are differentiated through."""
    surrogates: int = 24
    """M, the networks; number m begins after m lifetime / M epochs of training."""
    lifetime: int = 24
    """Epochs after which a surrogate starts again from new weights."""
    surrogate_rate: float = 0.1
    """Learning rate of the surrogates: plain gradient descent without augmentation."""
    warm_up: int = 5
    """Epochs in which that rate rises from zero, linearly."""
    batch_size: int = 125
    """Images in a step of a surrogate."""
    poisons_per_batch: int = 4
    """Poisons in an unrolled batch; the authors' random batches hold between one and two."""
    color: float = 0.0
    """Budget of a map of colors, in units of Y, U and V; the authors' is 0.04. 0: no map."""
    color_points: int = 10
    """Points of that map along each of Y, U and V."""
    smoothness: float = 1.0
    """Weight of the squared differences between neighboring points of the map."""
    seed: int = 0
    """Of the surrogates' weights and batches, which all trials share."""

    def __post_init__(self):
        settle(self)
        whole = ("num_steps", "rise", "unroll", "surrogates", "lifetime", "warm_up")
        for name in (*whole, "batch_size", "poisons_per_batch"):
            check_range(self, name, 1, whole=True)
        check_range(self, "color_points", 2, whole=True)
        check_range(self, "seed", 0, whole=True)
        check_range(self, "color", 0)
        check_range(self, "smoothness", 0)
        check_above_zero(self, "learning_rate", "surrogate_rate")


def metapoison(
    data: Dataset, *, epsilon: float, config: MetaPoisonConfig = MetaPoisonConfig()
) -> TargetedAttack:
    """Returns the attack.

    It uses the networks of the substitutes in turn, and not their weights: surrogates are trained
    here. A step costs an epoch of each surrogate and, for each trial and
    surrogate, P / poisons_per_batch times the gradient through the unrolled steps.

    Args:
      data: clean images for the surrogates, as `data.as_dataset` takes them: the victim's training
        set, or like it.
      epsilon: budget of what is added to each pixel, in units of [0, 1]; the authors' is 8/255.
        The attack's own `epsilon` is that and the most that a map of colors can add.
      config: see there.

    Raises:
      TypeError, ValueError: for bad images or labels, or settings that do not fit them.
    """
    check_epsilon(epsilon)
    epsilon = plain(epsilon)
    data = as_dataset(data, "images for the surrogates")
    check(data, name="images for the surrogates")
    _check_fits(config, data)
    settings = {"additive": epsilon, **dataclasses.asdict(config)}
    reach = config.color * max(sum(map(abs, row)) for row in RGB_FROM_YUV)
    craft_on_data = functools.partial(craft, data, epsilon, config)
    return TargetedAttack("metapoison", min(1.0, epsilon + reach), craft_on_data, settings)


def craft(
    data: Dataset, epsilon: float, config: MetaPoisonConfig,
    keys, substitutes, bases, base_labels, targets, progress=None,
) -> Crafted:  # fmt: skip
    """Returns the poisons of T trials, all of them at once; see `TargetedCraftFn`."""
    networks, trials = checked_trials(keys, substitutes, bases, base_labels, targets)
    num_trials, num_poisons = trials.bases.shape[:2]
    groups = _num_groups(num_poisons, len(data.labels), config)
    mesh = devices.data_mesh(jax.devices()[: math.gcd(config.batch_size, len(jax.devices()))])
    trials, images = devices.replicate((trials, Dataset(data.images, data.labels)), mesh)
    members = []
    for number in range(config.surrogates):
        plan = _Plan(networks[number % len(networks)], config, len(data.labels), mesh)
        members.append(_grown(plan, images, number, groups))
    perturbation, state = _start(config, epsilon, trials.key, trials.bases)
    objective = []
    for step in range(config.num_steps):
        poisons = _poisons(config, trials.bases, perturbation)
        gradient, values = jnp.zeros_like(poisons), []
        for number, member in enumerate(members):
            draw = step * len(members) + number
            members[number], found, gradient = _epoch(
                member, images, trials, poisons, gradient, draw
            )
            values += found
        perturbation, state = _move(config, epsilon, trials.bases, perturbation, state, gradient)
        objective.append(jnp.mean(jnp.stack(values), axis=0))
        if progress is not None:
            jax.block_until_ready(perturbation)
            total = num_trials * num_poisons
            progress((step + 1) * total // config.num_steps, total)
    return Crafted(_poisons(config, trials.bases, perturbation), jnp.stack(objective))


def unrolled_loss(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    rate: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    poisons: jax.Array,
    base_label: jax.Array,
    targets: jax.Array,
) -> jax.Array:
    """Returns the mean over k = 1..K of the target's CW loss after k steps of training, [].

    As in the authors' code, the target passes the network alongside the next batch, and where
    BatchNorm uses the batch's statistics it shares them.

    Args:
      apply: `apply(params, images) -> logits`, in training mode.
      params: those before the first step.
      rate: learning rate of the steps, [].
      images: float [K+1, B, H, W, C], batches; on the last there is no step.
      labels: int32 [K+1, B].
      poisons: float [Q, H, W, C], which take the place of the first Q images of every other batch.
      base_label: int32 [], label of the poisons, and goal of the attack.
      targets: float [V, H, W, C]; the mean over them is taken.
    """
    num_steps, size, num_poisons = len(images) - 1, images.shape[1], len(poisons)
    values = []

    def losses(params, batch, batch_labels, views):
        logits = apply(params, jnp.concatenate([batch, views]))
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits[:size], batch_labels)
        return jnp.mean(entropy), margin(logits[size:], base_label)

    for step in range(num_steps):
        batch = jnp.concatenate([poisons, images[step, num_poisons:]])
        batch_labels = labels[step].at[:num_poisons].set(base_label)
        views = targets if step else targets[:0]
        gradient, margins = jax.grad(losses, has_aux=True)(params, batch, batch_labels, views)
        if step:
            values.append(jnp.mean(margins))
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    values.append(jnp.mean(losses(params, images[-1], labels[-1], targets)[1]))
    return jnp.mean(jnp.stack(values))


def margin(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Returns max(max_{c != label} z_c - z_label, -100) for logits z [B, K]: [B]."""
    others = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
    return jnp.maximum(jnp.max(others, axis=-1) - logits[:, label], -100.0)


def recolor(image: jax.Array, colors: jax.Array) -> jax.Array:
    """Returns the image with each pixel moved by the map's value at its color.

    Args:
      image: float [H, W, 3], RGB in [0, 1].
      colors: float [g, g, g, 3]: at each point of a grid over Y, U and V, what is added to them.
        Between points it is interpolated (trilinearly).
    """
    matrix = jnp.asarray(RGB_FROM_YUV, image.dtype)
    yuv = jnp.einsum("yr,hwr->hwy", jnp.linalg.inv(matrix), image)
    low, high = jnp.asarray(YUV_LOW, image.dtype), jnp.asarray(YUV_HIGH, image.dtype)
    points = colors.shape[0]
    place = jnp.clip((yuv - low) / (high - low), 0.0, 1.0) * (points - 1)
    weights = jnp.maximum(
        0.0, 1 - jnp.abs(place[..., None] - jnp.arange(points, dtype=image.dtype))
    )
    along = [weights[:, :, axis] for axis in range(3)]
    moved = jnp.einsum("hwi,hwj,hwk,ijkc->hwc", *along, colors)
    return image + jnp.einsum("ry,hwy->hwr", matrix, moved)


def roughness(colors: jax.Array) -> jax.Array:
    """Returns the sum of squared differences of neighboring points, [..., g, g, g, 3] -> []."""
    return sum(
        (jnp.sum(jnp.diff(colors, axis=axis) ** 2) for axis in (-4, -3, -2)),
        start=jnp.zeros((), colors.dtype),
    )


class _Perturbation(NamedTuple):
    """What is added to pixels, and to colors; or something of each."""

    additive: Any
    colors: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(config, epsilon, keys, bases):
    """Returns (perturbation, state of the optimizer) before the first step."""
    draw = functools.partial(balls.random_change, epsilon=epsilon, norm="linf")
    noise = jax.vmap(draw)(keys, bases)
    points = (config.color_points,) * 3 if config.color else ()
    colors = jnp.zeros((*bases.shape[:2], *points, 3), bases.dtype)
    perturbation = _Perturbation(noise, colors)
    return perturbation, _optimizer(config, epsilon).init(perturbation)


@functools.partial(jax.jit, static_argnums=0)
def _poisons(config, bases, perturbation):
    """Returns the poisons [T, P, H, W, C] in [0, 1]."""
    moved = bases
    if config.color:  # a trial at a time, for the sake of memory
        moved = jax.lax.map(lambda pair: jax.vmap(recolor)(*pair), (bases, perturbation.colors))
    return jnp.clip(moved + perturbation.additive, 0.0, 1.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _move(config, epsilon, bases, perturbation, state, gradient):
    """Returns (perturbation, state) after a step, within both budgets."""

    def loss(perturbation):  # its gradient is that of the objective
        penalty = config.smoothness * roughness(perturbation.colors) if config.color else 0.0
        return jnp.vdot(gradient, _poisons(config, bases, perturbation)) + penalty

    optimizer = _optimizer(config, epsilon)
    updates, state = optimizer.update(jax.grad(loss)(perturbation), state, perturbation)
    limits = _Perturbation(epsilon, config.color)
    moved = jax.tree.map(
        lambda p, u, most: jnp.clip(p + u, -most, most), perturbation, updates, limits
    )
    return moved, state


def _optimizer(config, epsilon) -> optax.GradientTransformation:
    """Returns Adam; colors move as many of their own budgets in a step as pixels do."""
    thirds = {config.num_steps * part // 3: 0.1 for part in (1, 2) if config.num_steps * part // 3}
    cuts = optax.piecewise_constant_schedule(config.learning_rate, thirds)

    def rate(scale):
        return lambda step: scale * jnp.minimum(1.0, ((step + 1) / config.rise) ** 2) * cuts(step)

    rules: dict[Hashable, optax.GradientTransformation]
    rules = {"pixels": optax.adam(rate(1.0)), "colors": optax.adam(rate(config.color / epsilon))}
    return optax.partition(rules, _Perturbation("pixels", "colors"))


class _Plan(NamedTuple):
    """What a surrogate's training is compiled for: hashable, the same for equal networks."""

    network: Network
    config: MetaPoisonConfig
    num_images: int
    mesh: jax.sharding.Mesh

    @property
    def rate(self) -> optax.Schedule:
        """The learning rate of the surrogates' steps."""
        num_steps = self.config.warm_up * (self.num_images // self.config.batch_size)
        return functools.partial(_warm_up, self.config.surrogate_rate, num_steps)


def _warm_up(rate, num_steps, step):
    return rate * jnp.minimum(1.0, (step + 1) / num_steps).astype(jnp.float32)


class _Compiled(NamedTuple):
    """The parts of a surrogate's training, compiled once for all that have the same plan."""

    optimizer: optax.GradientTransformation
    train: Callable[..., tuple[TrainState, Any]]
    slopes: Callable[..., tuple[Any, Any]]


def _compiled(plan):
    recipe = Recipe(momentum=0.0, weight_decay=0.0, max_shift=0.0, flip=False)
    optimizer = optax.sgd(plan.rate)
    return _Compiled(
        optimizer=optimizer,
        train=loops.scan(train_step(plan.network, recipe, optimizer, plan.mesh)),
        slopes=loops.scan(functools.partial(_slopes_of_trial, plan)),
    )


def _slopes_of_trial(plan, constants, carry, trial):
    """Returns (carry, (loss [], its gradient by the poisons)); a step of `loops.scan`."""
    poisons, base_label, targets = trial
    loss = functools.partial(_loss_of_poisons, plan, constants, base_label, targets)
    return carry, jax.value_and_grad(loss)(poisons)


def _loss_of_poisons(plan, constants, base_label, targets, poisons):
    """Returns the `unrolled_loss` of poisons [Q, H, W, C] in the next batches, []."""
    state, images, labels = constants
    apply = functools.partial(_train_logits, plan.network, state.batch_stats)
    return unrolled_loss(
        apply, state.params, plan.rate(state.step), to_float(images), labels, poisons, base_label,
        targets,
    )  # fmt: skip


def _train_logits(network, batch_stats, params, images):
    return network.train_logits({"params": params, "batch_stats": batch_stats}, images)[0]


class _Surrogate(NamedTuple):
    """A surrogate: its training so far, and the batches of the epoch it is in.

    Attributes:
      plan: what it is compiled for.
      image_shape: (H, W, C).
      number: which surrogate it is.
      life: how often it has started again.
      age: its epochs in this life.
      key: of this life.
      state: weights and optimizer.
      order: int32 [n, B], the batches of this epoch.
      groups: parts that its epochs are cut into, one for each group of poisons.
    """

    plan: _Plan
    image_shape: tuple[int, ...]
    number: int
    life: int
    age: int
    key: jax.Array
    state: TrainState
    order: jax.Array
    groups: int


def _grown(plan, images, number, groups) -> _Surrogate:
    """Returns surrogate `number` after its share of a life, so that all ages are there."""
    member = _born(plan, images.images.shape[1:], number, 0, groups)
    for _ in range(number * plan.config.lifetime // plan.config.surrogates):
        for place in range(groups):
            member = _trained(member, images, place)
        member = _older(member)
    return member


def _born(plan, image_shape, number, life, groups) -> _Surrogate:
    """Returns a surrogate with new weights."""
    key = jax.random.fold_in(jax.random.key(plan.config.seed), number)
    key = jax.random.fold_in(key, life)
    order = epoch_order(key, 0, plan.num_images, plan.config.batch_size)
    state = init_state(plan.network, shared(_compiled, plan).optimizer, key, image_shape)
    state = jax.tree.map(jnp.array, state)  # a network may start from its own weights: copies
    return _Surrogate(plan, image_shape, number, life, 0, key, state, order, groups)


def _older(member) -> _Surrogate:
    """Returns a surrogate at the start of its next epoch, or of its next life."""
    plan = member.plan
    if member.age + 1 == plan.config.lifetime:
        return _born(plan, member.image_shape, member.number, member.life + 1, member.groups)
    order = epoch_order(member.key, member.age + 1, plan.num_images, plan.config.batch_size)
    return member._replace(age=member.age + 1, order=order)


def _epoch(member, images, trials, poisons, gradient, deal):
    """Returns (surrogate one epoch older, losses [T] of each group, gradient with theirs added).

    Args:
      member: the surrogate.
      images: the clean set.
      trials: T of them, a `Trial` with a leading axis.
      poisons: float32 [T, P, H, W, C].
      gradient: of the same shape, to which those of all groups are added.
      deal: number by which poisons are dealt to the groups.
    """
    values = []
    rows = _groups(trials.key, deal, poisons.shape[1], member.groups)
    for place in range(member.groups):
        part = _take(poisons, rows[:, place]), trials.base_label, trials.targets
        value, slopes = _slopes(member, images, place, part)
        gradient = _add(gradient, rows[:, place], slopes)
        values.append(value)
        member = _trained(member, images, place)
    return _older(member), values, gradient


def _trained(member, images, place) -> _Surrogate:
    """Returns a surrogate after the steps of part `place` of its epoch."""
    size = len(member.order) // member.groups
    part = member.order[place * size : (place + 1) * size]
    train = shared(_compiled, member.plan).train
    state, _ = train((images, (), member.key), member.state, part)
    # Programs that do not wait for each other may take each other's threads on CPU, and then both
    # wait for ever.
    return member._replace(state=jax.block_until_ready(state))


def _slopes(member, images, place, trials):
    """Returns the losses [T] of poisons [T, Q, ...] in the next batches, and their gradients."""
    num_batches = len(member.order)
    first = place * (num_batches // member.groups)
    ahead = jnp.arange(first, first + member.plan.config.unroll + 1)
    rows = member.order[ahead % num_batches]
    constants = member.state, images.images[rows], images.labels[rows]
    run = shared(_compiled, member.plan).slopes
    return jax.block_until_ready(run(constants, (), trials)[1])  # see `_trained`


@functools.partial(jax.jit, static_argnums=(2, 3))
def _groups(keys, number, num_poisons, groups):
    """Returns the poisons of each group, in random order: int32 [T, groups, Q]."""
    size = math.ceil(num_poisons / groups)
    places = jnp.arange(groups * size) % num_poisons  # the last may hold some of the first again

    def draw(key):
        order = jax.random.permutation(jax.random.fold_in(key, number), num_poisons)
        return order[places].reshape(groups, size)

    return jax.vmap(draw)(keys)


_take = jax.jit(jax.vmap(lambda poisons, rows: poisons[rows]))
_add = jax.jit(jax.vmap(lambda total, rows, part: total.at[rows].add(part)))


def _num_groups(num_poisons, num_images, config):
    """Returns how many batches of an epoch hold poisons."""
    groups = math.ceil(num_poisons / config.poisons_per_batch)
    num_batches = num_images // config.batch_size
    if groups > num_batches:
        raise ValueError(
            f"{num_poisons} poisons, {config.poisons_per_batch} in a batch, need {groups} "
            f"batches; an epoch has {num_batches}: put more of them into a batch"
        )
    return groups


def _check_fits(config, data):
    if not config.poisons_per_batch < config.batch_size <= len(data.labels):
        raise ValueError(
            f"a batch of {config.batch_size} must have room for clean images besides "
            f"{config.poisons_per_batch} poisons, and not be larger than the {len(data.labels)} "
            "images there are"
        )
    if config.color and data.images.shape[-1] != 3:
        raise ValueError("a map of colors needs images of three channels: set color=0")
