"""From one prediction to the training images behind it, and whether it stands without them.

Let w be the label that the image should have, v the gradient of its loss by the last layer,
s = (H + damping I)^-1 v, and g_i the gradient of training image i. Two scores, both positive where
training on an image speaks against w:

    -<v, g_i> / ||g_i||                        renormalized influence (GAS, arXiv 2201.10055)
    how far -<s, g_i> falls on random views    Delta-Influence (arXiv 2411.13731)

The first is without H, as in its paper: a head that fits its training set has curvature next to
none along the gradients of poisons, and with its inverse feature collisions were not found.

Images are ordered by the sum of their two ranks. Then the check: new last layers are fitted without
the first 1, 2, 4, ... images, several seeds each, all in one compiled call; k is the smallest
number whose removal changes the prediction in most seeds. The same with as many images of the same
labels drawn at random is the control, and where the network was trained on this data alone, new
small networks are trained from scratch without the k images.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import curvature, influence, solvers
from jaxpoison.audit import explanation_page, findings
from jaxpoison.audit.views import random_views
from jaxpoison.audit.worth import BATCH_SIZE, drawn, fitted, steps_for
from jaxpoison.core import files, heads
from jaxpoison.core.checks import check_count
from jaxpoison.core.extras import require
from jaxpoison.data import Dataset, as_dataset, check, check_alike, to_float
from jaxpoison.data.pixels import to_unit
from jaxpoison.evaluation.statistics import wilson
from jaxpoison.network import as_network, logits
from jaxpoison.network import features as features_of
from jaxpoison.training import HeadRecipe, fit_head

VIEWS = 32
"""Transformed versions of the image."""
TOLERANCE = 3
"""Views on which the influence of a cause need not fall."""
DAMPING = 1.0
"""In mean eigenvalues of H."""
SOLVER_TOLERANCE, SOLVER_STEPS = 1e-2, 200
NUM_MAPS = 12
"""Images of the ranking with a pixel map."""
LARGEST_SHARE = 0.1
"""Of the training set, which a removal takes at most."""
MOST_REMOVED = 128
CHUNK = 4096
REFIT = HeadRecipe(epochs=20, milestones=(10, 15))
"""A third of `training.HEAD`: some ninety last layers are fitted."""
RETRAININGS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Removal:
    """What is predicted after training without some images, S trainings.

    Attributes:
      name: `as_is`, `without` or `random`.
      method: `refit` for a new last layer on the network's features, `retrained` for new small
        networks trained from scratch.
      num_removed: k.
      predictions: int [S], of the image explained.
      probability: float [S], of the wanted label, in [0, 1].
      accuracy: float [S] on the trusted images, in [0, 1]; NaN without them.
      changed: how many of the predictions differ from the one explained.
      interval: of the rate of changed predictions, 95% (Wilson); as if all S were independent.
    """

    name: str
    method: str
    num_removed: int
    predictions: np.ndarray
    probability: np.ndarray
    accuracy: np.ndarray
    changed: int
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """The training images behind a prediction, most to blame first.

    Attributes:
      image: float32 [H, W, C] in [0, 1], whose prediction is explained.
      prediction: the label that the network gives it.
      wanted: the label that it should have; the runner-up if none was given.
      wanted_given: whether it was.
      probabilities: float32 [K], of the network.
      class_names: K texts.
      rows: int [N], training images in order: the sum of the ranks of both scores.
      ids: N texts, and
      labels: int32 [N], the next three float32 [N], all by row of the training set.
      influence: -<s, g_i>, per unit of weight; positive speaks for the prediction.
      renormalized: -<v, g_i> / ||g_i||.
      delta: the fall of the influence that all but a few views of the image reach.
      top: uint8 or float32 [M, H, W, C], the first images of `rows`.
      maps: float32 [M, H, W, C], how raising a pixel of theirs, and training on, would change the
        loss of the wanted label: positive raises it.
      num_causes: k, how many of `rows` are named.
      is_enough: whether removing them changes the prediction in most refits. If not, k is the
        largest number that was tried.
      removals: as is, without the k, and without k at random.
    """

    image: np.ndarray
    prediction: int
    wanted: int
    wanted_given: bool
    probabilities: np.ndarray
    class_names: tuple[str, ...]
    rows: np.ndarray
    ids: tuple[str, ...]
    labels: np.ndarray
    influence: np.ndarray
    renormalized: np.ndarray
    delta: np.ndarray
    top: np.ndarray
    maps: np.ndarray
    num_causes: int
    is_enough: bool
    removals: tuple[Removal, ...]

    @property
    def causes(self) -> np.ndarray:
        """int [k], rows of the training images that are named."""
        return self.rows[: self.num_causes]

    def columns(self) -> dict[str, list[Any]]:
        """Returns {name: values}, in the order of `rows`; the columns of `to_frame`."""
        order = self.rows
        ranks = [_ranks(score)[order] + 1 for score in (self.renormalized, self.delta)]
        return {
            "row": order.tolist(),
            "id": [self.ids[row] for row in order],
            "class": [self.class_names[label] for label in self.labels[order]],
            "named": (np.arange(len(order)) < self.num_causes).tolist(),
            "renormalized_influence": self.renormalized[order].tolist(),
            "renormalized_rank": ranks[0].tolist(),
            "delta_influence": self.delta[order].tolist(),
            "delta_rank": ranks[1].tolist(),
            "influence": self.influence[order].tolist(),
        }

    def to_frame(self) -> Any:
        """Returns a DataFrame, one row for each training image, most to blame first.

        Raises:
          ImportError: without pandas (extra `audit`).
        """
        return require("pandas", extra="audit").DataFrame(self.columns())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes explanation.html, .json and .csv into a folder, which is made if need be.

        Raises:
          PermissionError, OSError: if the folder cannot be written to.
          ImportError: without Jinja2 (extra `audit`).
        """
        html = explanation_page.html(self)
        folder = files.check_writable(folder)
        files.write_text(folder / "explanation.html", html)
        files.write_text(folder / "explanation.csv", findings.table(self.columns()))
        files.write_text(folder / "explanation.json", explanation_page.as_json(self))


class _Scores(NamedTuple):
    """Of N training images, and the evidence of the solves."""

    influence: Any
    renormalized: Any
    delta: Any
    ihvp: Any
    converged: Any


def explain(
    model: Any,
    variables: Any,
    data: Any,
    image: Any,
    wanted: int | None = None,
    *,
    key: jax.Array,
    ids: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    trusted: Any = None,
    num_seeds: int = 5,
    recipe: HeadRecipe = REFIT,
    retrain: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Explanation:
    """Returns which training images are behind a prediction, checked by their removal.

    Influence acts through the last layer, on the network's features as they are: poisons that
    shaped the features are found only as far as they pull the last layer as well.

    Args:
      model: a `Network`, or what `network.as_network` takes, with a last linear layer that was
        trained on `data`; the rest may be a frozen extractor.
      variables: its variables.
      data: N training images and labels, as `data.as_dataset` takes them; at least 10.
      image: [H, W, C], uint8 in 0..255 or float in [0, 1]; not one of the training images.
      wanted: the label that it should have, in [0, K); None: the runner-up of the prediction.
      key: PRNG key of the views, the refits and what is removed at random.
      ids: N texts by which training images are named; their rows by default.
      class_names: K texts; the numbers of the classes by default.
      trusted: images and labels to measure accuracy on, which shows what a removal costs; or None.
      num_seeds: S, last layers fitted for each removal, at least 2.
      recipe: of these last layers.
      retrain: whether to train new small networks from scratch as well (3 seeds, as is, without
        the k images and without k at random), as `worth` does; for a network that was trained on
        `data` alone. Images are then uint8 [N, S, S, 3], S at least 16.
      progress: called as `progress(stage, done, total)`.

    Raises:
      ValueError: for images or labels that do not fit the network, a wanted label that is out of
        range or is predicted already, or a solve that failed.
    """
    check_count(num_seeds=num_seeds)
    if num_seeds < 2:
        raise ValueError("num_seeds is 1; one training says little: expected at least 2")
    tell = progress or (lambda stage, done, total: None)
    data = as_dataset(data)
    network = as_network(model, image_shape=data.images.shape[1:])
    check(data, network.num_classes)
    if trusted is not None:
        trusted = as_dataset(trusted, "trusted set")
        check_alike(trusted, data, network.num_classes)
    image, num_images = _checked_image(image, data), len(data.labels)
    if num_images < 10:
        raise ValueError(f"{num_images} training images; expected at least 10")
    if retrain and (data.images.dtype != np.uint8 or data.images.shape[-1] != 3):
        raise ValueError(
            f"retrain needs images uint8 [N, S, S, 3], got {data.images.dtype} "
            f"{data.images.shape}: convert them with data.to_uint8, or leave it out"
        )
    said = np.asarray(logits(network, variables, image[None]))[0]
    prediction, other = np.argsort(-said, kind="stable")[:2].tolist()
    names = _names(class_names, len(said), "class_names", "class")
    _check_wanted(wanted, prediction, names)
    label = other if wanted is None else int(wanted)

    view_key, fit_key, random_key = jax.random.split(key, 3)
    tell("Scoring training images", 0, 1)
    queries = jnp.concatenate([image[None], random_views(view_key, image, number=VIEWS)])
    features = features_of(network, variables, data.images)
    head = dict(network.head(variables))
    seen = features_of(network, variables, queries)
    scores = _scores(head, seen, jnp.int32(label), features, jnp.asarray(data.labels))
    if not bool(scores.converged):
        raise ValueError(
            "influence could not be computed: conjugate gradients did not reach a residual of "
            f"{SOLVER_TOLERANCE} in {SOLVER_STEPS} steps; are the features or the last layer's "
            "weights very large? Divide both by what makes them of the order of 1"
        )
    renormalized, delta = np.asarray(scores.renormalized), np.asarray(scores.delta)
    rows = np.argsort(_ranks(renormalized) + _ranks(delta), kind="stable")
    first = rows[:NUM_MAPS]
    maps = _maps(
        network.without_variables(), variables, scores.ihvp, to_float(data.images[first]),
        jnp.asarray(data.labels[first]),
    )  # fmt: skip
    tell("Scoring training images", 1, 1)

    check_data = data if trusted is None else trusted
    tested = features if trusted is None else features_of(network, variables, trusted.images)
    refits = functools.partial(
        _refits, jax.random.split(fit_key, num_seeds), features=features,
        labels=jnp.asarray(data.labels), query=seen[0], tested=tested,
        tested_labels=jnp.asarray(check_data.labels), num_classes=len(said), recipe=recipe,
        bias="bias" in head,
    )  # fmt: skip
    tell("Refitting without the first ones", 0, 2)
    sizes = _sizes(num_images)
    prefixes = np.ones((1 + len(sizes), num_images), bool)
    for place, size in enumerate(sizes, 1):
        prefixes[place, rows[:size]] = False
    outcomes = _Outcomes(prediction, label, trusted is not None)
    refitted = [np.asarray(part) for part in refits(keeps=jnp.asarray(prefixes))]
    flips = (refitted[0].argmax(-1) != prediction).mean(axis=1)
    enough = np.flatnonzero(flips[1:] > 0.5)
    chosen = int(enough[0]) if len(enough) else len(sizes) - 1
    num_causes, place = sizes[chosen], chosen + 1
    tell("Refitting without the first ones", 1, 2)
    at_random = _at_random(random_key, np.asarray(data.labels), rows[:num_causes], len(prefixes))
    control = [np.asarray(part) for part in refits(keeps=jnp.asarray(at_random))]
    removals = [
        outcomes.removal("as_is", "refit", 0, refitted[0][0], refitted[1][0]),
        outcomes.removal("without", "refit", num_causes, refitted[0][place], refitted[1][place]),
        outcomes.removal("random", "refit", num_causes, *control),
    ]
    tell("Refitting without the first ones", 2, 2)
    if retrain:
        ways = (np.ones(num_images, bool), prefixes[place], at_random[0])
        removals += _retrained(ways, data, image, trusted, outcomes, num_causes, len(said), tell)
    return Explanation(
        image=np.asarray(image), prediction=prediction, wanted=label,
        wanted_given=wanted is not None, probabilities=np.asarray(jax.nn.softmax(said)),
        class_names=names, rows=rows, ids=_names(ids, num_images, "ids", "training image"),
        labels=np.asarray(data.labels), influence=np.asarray(scores.influence),
        renormalized=renormalized, delta=delta, top=np.asarray(data.images)[first],
        maps=np.asarray(maps), num_causes=num_causes, is_enough=bool(len(enough)),
        removals=tuple(removals),
    )  # fmt: skip


@jax.jit
def _scores(head, queries, wanted, features, labels):
    """Returns `_Scores`: of queries [1 + T, d], the image itself first."""
    train = features, labels
    probabilities = jax.nn.softmax(heads.head_logits(head, features))
    # The mean eigenvalue of H, in closed form, so that nothing depends on the scale of features.
    spread = jnp.sum(probabilities * (1 - probabilities), axis=1)
    size = sum(leaf.size for leaf in jax.tree.leaves(head))
    lengths = jnp.sum(features**2, axis=1) + ("bias" in head)
    damping = DAMPING * jnp.mean(lengths * spread) / size + 1e-12
    cg = solvers.cg(damping=cast(Any, damping), tolerance=SOLVER_TOLERANCE, max_steps=SOLVER_STEPS)
    # A function, and not `cg` itself: an array among its settings has no hash.
    to_head = {
        "solver": lambda *args, **given: cg(*args, **given),
        "curvature": curvature.linear_head,
    }
    asked = queries, jnp.broadcast_to(wanted, len(queries))
    scored, solutions = influence.score_matrix(
        influence.linear_head_loss, head, asked, train, queries_at_once=len(queries), **to_head
    )
    itself = jax.tree.map(lambda x: x[:1], asked)
    solution = influence.group_ihvp(influence.linear_head_loss, head, itself, train, **to_head)
    gradient = influence.group_gradient(influence.linear_head_loss, head, itself)
    renormalized = influence.renormalized_influence(
        influence.linear_head_loss, head, gradient, train, chunk_size=CHUNK
    )
    scored = cast(jax.Array, scored)
    delta = influence.delta_influence(scored[0], scored[1:], tolerance=TOLERANCE)
    converged = jnp.all(solutions.converged) & solution.converged
    return _Scores(scored[0], renormalized, delta, solution.value, converged)


@functools.partial(jax.jit, static_argnames="network")
def _maps(network, variables, ihvp, images, labels):
    """Returns the pixel influence of images [M, H, W, C], through the features."""

    def loss_fn(head, batch):
        features = network.features(variables, batch[0])
        return influence.linear_head_loss(head, (features, batch[1]))

    head = dict(network.head(variables))
    return influence.pixel_influence(loss_fn, head, ihvp, (images, labels))


@functools.partial(jax.jit, static_argnames=("num_classes", "recipe", "bias"))
def _refits(
    keys, *, keeps, features, labels, query, tested, tested_labels, num_classes, recipe, bias
):
    """Returns probabilities [R, S, K] of the query and accuracies [R, S], of R sets and S keys."""

    def one(keep, key):
        head = fit_head(
            key, features, labels, num_classes=num_classes, recipe=recipe, keep=keep, bias=bias
        )
        hits = jnp.argmax(heads.head_logits(head, tested), axis=-1) == tested_labels
        return jax.nn.softmax(heads.head_logits(head, query[None])[0]), jnp.mean(hits)

    return jax.vmap(lambda keep: jax.vmap(functools.partial(one, keep))(keys))(keeps)


class _Outcomes(NamedTuple):
    """What is asked of each training."""

    prediction: int
    wanted: int
    has_trusted: bool

    def removal(self, name, method, num_removed, probabilities, accuracy):
        """Returns the record of trainings that gave the image probabilities [..., K]."""
        probabilities = probabilities.reshape(-1, probabilities.shape[-1])
        said = probabilities.argmax(axis=-1)
        changed = int((said != self.prediction).sum())
        accuracy = np.ravel(accuracy) if self.has_trusted else np.full(len(said), np.nan)
        return Removal(
            name, method, num_removed, said, probabilities[:, self.wanted], accuracy, changed,
            wilson(changed, len(said)),
        )  # fmt: skip


def _retrained(ways, data, image, trusted, outcomes, num_causes, num_classes, tell):
    """Returns removals by training small networks from scratch; `ways` are masks [N] to keep."""
    num_images = len(data.labels)
    steps, removals = steps_for(num_images), []
    for place, (name, keep) in enumerate(zip(("as_is", "without", "random"), ways, strict=True)):
        probabilities, accuracies = [], []
        for seed in range(RETRAININGS):
            tell("Training from scratch", place * RETRAININGS + seed, len(ways) * RETRAININGS)
            batches = drawn(keep, steps * BATCH_SIZE, seed).reshape(steps, BATCH_SIZE)
            network, variables = fitted(data, batches, num_classes, seed=seed, part=steps)
            probabilities.append(jax.nn.softmax(logits(network, variables, image[None]))[0])
            if trusted is not None:
                said = jnp.argmax(logits(network, variables, trusted.images), axis=-1)
                accuracies.append(float(jnp.mean(said == trusted.labels)))
        removed = num_causes if place else 0
        removals.append(
            outcomes.removal(
                name, "retrained", removed, np.stack(probabilities), np.array(accuracies)
            )
        )
    tell("Training from scratch", len(ways) * RETRAININGS, len(ways) * RETRAININGS)
    return removals


def _sizes(num_images):
    """Returns how many images removals take: 1, 2, 4, ... up to 128 and a tenth of the set."""
    most = min(MOST_REMOVED, int(LARGEST_SHARE * num_images))
    return [2**power for power in range(most.bit_length())]


def _at_random(key, labels, named, number):
    """Returns masks [number, N] that leave out as many images of each label as `named` has.

    Where a label has not enough others, all of these are left out.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    keeps = np.ones((number, len(labels)), bool)
    free = np.setdiff1d(np.arange(len(labels)), named)
    for label, count in zip(*np.unique(labels[named], return_counts=True), strict=True):
        others = free[labels[free] == label]
        for keep in keeps:
            keep[rng.permutation(others)[:count]] = False
    return keeps


def _ranks(scores):
    """Returns the rank of each score, 0 for the largest."""
    ranks = np.empty(len(scores), int)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return ranks


def _checked_image(image, data):
    image = np.asarray(image)
    if image.shape != data.images.shape[1:]:
        raise ValueError(
            f"image has shape {image.shape}; expected {data.images.shape[1:]}, that of the images "
            "trained on"
        )
    check(as_dataset(Dataset(image[None], np.zeros(1, np.int32)), "image"), name="image")
    return jnp.asarray(to_unit(image))


def _check_wanted(wanted, prediction, names):
    if wanted is None:
        return
    if not 0 <= wanted < len(names):
        raise ValueError(f"wanted is {wanted}; expected a label from 0 to {len(names) - 1}")
    if wanted == prediction:
        raise ValueError(
            f"the network predicts the wanted label, {names[wanted]!a}, already: leave it out to "
            "see what is behind a right prediction"
        )


def _names(given, number, name, of):
    texts = tuple(map(str, range(number) if given is None else given))
    if len(texts) != number:
        raise ValueError(f"{name} has {len(texts)} entries; expected one for each of {number} {of}")
    return texts
