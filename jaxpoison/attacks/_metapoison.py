"""MetaPoison (Huang et al., arXiv 2004.00225): poisons that work through steps of training.

    minimise  mean over surrogates and k = 1..K of  CW(f(x^t; theta_k), b),
              theta_{k+1} = theta_k - rate grad_theta mean CE(batch_k with the poisons in it)

by back-propagation through the K steps. CW(z, b) = max(max_{c != b} z_c - z_b, -100): negative
where the target is taken for class b. The surrogates stand at different epochs of their training,
go on by one epoch of clean images with every step of the poisons, and begin anew, from new weights,
when they have reached the last: so the poisons suit any network that is trained, not one.

This is the paper's algorithm, with the poisons in every unrolled batch. The authors' code keeps
those of the second batch from the gradient; its own comment calls that batch clean.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxpoison.attacks.base import Crafted, TargetedAttack, check_epsilon
from jaxpoison.attacks.descent import check_positive
from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset, check, to_float
from jaxpoison.models import Classifier
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
    """Epochs after which a surrogate begins anew."""
    surrogate_rate: float = 0.1
    """Learning rate of the surrogates: plain gradient descent without augmentation."""
    warm_up: int = 5
    """Epochs in which that rate rises from zero, linearly."""
    batch_size: int = 125
    """Images in a step of a surrogate."""
    poisons_per_batch: int = 4
    """Poisons in an unrolled batch; the authors' random batches hold between one and two."""
    colour: float = 0.0
    """Budget of a map of colours, in units of Y, U and V; the authors' is 0.04. 0: no map."""
    colour_points: int = 10
    """Points of that map along each of Y, U and V."""
    smoothness: float = 1.0
    """Weight of the squared differences between neighbouring points of the map."""
    seed: int = 0
    """Of the surrogates' weights and batches, which all trials share."""


def metapoison(
    data: Dataset, *, epsilon: float, config: MetaPoisonConfig = MetaPoisonConfig()
) -> TargetedAttack:
    """Returns the attack.

    Of the substitutes that crafting is given it takes the networks, in turn, and not their weights:
    the surrogates are trained here. A step costs an epoch of each surrogate and, for each trial and
    surrogate, P / poisons_per_batch times the gradient through the unrolled steps.

    Args:
      data: clean images for the surrogates: the victim's training set, or like it.
      epsilon: budget of what is added to each pixel, in units of [0, 1]; the authors' is 8/255.
        The attack's own `epsilon` is that and the most that a map of colours can add.
      config: see there.

    Raises:
      ValueError: for bad images or labels, or settings out of range.
    """
    check_epsilon(epsilon)
    check(data)
    _check(config, data)
    num_batches = len(data.labels) // config.batch_size
    compiled = functools.cache(lambda model, mesh: _compiled(model, config, data, mesh))
    optimizer = _optimizer(config, epsilon)
    limits = _Perturbation(epsilon, config.colour)

    @jax.jit
    def start(keys, bases):
        def noise(key, bases):
            return jax.random.uniform(key, bases.shape, minval=-epsilon, maxval=epsilon)

        points = (config.colour_points,) * 3 if config.colour else ()
        colours = jnp.zeros((*bases.shape[:2], *points, 3))
        perturbation = _Perturbation(jax.vmap(noise)(keys, bases), colours)
        return perturbation, optimizer.init(perturbation)

    @jax.jit
    def poisons_of(bases, perturbation):
        moved = bases
        if config.colour:  # a trial at a time, for the sake of memory
            moved = jax.lax.map(
                lambda pair: jax.vmap(recolour)(*pair), (bases, perturbation.colours)
            )
        return jnp.clip(moved + perturbation.additive, 0.0, 1.0)

    @jax.jit
    def move(bases, perturbation, state, gradient):
        def loss(perturbation):  # its gradient is that of the objective
            penalty = config.smoothness * roughness(perturbation.colours) if config.colour else 0.0
            return jnp.vdot(gradient, poisons_of(bases, perturbation)) + penalty

        updates, state = optimizer.update(jax.grad(loss)(perturbation), state, perturbation)
        moved = jax.tree.map(
            lambda p, u, most: jnp.clip(p + u, -most, most), perturbation, updates, limits
        )
        return moved, state

    def craft(keys, substitutes, bases, base_labels, targets, progress=None):
        num_trials, num_poisons = bases.shape[:2]
        groups = math.ceil(num_poisons / config.poisons_per_batch)
        if groups > num_batches:
            raise ValueError(
                f"{num_poisons} poisons, {config.poisons_per_batch} in a batch, need {groups} "
                f"batches; an epoch has {num_batches}: put more of them into a batch"
            )
        mesh = devices.data_mesh(jax.devices()[: math.gcd(config.batch_size, len(jax.devices()))])
        keys, bases, base_labels, targets, images = devices.replicate(
            (keys, bases, base_labels, targets, data), mesh
        )
        networks = [compiled(cast(Hashable, one.model), mesh) for one in substitutes]
        members = [
            _begin(networks[number % len(networks)], config, data, number)
            for number in range(config.surrogates)
        ]
        for number, member in enumerate(members):
            for _ in range(number * config.lifetime // config.surrogates):
                for place in range(groups):
                    member = _train(member, images, place, groups)
                member = _older(member, config, data)
            members[number] = member
        perturbation, state = start(keys, bases)
        objective = []
        for step in range(config.num_steps):
            poisons = poisons_of(bases, perturbation)
            gradient, values = jnp.zeros_like(poisons), []
            for number, member in enumerate(members):
                rows = _groups(keys, step * len(members) + number, num_poisons, groups)
                for place in range(groups):
                    trials = _take(poisons, rows[:, place]), base_labels, targets
                    value, slopes = _slopes(member, images, place, groups, config.unroll, trials)
                    gradient = _add(gradient, rows[:, place], slopes)
                    values.append(value)
                    member = _train(member, images, place, groups)
                members[number] = _older(member, config, data)
            perturbation, state = move(bases, perturbation, state, gradient)
            objective.append(jnp.mean(jnp.stack(values), axis=0))
            if progress is not None:
                jax.block_until_ready(perturbation)
                total = num_trials * num_poisons
                progress((step + 1) * total // config.num_steps, total)
        return Crafted(poisons_of(bases, perturbation), jnp.stack(objective))

    settings = {"additive": epsilon, **dataclasses.asdict(config)}
    reach = config.colour * max(sum(map(abs, row)) for row in RGB_FROM_YUV)
    return TargetedAttack("metapoison", min(1.0, epsilon + reach), craft, settings)


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

    As in the authors' code, the target passes the network beside the next batch, and where
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

    def losses(params, batch, batch_labels, beside):
        logits = apply(params, jnp.concatenate([batch, beside]))
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits[:size], batch_labels)
        return jnp.mean(entropy), margin(logits[size:], base_label)

    for step in range(num_steps):
        batch = jnp.concatenate([poisons, images[step, num_poisons:]])
        batch_labels = labels[step].at[:num_poisons].set(base_label)
        beside = targets if step else targets[:0]
        gradient, margins = jax.grad(losses, has_aux=True)(params, batch, batch_labels, beside)
        if step:
            values.append(jnp.mean(margins))
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    values.append(jnp.mean(losses(params, images[-1], labels[-1], targets)[1]))
    return jnp.mean(jnp.stack(values))


def margin(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Returns max(max_{c != label} z_c - z_label, -100) for logits z [B, K]: [B]."""
    others = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
    return jnp.maximum(jnp.max(others, axis=-1) - logits[:, label], -100.0)


def recolour(image: jax.Array, colours: jax.Array) -> jax.Array:
    """Returns the image with each pixel moved by what the map says of its colour.

    Args:
      image: float [H, W, 3], RGB in [0, 1].
      colours: float [g, g, g, 3]: at each point of a grid over Y, U and V, what is added to them.
        Between points it is interpolated (trilinearly).
    """
    matrix = jnp.asarray(RGB_FROM_YUV)
    yuv = jnp.einsum("yr,hwr->hwy", jnp.linalg.inv(matrix), image)
    low, high = jnp.asarray(YUV_LOW), jnp.asarray(YUV_HIGH)
    points = colours.shape[0]
    place = jnp.clip((yuv - low) / (high - low), 0.0, 1.0) * (points - 1)
    weights = jnp.maximum(0.0, 1 - jnp.abs(place[..., None] - jnp.arange(points)))
    along = [weights[:, :, axis] for axis in range(3)]
    moved = jnp.einsum("hwi,hwj,hwk,ijkc->hwc", *along, colours)
    return image + jnp.einsum("ry,hwy->hwr", matrix, moved)


def roughness(colours: jax.Array) -> jax.Array:
    """Returns the sum of squared differences of neighbouring points, [..., g, g, g, 3] -> []."""
    return sum(
        (jnp.sum(jnp.diff(colours, axis=axis) ** 2) for axis in (-4, -3, -2)), start=jnp.zeros(())
    )


class _Perturbation(NamedTuple):
    """What is added to pixels, and to colours; or something of each."""

    additive: Any
    colours: Any


class _Network(NamedTuple):
    """A network's functions, compiled once for all surrogates that have it."""

    init: Callable[[jax.Array], TrainState]
    train: Callable[..., tuple[TrainState, Any]]
    slopes: Callable[..., tuple[Any, Any]]


class _Surrogate(NamedTuple):
    """A surrogate: its number, its training so far, and the batches of the epoch it is in."""

    network: _Network
    number: int
    life: int
    age: int
    key: jax.Array
    state: TrainState
    order: jax.Array  # [n, B]


def _compiled(model: Classifier, config, data, mesh) -> _Network:
    recipe = Recipe(momentum=0.0, weight_decay=0.0, max_shift=0.0, flip=False)
    num_steps = config.warm_up * (len(data.labels) // config.batch_size)

    def rate(step):
        return config.surrogate_rate * jnp.minimum(1.0, (step + 1) / num_steps)

    optimizer = optax.sgd(rate)

    def slopes(constants, carry, trial):
        state, images, labels = constants
        poisons, base_label, targets = trial

        def apply(params, images):
            variables = {"params": params, "batch_stats": state.batch_stats}
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

        def loss(poisons):
            return unrolled_loss(
                apply, state.params, rate(state.step), to_float(images), labels, poisons,
                base_label, targets,
            )  # fmt: skip

        return carry, jax.value_and_grad(loss)(poisons)

    return _Network(
        init=jax.jit(lambda key: init_state(model, optimizer, key, data.images.shape[1:])),
        train=loops.scan(train_step(model, recipe, optimizer, mesh)),
        slopes=loops.scan(slopes),
    )


def _begin(network, config, data, number, life=0) -> _Surrogate:
    """Returns a surrogate with new weights."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), number), life)
    order = epoch_order(key, 0, len(data.labels), config.batch_size)
    return _Surrogate(network, number, life, 0, key, network.init(key), order)


def _older(member, config, data) -> _Surrogate:
    """Returns a surrogate at the begin of its next epoch, or of its next life."""
    if member.age + 1 == config.lifetime:
        return _begin(member.network, config, data, member.number, member.life + 1)
    order = epoch_order(member.key, member.age + 1, len(data.labels), config.batch_size)
    return member._replace(age=member.age + 1, order=order)


def _train(member, data, place, groups) -> _Surrogate:
    """Returns a surrogate after the steps of part `place` of `groups` of its epoch."""
    size = len(member.order) // groups
    part = member.order[place * size : (place + 1) * size]
    state, _ = member.network.train((data, (), member.key), member.state, part)
    return member._replace(state=state)


def _slopes(member, data, place, groups, unroll, trials):
    """Returns the losses [T] of poisons [T, Q, ...] in the next batches, and their gradients."""
    num_batches = len(member.order)
    first = place * (num_batches // groups)
    rows = member.order[jnp.arange(first, first + unroll + 1) % num_batches]
    constants = member.state, data.images[rows], data.labels[rows]
    return member.network.slopes(constants, (), trials)[1]


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


def _optimizer(config, epsilon) -> optax.GradientTransformation:
    """Returns Adam; colours move as many of their own budgets in a step as pixels do."""
    thirds = {config.num_steps * part // 3: 0.1 for part in (1, 2) if config.num_steps * part // 3}
    cuts = optax.piecewise_constant_schedule(config.learning_rate, thirds)

    def rate(scale):
        return lambda step: scale * jnp.minimum(1.0, ((step + 1) / config.rise) ** 2) * cuts(step)

    rules: dict[Hashable, optax.GradientTransformation]
    rules = {"pixels": optax.adam(rate(1.0)), "colours": optax.adam(rate(config.colour / epsilon))}
    return optax.partition(rules, _Perturbation("pixels", "colours"))


def _check(config, data):
    settings = dataclasses.asdict(config)
    for name in ("colour", "smoothness", "seed"):
        if settings[name] < 0:
            raise ValueError(f"{name} must be at least 0, not {settings.pop(name)}")
        del settings[name]
    check_positive(**settings)
    if not config.poisons_per_batch < config.batch_size <= len(data.labels):
        raise ValueError(
            f"a batch of {config.batch_size} must have room for clean images beside "
            f"{config.poisons_per_batch} poisons, and not be larger than the {len(data.labels)} "
            "images there are"
        )
    if config.colour_points < 2:
        raise ValueError(f"colour_points must be at least 2, not {config.colour_points}")
    if config.colour and data.images.shape[-1] != 3:
        raise ValueError("a map of colours needs images of three channels: take colour=0")
