"""Networks of Flax NNX: a module is split once, and merged inside each function.

A merged module is a new object that lives in one trace, so its mode may be set and its layers may
be watched; the user's module is never touched.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.extend import core

from jaxpoison.core.programs import jit_once
from jaxpoison.network._layers import (
    Call,
    LayeredNetwork,
    by_name,
    conv_layer,
    dense_layer,
    general_layer,
    mode_arguments,
    named_head,
    origin,
    settings_of_modes,
)
from jaxpoison.network.base import (
    Network,
    check_logits,
    check_outputs,
    check_outside_jit,
    is_batch_norm,
    kept_variables,
)

_HOOK = "_network_hook"


def from_nnx(
    model: nnx.Module,
    *,
    head: str | None = None,
    init: Callable[[jax.Array], nnx.Module] | None = None,
    num_classes: int | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
) -> Network:
    """Returns the network of an NNX module `model(images) -> logits` [B, K].

    `params` are the `nnx.Param`s, `batch_stats` all other arrays, as nested dicts of plain arrays
    whose keys are strings. The states of random streams are left out: where a function is given
    `rngs`, each stream starts from its key of that name (or that of "dropout"). The values that
    `model` holds are kept as `variables`; `model` itself is not changed.

    The mode is set on every layer that has `use_running_average` (True in evaluation) or
    `deterministic` (False where `rngs` is given), and passed to `model` where it takes one.

    Args:
      model: an instance, not a class.
      head: path of the last linear layer, an `nnx.Linear`, such as "classifier/fc" or "layers.3".
        By default it is the `nnx.Linear` whose output is the model's output.
      init: `init(key) -> module`, a new one of the same structure, e.g.
        `lambda key: Model(rngs=nnx.Rngs(key))`. Without it training starts from `model`'s values.
      num_classes: K; default: found by `for_images`.
      train_kwargs: arguments of `model` in training mode, where its signature does not tell; see
        `from_linen`.
      eval_kwargs: those in evaluation mode; give both or neither.
      mean: per-channel mean, subtracted from the images before the model sees them.
      std: per-channel standard deviation that they are then divided by.
      preprocess: pure function that the images go through before that.

    Raises:
      ValueError: if the model's mode cannot be told from its signature. TypeError: if `model` is
        no NNX module.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an instance of flax.nnx.Module, not {model!r}")
    if train_kwargs is None and eval_kwargs is None:
        train_kwargs, eval_kwargs = mode_arguments(model)
    graphdef, variables, leaves = _split(model)
    return NnxNetwork(
        graphdef=graphdef,
        leaves=leaves,
        name=type(model).__name__,
        make=init,
        num_classes=num_classes,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        preprocess=preprocess,
        variables=variables,
        **settings_of_modes(train_kwargs, eval_kwargs),
        **named_head(head),
    )


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One array of a module.

    Attributes:
      path: where NNX has it.
      kind: "params", "batch_stats", or the "key" or "count" of a random stream.
      stream: the random stream's name.
      shape: its shape.
      dtype: its type.
    """

    path: tuple[Any, ...]
    kind: str
    stream: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def names(self):
        return (self.kind, *map(str, self.path))


@dataclasses.dataclass(frozen=True)
class NnxNetwork(LayeredNetwork):
    """The network of an NNX module; see `from_nnx`.

    Attributes:
      graphdef: the module without its arrays, in evaluation mode.
      leaves: what those arrays are.
      name: of the module's class.
      make: makes a new module from a key, or None.
    """

    graphdef: Any = dataclasses.field(default=None, repr=False)
    leaves: tuple[_Leaf, ...] = dataclasses.field(default=(), repr=False)
    name: str = ""
    make: Callable[[jax.Array], nnx.Module] | None = dataclasses.field(default=None, compare=False)

    def init(self, key, image_shape):
        if self.make is None:
            return kept_variables(
                self, key, "give from_nnx an init=, e.g. lambda key: Model(rngs=nnx.Rngs(key))"
            )
        check_outside_jit(key)
        return _init(self.make, self.leaves, self.name, key)

    def logits(self, variables, images, *, rngs=None):
        return check_logits(self.name, self._run(variables, images, rngs)[0])

    def train_logits(self, variables, images, *, rngs=None):
        output, updated = self._run(variables, images, rngs, train=True)
        return check_logits(self.name, output), {"batch_stats": updated}

    def tapped(
        self,
        variables: Any,
        x: Any,
        record: Callable[[str, Any, jax.Array, Mapping[str, Any]], None],
        *,
        select: Callable[[Any], bool] = is_batch_norm,
        **kwargs: Any,
    ) -> Any:
        """Returns the output in evaluation mode, and shows each selected layer's calls on the way.

        Args:
          variables: of the network.
          x: input of the network.
          record: called as `record(name, layer, inputs, kwargs)` at each call of a selected layer,
            in the order of the calls; `kwargs` are the call's arguments by name. What it makes of
            the inputs belongs to the trace that `tapped` is called in.
          select: `select(layer)` is True for layers to show.
          **kwargs: further arguments of the model.

        Raises:
          ValueError: if a selected layer is called in a transformation inside the model (nnx.jit,
            nnx.remat, nnx.scan, nnx.vmap, or JAX's), which its input cannot leave.
        """

        def see(path, layer, inputs, kwargs, output, here):
            name = "/".join(path)
            if not here:
                raise ValueError(
                    f"the inputs of {name} cannot be seen: the layer is called in a transformation "
                    "inside the model (nnx.jit, nnx.remat, nnx.scan, nnx.vmap); select other "
                    "layers, or call it outside of one"
                )
            record(name, layer, inputs, kwargs)

        def watch(path, layer):
            return see if select(layer) else None

        return self._run(variables, x, None, watch=watch, **kwargs)[0]

    def tapped_logits(self, variables, images, tap):
        def watch(path, layer):
            described = _described(path, layer)
            if described is None:
                return None
            return lambda path, layer, inputs, kwargs, output, here: tap(described, inputs, output)

        return check_outputs(self.name, self._run(variables, images, None, watch=watch)[0])

    def taps(self, variables, x, *, select=None, **kwargs):
        calls: list[Call] = []

        def record(name, layer, inputs, kwargs):
            calls.append(Call(tuple(name.split("/")), inputs, inputs))

        select = is_batch_norm if select is None else select
        output = self.tapped(variables, x, record, select=select, **kwargs)
        return output, by_name(calls)

    def _name(self):
        return self.name

    def _shapes(self, image_shape):
        flat = {
            leaf.names: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for leaf in self.leaves
            if not leaf.stream
        }
        return {"params": {}, "batch_stats": {}, **traverse_util.unflatten_dict(flat)}

    def _head_inputs(self, variables, images, path, rngs):
        found = []

        def see(path, layer, inputs, kwargs, output, here):
            found.append(inputs if here else None)

        def watch(layer_path, layer):
            return see if layer_path == path else None

        self._run(variables, images, rngs, watch=watch)
        if not found or found[-1] is None:
            raise ValueError(
                f"the input of {'/'.join(path)} cannot be seen: {self.name} does not call it, or "
                "calls it in a transformation (nnx.jit, nnx.remat, nnx.scan, nnx.vmap)"
            )
        return found[-1]

    def _linear_calls(self, variables, images):
        calls: list[Call] = []

        def see(path, layer, inputs, kwargs, output, here):
            if here:
                calls.append(Call(path, inputs, output))

        def watch(path, layer):
            return see if isinstance(layer, nnx.Linear) else None

        return self._run(variables, images, None, watch=watch)[0], calls

    def _run(self, variables, images, rngs, *, train=False, watch=None, **kwargs):
        """Returns (output, batch_stats after the call); `watch` as of `_watch`."""
        given = {
            leaf.path: _value(leaf, number, variables, rngs)
            for number, leaf in enumerate(self.leaves)
        }
        images = self.prepared(images)
        output, now = self._call(given, images, rngs is None, train, watch, kwargs)
        if rngs is None or not train:
            changed = self._changed(given, now, images, rngs is None, train, kwargs)
            if rngs is None and any(leaf.kind == "count" for leaf in changed):
                raise ValueError(
                    f"{self.name} draws random numbers: give keys for its streams, "
                    "rngs={'dropout': key}"
                )
            stats = [leaf for leaf in changed if leaf.kind == "batch_stats"]
            if not train and stats:
                raise ValueError(
                    f"{self.name} changes its variables in evaluation mode "
                    f"({', '.join('/'.join(leaf.names[1:]) for leaf in stats)}): give the "
                    "arguments of both modes, train_kwargs= and eval_kwargs="
                )
        stats = {
            leaf.names[1:]: now[leaf.path] for leaf in self.leaves if leaf.kind == "batch_stats"
        }
        return output, traverse_util.unflatten_dict(stats)

    def _call(self, given, images, deterministic, train, watch, kwargs):
        """Returns (output, arrays by path after the call)."""
        model = nnx.merge(self.graphdef, traverse_util.unflatten_dict(given))
        _set_mode(model, use_running_average=not train, deterministic=deterministic)
        if watch is not None:
            _watch(model, watch)
        modes = self.train_kwargs if train else self.eval_kwargs
        return model(images, **{**dict(modes), **kwargs}), dict(_flat(model))

    def _changed(self, given, now, images, deterministic, train, kwargs):
        """Returns the leaves that a call computes, in the order of `leaves`."""
        changed = [leaf for leaf in self.leaves if now[leaf.path] is not given[leaf.path]]
        if not changed:
            return changed

        # NNX's transformations return even what they do not change: look into the program.
        def values(given):
            now = self._call(given, images, deterministic, train, None, kwargs)[1]
            return [now[leaf.path] for leaf in self.leaves]

        order = list(given)
        jaxpr = jax.make_jaxpr(lambda *flat: values(dict(zip(order, flat, strict=True))))(
            *(given[path] for path in order)
        ).jaxpr
        return [
            leaf
            for leaf, var in zip(self.leaves, jaxpr.outvars, strict=True)
            if origin(jaxpr, var) is not jaxpr.invars[order.index(leaf.path)]
        ]


def _described(path, layer):
    """Returns the description of a linear layer, or None for other modules."""
    if isinstance(layer, nnx.Linear):
        return dense_layer(path, layer)
    if isinstance(layer, nnx.LinearGeneral):
        return general_layer(path, layer, layer.batch_axis)
    return conv_layer(path, layer) if isinstance(layer, nnx.Conv) else None


def _split(model):
    """Returns (graphdef in evaluation mode, variables, leaves) of a copy of `model`."""
    model = nnx.clone(model)
    _set_mode(model, use_running_average=True, deterministic=True)
    graphdef = nnx.split(model)[0]
    leaves, flat = [], {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = _array(variable)
        leaf = _Leaf(path, *_kind(variable), value.shape, value.dtype)
        leaves.append(leaf)
        if not leaf.stream:
            flat[leaf.names] = value
    variables = {"params": {}, "batch_stats": {}, **traverse_util.unflatten_dict(flat)}
    return graphdef, variables, tuple(leaves)


@functools.partial(jit_once, static_argnums=(0, 1, 2))
def _init(make, leaves, name, key):
    model = make(key)
    if not isinstance(model, nnx.Module):
        raise ValueError(f"init must return a flax.nnx.Module, not a {type(model).__name__}")
    _, variables, made = _split(model)
    if made != leaves:
        differing = {"/".join(leaf.names) for leaf in set(made) ^ set(leaves)}
        raise ValueError(
            f"init makes other arrays than the {name} that the network was made from: "
            f"{', '.join(sorted(differing))}"
        )
    return variables


def _flat(model):
    """Returns (path, array) of everything that `model` holds."""
    return [(path, _array(variable)) for path, variable in nnx.to_flat_state(nnx.state(model))]


def _array(variable):
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _kind(variable):
    """Returns (kind, name of the random stream) of a leaf."""
    if isinstance(variable, nnx.RngState):
        return "key" if isinstance(variable, nnx.RngKey) else "count", variable.tag
    return "params" if isinstance(variable, nnx.Param) else "batch_stats", ""


def _value(leaf, number, variables, rngs):
    """Returns what a leaf holds during one call; each random stream has its own key."""
    if leaf.kind == "count":
        return jnp.zeros(leaf.shape, leaf.dtype)
    if leaf.kind == "key":
        if rngs is None:
            key = jax.random.key(0)  # `_run` raises if it is used
        elif leaf.stream in rngs or "dropout" in rngs:
            key = rngs.get(leaf.stream, rngs.get("dropout"))
        else:
            raise ValueError(f"rngs has keys for {', '.join(rngs)}: one for 'dropout' is missing")
        key = jax.random.fold_in(key, number)
        return jax.random.split(key, leaf.shape) if leaf.shape else key
    return functools.reduce(lambda tree, name: tree[name], leaf.names, variables)


def _modules(model):
    return [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]


def _set_mode(model, **modes):
    for _, module in _modules(model):
        for name, value in modes.items():
            if name in vars(module):
                setattr(module, name, value)


def _watch(model, watch):
    """Lets `model` show its calls.

    Args:
      model: a merged module, changed in place.
      watch: `watch(path, layer)` returns None, or what is called after each call of that layer,
        as `see(path, layer, inputs, kwargs, output, here)`. `here` is whether the call is part of
        the trace that `_watch` was called in, so that its arrays may leave the model. What it
        returns, unless None, takes the place of the output.
    """
    trace = core.get_opaque_trace_state()
    for path, layer in _modules(model):
        names = tuple(map(str, path))
        see = watch(names, layer)
        if see is not None:
            setattr(layer, _HOOK, functools.partial(_show, see, names, trace, type(layer).__call__))
            layer.__class__ = _watched(type(layer))


def _show(see, path, trace, call, layer, args, kwargs, output):
    given = dict(inspect.signature(call).bind(layer, *args, **kwargs).arguments)
    named = given.pop("kwargs", {})
    _, inputs, *_ = given.values()
    others = dict(list(given.items())[2:]) | named
    shown = see(path, layer, inputs, others, output, core.get_opaque_trace_state() == trace)
    return output if shown is None else shown


@functools.cache
def _watched(kind):
    """Returns the subclass of a layer's class whose calls call the instance's hook."""

    def __call__(self, *args, **kwargs):
        output = kind.__call__(self, *args, **kwargs)
        return getattr(self, _HOOK)(self, args, kwargs, output)

    return type(kind)(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})
