"""The shape of an attack: a value with a name, a budget and a function that crafts."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.attacks.triggers import Trigger
from jaxpoison.core.settings import check_range, plain, settle
from jaxpoison.data import Dataset, as_dataset, check, to_float
from jaxpoison.data.labels import check_range as check_labels
from jaxpoison.network import Network, as_network

Progress = Callable[[str, int, int], None]


class Victim(NamedTuple):
    """The network that an attack is crafted against.

    Attributes:
      model: a `network.Network`, or what `network.as_network` takes: a `models.Classifier` or any
        other Flax Linen module, or a Flax NNX module.
      variables: its trained `params` and `batch_stats`.
    """

    model: Any
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
      epsilon: budget in units of [0, 1]: the largest absolute change of a pixel, or with
        norm="l2" among the settings the largest length of an image's change.
      craft: see `CraftFn`.
      settings: numbers that define the attack, JSON-able, for archives.
    """

    name: str
    epsilon: float
    craft: CraftFn
    settings: dict[str, Any]


class Crafted(NamedTuple):
    """Poisons, and the course of their objective.

    Attributes:
      images: float32 [T, P, H, W, C] in [0, 1], within the budget of the base images.
      objective: float32 [S, T], what was minimized, before each of S steps.
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


class TriggerFn(Protocol):
    """Returns the trigger for images of (H, W, C); what is random in it follows from the key."""

    def __call__(
        self, key: jax.Array, image_shape: tuple[int, int, int], target_class: int
    ) -> Trigger: ...


class BackdoorAttack(NamedTuple):
    """An attack whose goal is that a trigger is taken for a class.

    Attributes:
      name: short name, for archives and tables.
      make_trigger: see `TriggerFn`.
      settings: what defines the attack, JSON-able, for archives.
      clean_label: whether poisons are examples of the target class; others get its label.
      cover_ratio: covers for each poison: changed images that keep their labels.
      cover: `cover(key, trigger, images) -> images`, what is done to covers.
      prepare: `prepare(key, images, labels) -> images`, what is done to poisons before they get the
        trigger.
      craft: `craft(key, trigger, dataset, num_poisons) -> (rows, images)`: chooses the poisons, in
        ascending order, and changes them, where they do not show the trigger. The images of
        `dataset` are float32 in [0, 1].
    """

    name: str
    make_trigger: TriggerFn
    settings: dict[str, Any]
    clean_label: bool = False
    cover_ratio: float = 0.0
    cover: Callable[[jax.Array, Trigger, Any], jax.Array] | None = None
    prepare: Callable[[jax.Array, Any, Any], jax.Array] | None = None
    craft: Callable[[jax.Array, Trigger, Any, int], tuple[np.ndarray, jax.Array]] | None = None


class Trials(NamedTuple):
    """T trials of a targeted attack.

    Attributes:
      targets: uint8 or float32 [T, V, H, W, C]: V views of each target, usually one.
      target_labels: int32 [T], the true classes of the targets.
      target_ids: int32 [T], where the targets stand in the set they were drawn from.
      base_labels: int32 [T], the classes that the targets should be misclassified as.
      rows: int32 [T, P], the rows of the training set that become poisons, of class `base_labels`.
    """

    targets: np.ndarray
    target_labels: np.ndarray
    target_ids: np.ndarray
    base_labels: np.ndarray
    rows: np.ndarray


class Trial(NamedTuple):
    """One trial on the device, or many with a leading axis.

    Attributes:
      key: typed PRNG key.
      bases: float32 [P, H, W, C] in [0, 1].
      base_label: int32 [].
      targets: float32 [V, H, W, C] in [0, 1].
    """

    key: jax.Array
    bases: jax.Array
    base_label: jax.Array
    targets: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of an attack, which are a static argument of what it compiles.

    Attributes:
      epsilon: largest absolute change of a pixel, in units of [0, 1].
      batch_size: most images or poisons that move at once.
    """

    epsilon: float
    batch_size: int = 512

    def __post_init__(self):
        settle(self)
        check_epsilon(self.epsilon, self.most)
        check_range(self, "batch_size", 1, whole=True)

    @property
    def most(self) -> float:
        """The largest budget that makes sense."""
        return 1.0

    def for_archives(self) -> dict[str, Any]:
        """Returns what defines the attack, JSON-able: all but the budget and `batch_size`."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value._asdict() if hasattr(value, "_asdict") else value
            for name, value in settings.items()
            if name not in ("epsilon", "batch_size")
        }


def check_epsilon(epsilon: Any, most: float = 1.0) -> None:
    """Raises a ValueError unless the budget is a number in (0, most], and finite."""
    epsilon = plain(epsilon)
    is_number = isinstance(epsilon, int | float) and not isinstance(epsilon, bool)
    if not is_number or not 0 < epsilon <= most or math.isinf(epsilon):
        raise ValueError(f"epsilon is in units of pixels in [0, 1], not {epsilon!r}")


def check_above_zero(settings: Any, *names: str) -> None:
    """Raises, as `check_range`, unless these fields of a dataclass are numbers above 0."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{type(settings).__name__}: {name} must be above 0, got {value!r}")
        check_range(settings, name, 0)


def check_attack(attack: Any, kind: type, name: str = "attack") -> None:
    """Raises a TypeError unless `attack` is an attack of this kind."""
    if isinstance(attack, kind):
        return
    advice = f"expected an attacks.{kind.__name__}"
    if callable(attack):
        called = getattr(attack, "__name__", "it")
        needed = "" if kind is BackdoorAttack else "epsilon=8 / 255"
        advice = f"call it first, such as {called}({needed})"
    elif isinstance(attack, Attack):
        advice = "it has no target: make its training set with attacks.mixture"
    elif isinstance(attack, TargetedAttack):
        advice = "it has targets: make its training sets with attacks.poison"
    elif isinstance(attack, BackdoorAttack):
        advice = "it has a trigger: make its training set with attacks.implant"
    raise TypeError(f"{name} is a {type(attack).__name__}; {advice}")


def check_victim(victim: Any, name: str = "victim") -> None:
    """Raises a TypeError unless `victim` is a `Victim`, or a tuple of the same two parts."""
    if not isinstance(victim, tuple) or len(victim) != 2:
        raise TypeError(
            f"{name} is a {type(victim).__name__}; expected attacks.Victim(model, variables)"
        )


def check_key(key: Any) -> None:
    """Raises a TypeError unless `key` is a PRNG key."""
    is_raw = getattr(key, "shape", None) == (2,) and key.dtype == np.uint32
    if not is_raw and not jnp.issubdtype(getattr(key, "dtype", np.void), jax.dtypes.prng_key):
        raise TypeError(f"key is a {type(key).__name__}; expected a PRNG key, jax.random.key(seed)")


def typed_key(key: Any) -> jax.Array:
    """Returns a PRNG key as a typed one.

    Raises:
      TypeError: if it is no key.
    """
    check_key(key)
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def network_of(victim: Any, image_shape: Sequence[int], name: str = "victim") -> Network:
    """Returns the victim's network, without variables: a static argument of compiled functions.

    Args:
      victim: see `Victim`.
      image_shape: (H, W, C) of the images that it will see.
      name: what to call it in a message.
    """
    check_victim(victim, name)
    network = as_network(victim[0], image_shape=tuple(image_shape)).without_variables()
    if network.num_classes is None:
        raise ValueError(f"{name}: its number of classes is not known; give num_classes=...")
    return network


def check_substitutes(substitutes: Any) -> None:
    """Raises a TypeError unless this is a sequence of victims; a ValueError if it is empty."""
    if isinstance(substitutes, Victim) or not isinstance(substitutes, Sequence):
        raise TypeError(
            f"substitutes are a {type(substitutes).__name__}; expected a list of "
            "attacks.Victim(model, variables)"
        )
    if not substitutes:
        raise ValueError("crafting needs at least one substitute network")
    for number, one in enumerate(substitutes):
        check_victim(one, f"substitutes[{number}]")


def networks_of(substitutes: Any, image_shape: Sequence[int]) -> tuple[Network, ...]:
    """Returns the networks of substitutes, as `network_of` does.

    Raises:
      TypeError: if they are no sequence of victims. ValueError: if there is none.
    """
    check_substitutes(substitutes)
    return tuple(
        network_of(one, image_shape, f"substitutes[{number}]")
        for number, one in enumerate(substitutes)
    )


def checked_images(victim: Any, images: Any, labels: Any) -> tuple[Network, jax.Array, jax.Array]:
    """Returns (network, float32 images, int32 labels), for the door of a `CraftFn`.

    Raises:
      TypeError, ValueError: for a victim, images or labels that cannot be crafted on.
    """
    clean = as_dataset(Dataset(images, labels), "images to poison")
    check(clean, name="images to poison")
    network = network_of(victim, clean.images.shape[1:])
    check_labels(np.asarray(clean.labels), network.num_classes, "labels")
    return network, to_float(clean.images), jnp.asarray(clean.labels)


def checked_trials(
    keys: Any, substitutes: Any, bases: Any, base_labels: Any, targets: Any
) -> tuple[tuple[Network, ...], Trial]:
    """Returns (networks, trials with a leading axis), for the door of a `TargetedCraftFn`.

    Raises:
      TypeError, ValueError: for substitutes or arrays that do not fit each other.
    """
    trials = Trial(keys, jnp.asarray(bases), jnp.asarray(base_labels), jnp.asarray(targets))
    shape = trials.bases.shape
    for name, array in (("bases", trials.bases), ("targets", trials.targets)):
        fits = array.ndim == 5 and array.shape[:1] == shape[:1] and array.shape[2:] == shape[2:]
        if not fits or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} are {array.dtype} {array.shape}; expected float32 [T, P, H, W, C] in "
                "[0, 1] for bases, [T, V, H, W, C] for targets"
            )
    for name, array in (("keys", keys), ("base_labels", trials.base_label)):
        if jnp.shape(array) != shape[:1]:
            raise ValueError(f"{name} have shape {jnp.shape(array)}; expected ({shape[0]},)")
    networks = networks_of(substitutes, shape[2:])
    known = [network.num_classes for network in networks if network.num_classes is not None]
    check_labels(np.asarray(trials.base_label), min(known, default=None), "base_labels")
    return networks, trials
