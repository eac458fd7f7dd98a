"""What the layers of a tapped function see: the rows that their kernels multiply.

Adding a perturbation to each output makes the gradients to the outputs those to the perturbations;
gradients to the kernels are never computed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import get_opaque_trace_state

from jaxpoison.core.batches import Batch, split_batch
from jaxpoison.core.checks import listing
from jaxpoison.core.layers import Layer, TappedFn
from jaxpoison.core.spmd import device_local
from jaxpoison.core.trees import Params, at_least_float32, named_leaves


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer, of one example.

    Attributes:
      layer: which weights it has.
      output: its shape and dtype.
      width: numbers of the output at one position.
    """

    layer: Layer
    output: jax.ShapeDtypeStruct
    width: int


def calls_of(tapped: TappedFn, params: Params, batch: Batch) -> tuple[tuple[Call, ...], int]:
    """Returns (the calls of layers, the number of outputs) of one example; nothing is computed.

    Raises:
      ValueError: if `tapped` hands no layer of `params` to its tap, or a layer does not fit.
    """
    inputs, _ = split_batch(batch)
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *jnp.shape(x)[1:]), jnp.result_type(x)), inputs
    )
    calls: list[Call] = []

    def forward(params, x):
        record = Record(named_leaves(params)[0], None)
        outputs = tapped(params, x, record)
        calls[:] = record.calls
        return outputs

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    outputs = jax.eval_shape(forward, shapes, one)
    if not calls:
        raise ValueError(
            "tapped hands no layer of params to its tap; params hold "
            f"{listing(named_leaves(params)[0], 40)}: call tap(layer, inputs, output) where a "
            "linear layer is computed, with the paths of its weights, or make the function by "
            "network.tapped_logits"
        )
    return tuple(calls), sum(leaf.size for leaf in jax.tree.leaves(outputs))


def layers_of(calls: Sequence[Call]) -> tuple[Layer, ...]:
    """Returns the layers that are called, in the order of their first calls."""
    return tuple(dict.fromkeys(call.layer for call in calls))


def by_layer(calls: Sequence[Call], values: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """Returns one array for each layer: calls of the same layer are further positions."""
    return [
        jnp.concatenate(
            [v for call, v in zip(calls, values, strict=True) if call.layer == layer], axis
        )
        for layer in layers_of(calls)
    ]


def seen(
    tapped: TappedFn, params: Params, others: dict[str, jax.Array], calls: Sequence[Call], x: Any
) -> tuple[Any, Any, list[jax.Array]]:
    """Returns (outputs, pull, rows) of one example.

    Args:
      tapped: the function.
      params: its parameters.
      others: those leaves, by name, whose gradients are wanted as well.
      calls: `calls_of` it.
      x: the example's inputs, with a leading axis of 1.

    Returns:
      The outputs, a function from their cotangents to (gradients to the output of each call, those
      to `others`), and the rows that each call's kernel multiplies, `[T, d]`.
    """
    leaves, treedef = named_leaves(params)
    zeros = [jnp.zeros(call.output.shape, call.output.dtype) for call in calls]

    def forward(perturbations, others):
        record = Record(leaves, perturbations)
        outputs = tapped(treedef.unflatten((leaves | others).values()), x, record)
        return at_least_float32(outputs), record.rows

    return jax.vjp(forward, device_local(zeros, params, x), others, has_aux=True)


class Record:
    """A tap that keeps the rows of each call and adds a perturbation to its output."""

    def __init__(self, leaves, perturbations):
        self.leaves, self.perturbations = leaves, perturbations
        self.calls: list[Call] = []
        self.rows: list[jax.Array] = []
        self.trace = get_opaque_trace_state()

    def __call__(self, layer, inputs, output):
        if layer.kernel not in self.leaves and layer.bias not in self.leaves:
            return output
        if get_opaque_trace_state() != self.trace:
            raise ValueError(
                f"the layer of {layer.kernel} is called in a transformation inside the network "
                "(jit, remat, scan, vmap), which its input cannot leave: call it outside of one, "
                "or leave its tap out"
            )
        self._check(layer, output)
        kernel = self.leaves[layer.kernel]
        width = math.prod(layer.output_shape(kernel.shape))
        rows = at_least_float32(layer.rows(lax.stop_gradient(inputs), kernel.shape))
        if rows.shape != (output.size // width, kernel.size // width):
            raise ValueError(
                f"the layer of {layer.kernel} {kernel.shape} has inputs {inputs.shape} and output "
                f"{output.shape}, which do not fit {layer}: mend its strides, padding or dilation, "
                "or leave its tap out"
            )
        if layer.bias is not None:
            rows = jnp.concatenate([rows, jnp.ones_like(rows[:, :1])], axis=1)
        self.calls.append(Call(layer, jax.ShapeDtypeStruct(output.shape, output.dtype), width))
        self.rows.append(rows)
        if self.perturbations is None:
            return output
        return output + self.perturbations[len(self.calls) - 1]

    def _check(self, layer, output):
        for name in (layer.kernel, layer.bias):
            if name is not None and name not in self.leaves:
                raise ValueError(
                    f"{layer} names {name!r}, which params do not hold; there are: "
                    f"{listing(self.leaves, 40)}"
                )
        for call in self.calls:
            if call.layer.kernel == layer.kernel and call.layer != layer:
                raise ValueError(
                    f"{layer.kernel} is the kernel of two layers, {call.layer} and {layer}: tap "
                    "neither, and it gets its diagonal"
                )
        wanted = layer.output_shape(self.leaves[layer.kernel].shape)
        shapes = [output.shape[max(output.ndim - len(wanted), 0) :]]
        if layer.bias is not None:
            shapes.append(self.leaves[layer.bias].shape)
        if not wanted or any(shape != wanted for shape in shapes):
            raise ValueError(
                f"the output {output.shape} of {layer}, and its bias if it has one, must end in "
                f"{wanted}, as its kernel {self.leaves[layer.kernel].shape} does: hand the output "
                "to tap before anything else is done to it"
            )
