"""The second witness: a small network trained on the data under audit, watched after every epoch.

A network first learns what most images of a class share; what contradicts that it learns last, by
heart. So the margin of the given label, averaged over training, is low for wrong labels (AUM,
Pleiss et al. 2020, arXiv 2001.10528; arXiv 2510.16211).
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison import models, solvers
from jaxpoison.audit import nearest
from jaxpoison.audit.evidence import SIZE, Evidence, HeldOut, Training
from jaxpoison.core import devices, loops
from jaxpoison.core.checks import check_count
from jaxpoison.data import Dataset, check, to_float
from jaxpoison.filters.extraction import apply_and_extract
from jaxpoison.network import Network, as_network, logits, over_set, shared
from jaxpoison.network import features as features_of
from jaxpoison.training import FAST, Checkpoints, Recipe, init_state
from jaxpoison.training import recipe as recipes
from jaxpoison.training._fit import epoch_order, train_step

WIDTHS = (32, 64, 128)
RECIPE = dataclasses.replace(
    FAST,
    epochs=12,
    batch_size=128,
    learning_rate=0.15,
    momentum=0.9,
    weight_decay=2e-3,
    schedule="one_cycle",
    optimizer="sgd",
    other_rate=None,
)
"""`training.FAST` by gradient descent, for a narrower network; epochs and batch size are those of
large sets."""
FEWEST_STEPS = 600
MOST_EPOCHS = 100
MOST_HELD_OUT = 6_000
"""Images of both halves in `held_out`."""
LEAST_TRUSTED = 20
"""Trusted images below which their accuracy says too little."""


class Trained(NamedTuple):
    """A small network, trained here.

    Attributes:
      training: what it said of each image on the way.
      variables: its weights after the last epoch, for `small_network`.
    """

    training: Training
    variables: Any


class _Watched(NamedTuple):
    """What is kept of all epochs so far; see `evidence.Training`."""

    margins: Any
    losses: Any
    probabilities: Any


def recipe_for(num_images: int, epochs: int | None = None) -> Recipe:
    """Returns how a set of this size is trained.

    Small sets have smaller batches and more epochs, so that there are at least 600 steps.

    Args:
      num_images: N, at least 1.
      epochs: passes over the set; None for what suits its size.
    """
    batch_size = 128 if num_images >= 5_000 else 64 if num_images >= 1_000 else 32
    batch_size = min(batch_size, num_images)
    if epochs is None:
        enough = math.ceil(FEWEST_STEPS / (num_images // batch_size))
        epochs = min(max(RECIPE.epochs, enough), MOST_EPOCHS)
    return dataclasses.replace(RECIPE, epochs=epochs, batch_size=batch_size)


def small_network(num_classes: int) -> Network:
    """Returns the network that audits train: `models.fast_cnn`, half as wide."""
    return as_network(models.fast_cnn(widths=WIDTHS, num_classes=num_classes))


def train(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    seed: int = 0,
    epochs: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Trains a small network on the data; returns it and what it said of each image on the way.

    Args:
      images: uint8 [N, S, S, 3] in 0..255, S at least 16; meant for S = 32.
      labels: int32 [N], in [0, K).
      num_classes: K.
      seed: of initial weights, order and augmentation.
      epochs: E; None for what suits N, see `recipe_for`.
      folder: where to keep checkpoints, so that an interrupted training resumes; None for nowhere.
      progress: called after each epoch as `progress(finished epochs, E)`.

    Raises:
      ValueError: for fewer than two classes, images or labels that do not fit, or a folder that
        holds another training.
      DivergedError: if the loss is not finite after an epoch.
    """
    check_count(num_classes=num_classes)
    if num_classes == 1:
        raise ValueError("num_classes is 1: there is nothing to learn; expected at least 2 classes")
    dataset = Dataset(np.asarray(images), np.asarray(labels, np.int32))
    check(dataset, num_classes)
    if epochs is not None:
        check_count(epochs=epochs)
    recipe = recipe_for(len(dataset.labels), epochs)
    network = small_network(num_classes)
    checkpoints = None
    if folder is not None:
        checkpoints = Checkpoints(folder, every=1, identity=_identity(dataset, recipe, seed))
    try:
        state, watched = _watch(network, recipe, dataset, seed, checkpoints, progress)
    finally:
        if checkpoints is not None:
            checkpoints.close()
    training = _training(network, state.variables, dataset.images, watched)
    return Trained(training, state.variables)


def held_out(
    evidence: Evidence,
    *,
    seed: int = 0,
    epochs: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOut | None:
    """Trains a small network on half of a sample; tests it on the other half and on trusted images.

    Sample and halves go by content; of exact copies only one takes part. Trusted images that are in
    the data as well are not tested on: the network may have learned them.

    Args:
      evidence: the data, with trusted images.
      seed, epochs, folder, progress: see `train`.

    Returns:
      The accuracies; None where there are too few images or trusted ones, or one class.
    """
    trusted = evidence.trusted
    if trusted is None:
        return None
    ours = {digest.tobytes() for digest in evidence.digests}
    strange = np.array([digest.tobytes() not in ours for digest in trusted.digests])
    rows = np.unique(nearest.copies_of(evidence), return_index=True)[1]
    half = min(len(rows), MOST_HELD_OUT) // 2
    learned, tested = rows[:half], rows[half : 2 * half]
    classes = len(np.unique(evidence.labels[learned]))
    if strange.sum() < LEAST_TRUSTED or classes < 2 or half < 8 * classes:
        return None
    labels = np.asarray(evidence.labels)
    done = train(
        np.asarray(evidence.images[learned]), labels[learned], evidence.num_classes,
        seed=seed, epochs=epochs, folder=folder, progress=progress,
    )  # fmt: skip
    network = small_network(evidence.num_classes)

    def accuracy(images, labels):
        said = logits(network, done.variables, np.asarray(images))
        return float(np.mean(np.argmax(said, axis=1) == labels))

    return HeldOut(
        accuracy(evidence.images[tested], labels[tested]), half,
        accuracy(trusted.images[strange], trusted.labels[strange]), int(strange.sum()),
    )  # fmt: skip


def checked(model: Any, variables: Any, num_classes: int) -> tuple[Network, Any]:
    """Returns a network that was trained elsewhere, with its variables, as `of_network` needs them.

    Nothing is computed: shapes alone are compared.

    Args:
      model: a `Network`, or what `network.as_network` takes, for images of 32x32.
      variables: its variables; None for those that it holds itself (NNX).
      num_classes: K of the data.

    Raises:
      TypeError: if `model` is no network.
      ValueError: for variables that are missing or do not fit, or another number of classes.
    """
    network = as_network(model, image_shape=(SIZE, SIZE, 3))
    variables = network.variables if variables is None else variables
    if variables is None:
        raise ValueError("the network has no variables: pass a pair (model, variables)")
    images = jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.float32)
    try:
        said = jax.eval_shape(network.logits, variables, images)
    except Exception as error:  # Flax and models raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise ValueError(
            f"the variables do not fit the network ({reason}); expected what its training left, "
            "such as {'params': ..., 'batch_stats': ...}"
        ) from error
    if said.shape[1] != num_classes:
        raise ValueError(
            f"the network tells {said.shape[1]} classes apart, the data have {num_classes}; "
            "expected one logit for each class, in the order of the classes' names"
        )
    return network, variables


def of_network(model: Any, variables: Any, images: np.ndarray, labels: np.ndarray) -> Training:
    """Returns the outputs of a network trained elsewhere for each image, as of one epoch.

    Args:
      model: a `Network`, or what `network.as_network` takes.
      variables: its variables.
      images: uint8 [N, H, W, C] in 0..255 or float32 in [0, 1], as the network takes them.
      labels: int32 [N], in [0, K).

    Returns:
      E = 1. Without a last linear layer `features` are the logits; without BatchNorm layers
      `vectors` is [N, 0].

    Raises:
      ValueError: for images or labels that do not fit the network.
    """
    dataset = Dataset(np.asarray(images), np.asarray(labels, np.int32))
    check(dataset)
    network = as_network(model, image_shape=dataset.images.shape[1:])
    check(dataset, network.num_classes)
    said = logits(network, variables, dataset.images)
    margins, losses, probabilities = _judged(said, dataset.labels)
    watched = _Watched(margins[None], losses[None], probabilities)
    return _training(network, variables, dataset.images, watched, np.asarray(said))


def _watch(network, recipe, dataset, seed, checkpoints, progress):
    """Returns (state after training, `_Watched` of all epochs)."""
    num_images, num_classes = len(dataset.labels), network.num_classes
    mesh = mesh_for(recipe.batch_size)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    optimizer, run_epoch = shared(epoch_program, network, recipe, mesh)
    state = init_state(network, optimizer, init_key, dataset.images.shape[1:])
    kept = np.zeros((recipe.epochs, num_images), np.float32)
    watched = _Watched(kept, kept.copy(), np.zeros((num_images, num_classes), np.float32))
    state = devices.replicate(jax.tree.map(jnp.array, state), mesh)
    first_epoch = 0
    if checkpoints is not None:
        first_epoch, (state, watched) = checkpoints.restore((state, watched))
        watched = jax.tree.map(np.array, watched)
    placed = devices.replicate(dataset, mesh)
    for epoch in range(first_epoch, recipe.epochs):
        order = epoch_order(data_key, epoch, num_images, recipe.batch_size)
        state = state._replace(opt_state=recipes.at_epoch(state.opt_state, epoch, len(order)))
        state, steps = run_epoch((placed, (), data_key), devices.replicate(state, mesh), order)
        if not np.isfinite(np.asarray(steps["loss"])).all():
            raise solvers.DivergedError(f"the training loss is not finite after epoch {epoch}")
        said = logits(network, state.variables, placed.images, mesh=mesh)
        margins, losses, probabilities = _judged(said, placed.labels)
        watched.margins[epoch], watched.losses[epoch] = margins, losses
        watched.probabilities[...] += np.asarray(probabilities) / recipe.epochs
        if checkpoints is not None:
            checkpoints.save(epoch + 1, (state, watched))
        if progress is not None:
            progress(epoch + 1, recipe.epochs)
    return state, watched


def epoch_program(network: Network, recipe: Recipe, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Returns (optimizer, `loops.scan` of a training step); for `network.shared`."""
    optimizer = recipes.optimizer(recipe)
    return optimizer, loops.scan(train_step(network, recipe, optimizer, mesh))


def mesh_for(batch_size: int) -> jax.sharding.Mesh:
    """Returns all devices, or one where the batch cannot be spread over all."""
    mesh = devices.data_mesh()
    return mesh if batch_size % mesh.size == 0 else devices.data_mesh(jax.local_devices()[:1])


@jax.jit
def _judged(said, labels):
    """Returns margins [N], losses [N] and probabilities [N, K] of logits [N, K]."""
    given = jnp.arange(said.shape[1]) == labels[:, None]
    own = jnp.sum(jnp.where(given, said, 0), axis=1)
    margins = own - jnp.max(jnp.where(given, -jnp.inf, said), axis=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(said, labels)
    return _Watched(margins, losses, jax.nn.softmax(said))


def _training(network, variables, images, watched, said=None):
    """Returns the record of all epochs, with features and vectors as they are now."""
    try:
        features = features_of(network, variables, images)
    except ValueError:
        if said is None:
            raise
        features = said  # of a network without a last linear layer
    vectors, layers = _characteristic(network, variables, images)
    arrays = (*watched, features, vectors)
    margins, losses, probabilities, features, vectors = (np.asarray(x, np.float32) for x in arrays)
    return Training(margins, losses, probabilities, features, vectors, layers)


def _characteristic(network, variables, images):
    """Returns characteristic vectors, float32 [N, M], and the layer of each column."""
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    try:
        described = jax.eval_shape(
            lambda variables, x: apply_and_extract(network, variables, x)[1], variables, one
        )
    except (TypeError, ValueError):  # no layers to be seen, or none with statistics
        return np.zeros((len(images), 0)), np.zeros(0, np.int32)
    sizes = [2 * block.mean.shape[-1] for block in described.blocks]
    layers = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return over_set(_vectors, network)(variables, images), layers


def _vectors(network, variables, images):
    return apply_and_extract(network, variables, to_float(images))[1].ravel()


def _identity(dataset, recipe, seed):
    """Returns which training it is, in words, for its checkpoints."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (dataset.images, dataset.labels):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return f"data {digest.hexdigest()}, widths {WIDTHS}, seed {seed}, {recipe}"
