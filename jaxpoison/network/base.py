"""What every network offers, whatever it was written in."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import core

from jaxpoison.core import layers

Variables = Mapping[str, Any]
Path = tuple[str, ...]
Tap = Callable[[str, Any, jax.Array, Mapping[str, Any]], None]
"""`record(name, layer, inputs, kwargs)`, called where a layer is called; see `Network.tapped`."""


@dataclasses.dataclass(frozen=True)
class Network(abc.ABC):
    """A model as pure functions of its variables.

    Networks of equal models are equal and hash alike, so a network is a static argument of
    `jax.jit` and a key of caches. Every method may be put under `jit`, `vmap`, `grad` and
    `shard_map`. Images are float [B, H, W, C] in [0, 1]; variables are nested dicts of arrays,
    `params` and `batch_stats`, and whatever other collections the model has.

    Attributes:
      num_classes: K, or None where it is not known; see `for_images`.
      num_features: d, the width of the last linear layer's input, or None where it is not known.
      mean: per-channel mean that the network subtracts from pixels, (0,) for none.
      std: per-channel standard deviation that it then divides them by, (1,) for none.
      variables: the variables that it was made from, or None. Not compared: networks that differ
        in them only are equal.
    """

    num_classes: int | None = None
    num_features: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    variables: Any = dataclasses.field(default=None, compare=False, repr=False, kw_only=True)

    @abc.abstractmethod
    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> dict[str, Any]:
        """Returns variables to start training from, `{"params": tree, "batch_stats": tree}`.

        They are new ones drawn from `key` where the network can make them. A network that was made
        from variables, without a function that makes new ones, returns those and ignores `key`;
        call it outside of `jit`, where networks that differ in their variables are equal.

        Args:
          key: typed PRNG key.
          image_shape: (H, W, C).

        Raises:
          ValueError: if the network can neither make variables nor was made from some.
        """

    @abc.abstractmethod
    def logits(
        self,
        variables: Variables,
        images: jax.Array,
        *,
        rngs: Mapping[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Returns the logits, float32 [B, K], in evaluation mode.

        `rngs`, e.g. `{"dropout": key}`, is for models whose dropout may be on in evaluation mode.
        """

    @abc.abstractmethod
    def features(
        self,
        variables: Variables,
        images: jax.Array,
        *,
        rngs: Mapping[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Returns the input of the last linear layer, float32 [B, d], in evaluation mode.

        `logits` is `features @ kernel + bias`, with the kernel and bias of `head`.

        Raises:
          ValueError: if the network has no last linear layer, or it is not known which one it is.
        """

    @abc.abstractmethod
    def head(self, variables: Variables) -> dict[str, jax.Array]:
        """Returns the last linear layer: `kernel` [d, K], and `bias` [K] where it has one."""

    @abc.abstractmethod
    def with_head(self, variables: Variables, head: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Returns `variables` with another last linear layer, in the same structure."""

    @abc.abstractmethod
    def train_logits(
        self,
        variables: Variables,
        images: jax.Array,
        *,
        rngs: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns (logits, updated collections) in training mode.

        BatchNorm uses the statistics of the batch. The collections are all but `params`:
        `{"params": params, **updated}` are the variables for the next step. Dropout is on where
        `rngs`, e.g. `{"dropout": key}`, is given, and off without.
        """

    @abc.abstractmethod
    def for_images(self, image_shape: tuple[int, ...]) -> "Network":
        """Returns this network with what a look at images of shape (H, W, C) tells.

        `num_classes`, `num_features` and which layer is the last one. Nothing is computed: the
        forward pass is only traced, once for each network and shape.
        """

    def taps(
        self,
        variables: Variables,
        x: Any,
        *,
        select: Callable[[Any], bool] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Returns (output, inputs of the selected layers by name), in one forward pass.

        Args:
          variables: of the network.
          x: input of the network, e.g. images.
          select: `select(layer)` is True for the layers whose inputs are wanted; default: the
            BatchNorm layers (`is_batch_norm`).
          **kwargs: further arguments of the model, in place of those of evaluation mode.

        Returns:
          The output, and a dict in the order of the first calls, with keys such as
          "body/stage0_block0/norm1". The second call of a shared layer is "name#2".

        Raises:
          ValueError: if the model has no layers, or a layer is called in a transformation (`scan`,
            `vmap`) that its input cannot leave.
        """
        raise ValueError(
            f"{type(self).__name__} has no layers to tap: only networks made of Linen or NNX "
            "modules have (from_linen, from_nnx)"
        )

    def tapped_logits(self, variables: Variables, images: jax.Array, tap: layers.Tap) -> jax.Array:
        """Returns the logits in evaluation mode, with `tap` called by each linear layer.

        Those are dense layers, those of attention among them, and convolutions (without groups, or
        a padding that depends on the values), by the paths of their weights in `params`; see
        `core.layers`. What `tap` returns takes the place of the layer's output. `tapped_logits`,
        the function, is how it is used.

        Args:
          variables: of the network.
          images: float [B, H, W, C] in [0, 1], or tokens [B, T] of a language model.
          tap: `tap(layer, inputs, output) -> output`.

        Returns:
          float32 [B, K], or [B, T, K].

        Raises:
          ValueError: if the network has no layers, or does not return one array of logits.
        """
        raise ValueError(
            f"{type(self).__name__} has no layers to tap: write the function so that it calls tap "
            "itself, apply(params, images, tap=curvature.no_tap)"
        )

    def without_variables(self) -> "Network":
        """Returns an equal network that keeps no arrays alive, for use as a key."""
        return self if self.variables is None else dataclasses.replace(self, variables=None)

    def _normalized(self, images, preprocess=None):
        if preprocess is not None:
            images = preprocess(images)
        if self.mean == (0.0,) and self.std == (1.0,):
            return images
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)


def is_batch_norm(layer: Any) -> bool:
    """Returns whether `layer` is Linen's or NNX's BatchNorm, or of a subclass."""
    return isinstance(layer, (nn.BatchNorm, nnx.BatchNorm))


def as_float32(array: Any) -> jax.Array:
    """Returns `array` in float32, or in its own type where that is wider."""
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def check_logits(name: str, output: Any) -> jax.Array:
    """Returns `output` in float32 if it is an array [B, K]."""
    return _checked(name, output, fits=lambda ndim: ndim == 2, expected="[B, K]")


def check_outputs(name: str, output: Any) -> jax.Array:
    """Returns `output` in float32 if it is an array [B, ..., K]."""
    return _checked(name, output, fits=lambda ndim: ndim >= 2, expected="[B, ..., K]")


def _checked(name, output, *, fits, expected):
    if not isinstance(output, jax.Array) or not fits(output.ndim):
        found = (
            f"shape {output.shape}" if hasattr(output, "shape") else f"a {type(output).__name__}"
        )
        raise ValueError(
            f"{name} returned {found} for a batch of images; expected logits, an array {expected}: "
            "wrap the model so that it returns its logits alone"
        )
    return as_float32(output)


def check_outside_jit(key: Any) -> None:
    """Raises for an `init` that differs between equal networks where it would be compiled in."""
    if isinstance(key, core.Tracer):
        raise ValueError(
            "init was called under jit, vmap or grad; call it outside: networks that differ only "
            "in what they start from are equal, so a compiled function would keep the first one's"
        )


def kept_variables(network: Network, key: Any, how: str) -> dict[str, Any]:
    """Returns `network.variables`, for `init` of a network that cannot make new ones."""
    check_outside_jit(key)
    if network.variables is None:
        raise ValueError(f"the network cannot make variables: {how}")
    return network.variables


def placed(tree: Mapping[str, Any], path: Path, value: Any) -> Any:
    """Returns `tree` with `value` at `path`; mappings keep their types."""
    if not path:
        return value
    new = {**tree, path[0]: placed(tree[path[0]], path[1:], value)}
    return new if type(tree) is dict else type(tree)(new)  # pyright: ignore


def found_at(tree: Any, path: Path) -> Any:
    """Returns what is at `path`, or None."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree
