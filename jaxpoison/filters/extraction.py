"""Characteristic vectors: what one image does to the statistics of every BatchNorm layer.

For BatchNorm layer i with input A_i [N, ..., C_i] (S_i positions besides examples and channels):

    mu_i[n, c]  = mean over positions of A_i[n, :, c]
    var_i[n, c] = mean over positions of (A_i[n, :, c] - mu_i[n, c])^2

which is eq. 5 of De Gaspari, Hitaj and Mancini (arXiv 2403.13523). The network stays as it is, in
evaluation mode: `nn.intercept_methods` (Flax Linen) or `Network.tapped` (Flax NNX) shows each
layer's input on its way, so outputs are those of a plain forward pass, and all of it may be put
under `jit`, `vmap`, `grad` and `shard_map`.
"""

import collections
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core, nnx, traverse_util
from flax.errors import FlaxError

from jaxpoison.network import Network, as_network, is_batch_norm

Predicate = Callable[[Any], bool]
Stats = Literal["input", "self"]
Path = tuple[str, ...]

_SOWN = "characteristic"  # name of what the interceptor stores in a layer's scope
_trace_numbers = itertools.count()


class Block(NamedTuple):
    """Two numbers for each channel of one layer.

    Attributes:
      mean: float32 [..., C].
      var: float32 [..., C].
    """

    mean: jax.Array
    var: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CharVec:
    """Characteristic vectors of N examples; a pytree, so it may pass through any transformation.

    Attributes:
      blocks: one for each layer, in the order in which the network calls them: channel-wise mean
        and biased variance of the layer's input, float32 [N, C_i]. A shared layer has one block
        for each call; a layer under `nn.scan` one for each step, one after the other.
      paths: names of the layers, such as "body/stage0_block0/norm1".
      sizes: S_i, positions over which the mean was taken. Where it is 1 the variance is 0.
    """

    blocks: tuple[Block, ...]
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def num_examples(self) -> int:
        """N, the length of the first axis."""
        return self.blocks[0].mean.shape[0]

    def ravel(self) -> jax.Array:
        """Returns (mu_1, var_1, mu_2, ...), float32 [N, 2 sum C_i], e.g. for a 2-D picture."""
        return jnp.concatenate([array for block in self.blocks for array in block], axis=-1)


def extract_charvec(
    model: Any,
    variables: Any,
    x: Any,
    *,
    predicate: Predicate = is_batch_norm,
    stats: Stats = "input",
    **apply_kwargs: Any,
) -> CharVec:
    """Returns the characteristic vectors of `x`; see `apply_and_extract`."""
    return apply_and_extract(model, variables, x, predicate=predicate, stats=stats, **apply_kwargs)[
        1
    ]


def apply_and_extract(
    model: Any,
    variables: Any,
    x: Any,
    *,
    predicate: Predicate = is_batch_norm,
    stats: Stats = "input",
    **apply_kwargs: Any,
) -> tuple[Any, CharVec]:
    """Returns (output of the network, characteristic vectors), in one forward pass.

    Put `jit` around this function, never inside: the interceptor does not reach a function that
    is already compiled. A `mask` that a layer is called with (padded sequences) is honored. Models
    that merge the axis of examples with another one are run under `vmap`.

    Args:
      model: any Flax Linen module, NNX module, or `network.Network` made from one; it is not
        changed. NNX modules and networks are run in evaluation mode automatically.
      variables: what `model.apply` takes; for NNX and networks, what the network takes.
      x: N examples, an array [N, ...] or a pytree of them.
      predicate: `predicate(layer)` selects the layers to measure. For a network without
        BatchNorm, e.g. `lambda layer: isinstance(layer, nn.LayerNorm)`. Channels are the layer's
        `axis` (default: the last).
      stats: "input" measures layer inputs in evaluation mode. "self", for ablations, lets each
        layer normalize an example by that example's own statistics (training mode, so pass e.g.
        `train=True`), as a step of BatchNorm on that example alone would; for Linen.
      **apply_kwargs: further arguments of the forward pass, e.g. `train=False`,
        `method="features"`.

    Returns:
      The output for all N examples, unchanged by the measurement, and a `CharVec`.

    Raises:
      ValueError: if no layer is found, a layer is in the wrong mode, or a layer sits inside a
        transformation from which nothing can be returned.
    """
    if stats not in ("input", "self"):
        raise ValueError(f'stats must be "input" or "self", not {stats!r}')
    if "mutable" in apply_kwargs:
        raise ValueError("mutable= is set by the extraction; leave it out of the arguments")
    if isinstance(model, nnx.Module):
        model = as_network(model)
    of_network = isinstance(model, Network)
    linen = getattr(model, "module", None) if of_network else model
    if isinstance(linen, nn.Module):
        if of_network:
            net: Any = model
            x, apply_kwargs = net.prepared(x), {**dict(net.eval_kwargs), **apply_kwargs}
        capture = functools.partial(_capture, linen, variables, predicate, stats, apply_kwargs)
    elif hasattr(model, "tapped"):
        if stats != "input":
            raise ValueError('stats="self" is for Flax Linen; use stats="input"')
        capture = functools.partial(_tapped, model, variables, predicate, apply_kwargs)
    else:
        raise TypeError(
            f"model is a {type(model).__name__}, whose layers cannot be seen; expected a Flax "
            "Linen or NNX module, or a network.Network made from one"
        )
    if stats == "input":
        try:
            return capture(x, together=True)
        except _ExamplesMerged:
            pass
    outputs, charvec = jax.vmap(
        lambda one: capture(jax.tree.map(lambda a: a[None], one), together=False)
    )(x)
    outputs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs)
    return outputs, jax.tree.map(lambda a: a[:, 0], charvec)


class _ExamplesMerged(Exception):
    """A layer's first axis is not the axis of examples."""


class _Met:
    """The layers that one trace of the forward pass has met; facts about them, no arrays."""

    def __init__(self):
        self.called: dict[Path, int] = {}  # all modules, and when they were first called
        self.num_measured = 0
        self.lost: set[Path] = set()  # measured layers with nowhere to store the result


class _Facts(NamedTuple):
    """What is known of a measurement when it is traced, kept in the shape of an empty array.

    `nn.jit` traces one of several equal layers only; shapes come back from all of them.
    """

    size: int
    order: int
    rows: int
    channels: int


def _capture(module, variables, predicate, stats, apply_kwargs, x, *, together):
    # A new name each time: for a name seen before, `nn.jit` would reuse what it compiled then.
    own = f"{_SOWN}_{next(_trace_numbers)}"
    num_examples = jax.tree.leaves(x)[0].shape[0]

    def run(collections):
        met = _Met()

        def interceptor(next_fn, args, kwargs, context):
            layer = context.module
            met.called.setdefault(layer.path, len(met.called))
            if context.method_name != "__call__" or not predicate(layer):
                return next_fn(*args, **kwargs)
            inputs = args[0] if args else kwargs["x"]
            if together and inputs.shape[0] != num_examples:
                raise _ExamplesMerged
            _check_mode(layer, args, kwargs, stats)
            if stats == "self":
                output, block = _train_on_one(next_fn, args, kwargs, layer)
            else:
                block = _measure(layer, inputs, kwargs.get("mask"), together, _name(layer.path))
                output = next_fn(*args, **kwargs)
            met.num_measured += 1
            facts = _Facts(inputs.size // block.mean.size, met.num_measured, *block.mean.shape)
            stored = [layer.is_mutable_collection(name) for name in collections]
            if any(stored):
                value = block, jnp.zeros((*facts, 0))
                layer.sow(collections[stored.index(True)], _SOWN, value)
            else:
                met.lost.add(layer.path)
            return output

        with nn.intercept_methods(interceptor):
            output, updates = module.apply(variables, x, mutable=collections, **apply_kwargs)
        return output, updates, met

    output, updates, met = run([own, "batch_stats"] if stats == "self" else [own])
    if met.lost and stats == "input":
        # `nn.scan` and `nn.vmap` return only collections they were told of; BatchNorm's is one.
        try:
            output, updates, met = run([own, "batch_stats"])
        except (TypeError, ValueError, FlaxError) as error:
            raise _not_returned(met.lost) from error
    if met.lost:
        raise _not_returned(met.lost)
    sown = {
        path[:-1]: calls
        for tree in updates.values()
        for path, calls in traverse_util.flatten_dict(core.unfreeze(tree)).items()
        if path[-1] == _SOWN
    }
    _check_complete(variables, sown.keys(), met.called, predicate)
    return output, _collect(sown, met.called)


def _tapped(network, variables, predicate, kwargs, x, *, together):
    """As `_capture`, for a network that shows its layers' calls itself."""
    num_examples = jax.tree.leaves(x)[0].shape[0]
    found: list[tuple[str, int, Block]] = []
    calls = collections.Counter[str]()

    def record(name, layer, inputs, call_kwargs):
        if together and inputs.shape[0] != num_examples:
            raise _ExamplesMerged
        block = _measure(layer, inputs, call_kwargs.get("mask"), together, name)
        calls[name] += 1
        name = name if calls[name] == 1 else f"{name}#{calls[name]}"
        found.append((name, inputs.size // block.mean.size, block))

    output = network.tapped(variables, x, record, select=predicate, **kwargs)
    measured = {tuple(name.split("/")) for name in calls}
    _check_complete(variables, measured, dict.fromkeys(measured), predicate)
    paths, sizes, blocks = zip(*found, strict=True)
    return output, CharVec(blocks, paths, sizes)


def _measure(layer, inputs, mask, together, name):
    """Returns mean and biased variance per example and channel, in two passes and float32."""
    axis = getattr(layer, "axis", -1)
    channels = {a % inputs.ndim for a in (axis if isinstance(axis, (tuple, list)) else (axis,))}
    if 0 in channels:
        raise ValueError(f"{name}: axis {axis} is that of the examples, not channels")
    positions = [a for a in range(int(together), inputs.ndim) if a not in channels]
    inputs = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    mean = jnp.mean(inputs, positions, where=mask)
    var = jnp.var(inputs, positions, where=mask)
    rows = inputs.shape[0] if together else 1
    return Block(mean.reshape(rows, -1), var.reshape(rows, -1))


def _train_on_one(next_fn, args, kwargs, layer):
    """Returns (output, statistics) of a BatchNorm in training mode that sees one example.

    Its update is `momentum * old + (1 - momentum) * statistics`; old is set to 0, for subtracting
    it would lose digits (1e-4 at momentum 0.999).
    """
    if not isinstance(layer, nn.BatchNorm) or layer.momentum == 1 or layer.axis_name is not None:
        raise ValueError(
            f'{_name(layer.path)}: stats="self" needs an nn.BatchNorm with momentum below 1 and '
            'without axis_name; use stats="input"'
        )
    for kind in Block._fields:
        old = layer.get_variable("batch_stats", kind)
        layer.put_variable("batch_stats", kind, jnp.zeros_like(old))
    output = next_fn(*args, **kwargs)
    updated = (layer.get_variable("batch_stats", kind) for kind in Block._fields)
    return output, Block(*(new.reshape(1, -1) / (1 - layer.momentum) for new in updated))


def _check_mode(layer, args, kwargs, stats):
    if not isinstance(layer, nn.BatchNorm):
        return
    evaluation = layer.use_running_average
    if evaluation is None:
        evaluation = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    if evaluation is not None and bool(evaluation) != (stats == "input"):
        found, wanted = ("evaluation", "training") if evaluation else ("training", "evaluation")
        raise ValueError(
            f'{_name(layer.path)} runs in {found} mode, but stats="{stats}" needs {wanted} mode: '
            "pass what your model takes for that, e.g. "
            f"train={stats == 'self'}, on to the extraction (apply_kwargs)"
        )


def _check_complete(variables, measured, called, predicate):
    kept = traverse_util.flatten_dict(core.unfreeze(variables.get("batch_stats", {})))
    normalizing = {path[:-1] for path in kept if path[-1] == "mean"}
    missing = sorted(_name(path) for path in normalizing - measured - called.keys())
    if not measured and missing:
        raise ValueError(
            f"none of the layers with running statistics was seen ({', '.join(missing)}): the "
            "forward pass does not call them, or calls them in a function that was compiled "
            "before the extraction; compile around the extraction only"
        )
    if not measured:
        raise ValueError(
            "no layer of the network was chosen by the predicate (default: nn.BatchNorm): say "
            "where to measure, e.g. predicate=lambda layer: isinstance(layer, nn.LayerNorm)"
        )
    if missing:
        warnings.warn(
            f"layers with running statistics that the forward pass does not call are left out: "
            f"{', '.join(missing)}",
            stacklevel=2,
        )
    others = sorted(_name(path) for path in (normalizing & called.keys()) - measured)
    if others and predicate is is_batch_norm:
        warnings.warn(
            f"layers with running statistics that are no nn.BatchNorm are left out: "
            f"{', '.join(others)}; pass predicate= to measure there too",
            stacklevel=2,
        )


def _collect(sown, called):
    found = []
    for path, calls in sown.items():
        # A layer that was not traced itself is in a module that was, or in one of that kind.
        prefixes = (path[:length] for length in range(len(path), -1, -1))
        position = next((called[prefix] for prefix in prefixes if prefix in called), 0)
        for call, (block, empty) in enumerate(calls):
            name = _name(path) if call == 0 else f"{_name(path)}#{call + 1}"
            facts = _Facts(*empty.shape[-5:-1])
            if block.mean.shape[-2:] != (facts.rows, facts.channels):
                raise ValueError(
                    f"{name}: its batch_stats are stacked along another axis than the first; "
                    "lift them with variable_axes={'batch_stats': 0}"
                )
            found.append(((position, facts.order), name, facts.size, block))
    blocks, paths, sizes = [], [], []
    for _, name, size, block in sorted(found, key=lambda each: each[0]):
        # A lifted layer has further axes in front: one block for each step.
        steps = jax.tree.map(lambda a: a.reshape(-1, *a.shape[-2:]), block)
        for step in range(len(steps.mean)):
            blocks.append(jax.tree.map(lambda a, step=step: a[step], steps))
            paths.append(f"{name}[{step}]" if block.mean.ndim > 2 else name)
            sizes.append(size)
    return CharVec(tuple(blocks), tuple(paths), tuple(sizes))


def _not_returned(lost):
    names = ", ".join(sorted(map(_name, lost)))
    return ValueError(
        f"nothing can be returned from the layers {names}: they sit in a lifted transformation "
        "(nn.scan, nn.vmap) that does not return the collection batch_stats along an axis; lift "
        "it with variable_axes={'batch_stats': 0}, or choose other layers with predicate="
    )


def _name(path):
    return "/".join(path) or "the module itself"
