"""Networks of plain functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.network.base import (
    Network,
    as_float32,
    check_logits,
    check_outside_jit,
    kept_variables,
)


def from_functions(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    *,
    features: Callable[[Any, jax.Array], jax.Array] | None = None,
    head: Callable[[Any], Mapping[str, jax.Array]] | None = None,
    with_head: Callable[[Any, Mapping[str, jax.Array]], Any] | None = None,
    train_apply: Callable[[Any, jax.Array, Mapping[str, jax.Array] | None], jax.Array]
    | None = None,
    init: Callable[[jax.Array], Any] | None = None,
    num_classes: int | None = None,
    num_features: int | None = None,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
) -> Network:
    """Returns the network of pure functions; its variables are `{"params": params}`.

    Networks are equal where their functions are the same objects: define them once, at the top of
    a module, and nothing is compiled twice.

    Args:
      apply: `apply(params, images) -> logits` [B, K], in evaluation mode.
      params: a pytree of arrays, kept as `variables`.
      features: `features(params, images)` [B, d], the input of the last linear layer. HINT and
        transfer learning need it, `head` and `with_head`.
      head: `head(params) -> {"kernel": [d, K], "bias": [K]}`, without `bias` if it has none.
      with_head: `with_head(params, head) -> params`.
      train_apply: `train_apply(params, images, rngs) -> logits` in training mode, `rngs` None or
        `{"dropout": key}`; default: `apply`. Models with BatchNorm need `from_linen` or `from_nnx`.
      init: `init(key) -> params`, new ones. Without it training starts from `params`.
      num_classes: K; default: found by `for_images`.
      num_features: d; default: found by `for_images`.
      mean: per-channel mean, subtracted from the images before the functions see them.
      std: per-channel standard deviation that they are then divided by.
    """
    functions = {
        "apply": apply, "features": features, "head": head, "with_head": with_head,
        "train_apply": train_apply, "init": init,
    }  # fmt: skip
    for name, function in functions.items():
        if not (callable(function) or (function is None and name != "apply")):
            raise TypeError(f"{name} must be a function, not a {type(function).__name__}")
    return FunctionNetwork(
        num_classes=num_classes,
        num_features=num_features,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        apply=apply,
        features_of=features,
        head_of=head,
        put_head=with_head,
        train_apply=train_apply,
        make=init,
        variables={"params": params, "batch_stats": {}},
    )


@dataclasses.dataclass(frozen=True)
class FunctionNetwork(Network):
    """The network of plain functions; see `from_functions` for the attributes."""

    apply: Callable[..., Any] = jnp.asarray
    features_of: Callable[..., Any] | None = None
    head_of: Callable[..., Any] | None = None
    put_head: Callable[..., Any] | None = None
    train_apply: Callable[..., Any] | None = None
    make: Callable[..., Any] | None = dataclasses.field(default=None, compare=False)

    def init(self, key, image_shape):
        if self.make is None:
            return kept_variables(self, key, "give from_functions an init=, init(key) -> params")
        check_outside_jit(key)
        return {"params": self.make(key), "batch_stats": {}}

    def logits(self, variables, images, *, rngs=None):
        return check_logits("apply", self.apply(variables["params"], self._normalized(images)))

    def features(self, variables, images, *, rngs=None):
        features_of = _needed(self.features_of, "features=")
        return as_float32(features_of(variables["params"], self._normalized(images)))

    def head(self, variables):
        return dict(_needed(self.head_of, "head=")(variables["params"]))

    def with_head(self, variables, head):
        put_head = _needed(self.put_head, "with_head=")
        return {**variables, "params": put_head(variables["params"], head)}

    def train_logits(self, variables, images, *, rngs=None):
        if self.train_apply is None:
            logits = self.logits(variables, images)
        else:
            output = self.train_apply(variables["params"], self._normalized(images), rngs)
            logits = check_logits("train_apply", output)
        return logits, {name: variables[name] for name in variables if name != "params"}

    def for_images(self, image_shape):
        if self.variables is None:  # a network in a cache; it was made from one that looked
            return self
        images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
        classes = jax.eval_shape(self.logits, self.variables, images).shape[1]
        if self.num_classes not in (None, classes):
            raise ValueError(
                f"apply returns {classes} logits for an image, not num_classes = {self.num_classes}"
            )
        width = self.num_features
        if self.features_of is not None:
            width = jax.eval_shape(self.features, self.variables, images).shape[1]
        return dataclasses.replace(self, num_classes=classes, num_features=width)


def _needed(function, argument):
    if function is None:
        raise ValueError(
            f"the network was made without {argument}: give it to from_functions; HINT, transfer "
            "learning and attacks on features need features=, head= and with_head="
        )
    return function
