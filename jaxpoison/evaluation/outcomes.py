"""Whether a targeted poison works: a victim trained on the poisoned set, asked for the target.

The attack succeeds if the target is classified as the base class; any other error is a failed
attack. The victim is a new head on a frozen extractor, as in the filter's paper (arXiv 2403.13523)
and with the polytope attacks (`transfer_outcome`), or a whole network trained from new initial
weights, as in HINT's (arXiv 2309.08549) (`scratch_outcome`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import network
from jaxpoison.attacks.archive import PoisonedDataset, Target
from jaxpoison.attacks.base import Victim
from jaxpoison.core import devices
from jaxpoison.data import Dataset, check, to_float
from jaxpoison.evaluation.statistics import wilson
from jaxpoison.models import Classifier
from jaxpoison.training import Recipe, fit, heads
from jaxpoison.training.heads import HEAD, HeadRecipe
from jaxpoison.training.hooks import Defense, none


class Outcome(NamedTuple):
    """What became of T trials, each with a head of its own.

    Attributes:
      prediction: int32 [T], the class that the target is given (its first view).
      success: bool [T], whether that is the base class.
      accuracy: float32 [T], on the test set.
      head: the heads, `{"kernel": [T, d, K], "bias": [T, K]}`.
    """

    prediction: np.ndarray
    success: np.ndarray
    accuracy: np.ndarray
    head: dict[str, np.ndarray]


class ScratchOutcome(NamedTuple):
    """What became of T trials, each with a network of its own.

    Attributes:
      prediction: int32 [T], the class that the target is given (its first view).
      success: bool [T], whether that is the base class.
      probabilities: float32 [T, K], what the network gives to each class.
      accuracy: float32 [T], on the test set.
    """

    prediction: np.ndarray
    success: np.ndarray
    probabilities: np.ndarray
    accuracy: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson interval of the rate of success, at 95 %."""
        return wilson(int(self.success.sum()), len(self.success))


def scratch_outcome(
    key: jax.Array,
    model: Classifier,
    recipe: Recipe,
    poisoned: Sequence[PoisonedDataset],
    test: Dataset,
    *,
    defense: Defense | None = None,
    report: Callable[[int, int, dict], None] | None = None,
) -> ScratchOutcome:
    """Returns what networks trained on the poisoned sets, each from new weights, say of the target.

    One after another, by `training.fit`. The key must be none that a surrogate was trained with.

    Args:
      key: PRNG key; a victim's own follows from it and the id of the target, so that two defences
        are compared with the same initial weights and the same order of the examples.
      model: the victims' network.
      recipe: how they are trained.
      poisoned: T sets, each with its target.
      test: clean test images.
      defense: what the victims do against poisons; default nothing. Its state begins anew with
        each victim.
      report: called after each epoch as `report(trial, epoch, metrics)`.

    Raises:
      ValueError: for no sets, a set without a target, bad images or labels, or a batch size that
        does not fit. DivergedError: if a training loss is not finite.
    """
    targets = _checked(poisoned, test, model.num_classes)
    defense = none() if defense is None else defense
    mesh = devices.data_mesh()
    answers = []
    for trial, (one, target) in enumerate(zip(poisoned, targets, strict=True)):
        state = fit(
            model,
            recipe,
            one.dataset,
            key=jax.random.fold_in(key, target.target_id),
            defense=defense,
            report=None if report is None else functools.partial(report, trial),
        )
        logits = model.apply(state.variables, to_float(target.images[:1]))
        probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits)[0]), np.float32)
        accuracy = network.accuracy(model, state.variables, test.images, test.labels)
        answers.append((probabilities, accuracy))
    probabilities, accuracy = map(np.array, zip(*answers, strict=True))
    prediction = probabilities.argmax(axis=1)
    success = prediction == np.array([target.base_label for target in targets])
    return ScratchOutcome(
        prediction.astype(np.int32),
        success,
        probabilities,
        accuracy.astype(np.float32),
    )


def transfer_outcome(
    key: jax.Array,
    victim: Victim,
    poisoned: Sequence[PoisonedDataset],
    test: Dataset,
    *,
    recipe: HeadRecipe = HEAD,
    keep: np.ndarray | None = None,
) -> Outcome:
    """Returns what a victim's head, trained on each poisoned set, says of its target.

    Images that several sets share, as they share the clean ones, pass the extractor once. So to
    compare filters, give every set once for each filter, and `keep` to match, in a single call.

    Args:
      key: PRNG key; a head's own follows from it and the id of the target, so that sets with the
        same target are compared with the same initial head.
      victim: the network; its head is not used.
      poisoned: T sets of N images, each with its target.
      test: clean test images.
      recipe: how heads are trained.
      keep: bool [T, N], the examples that a filter leaves in each set; default all.

    Raises:
      ValueError: for no sets, sets of different sizes, a set without a target, bad images or
        labels, or a `keep` of another shape.
    """
    num_classes = victim.model.num_classes
    targets = _checked(poisoned, test, num_classes)
    shape = poisoned[0].images.shape
    for trial, one in enumerate(poisoned):
        if one.images.shape != shape or one.images.dtype != poisoned[0].images.dtype:
            raise ValueError(
                f"poisoned set {trial} has {one.images.dtype} images {one.images.shape}, set 0 has "
                f"{poisoned[0].images.dtype} {shape}: judge different kinds of sets one by one"
            )
    keep = np.ones((len(poisoned), shape[0]), bool) if keep is None else np.asarray(keep)
    if keep.shape != (len(poisoned), shape[0]) or keep.dtype != bool:
        raise ValueError(
            f"keep is {keep.dtype} {keep.shape}; expected bool {(len(poisoned), shape[0])}"
        )

    images, places = _distinct([one.images for one in poisoned])
    train_features, test_features, target_features = (
        network.features(victim.model, victim.variables, part)
        for part in (images, test.images, np.stack([target.images[0] for target in targets]))
    )

    head, prediction, accuracy = _judge(
        key,
        (train_features, test_features, jnp.asarray(test.labels)),
        (
            jnp.array([target.target_id for target in targets]),
            jnp.asarray(places),
            jnp.asarray(np.stack([one.labels for one in poisoned])),
            jnp.asarray(keep),
            target_features,
        ),
        num_classes=num_classes,
        recipe=recipe,
    )
    prediction = np.asarray(prediction, np.int32)
    success = prediction == np.array([target.base_label for target in targets])
    return Outcome(prediction, success, np.asarray(accuracy), jax.tree.map(np.asarray, head))


@functools.partial(jax.jit, static_argnames=("num_classes", "recipe"))
def _judge(key, shared, trials, *, num_classes, recipe):
    """Returns heads, predictions of the targets and accuracies, for all trials."""
    train_features, test_features, test_labels = shared

    def judge(target_id, places, labels, keep, target):
        head = heads.fit_head(
            jax.random.fold_in(key, target_id),
            train_features[places],
            labels,
            num_classes=num_classes,
            recipe=recipe,
            keep=keep,
        )
        answers = jnp.argmax(test_features @ head["kernel"] + head["bias"], axis=-1)
        prediction = jnp.argmax(target @ head["kernel"] + head["bias"])
        return head, prediction, jnp.mean(answers == test_labels)

    return jax.vmap(judge)(*trials)


def _checked(poisoned: Sequence[PoisonedDataset], test: Dataset, num_classes: int) -> list[Target]:
    """Returns the targets of the sets; raises a ValueError where a set cannot be judged."""
    if not poisoned:
        raise ValueError("there is no poisoned set to judge")
    check(test, num_classes, "test set")
    targets = []
    for trial, one in enumerate(poisoned):
        if one.target is None:
            raise ValueError(f"poisoned set {trial} has no target: it is not of a targeted attack")
        check(one.dataset, num_classes, f"poisoned set {trial}")
        targets.append(one.target)
    return targets


def _distinct(sets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct images of all sets [M, H, W, C], and where each set's are [T, N]."""
    place: dict[bytes, int] = {}
    distinct, places = [], np.empty((len(sets), len(sets[0])), np.int32)
    for number, images in enumerate(sets):
        for row, image in enumerate(images):
            content = image.tobytes()
            if content not in place:
                place[content] = len(distinct)
                distinct.append(image)
            places[number, row] = place[content]
    return np.stack(distinct), places
