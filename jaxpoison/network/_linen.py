"""Networks of Flax Linen: the package's own `Classifier`, and any other module."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import core, traverse_util
from flax.errors import ModifyScopeVariableError

from jaxpoison.core.programs import jit_once
from jaxpoison.network._layers import (
    MODES,
    Call,
    LayeredNetwork,
    by_name,
    conv_layer,
    dense_layer,
    general_layer,
    mode_arguments,
    named_head,
    settings_of_modes,
)
from jaxpoison.network.base import (
    Network,
    check_logits,
    check_outputs,
    found_at,
    is_batch_norm,
)

_SOWN = "_network_calls"
_trace_numbers = itertools.count()


def from_linen(
    module: nn.Module,
    *,
    head: str | None = None,
    variables: Any = None,
    num_classes: int | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
) -> Network:
    """Returns the network of a Linen module `module(images, ...) -> logits` [B, K].

    For the package's own classifiers (`models`), which have a `body`, a `head` and a method
    `features`, nothing else is needed.

    Args:
      module: an instance, not a class.
      head: path of the last linear layer, an `nn.Dense`, such as "classifier/fc". By default it is
        the `nn.Dense` whose output is the module's output.
      variables: variables of the module, e.g. trained ones, to keep as `network.variables`.
      num_classes: K; default: found by `for_images`.
      train_kwargs: arguments of `__call__` in training mode, such as `{"train": True}`. By default
        they are found in the signature: train, training, is_training, is_train, deterministic,
        use_running_average, inference.
      eval_kwargs: those in evaluation mode; give both or neither.
      mean: per-channel mean, subtracted from the images before the module sees them.
      std: per-channel standard deviation that they are then divided by.
      preprocess: pure function that the images go through before that.

    Raises:
      ValueError: if the module's mode cannot be told from its signature, or settings are arrays,
        which cannot be compared. TypeError: if `module` is no Linen module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an instance of flax.linen.Module, not {module!r}")
    if is_classifier(module):
        given = {
            "head": head, "num_classes": num_classes, "train_kwargs": train_kwargs,
            "eval_kwargs": eval_kwargs, "preprocess": preprocess,
        }  # fmt: skip
        needless = [name for name, value in given.items() if value is not None]
        if needless or mean != (0.0,) or std != (1.0,):
            raise ValueError(
                f"{type(module).__name__} has its own head, num_classes, mode, mean and std: "
                "leave the other arguments out"
            )
        classifier: Any = module
        return ClassifierNetwork(
            module=module,
            num_classes=classifier.num_classes,
            num_features=classifier.num_features,
            mean=tuple(classifier.mean),
            std=tuple(classifier.std),
            head_path=("head",),
            train_kwargs=(("train", True),),
            variables=None if variables is None else _plain(variables),
        )
    _check_settings(module)
    if train_kwargs is None and eval_kwargs is None:
        train_kwargs, eval_kwargs = _modes(module)
    return LinenNetwork(
        module=module,
        **settings_of_modes(train_kwargs, eval_kwargs),
        num_classes=num_classes,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        preprocess=preprocess,
        **named_head(head),
        variables=None if variables is None else _plain(variables),
    )


def is_classifier(module: nn.Module) -> bool:
    """Returns whether `module` is built as the package's own classifiers are."""
    needed = {"body", "num_features", "num_classes", "mean", "std"}
    names = {field.name for field in dataclasses.fields(module)}  # pyright: ignore
    return needed <= names and callable(getattr(type(module), "features", None))


@dataclasses.dataclass(frozen=True)
class LinenNetwork(LayeredNetwork):
    """The network of any Linen module; see `from_linen`.

    Attributes:
      module: the Linen module.
    """

    module: Any = None

    def __hash__(self):
        # Settings that cannot be hashed, such as lists, are compared all the same.
        try:
            own = hash(self.module)
        except TypeError:
            own = hash(type(self.module))
        return hash((type(self), own, self.num_classes, self.mean, self.std, self.head_path))

    def init(self, key, image_shape):
        return _init(self, key, tuple(image_shape))

    def logits(self, variables, images, *, rngs=None):
        return check_logits(self._name(), self._apply(variables, images, rngs))

    def train_logits(self, variables, images, *, rngs=None):
        names = [name for name in variables if name != "params"]
        output, updated = self.module.apply(
            variables,
            self.prepared(images),
            **dict(self.train_kwargs),
            mutable=names,
            rngs=rngs,
        )
        kept = {name: variables[name] for name in names}
        return check_logits(self._name(), output), {**kept, **_plain(updated)}

    def taps(self, variables, x, *, select=None, **kwargs):
        output, calls = self._recorded(
            variables, self.prepared(x), is_batch_norm if select is None else select, **kwargs
        )
        return output, by_name(calls)

    def tapped_logits(self, variables, images, tap):
        def interceptor(next_fn, args, kwargs, context):
            output = next_fn(*args, **kwargs)
            module = context.module
            layer = None if context.method_name != "__call__" else _described(module)
            # Tied weights are another layer's, or no parameters of this one.
            if layer is None or found_at(variables["params"], (*module.path, "kernel")) is None:
                return output
            return tap(layer, args[0] if args else kwargs["inputs"], output)

        with nn.intercept_methods(interceptor):
            return check_outputs(self._name(), self._apply(variables, images, None))

    def _name(self):
        return type(self.module).__name__

    def _apply(self, variables, images, rngs, **kwargs):
        try:
            return self.module.apply(
                variables,
                self.prepared(images),
                **dict(self.eval_kwargs),
                **kwargs,
                rngs=rngs,
            )
        except ModifyScopeVariableError as error:
            raise ValueError(
                f"{self._name()} changes its variables in evaluation mode "
                f"({dict(self.eval_kwargs) or 'no argument'}): give the arguments of both modes, "
                "train_kwargs= and eval_kwargs="
            ) from error

    def _shapes(self, image_shape):
        return jax.eval_shape(lambda: _init(self, jax.random.key(0), image_shape))

    def _head_inputs(self, variables, images, path, rngs):
        _, calls = self._recorded(
            variables, self.prepared(images), lambda layer: layer.path == path, rngs=rngs
        )
        return calls[-1].inputs

    def _linear_calls(self, variables, images):
        return self._recorded(
            variables, self.prepared(images), lambda layer: isinstance(layer, nn.Dense)
        )

    def _recorded(self, variables, x, select, **kwargs):
        return _recorded(self.module, variables, x, select, {**dict(self.eval_kwargs), **kwargs})


@dataclasses.dataclass(frozen=True)
class ClassifierNetwork(LinenNetwork):
    """The network of one of the package's own classifiers, see `models.Classifier`."""

    __hash__ = LinenNetwork.__hash__

    def features(self, variables, images, *, rngs=None):
        return self._apply(variables, images, rngs, method="features")

    def for_images(self, image_shape):
        return self

    def prepared(self, images):
        return images  # the module normalizes them itself


@functools.partial(jit_once, static_argnums=(0, 2))
def _init(network, key, image_shape):
    images = network.prepared(jnp.zeros((1, *image_shape)))
    variables = _plain(network.module.init(key, images, **dict(network.eval_kwargs)))
    return {"params": {}, "batch_stats": {}, **variables}


def _recorded(module, variables, x, select, kwargs) -> tuple[Any, list[Call]]:
    """Returns (output, calls of the selected layers).

    They are stored in the layers' scopes, so that they may leave `nn.jit` and `nn.remat`.
    """
    # A new name each time: for a name seen before, `nn.jit` would reuse what it compiled then.
    own = f"{_SOWN}_{next(_trace_numbers)}"
    order: dict[tuple[str, ...], int] = {}
    lost: dict[str, None] = {}

    def interceptor(next_fn, args, kwargs, context):
        layer = context.module
        order.setdefault(layer.path, len(order))
        output = next_fn(*args, **kwargs)
        if context.method_name == "__call__" and select(layer):
            inputs = args[0] if args else next(iter(kwargs.values()))
            if layer.is_mutable_collection(own):
                layer.sow(own, _SOWN, (inputs, output))
            else:
                lost["/".join(layer.path)] = None
        return output

    with nn.intercept_methods(interceptor):
        output, sown = module.apply(variables, x, **kwargs, mutable=[own])
    if lost:
        raise ValueError(
            f"the inputs of {', '.join(lost)} cannot be seen: the layers are called in a lifted "
            "transformation (nn.scan, nn.vmap); select other layers, or unroll it"
        )
    stored: dict[Any, Any] = traverse_util.flatten_dict(core.unfreeze(sown.get(own, {})))
    calls = [(path[:-1], pairs) for path, pairs in stored.items()]
    # A layer that was not traced itself is in a module that was, or in one of that kind.
    calls.sort(key=lambda each: [order.get(each[0][: n + 1], 0) for n in range(len(each[0]))])
    return output, [Call(path, *pair) for path, pairs in calls for pair in pairs]


def _described(module):
    """Returns the description of a linear layer, or None for other modules."""
    if isinstance(module, nn.Dense):
        return dense_layer(module.path, module)
    if isinstance(module, nn.DenseGeneral):
        return general_layer(module.path, module, module.batch_dims)
    return conv_layer(module.path, module) if isinstance(module, nn.Conv) else None


def _plain(variables):
    """Returns the collections as plain dicts."""
    return core.unfreeze(variables) if isinstance(variables, core.FrozenDict) else dict(variables)


def _modes(module):
    """Returns the arguments of `module.__call__` in training and in evaluation mode."""
    modes = mode_arguments(module)
    fields = {field.name for field in dataclasses.fields(module)} & MODES.keys()
    if not modes[0] and fields:
        raise ValueError(
            f"{type(module).__name__} is told its mode when it is made ({', '.join(fields)}), so "
            "that one module cannot both train and predict: make it an argument of __call__"
        )
    return modes


def _check_settings(module):
    for field in dataclasses.fields(module):
        value = getattr(module, field.name, None)
        if isinstance(value, (jax.Array, np.ndarray)):
            raise ValueError(
                f"{type(module).__name__}.{field.name} is an array, and networks are compared by "
                "their settings: give it as a tuple, or make it a variable of the module"
            )
