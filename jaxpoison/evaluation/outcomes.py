"""Whether a targeted poison works: the prediction for the target by a victim trained on the set.

The attack succeeds if the target is classified as the base class; any other error is a failed
attack. The victim is a new head on a frozen extractor, as in the filter's paper (arXiv 2403.13523)
and with the polytope attacks (`transfer_outcome`), or a whole network trained from new initial
weights, as in HINT's (arXiv 2309.08549) (`scratch_outcome`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import network
from jaxpoison.attacks.archive import PoisonedDataset, Target
from jaxpoison.attacks.base import Victim, check_victim
from jaxpoison.data import Dataset, as_dataset, check
from jaxpoison.data.labels import check_range
from jaxpoison.evaluation.statistics import wilson
from jaxpoison.training import Recipe, fit, heads
from jaxpoison.training.heads import HEAD, HeadRecipe
from jaxpoison.training.hooks import Defense


class Outcome(NamedTuple):
    """Results of T trials, each with a head of its own.

    Attributes:
      prediction: int32 [T], the class predicted for the target (its first view).
      success: bool [T], whether that is the base class.
      accuracy: float32 [T], on the test set.
      head: the heads, `{"kernel": [T, d, K], "bias": [T, K]}`.
    """

    prediction: np.ndarray
    success: np.ndarray
    accuracy: np.ndarray
    head: dict[str, np.ndarray]


class ScratchOutcome(NamedTuple):
    """Results of T trials, each with a network of its own.

    Attributes:
      prediction: int32 [T], the class predicted for the target (its first view).
      success: bool [T], whether that is the base class.
      probabilities: float32 [T, K], of each class for the target.
      accuracy: float32 [T], on the test set.
    """

    prediction: np.ndarray
    success: np.ndarray
    probabilities: np.ndarray
    accuracy: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson interval of the rate of success, at 95%."""
        return wilson(int(self.success.sum()), len(self.success))


def scratch_outcome(
    key: jax.Array,
    model: Any,
    recipe: Recipe,
    poisoned: Sequence[PoisonedDataset],
    test: Any,
    *,
    defense: Defense | None = None,
    report: Callable[[int, int, dict], None] | None = None,
) -> ScratchOutcome:
    """Returns the predictions for the targets by networks trained on the poisoned sets.

    One after another, by `training.fit`, each from new weights. The key must differ from those
    that surrogates were trained with.

    Args:
      key: PRNG key; a victim's own follows from it and the id of the target, so that two defenses
        are compared with the same initial weights and the same order of the examples.
      model: the victims' network: a `Network`, or what `network.as_network` takes.
      recipe: how they are trained.
      poisoned: T sets, each with its target.
      test: clean test images, as `data.as_dataset` takes them.
      defense: what the victims do against poisons; default nothing. Its state starts again with
        each victim.
      report: called after each epoch as `report(trial, epoch, metrics)`.

    Raises:
      TypeError: for arguments of another kind.
      ValueError: for no sets, a set without a target, bad images or labels, or a batch size that
        does not fit. DivergedError: if a training loss is not finite.
    """
    test = as_dataset(test, "test set")
    check(test, name="test set")
    net = network.as_network(model, image_shape=test.images.shape[1:])
    targets = _checked(poisoned, test, net.num_classes)
    answers = []
    for trial, (one, target) in enumerate(zip(poisoned, targets, strict=True)):
        state = fit(
            net,
            recipe,
            one.dataset,
            key=jax.random.fold_in(key, target.target_id),
            defense=defense,
            report=None if report is None else functools.partial(report, trial),
        )
        logits = network.logits(net, state.variables, target.images[:1])
        accuracy = network.accuracy(net, state.variables, test.images, test.labels)
        answers.append((np.asarray(jax.nn.softmax(logits[0]), np.float32), accuracy))
    probabilities, accuracy = map(np.array, zip(*answers, strict=True))
    prediction = probabilities.argmax(axis=1)
    return ScratchOutcome(
        prediction.astype(np.int32),
        prediction == np.array([target.base_label for target in targets]),
        probabilities,
        accuracy.astype(np.float32),
    )


def transfer_outcome(
    key: jax.Array,
    victim: Victim,
    poisoned: Sequence[PoisonedDataset],
    test: Any,
    *,
    recipe: HeadRecipe = HEAD,
    keep: np.ndarray | None = None,
) -> Outcome:
    """Returns the predictions for the targets by heads trained on the poisoned sets.

    Images that several sets share, such as the clean ones, pass through the extractor once. To
    compare filters, pass every set once per filter, with a matching `keep`, in a single call.

    Args:
      key: PRNG key; a head's own follows from it and the id of the target, so that sets with the
        same target are compared with the same initial head.
      victim: the network; its head is not used.
      poisoned: T sets of N images, each with its target.
      test: clean test images, as `data.as_dataset` takes them.
      recipe: how heads are trained.
      keep: bool [T, N], the examples that a filter leaves in each set; default all.

    Raises:
      TypeError: for arguments of another kind.
      ValueError: for no sets, sets of different sizes, a set without a target, bad images or
        labels, a `keep` of another shape, or heads that are not finite.
    """
    check_victim(victim)
    test = as_dataset(test, "test set")
    check(test, name="test set")
    net = network.as_network(victim[0], image_shape=test.images.shape[1:])
    num_classes = net.num_classes
    targets = _checked(poisoned, test, num_classes)
    keep = _checked_keep(keep, poisoned)
    images, places = _distinct([one.images for one in poisoned])
    train_features, test_features, target_features = (
        network.features(net, victim[1], part)
        for part in (images, test.images, np.stack([target.images[0] for target in targets]))
    )

    head, prediction, accuracy = _judge(
        key,
        (train_features, test_features, jnp.asarray(test.labels)),
        (
            jnp.array([target.target_id for target in targets], jnp.int32),
            jnp.asarray(places),
            jnp.asarray(np.stack([one.labels for one in poisoned])),
            jnp.asarray(keep),
            target_features,
        ),
        num_classes=num_classes,
        recipe=recipe,
    )
    head = jax.tree.map(np.asarray, head)
    finite = np.isfinite(head["kernel"]).all(axis=(1, 2)) & np.isfinite(head["bias"]).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"the heads of {np.sum(~finite)} of {len(finite)} sets are not finite, the first is "
            f"that of set {int(np.argmin(finite))}: look at the features, or lower the recipe's "
            "learning rate"
        )
    prediction = np.asarray(prediction, np.int32)
    success = prediction == np.array([target.base_label for target in targets])
    return Outcome(prediction, success, np.asarray(accuracy, np.float32), head)


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


def _checked(
    poisoned: Sequence[PoisonedDataset], test: Dataset, num_classes: int | None
) -> list[Target]:
    """Returns the targets of the sets; raises an error where a set cannot be judged."""
    if isinstance(poisoned, PoisonedDataset):
        raise TypeError("poisoned is a single set; give a list of them")
    if not poisoned:
        raise ValueError("there is no poisoned set to judge")
    check_range(np.asarray(test.labels), num_classes, "test set")
    targets = []
    for trial, one in enumerate(poisoned):
        if not isinstance(one, PoisonedDataset):
            raise TypeError(
                f"poisoned[{trial}] is a {type(one).__name__}; expected an attacks.PoisonedDataset"
            )
        if one.target is None:
            raise ValueError(f"poisoned set {trial} has no target: it is not of a targeted attack")
        check(one.dataset, num_classes, f"poisoned set {trial}")
        views = Dataset(one.target.images, np.zeros(len(one.target.images), np.int32))
        check(views, name=f"target of poisoned set {trial}")
        check_range(np.asarray(one.target[1:3]), num_classes, f"target of poisoned set {trial}")
        targets.append(one.target)
    return targets


def _checked_keep(keep, poisoned):
    """Returns bool [T, N]; raises a ValueError unless the sets and `keep` are alike."""
    first = poisoned[0].images
    for trial, one in enumerate(poisoned):
        if one.images.shape != first.shape or one.images.dtype != first.dtype:
            raise ValueError(
                f"poisoned set {trial} has {one.images.dtype} images {one.images.shape}, set 0 has "
                f"{first.dtype} {first.shape}: judge different kinds of sets one by one"
            )
    shape = (len(poisoned), len(first))
    keep = np.ones(shape, bool) if keep is None else np.asarray(keep)
    if keep.shape != shape or keep.dtype != bool:
        raise ValueError(f"keep is {keep.dtype} {keep.shape}; expected bool {shape}")
    return keep


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
