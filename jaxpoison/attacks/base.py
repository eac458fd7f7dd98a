"""The shape of an attack: a value with a name, a budget and a function that crafts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jaxpoison.models import Classifier

Progress = Callable[[str, int, int], None]


class Victim(NamedTuple):
    """The network that an attack is crafted against.

    Attributes:
      model: the network.
      variables: its trained `params` and `batch_stats`.
    """

    model: Classifier
    variables: Any


class CraftFn(Protocol):
    """Returns poisoned images, float32 like `images`, from clean ones.

    Args:
      key: PRNG key.
      victim: the network to craft against.
      images: float32 [N, H, W, C] in [0, 1].
      labels: int32 [N].
      progress: called as `progress(done, total)` with numbers of images, or None.
    """

    def __call__(
        self, key: jax.Array, victim: Victim, images: jax.Array, labels: jax.Array, progress=None
    ) -> jax.Array: ...


class Attack(NamedTuple):
    """An attack.

    Attributes:
      name: short name, for archives and tables.
      epsilon: largest absolute change of a pixel, in units of [0, 1].
      craft: see `CraftFn`.
      settings: numbers that define the attack, for archives.
    """

    name: str
    epsilon: float
    craft: CraftFn
    settings: dict[str, float]


def check_epsilon(epsilon):
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is in units of pixels in [0, 1], not {epsilon}")


class Crafted(NamedTuple):
    """Poisons, and evidence that crafting them got somewhere.

    Attributes:
      images: float32 [T, P, H, W, C] in [0, 1], within the budget of the base images.
      objective: float32 [S, T], what was minimised, before each of S steps.
    """

    images: jax.Array
    objective: jax.Array


class TargetedCraftFn(Protocol):
    """Returns the poisons of T trials.

    Args:
      keys: typed PRNG keys [T]; a trial's poisons depend on its own key alone.
      substitutes: networks that the attacker holds; the victim's own among them is a white box.
      bases: float32 [T, P, H, W, C] in [0, 1].
      base_labels: int32 [T], labels of the bases and goal of the attack.
      targets: float32 [T, V, H, W, C] in [0, 1].
      progress: called as `progress(done, total)` with numbers of poisons, or None.
    """

    def __call__(
        self,
        keys: jax.Array,
        substitutes: Sequence[Victim],
        bases: jax.Array,
        base_labels: jax.Array,
        targets: jax.Array,
        progress=None,
    ) -> Crafted: ...


class TargetedAttack(NamedTuple):
    """An `Attack` with a target.

    Attributes:
      name: short name, for archives and tables.
      epsilon: largest absolute change of a pixel, in units of [0, 1].
      craft: see `TargetedCraftFn`.
      settings: what defines the attack, JSON-able, for archives.
    """

    name: str
    epsilon: float
    craft: TargetedCraftFn
    settings: dict[str, Any]
