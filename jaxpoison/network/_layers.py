"""Networks made of layers: which one is the last, and what it holds."""

import abc
import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpoison.core import layers
from jaxpoison.network.base import Network, Path, as_float32, check_logits, found_at, placed

# Arguments by which modules are told their mode, and whether True means training.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "is_train": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}
# Operations that pass the values on as they are, or rounded.
_COPIES = {"convert_element_type", "copy", "sharding_constraint", "optimization_barrier"}
# Calls of another program with the same inputs and outputs.
_CALLS = {"jit", "pjit", "remat2", "checkpoint", "closed_call", "custom_jvp_call"}


class Call(NamedTuple):
    """One call of a layer: its path and, as traced, what went in and what came out."""

    path: Path
    inputs: jax.Array
    output: jax.Array


class Sight(NamedTuple):
    """What a trace of the forward pass tells: sizes, and the last linear layer or why not."""

    num_classes: int
    num_features: int | None
    head_path: Path | None
    no_head: str


@dataclasses.dataclass(frozen=True)
class LayeredNetwork(Network):
    """A network of Linen or NNX layers.

    Attributes:
      train_kwargs: (name, value) of the model's arguments in training mode.
      eval_kwargs: those in evaluation mode.
      preprocess: pure function that images go through first, or None.
      head_path: where in `params` the last linear layer is, or None while it is not known.
      head_named: whether the user named it.
      no_head: why it is not known.
    """

    train_kwargs: tuple[tuple[str, Any], ...] = ()
    eval_kwargs: tuple[tuple[str, Any], ...] = ()
    preprocess: Callable[[jax.Array], jax.Array] | None = None
    head_path: Path | None = None
    head_named: bool = dataclasses.field(default=False, compare=False)
    no_head: str = dataclasses.field(
        default="it is not known yet which layer is the last linear one: give its name (head=...), "
        "or the images' shape, as_network(model, image_shape=(H, W, C))",
        compare=False,
        repr=False,
    )

    def head(self, variables):
        path = self._head_path()
        layer = found_at(variables["params"], path)
        if layer is None or "kernel" not in layer:
            raise ValueError(
                f"params hold no kernel of a linear layer at {'/'.join(path)!r}: name another "
                "layer with head=... (weights tied to another layer's cannot be the head)"
            )
        return {name: layer[name] for name in ("kernel", "bias") if name in layer}

    def with_head(self, variables, head):
        path = self._head_path()
        now = self.head(variables)
        if set(now) != set(head):
            raise ValueError(
                f"the last linear layer {'/'.join(path)!r} holds {', '.join(now)}; the new head "
                f"holds {', '.join(head)}: give the same"
            )
        layer = placed(found_at(variables["params"], path), ("kernel",), head["kernel"])
        if "bias" in head:
            layer = placed(layer, ("bias",), head["bias"])
        return placed(variables, ("params", *path), layer)

    def for_images(self, image_shape):
        sight = _sight(self.without_variables(), tuple(image_shape), self.head_named)
        if self.num_classes not in (None, sight.num_classes):
            raise ValueError(
                f"{self._name()} returns {sight.num_classes} logits for an image, not "
                f"num_classes = {self.num_classes}"
            )
        return dataclasses.replace(self, **sight._asdict())

    def features(self, variables, images, *, rngs=None):
        network = self if self.head_path else self.for_images(images.shape[1:])
        return as_float32(network._head_inputs(variables, images, network._head_path(), rngs))

    def prepared(self, images):
        """Returns the images as the module sees them: preprocessed and normalized."""
        return self._normalized(images, self.preprocess)

    def _head_path(self) -> Path:
        if self.head_path is None:
            raise ValueError(f"{self._name()}: {self.no_head}")
        return self.head_path

    @abc.abstractmethod
    def _name(self) -> str:
        """The model's name in messages."""

    @abc.abstractmethod
    def _head_inputs(self, variables, images, path, rngs) -> jax.Array:
        """Returns what goes into the layer at `path`, in evaluation mode."""

    @abc.abstractmethod
    def _shapes(self, image_shape) -> Any:
        """Returns the variables' shapes."""

    @abc.abstractmethod
    def _linear_calls(self, variables, images) -> tuple[Any, list[Call]]:
        """Returns (output, calls of linear layers), in evaluation mode."""


@functools.lru_cache(maxsize=64)
def _sight(network, image_shape, head_named):
    met: list[Path] = []
    widths: list[int] = []

    def forward(variables, images):
        output, calls = network._linear_calls(variables, images)
        met[:] = [call.path for call in calls]
        widths[:] = [call.inputs.shape[-1] for call in calls]
        return check_logits(network._name(), output), [call.output for call in calls]

    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    jaxpr = jax.make_jaxpr(forward)(network._shapes(image_shape), images).jaxpr
    logits, *outputs = (origin(jaxpr, var) for var in jaxpr.outvars)
    num_classes = jaxpr.outvars[0].aval.shape[1]
    names = ", ".join("/".join(path) for path in dict.fromkeys(met)) or "none"
    last = [index for index, output in enumerate(outputs) if output is logits]
    if head_named:
        if network.head_path not in met:
            raise ValueError(
                f"{network._name()} calls no linear layer named {'/'.join(network.head_path)!r}; "
                f"those it calls: {names}"
            )
        last = [index for index in last if met[index] == network.head_path]
    if last:
        return Sight(num_classes, widths[last[-1]], met[last[-1]], "")
    why = (
        "its output is not the output of a linear layer: let it return the logits, without a "
        "softmax or scaling after them, or use from_functions with features=, head= and "
        f"with_head=. Linear layers it calls: {names}"
    )
    return Sight(num_classes, None, None, why)


def origin(jaxpr, var):
    """Returns the variable that `var` is a copy of, followed back through casts and calls."""
    equation = next((e for e in jaxpr.eqns if any(var is out for out in e.outvars)), None)
    if equation is None:
        return var
    kind = equation.primitive.name
    index = equation.outvars.index(var)
    if kind in _COPIES:
        return origin(jaxpr, equation.invars[index])
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    if kind == "scan":
        given = _given_to_scan(equation, inner, index)
        return var if given is None else origin(jaxpr, given)
    if kind not in _CALLS:
        return var
    source = origin(inner, inner.outvars[index])
    passed = [
        outer for outer, own in zip(equation.invars, inner.invars, strict=True) if own is source
    ]
    return origin(jaxpr, passed[0]) if passed else source


def _given_to_scan(scan, inner, index):
    """Returns the input of a `lax.scan` that its output `index` is a copy of, or None."""
    # Inputs are constants, then what is carried, then slices; outputs what is carried, then slices.
    sliced = [a.aval.ndim != b.aval.ndim for a, b in zip(scan.invars, inner.invars, strict=True)]
    stacked = [a.aval.ndim != b.aval.ndim for a, b in zip(scan.outvars, inner.outvars, strict=True)]
    num_constants = len(sliced) - sum(sliced) - (len(stacked) - sum(stacked))
    source = origin(inner, inner.outvars[index])
    place = next((p for p, own in enumerate(inner.invars) if own is source), None)
    if place is None:
        return None
    same = sliced[place] if stacked[index] else place == num_constants + index
    return scan.invars[place] if same else None


def by_name(calls: Sequence[Call]) -> dict[str, jax.Array]:
    """Returns the inputs of `calls`; the second call of a layer is "name#2"."""
    found: dict[str, jax.Array] = {}
    counts: collections.Counter[str] = collections.Counter()
    for call in calls:
        name = "/".join(call.path)
        counts[name] += 1
        found[name if counts[name] == 1 else f"{name}#{counts[name]}"] = call.inputs
    return found


def dense_layer(path: Path, layer: Any) -> layers.DenseLayer:
    """Returns the description of a Linen or NNX dense layer at `path`."""
    return layers.DenseLayer(*_paths(path, layer))


def general_layer(path: Path, layer: Any, batch_axes: Any) -> layers.DenseLayer | None:
    """Returns that of a `DenseGeneral` or `LinearGeneral`, as of attention, or None.

    None where it sums over other axes than the last ones, or has a kernel for each batch axis.
    """
    axes = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
    if batch_axes or axes != tuple(range(-len(axes), 0)):
        return None
    return layers.DenseLayer(*_paths(path, layer), num_axes=len(axes))


def conv_layer(path: Path, layer: Any) -> layers.ConvLayer | None:
    """Returns the description of a Linen or NNX convolution, or None if `ConvLayer` is not it."""
    num_axes = len(_per_axis(layer.kernel_size, 1))
    padding = layer.padding
    if isinstance(padding, int):
        padding = ((padding, padding),) * num_axes
    elif not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    plain = (
        layer.feature_group_count == 1
        and layer.mask is None
        and set(_per_axis(layer.input_dilation or 1, num_axes)) == {1}
        and not (isinstance(padding, str) and padding not in ("SAME", "VALID"))
    )
    if not plain:
        return None
    return layers.ConvLayer(
        *_paths(path, layer),
        strides=_per_axis(layer.strides or 1, num_axes),
        padding=padding,
        dilation=_per_axis(layer.kernel_dilation or 1, num_axes),
    )


def _paths(path, layer):
    name = "/".join(path)
    return f"{name}/kernel", f"{name}/bias" if layer.use_bias else None


def _per_axis(value, num_axes):
    return (value,) * num_axes if isinstance(value, int) else tuple(value)


def named_head(head: str | None) -> dict[str, Any]:
    """Returns the fields of a `LayeredNetwork` for a head that the user named, or did not."""
    if head is None:
        return {}
    return {"head_path": tuple(head.replace(".", "/").split("/")), "head_named": True}


def settings_of_modes(
    train_kwargs: Mapping[str, Any] | None, eval_kwargs: Mapping[str, Any] | None
) -> dict[str, tuple[tuple[str, Any], ...]]:
    """Returns the fields of a `LayeredNetwork` for the arguments of the two modes."""
    if train_kwargs is None or eval_kwargs is None:
        raise ValueError("give both train_kwargs and eval_kwargs, or neither")
    return {
        "train_kwargs": tuple(sorted(train_kwargs.items())),
        "eval_kwargs": tuple(sorted(eval_kwargs.items())),
    }


def mode_arguments(module: Any) -> tuple[dict[str, bool], dict[str, bool]]:
    """Returns the arguments of `module.__call__` in training and in evaluation mode.

    Raises:
      ValueError: if the signature has arguments without a default that are not in `MODES`.
    """
    arguments = list(inspect.signature(type(module).__call__).parameters.values())[2:]
    named = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    modes = {a.name: MODES[a.name] for a in named if a.name in MODES}
    unknown = [a.name for a in named if a.name not in modes and a.default is a.empty]
    if unknown or (len(named) < len(arguments) and not modes):
        raise ValueError(
            f"{type(module).__name__}.__call__ takes {', '.join(map(str, arguments))} after its "
            "input, and how it is told to train is not clear: give train_kwargs= and eval_kwargs=, "
            "e.g. train_kwargs={'train': True}, eval_kwargs={'train': False}. Known names: "
            f"{', '.join(MODES)}"
        )
    return modes, {argument: not training for argument, training in modes.items()}
