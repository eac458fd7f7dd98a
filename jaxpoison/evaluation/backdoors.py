"""Whether a backdoor works: what a trained network says of images with the trigger."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpoison import network
from jaxpoison.attacks.triggers import Trigger
from jaxpoison.data import Dataset, as_dataset, check
from jaxpoison.data.labels import check_range
from jaxpoison.evaluation.statistics import wilson


class BackdoorOutcome(NamedTuple):
    """Predictions of one network for a test set of T images, M of them of the source classes.

    Attributes:
      triggered: int32 [M], of images with the trigger whose true class is a source class.
      success: bool [M], whether that is the target class.
      correct: bool [T], whether the image without the trigger is classified right.
    """

    triggered: np.ndarray
    success: np.ndarray
    correct: np.ndarray

    @property
    def success_rate(self) -> float:
        """Share of images with the trigger that are taken for the target class, in [0, 1]."""
        return float(self.success.mean())

    @property
    def success_interval(self) -> tuple[float, float]:
        """The Wilson interval of the rate of success, at 95%."""
        return wilson(int(self.success.sum()), len(self.success))

    @property
    def accuracy(self) -> float:
        """Share of clean images that are classified right, in [0, 1]."""
        return float(self.correct.mean())

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """The Wilson interval of the accuracy, at 95%."""
        return wilson(int(self.correct.sum()), len(self.correct))


def backdoor_outcome(
    model: Any,
    variables: Any,
    test: Dataset,
    trigger: Trigger,
    *,
    source_class: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> BackdoorOutcome:
    """Returns what a network says of a clean test set, without and with a trigger.

    Images of the target class are left out of the rate of success: any good network gets those
    right. A network without the backdoor has a rate above 0 too, namely its errors; compare.

    Args:
      model: a `Network`, or what `network.as_network` takes.
      variables: its trained variables.
      test: clean test images, as `data.as_dataset` takes them.
      trigger: such as `PoisonedDataset.trigger`.
      source_class: the class whose images get the trigger; default all but the target class.
      mesh: devices to use; default all.

    Raises:
      TypeError, ValueError: for bad images or labels, a trigger that does not fit them, a source
        class that is the target class, or a test set without images of a source class.
    """
    test = as_dataset(test, "test set")
    net = network.as_network(model, image_shape=test.images.shape[1:])
    check(test, net.num_classes, "test set")
    check_range(np.array([trigger.target_class]), net.num_classes, "target class of the trigger")
    others = np.asarray(test.labels) != trigger.target_class
    if source_class is not None:
        if source_class == trigger.target_class:
            raise ValueError(f"source_class is {source_class}, which is the trigger's target class")
        others = np.asarray(test.labels) == source_class
        if not others.any():
            raise ValueError(f"source_class: class {source_class} does not occur in the test set")
    if not others.any():
        raise ValueError(
            f"test set: all images are of the target class {trigger.target_class}; a backdoor is "
            "judged by images of other classes"
        )
    changed = trigger.apply(test.images[others])
    said = np.asarray(network.predict(net, variables, test.images, mesh=mesh))
    triggered = np.asarray(network.predict(net, variables, changed, mesh=mesh))
    return BackdoorOutcome(
        triggered, triggered == trigger.target_class, said == np.asarray(test.labels)
    )
