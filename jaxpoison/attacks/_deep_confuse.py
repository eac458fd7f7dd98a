"""DeepConfuse (Feng et al., arXiv 1905.09027): a network that makes training images misleading.

    x' = clip(x + epsilon tanh G(x)),   G maximizes  CE(f(x; theta'), y),
                                        theta' = theta - rate grad_theta CE(f(G(x); theta), y)

over the training of a classifier f: wherever on its way it is, a step on the poisoned images shall
do it harm on the clean ones. The authors decouple the two: in each trial a new classifier walks its
trajectory on the images of the generator as it was, G_old, while at every point of it the
generator G takes a step through one simulated step of the classifier. Then G_old becomes G. Since
the trajectory does not depend on G, collecting it first and replaying it is the same as walking it
once alongside the generator's steps, as here, and keeping none of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison import solvers
from jaxpoison.attacks.base import Attack, check_above_zero, check_epsilon, checked_images
from jaxpoison.core import devices, loops
from jaxpoison.core.settings import check_range, plain, settle
from jaxpoison.data import Dataset
from jaxpoison.models.unet import UNet
from jaxpoison.network import Network, shared
from jaxpoison.training._fit import epoch_order, train_step
from jaxpoison.training.recipe import Recipe
from jaxpoison.training.state import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class DeepConfuseConfig:
    """Settings of the attack: how long the generator is trained, above all.

    The authors' are 1,000 trials of 20 passes and a width of 64, five to seven days of a GPU.
    """

    trials: int = 40
    """Classifiers whose training the generator learns to harm, one after another."""
    passes: int = 4
    """Epochs of each classifier."""
    batch_size: int = 128
    """Images in a step."""
    width: int = 64
    """Channels of the U-Net at full size; twice as many at each of the three smaller ones."""
    generator_rate: float = 1e-4
    """Learning rate of the generator (Adam)."""
    classifier_rate: float = 0.01
    """Learning rate of the classifiers, and of the simulated step: plain gradient descent."""

    def __post_init__(self):
        settle(self)
        for name in ("trials", "passes", "batch_size", "width"):
            check_range(self, name, 1, whole=True)
        check_above_zero(self, "generator_rate", "classifier_rate")


def deep_confuse(*, epsilon: float, config: DeepConfuseConfig = DeepConfuseConfig()) -> Attack:
    """Returns the attack.

    The generator is trained on the images that it will poison, with the victim's network but
    not its weights. The generator that is kept is the one whose classifier ended with the highest
    loss on the clean images (the authors go by accuracy, which hardly distinguishes generators
    after a short training).

    Args:
      epsilon: budget, in units of [0, 1].
      config: see there.

    Raises:
      ValueError: for a budget out of range.
    """
    check_epsilon(epsilon)
    craft_by_config = functools.partial(craft, plain(epsilon), config)
    return Attack("dc", plain(epsilon), craft_by_config, dataclasses.asdict(config))


def craft(
    epsilon: float, config: DeepConfuseConfig, key, victim, images, labels, progress=None
) -> jax.Array:
    """Returns poisoned images; see `CraftFn`."""
    network, images, labels = checked_images(victim, images, labels)
    num_images, size = len(images), min(config.batch_size, len(images))
    mesh = devices.data_mesh(jax.devices()[: math.gcd(size, len(jax.devices()))])
    plan = Plan(network, images.shape[1:], mesh, epsilon, config)
    run = shared(compiled, plan)
    clean = devices.replicate(Dataset(np.asarray(images), np.asarray(labels)), mesh)
    init_key, key = jax.random.split(key)
    generator = devices.replicate(run.generator(init_key, clean.images[:1]), mesh)
    best, highest = None, -math.inf
    for trial in range(config.trials + 1):
        trial_key = jax.random.fold_in(key, trial)
        old = jax.tree.map(jnp.array, generator.variables)  # copies: the loop donates its carry
        poisoned = clean._replace(images=run.generate(old, clean.images))
        classifier = start_classifier(plan, run.descent, trial_key)
        classifier = devices.replicate(classifier, mesh)
        epochs = [epoch_order(trial_key, n, num_images, size) for n in range(config.passes)]
        order = jnp.concatenate(epochs)
        if trial < config.trials:
            (generator, classifier), _ = run.learn(
                (clean, poisoned, trial_key), (generator, classifier), order
            )
        else:  # the last generator is only judged
            classifier, _ = run.walk((poisoned, (), trial_key), classifier, order)
        loss = float(jnp.mean(run.losses(classifier.variables, clean)))
        if loss > highest:
            best, highest = old, loss
        if progress is not None:
            progress((trial + 1) * num_images // (config.trials + 1), num_images)
    if best is None:
        raise solvers.DivergedError(
            "deep_confuse: no classifier ended with a finite loss: try a smaller rate"
        )
    return run.generate(best, clean.images)


def confusion(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    rate: float,
    poisoned: jax.Array,
    clean: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    """Returns the mean loss on clean images after one step of training on poisoned ones, [].

    Args:
      apply: `apply(params, images) -> logits`, in training mode.
      params: those before the step.
      rate: learning rate of the step.
      poisoned: float [B, H, W, C].
      clean: float [B, H, W, C], the same images before they were poisoned.
      labels: int32 [B].
    """

    def loss(params, images):
        logits = apply(params, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    gradient = jax.grad(loss)(params, poisoned)
    return loss(jax.tree.map(lambda p, g: p - rate * g, params, gradient), clean)


def unet_for(image_shape: tuple[int, ...], width: int) -> UNet:
    """Returns the U-Net of four sizes, or of as many as halving the image allows."""
    halvings = 0
    while halvings < 3 and all(side % 2 ** (halvings + 1) == 0 for side in image_shape[:2]):
        halvings += 1
    return UNet(tuple(width * 2**level for level in range(halvings + 1)))


def perturb(images: jax.Array, outputs: jax.Array, epsilon: float) -> jax.Array:
    """Returns clip(x + epsilon tanh(output)), pixels in [0, 1]."""
    return jnp.clip(images + epsilon * jnp.tanh(outputs), 0.0, 1.0)


class Plan(NamedTuple):
    """What a run is compiled for: all of it hashable, a static argument of the functions below.

    Attributes:
      network: the classifier, whose training the images shall harm.
      image_shape: (H, W, C).
      mesh: devices that a batch is spread over.
      epsilon: budget, in units of [0, 1].
      config: settings.
    """

    network: Network
    image_shape: tuple[int, ...]
    mesh: jax.sharding.Mesh
    epsilon: float
    config: DeepConfuseConfig

    @property
    def unet(self) -> UNet:
        """The generator."""
        return unet_for(self.image_shape, self.config.width)


class Compiled(NamedTuple):
    """The parts of crafting for one plan, each compiled once.

    Attributes:
      descent: the classifiers' optimizer, plain gradient descent.
      generator: `generator(key, images)`, its state before the first step.
      learn: `learn((clean, poisoned, key), (generator, classifier), rows [S, B])`: S steps of
        both, the generator's through a simulated step and the classifier's on `poisoned`. Gives
        the two states and the loss [S] on clean images after each simulated step.
      walk: `walk((poisoned, (), key), classifier, rows)`, the classifier's steps alone.
      losses: `losses(variables, dataset)`, a classifier's losses [N], in evaluation mode.
      generate: `generate(variables, images)`, poisoned images, in evaluation mode.
    """

    descent: optax.GradientTransformation
    generator: Callable[[jax.Array, Any], TrainState]
    learn: Callable[..., tuple[Any, Any]]
    walk: Callable[..., tuple[TrainState, Any]]
    losses: Callable[[Any, Dataset], jax.Array]
    generate: Callable[[Any, Any], jax.Array]


def compiled(plan: Plan) -> Compiled:
    """Returns the parts of crafting."""

    def over_set(function):
        return loops.map_batches(functools.partial(function, plan), batch_size=512, mesh=plan.mesh)

    return Compiled(
        descent=_descent(plan.config),
        generator=jax.jit(functools.partial(start_generator, plan)),
        learn=loops.scan(functools.partial(learn, plan)),
        walk=loops.scan(walk(plan)),
        losses=over_set(losses),
        generate=over_set(generate),
    )


def start_generator(plan: Plan, key: jax.Array, images: jax.Array) -> TrainState:
    """Returns the generator's state before the first step; `images` [1, H, W, C]."""
    variables = plan.unet.init(key, images)
    params = variables["params"]
    opt_state = optax.adam(plan.config.generator_rate).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], opt_state)


def start_classifier(
    plan: Plan, descent: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns a new classifier's state before the first step."""
    state = init_state(plan.network, descent, key, plan.image_shape)
    return jax.tree.map(jnp.array, state)  # copies: the loop donates its carry


def walk(plan: Plan) -> loops.Step:
    """Returns the classifier's step, see `train_step`: plain gradient descent."""
    recipe = Recipe(momentum=0.0, weight_decay=0.0, max_shift=0.0, flip=False)
    return train_step(plan.network, recipe, _descent(plan.config), plan.mesh)


def learn(plan: Plan, constants, carry, rows):
    """Returns ((generator, classifier), loss []) after a step of both, see `Compiled.learn`."""
    clean, poisoned, key = constants
    generator, classifier = carry
    batch = devices.constrain_examples((clean.images[rows], clean.labels[rows]), plan.mesh)
    harm = functools.partial(_harm, plan, generator.batch_stats, classifier, batch)
    (value, batch_stats), gradient = jax.value_and_grad(harm, has_aux=True)(generator.params)
    # Adam descends, and the harm is to rise.
    gradient = jax.tree.map(jnp.negative, gradient)
    adam = optax.adam(plan.config.generator_rate)
    updates, opt_state = adam.update(gradient, generator.opt_state)
    params = optax.apply_updates(generator.params, updates)
    generator = TrainState(generator.step + 1, params, batch_stats, opt_state)
    classifier, _ = walk(plan)((poisoned, (), key), classifier, rows)
    return (generator, classifier), value


def _harm(plan, batch_stats, classifier, batch, params):
    """Returns (`confusion` [], the generator's new batch statistics)."""
    images, labels = batch
    variables = {"params": params, "batch_stats": batch_stats}
    outputs, updates = plan.unet.apply(variables, images, train=True, mutable=["batch_stats"])
    apply = functools.partial(_train_logits, plan.network, classifier.batch_stats)
    poisoned = perturb(images, outputs, plan.epsilon)
    rate = plan.config.classifier_rate
    harm = confusion(apply, classifier.params, rate, poisoned, images, labels)
    return harm, updates["batch_stats"]


def _train_logits(network, batch_stats, params, images):
    return network.train_logits({"params": params, "batch_stats": batch_stats}, images)[0]


def losses(plan: Plan, variables: Any, batch: Dataset) -> jax.Array:
    """Returns a classifier's cross-entropy for each example, [B], in evaluation mode."""
    logits = plan.network.logits(variables, batch.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)


def generate(plan: Plan, variables: Any, images: jax.Array) -> jax.Array:
    """Returns poisoned images, with the generator in evaluation mode."""
    outputs = jnp.asarray(plan.unet.apply(variables, images))
    return perturb(images, outputs, plan.epsilon)


def _descent(config):
    return optax.sgd(config.classifier_rate)
