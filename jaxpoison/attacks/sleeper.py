"""Sleeper Agent (Souri et al. 2021, arXiv 2106.08970): a hidden trigger, with clean labels.

    minimize  1 - cos(g_t, g),   g_t = mean over source images s of grad_theta CE(f(s + trigger), t)
                                 g   = sum_j grad_theta CE(f(a(x_j)), t)

over poisons x_j of the target class t, within a budget. No poison shows the trigger: training on
them takes the steps that training on triggered images with the label t would. It is gradient
matching (`gradient_matching`) with many triggered images as the views of its target. The poisons
are the examples of t with the largest gradients; and as a network trained on poisons is another
one than that they were made for, it may be trained again on what there is between rounds of steps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison.attacks import _gradient_matching as matching
from jaxpoison.attacks.base import BackdoorAttack, Victim, check_substitutes, networks_of
from jaxpoison.attacks.triggers import Trigger
from jaxpoison.core import devices
from jaxpoison.core.checks import check_count
from jaxpoison.data import Dataset
from jaxpoison.network import shared

Retrain = Callable[[jax.Array, Dataset], Sequence[Victim]]
"""`retrain(key, dataset) -> substitutes`, trained from new weights on the set."""


def sleeper_agent(
    substitutes: Sequence[Victim],
    *,
    epsilon: float = 16 / 255,
    size: int = 8,
    source_class: int | None = None,
    num_sources: int = 256,
    num_steps: int = 250,
    rounds: int = 1,
    retrain: Retrain | None = None,
    learning_rate: float = 0.1,
    max_shift: float = 4.0,
    flip: bool = True,
    batch_size: int = 512,
) -> BackdoorAttack:
    """Returns the backdoor whose poisons do not show its trigger, and keep their labels.

    Their trigger is moved at random from image to image; here it is a patch of random colors at the
    bottom right.

    Args:
      substitutes: networks trained on clean data; several are an ensemble.
      epsilon: largest change of a pixel of a poison, in units of [0, 1].
      size: side of the trigger, in pixels; theirs is 8 on CIFAR-10.
      source_class: class of the images that shall be misclassified; None for all but the target
        class. See `evaluation.backdoor_outcome(source_class=...)`.
      num_sources: most images that the trigger is put on for g_t, drawn at random; at least 1.
      num_steps: steps of signed Adam, over all rounds.
      rounds: into which the steps are divided; before each but the first the substitutes are
        trained again. Theirs are 5.
      retrain: how, `retrain(key, dataset) -> substitutes`; needed for more than one round.
      learning_rate, max_shift, flip, batch_size: see `gradient_matching`.

    Raises:
      TypeError, ValueError: for settings out of range, or rounds without `retrain`; from `implant`,
        for substitutes that do not fit the images, or a source class without images.
    """
    check_substitutes(substitutes)
    check_count(size=size, num_sources=num_sources, num_steps=num_steps, rounds=rounds)
    if rounds > 1 and retrain is None:
        raise ValueError(f"rounds is {rounds}: give retrain, which trains the substitutes between")
    if num_steps < rounds:
        raise ValueError(f"num_steps is {num_steps}, fewer than the {rounds} rounds")
    settings = matching.GradientMatching(
        epsilon=epsilon, num_steps=num_steps // rounds, learning_rate=learning_rate, restarts=1,
        max_shift=max_shift, flip=flip, batch_size=batch_size,
    )  # fmt: skip
    about = settings.for_archives() | {
        "size": int(size), "source_class": source_class, "num_sources": int(num_sources),
        "rounds": int(rounds),
    }  # fmt: skip
    craft = functools.partial(
        _craft, settings, tuple(substitutes), source_class, num_sources, rounds, retrain
    )
    return BackdoorAttack(
        "sleeper_agent", functools.partial(_trigger, size), about, clean_label=True, craft=craft
    )


def _trigger(size, key, image_shape: tuple[int, int, int], target_class: int) -> Trigger:
    height, width, channels = image_shape
    if size > min(height, width):
        raise ValueError(f"size is {size} pixels, the images are {height}x{width}: make it smaller")
    patch = jax.random.uniform(key, (size, size, channels))
    patch = jnp.concatenate([patch, jnp.ones((size, size, 1))], axis=-1)
    field = jnp.zeros((height, width, channels + 1), jnp.float32)
    return Trigger("overlay", field.at[-size:, -size:].set(patch), target_class)


def _craft(
    settings, substitutes, source_class, num_sources, rounds, retrain,
    key, trigger, clean, num_poisons,
):  # fmt: skip
    """Returns the rows of the poisons, ascending, and the poisons; see `BackdoorAttack`."""
    target = trigger.target_class
    networks = networks_of(substitutes, clean.images.shape[1:])
    source_key, craft_key, retrain_key = jax.random.split(key, 3)
    sources = _sources(source_key, clean.labels, source_class, target, num_sources)
    own = np.flatnonzero(clean.labels == target)
    norms = np.mean(
        [
            gradient_norms(net, variables, clean.images[own], target)
            for net, (_, variables) in zip(networks, substitutes, strict=True)
        ],
        axis=0,
    )
    rows = np.sort(own[np.argsort(-norms, kind="stable")[:num_poisons]])
    bases, triggered = clean.images[rows], trigger.apply(clean.images[sources])
    poisons = None
    for number in range(rounds):
        if number:
            assert retrain is not None and poisons is not None
            images = np.array(clean.images)
            images[rows] = devices.to_host(poisons[0])
            key = jax.random.fold_in(retrain_key, number)
            substitutes = tuple(retrain(key, Dataset(images, clean.labels)))
        poisons, _ = matching.craft(
            settings, jax.random.fold_in(craft_key, number)[None], substitutes, bases[None],
            np.array([target], np.int32), triggered[None], starts=poisons,
        )  # fmt: skip
    assert poisons is not None
    return rows, poisons[0]


def _sources(key, labels, source_class, target, num_sources):
    """Returns the rows of the images that get the trigger."""
    if source_class == target:
        raise ValueError(f"source_class is {source_class}, which is the target class")
    found = labels != target if source_class is None else labels == source_class
    if not found.any():
        raise ValueError(f"source_class: class {source_class} does not occur in the training set")
    order = np.asarray(jax.random.permutation(key, len(labels)))
    return order[found[order]][:num_sources]


def gradient_norms(network: Any, variables: Any, images: np.ndarray, label: int) -> np.ndarray:
    """Returns the norm of the gradient of the cross-entropy by all parameters, float32 [N].

    Args:
      network: a `Network`.
      variables: of it, in evaluation mode.
      images: float32 [N, H, W, C].
      label: of all images.
    """
    norms = shared(_norms, network)
    return devices.to_host(norms(variables, jnp.asarray(images), jnp.int32(label)))


def _norms(network):
    def norm(variables, label, image):
        def loss(params):
            logits = network.logits({**variables, "params": params}, image[None])
            return optax.softmax_cross_entropy_with_integer_labels(logits[0], label)

        return optax.tree.norm(jax.grad(loss)(variables["params"]))

    @jax.jit
    def norms(variables, images, label):
        # One by one: batches of gradients by kernels take long to compile, and this is done once.
        return jax.lax.map(functools.partial(norm, variables, label), images)

    return norms
