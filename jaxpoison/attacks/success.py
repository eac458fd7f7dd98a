"""Whether a targeted poison works: a head trained on the poisoned features, asked for the target.

The victim of the filter's paper (arXiv 2403.13523) and of the polytope attacks: the extractor is
frozen, the head is trained from new initial values, and the attack succeeds if the target is
classified as the base class. Any other error is a failed attack.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.attacks.poisoned import PoisonedDataset
from jaxpoison.attacks.untargeted import Victim
from jaxpoison.data import Dataset, check
from jaxpoison.training import heads
from jaxpoison.training.heads import HEAD, HeadRecipe


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
    if not poisoned:
        raise ValueError("there is no poisoned set to judge")
    check(test, num_classes, "test set")
    shape = poisoned[0].images.shape
    for trial, one in enumerate(poisoned):
        if one.target is None:
            raise ValueError(f"poisoned set {trial} has no target: it is not of a targeted attack")
        if one.images.shape != shape or one.images.dtype != poisoned[0].images.dtype:
            raise ValueError(
                f"poisoned set {trial} has {one.images.dtype} images {one.images.shape}, set 0 has "
                f"{poisoned[0].images.dtype} {shape}: judge different kinds of sets one by one"
            )
        check(one.dataset, num_classes, f"poisoned set {trial}")
    keep = np.ones((len(poisoned), shape[0]), bool) if keep is None else np.asarray(keep)
    if keep.shape != (len(poisoned), shape[0]) or keep.dtype != bool:
        raise ValueError(
            f"keep is {keep.dtype} {keep.shape}; expected bool {(len(poisoned), shape[0])}"
        )

    images, places = _distinct([one.images for one in poisoned])
    targets = [one.target for one in poisoned if one.target is not None]
    train_features, test_features, target_features = (
        heads.features(victim.model, victim.variables, part)
        for part in (images, test.images, np.stack([target.images[0] for target in targets]))
    )

    @jax.jit
    @jax.vmap
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
        return head, prediction, jnp.mean(answers == test.labels)

    head, prediction, accuracy = judge(
        jnp.array([target.target_id for target in targets]),
        jnp.asarray(places),
        jnp.asarray(np.stack([one.labels for one in poisoned])),
        jnp.asarray(keep),
        target_features,
    )
    prediction = np.asarray(prediction, np.int32)
    success = prediction == np.array([target.base_label for target in targets])
    return Outcome(prediction, success, np.asarray(accuracy), jax.tree.map(np.asarray, head))


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
