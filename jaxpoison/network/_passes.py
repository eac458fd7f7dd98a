"""Passes over a set, and the one cache of compiled functions.

A function made at a call is compiled at each call. So what is compiled is made by a module-level
function of hashable arguments, through `shared`: equal arguments give the same object.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxpoison.core import devices, layers, loops
from jaxpoison.data import to_float
from jaxpoison.network._make import as_network
from jaxpoison.network.base import Network

Made = TypeVar("Made")
CACHE_SIZE = 128  # a program and its compiled forms each


def shared(make: Callable[..., Made], *static: Any) -> Made:
    """Returns `make(*static)`, the same object each time the arguments are equal.

    This is the cache for everything that holds a compiled function: loops over steps
    (`loops.scan`), passes over a set, tuples of them. Networks among the arguments are kept
    without their variables, so the cache holds no weights alive. Where an argument cannot be
    hashed, `make` is called each time.

    Args:
      make: a module-level function of settings, which returns what is to be shared.
      *static: its arguments, hashable: networks, frozen settings, meshes, numbers.

    Raises:
      ValueError: if `make` is defined inside another function, where each call makes another one.
    """
    _check_module_level(make)
    static = tuple(s.without_variables() if isinstance(s, Network) else s for s in static)
    try:
        hash(static)
    except TypeError:
        return make(*static)
    return _shared(make, static)


@functools.lru_cache(maxsize=CACHE_SIZE)
def _shared(make, static):
    return make(*static)


def over_set(
    fn: Callable[..., Any],
    *static: Any,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[Any, Any], Any]:
    """Returns `run(constants, xs) -> ys`: `fn` on all examples, a batch at a time, compiled once.

    Args:
      fn: a module-level function `fn(*static, constants, batch) -> outputs`, see
        `loops.map_batches`.
      *static: its first arguments, hashable, e.g. a network and frozen settings.
      batch_size: most examples in a batch; None: as in `loops.even_batches`.
      mesh: devices to use; default all.
    """
    _check_module_level(fn)
    mesh = devices.data_mesh() if mesh is None else mesh
    return shared(_mapped, fn, batch_size, mesh, *static)


def folded_over_set(
    fn: Callable[..., Any],
    *static: Any,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Returns `run(constants, carry, xs) -> (carry, ys)`: `over_set` with a carry between batches.

    `fn` is `fn(*static, constants, carry, batch, present)`, see `loops.fold_batches`.
    """
    _check_module_level(fn)
    mesh = devices.data_mesh() if mesh is None else mesh
    return shared(_folded, fn, batch_size, mesh, *static)


def features(
    model: Any,
    variables: Any,
    images: Any,
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Returns the inputs of the last linear layer, float32 [N, d], in evaluation mode.

    Args:
      model: a `Network`, or what `as_network` takes.
      variables: its variables.
      images: [N, H, W, C], uint8 in 0..255 or float32 in [0, 1].
      batch_size: most images in one pass; None: as in `loops.even_batches`.
      mesh: devices to use; default all.

    Raises:
      ValueError: if the network has no last linear layer.
    """
    return _pass(_features, model, variables, images, batch_size, mesh)


def logits(
    model: Any,
    variables: Any,
    images: Any,
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Returns the logits, float32 [N, K], in evaluation mode; arguments as of `features`."""
    return _pass(_logits, model, variables, images, batch_size, mesh)


def predict(
    model: Any,
    variables: Any,
    images: Any,
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Returns the predicted labels, int32 [N], in evaluation mode; arguments as of `features`."""
    return _pass(_predicted, model, variables, images, batch_size, mesh)


def accuracy(
    model: Any,
    variables: Any,
    images: Any,
    labels: Any,
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> float:
    """Returns the share of the images that are predicted as labeled, in [0, 1].

    Args:
      model: a `Network`, or what `as_network` takes.
      variables: its variables.
      images: [N, H, W, C], as for `features`.
      labels: int [N].
      batch_size: as for `features`.
      mesh: as for `features`.
    """
    predicted = predict(model, variables, images, batch_size=batch_size, mesh=mesh)
    return float(jnp.mean(predicted == labels))


def tapped_logits(model: Any, variables: Any) -> jax.tree_util.Partial:
    """Returns `apply(params, inputs, tap=no_tap) -> logits`, a function of `params` alone.

    It is the network in evaluation mode, which hands each dense layer and convolution to `tap` on
    the way (`nn.Dense`, `DenseGeneral`, `Conv`; `nnx.Linear`, `LinearGeneral`, `Conv`), for
    `curvature.ekfac` and `curvature.kfac`; without a tap it is what `curvature.gauss_newton` takes.
    It is a pytree that holds the other collections, such as BatchNorm's averages; those of equal
    networks are compiled once.

    Args:
      model: a `Network`, or what `as_network` takes; of Linen or NNX modules.
      variables: its variables.

    Returns:
      A function of `params`, shaped like `variables["params"]`, and inputs: images, float
      [B, H, W, C] in [0, 1], or whatever the model takes, such as tokens [B, T]. Logits are
      [B, ..., K].
    """
    network = as_network(model).without_variables()
    rest = {name: variables[name] for name in variables if name != "params"}
    return jax.tree_util.Partial(_TappedLogits(network), rest)


@dataclasses.dataclass(frozen=True)
class _TappedLogits:
    network: Network

    def __call__(self, rest, params, images, tap=layers.no_tap):
        return self.network.tapped_logits({**rest, "params": params}, images, tap)


def _pass(fn, model, variables, images, batch_size, mesh):
    mesh = devices.data_mesh() if mesh is None else mesh
    images = jnp.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"images have shape {images.shape}; expected [N, H, W, C]")
    network = as_network(model, image_shape=images.shape[1:])
    run = over_set(fn, network, batch_size=batch_size, mesh=mesh)
    return run(*devices.replicate((variables, images), mesh))


def _features(network, variables, images):
    return network.features(variables, to_float(images))


def _logits(network, variables, images):
    return network.logits(variables, to_float(images))


def _predicted(network, variables, images):
    return jnp.argmax(_logits(network, variables, images), axis=-1).astype(jnp.int32)


def _mapped(fn, batch_size, mesh, *static):
    return loops.map_batches(functools.partial(fn, *static), batch_size=batch_size, mesh=mesh)


def _folded(fn, batch_size, mesh, *static):
    return loops.fold_batches(functools.partial(fn, *static), batch_size=batch_size, mesh=mesh)


def _check_module_level(fn):
    name = getattr(fn, "__qualname__", "")
    if "<locals>" in name or "<lambda>" in name:
        raise ValueError(
            f"{name} is defined inside a function, so each call would compile again: define it at "
            "the top of a module and pass what it closes over as arguments"
        )
