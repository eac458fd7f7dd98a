"""Deep partition aggregation: a number of poisons below which a prediction cannot change.

Levine & Feizi 2021 (arXiv 2006.14768). A hash of each image puts it into one of P partitions,
whatever else is in the set; one network is trained on each, and they vote. With n_c votes for class
c, ties going to the smaller class, the prediction is c* = argmax n_c, and its radius

    r = min over c != c* of  floor((n_c* - n_c - [c < c*]) / 2)

An image that is inserted, removed or given another label touches one partition, and so one vote: no
r such changes change the prediction. New pixels are a removal and an insertion. For this to hold,
nothing about a network may depend on other partitions: all take the same number of steps from the
same weights, and each draws its own images in an order that its own content decides.
"""

import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.attacks.base import check_key
from jaxpoison.core import devices, loops
from jaxpoison.core.checks import check_count
from jaxpoison.data import Dataset, as_dataset, check
from jaxpoison.network import as_network, over_set, shared
from jaxpoison.training import Recipe, init_state
from jaxpoison.training import recipe as recipes
from jaxpoison.training._fit import train_step


class Certificate(NamedTuple):
    """Predictions of P networks for T test images, with what it takes to change them.

    Attributes:
      votes: int32 [T, K], networks for each class; a row sums to P.
      prediction: int32 [T], the class with most votes, the smallest of several.
      radius: int32 [T], changes of the training set that cannot change the prediction.
      correct: bool [T], whether the prediction is right.
    """

    votes: np.ndarray
    prediction: np.ndarray
    radius: np.ndarray
    correct: np.ndarray

    def certified_accuracy(self, num_changes: int = 0) -> float:
        """Returns the share of images that stay right, whatever `num_changes` changes are."""
        return float(np.mean(self.correct & (self.radius >= num_changes)))

    def unchanged(self, num_changes: int) -> float:
        """Returns the share of predictions, right or wrong, that `num_changes` cannot change."""
        return float(np.mean(self.radius >= num_changes))


def certify(
    key: jax.Array,
    model: Any,
    recipe: Recipe,
    train: Dataset,
    test: Dataset,
    *,
    num_partitions: int,
    steps_per_epoch: int,
    at_once: int = 50,
) -> Certificate:
    """Returns the predictions of networks trained on partitions, each with its certificate.

    It certifies this way of training, for the key: not a network that is trained on all images. An
    empty partition votes for class 0.

    Args:
      key: PRNG key, of the initial weights and of orders and augmentation.
      model: the network of each partition, a `Network` or what `network.as_network` takes.
      recipe: how it is trained.
      train: the training set, poisoned or not, as `data.as_dataset` takes it.
      test: clean test images.
      num_partitions: P, at least 1; a radius is at most P / 2.
      steps_per_epoch: batches of `recipe.batch_size` in an epoch of the recipe. Choose it without
        a look at this set, for instance from about how many images there should be: N / P / B.
      at_once: most networks that are trained side by side.

    Raises:
      TypeError, ValueError: for bad images or labels, or numbers below 1.
    """
    check_key(key)
    check_count(num_partitions=num_partitions, steps_per_epoch=steps_per_epoch, at_once=at_once)
    train, test = as_dataset(train), as_dataset(test, "test set")
    network = as_network(model, image_shape=train.images.shape[1:])
    check(train, network.num_classes)
    check(test, network.num_classes, "test set")
    if test.images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"test images are {test.images.shape[1:]}, training images {train.images.shape[1:]}; "
            "expected the same size"
        )
    members = partition(train, num_partitions)
    said = []
    for start in range(0, num_partitions, at_once):
        group = members[start : start + at_once]
        filled = group + group[:1] * (min(at_once, num_partitions) - len(group))
        variables = train_partitions(key, network, recipe, train, filled, steps_per_epoch)
        mesh = devices.data_mesh(jax.local_devices()[:1])
        answers = np.array(over_set(_answers, network, mesh=mesh)(variables, test.images))
        answers[:, [len(rows) == 0 for rows in filled]] = 0
        said.append(answers[:, : len(group)])
    num_classes = network.num_classes or int(np.max(train.labels)) + 1
    votes = count_votes(np.concatenate(said, axis=1), num_classes)
    prediction, radius = certified_radius(votes)
    prediction, radius = np.asarray(prediction), np.asarray(radius)
    return Certificate(np.asarray(votes), prediction, radius, prediction == np.asarray(test.labels))


def partition(dataset: Dataset, num_partitions: int) -> list[np.ndarray]:
    """Returns the rows of each partition, int64, in an order that their content alone decides.

    The partition of an image is the BLAKE2 hash of its pixels modulo P: labels and rows, which an
    attacker may choose more freely, have no say.
    """
    images, labels = np.asarray(dataset.images), np.asarray(dataset.labels)
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
    home = np.array([int.from_bytes(digest, "little") % num_partitions for digest in digests])
    order = np.array(sorted(range(len(labels)), key=lambda row: (digests[row], labels[row])), int)
    return [order[home[order] == number] for number in range(num_partitions)]


def train_partitions(
    key: jax.Array,
    model: Any,
    recipe: Recipe,
    dataset: Dataset,
    members: list[np.ndarray],
    steps_per_epoch: int,
) -> dict[str, Any]:
    """Returns the variables of networks trained on parts of a set, with a leading axis [P].

    They move side by side in one compiled step. Those of an empty part learn row 0.

    Args:
      key: PRNG key, the same for all.
      model: a `Network`, or what `network.as_network` takes.
      recipe: how they are trained.
      dataset: images and labels.
      members: rows of each part.
      steps_per_epoch: batches in an epoch.
    """
    network = as_network(model, image_shape=dataset.images.shape[1:])
    mesh = devices.data_mesh(jax.local_devices()[:1])
    optimizer, run = shared(_program, network, recipe, mesh)
    init_key, data_key = jax.random.split(key)
    state = init_state(network, optimizer, init_key, dataset.images.shape[1:])
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(members), *jnp.shape(x))), state)
    constants = devices.replicate((dataset._replace(ids=None), (), data_key), mesh)
    seed = np.asarray(jax.random.key_data(data_key))
    batches = [
        _drawn(rows, recipe.epochs * steps_per_epoch * recipe.batch_size, seed) for rows in members
    ]
    batches = np.stack(batches).reshape(len(members), -1, recipe.batch_size).swapaxes(0, 1)
    for epoch, part in enumerate(np.split(batches.astype(np.int32), recipe.epochs)):
        at_epoch = functools.partial(recipes.at_epoch, epoch=epoch, num_steps=steps_per_epoch)
        state = state._replace(opt_state=jax.vmap(at_epoch)(state.opt_state))
        state, _ = run(constants, devices.replicate(state, mesh), part)
    return state.variables


@functools.partial(jax.jit, static_argnums=1)
def count_votes(answers: jax.Array, num_classes: int) -> jax.Array:
    """Returns votes for each class, int32 [T, K], of answers int [T, P]."""
    return jnp.sum(answers[..., None] == jnp.arange(num_classes), axis=1, dtype=jnp.int32)


def certified_radius(votes: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns (prediction, radius), int32 [T] both, of votes int32 [T, K], K >= 2.

    The radius is the largest number of voters that may change their vote, each to any class,
    without another prediction.
    """
    classes = jnp.arange(votes.shape[1])
    prediction = jnp.argmax(votes, axis=1).astype(jnp.int32)
    own = classes == prediction[:, None]
    rivals = jnp.where(own, -1, votes + (classes < prediction[:, None]))
    return prediction, (jnp.max(votes, axis=1) - jnp.max(rivals, axis=1)) // 2


def _program(network, recipe, mesh):
    """Returns (optimizer, loop over a step of all networks); for `network.shared`."""
    optimizer = recipes.optimizer(recipe)
    step = train_step(network, recipe, optimizer, mesh)
    return optimizer, loops.scan(jax.vmap(step, in_axes=(None, 0, 0)))


def _drawn(rows, count, seed):
    """Returns `count` of the rows, passes in random order; the order follows from their number."""
    if not len(rows):
        return np.zeros(count, np.int64)
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate(passes)[:count]


def _answers(network, variables, images):
    """Returns the class that each network says, int32 [B, P]."""
    logits = jax.vmap(network.logits, in_axes=(0, None))(variables, images)
    return jnp.argmax(logits, axis=-1).T.astype(jnp.int32)
