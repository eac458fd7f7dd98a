"""DeepConfuse (Feng et al., arXiv 1905.09027): a network that makes training images misleading.

    x' = clip(x + epsilon tanh G(x)),   G maximises  CE(f(x; theta'), y),
                                        theta' = theta - rate grad_theta CE(f(G(x); theta), y)

over the training of a classifier f: wherever on its way it is, a step on the poisoned images shall
do it harm on the clean ones. The authors decouple the two: in each trial a new classifier walks its
trajectory on the images of the generator as it was, G_old, while at every point of it the
generator G takes a step through one simulated step of the classifier. Then G_old becomes G. Since
the trajectory does not depend on G, collecting it first and replaying it is the same as walking it
once beside the generator's steps, as here, and keeping none of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison import solvers
from jaxpoison.attacks.base import Attack, check_epsilon
from jaxpoison.attacks.descent import check_positive
from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset
from jaxpoison.models import Classifier
from jaxpoison.models.unet import UNet
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


def deep_confuse(*, epsilon: float, config: DeepConfuseConfig = DeepConfuseConfig()) -> Attack:
    """Returns the attack.

    The generator is trained on the images that it is to poison; of the victim it takes the network,
    not its weights. Of all generators on the way the one is kept whose classifier ended with the
    highest loss on the clean images (the authors go by accuracy, which after a short training
    hardly tells generators apart).

    Args:
      epsilon: budget, in units of [0, 1].
      config: see there.

    Raises:
      ValueError: for settings out of range.
    """
    check_epsilon(epsilon)
    check_positive(**dataclasses.asdict(config))
    cached = functools.cache(
        lambda model, shape, mesh: compiled(model, shape, mesh, epsilon, config)
    )

    def craft(key, victim, images, labels, progress=None):
        num_images, size = len(images), min(config.batch_size, len(images))
        mesh = devices.data_mesh(jax.devices()[: math.gcd(size, len(jax.devices()))])
        run = cached(cast(Hashable, victim.model), images.shape[1:], mesh)
        clean = devices.replicate(Dataset(np.asarray(images), np.asarray(labels)), mesh)
        init_key, key = jax.random.split(key)
        generator = devices.replicate(run.generator(init_key, clean.images[:1]), mesh)
        best, highest = None, -math.inf
        for trial in range(config.trials + 1):
            trial_key = jax.random.fold_in(key, trial)
            old = jax.tree.map(jnp.array, generator.variables)  # copies: the loop donates its carry
            poisoned = clean._replace(images=run.generate(old, clean.images))
            classifier = devices.replicate(run.classifier(trial_key), mesh)
            order = jnp.concatenate(
                [
                    epoch_order(trial_key, number, num_images, size)
                    for number in range(config.passes)
                ]
            )
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

    return Attack("dc", epsilon, craft, dataclasses.asdict(config))


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


class Compiled(NamedTuple):
    """The parts of crafting for one network and one size of images, each compiled once.

    Attributes:
      generator: `generator(key, images)`, its state before the first step.
      classifier: `classifier(key)`, the same of a classifier.
      learn: `learn((clean, poisoned, key), (generator, classifier), rows [S, B])`: S steps of
        both, the generator's through a simulated step and the classifier's on `poisoned`. Gives
        the two states and the loss [S] on clean images after each simulated step.
      walk: `walk((poisoned, (), key), classifier, rows)`, the classifier's steps alone.
      losses: `losses(variables, dataset)`, a classifier's losses [N], in evaluation mode.
      generate: `generate(variables, images)`, poisoned images, in evaluation mode.
    """

    generator: Callable[[jax.Array, Any], TrainState]
    classifier: Callable[[jax.Array], TrainState]
    learn: Callable[..., tuple[Any, Any]]
    walk: Callable[..., tuple[TrainState, Any]]
    losses: Callable[[Any, Dataset], jax.Array]
    generate: Callable[[Any, Any], jax.Array]


def compiled(
    model: Classifier,
    image_shape: tuple[int, ...],
    mesh: jax.sharding.Mesh,
    epsilon: float,
    config: DeepConfuseConfig,
) -> Compiled:
    """Returns the parts of crafting."""
    unet = unet_for(image_shape, config.width)
    adam, descent = optax.adam(config.generator_rate), optax.sgd(config.classifier_rate)
    recipe = Recipe(momentum=0.0, weight_decay=0.0, max_shift=0.0, flip=False)
    walk = train_step(model, recipe, descent, mesh)

    @jax.jit
    def generator(key, images):
        variables = unet.init(key, images)
        return TrainState(
            jnp.zeros((), jnp.int32),
            variables["params"],
            variables["batch_stats"],
            adam.init(variables["params"]),
        )

    def learn(constants, carry, rows):
        clean, poisoned, key = constants
        generator, classifier = carry
        images, labels = devices.constrain_examples((clean.images[rows], clean.labels[rows]), mesh)

        def apply(params, images):
            variables = {"params": params, "batch_stats": classifier.batch_stats}
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[0]

        def loss(params):
            variables = {"params": params, "batch_stats": generator.batch_stats}
            outputs, updates = unet.apply(variables, images, train=True, mutable=["batch_stats"])
            harm = confusion(
                apply, classifier.params, config.classifier_rate,
                perturb(images, outputs, epsilon), images, labels,
            )  # fmt: skip
            return -harm, updates["batch_stats"]

        (value, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(generator.params)
        updates, opt_state = adam.update(gradient, generator.opt_state)
        params = optax.apply_updates(generator.params, updates)
        generator = TrainState(generator.step + 1, params, batch_stats, opt_state)
        classifier, _ = walk((poisoned, (), key), classifier, rows)
        return (generator, classifier), -value

    def losses(variables, batch):
        logits = jnp.asarray(model.apply(variables, batch.images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)

    def generate(variables, images):
        return perturb(images, jnp.asarray(unet.apply(variables, images)), epsilon)

    return Compiled(
        generator=generator,
        classifier=jax.jit(lambda key: init_state(model, descent, key, image_shape)),
        learn=loops.scan(learn),
        walk=loops.scan(walk),
        losses=loops.map_batches(losses, batch_size=512, mesh=mesh),
        generate=loops.map_batches(generate, batch_size=512, mesh=mesh),
    )
