"""Layers as curvature sees them: which weights they hold, and what these multiply.

A *tapped function* is a network that hands each linear layer to `tap` as it computes it,

    def apply(params, x, tap=no_tap):
        y = x @ params["w"] + params["b"]
        y = tap(DenseLayer("w", "b"), x, y)
        ...

and goes on with what it gets back. `no_tap` gives back the output, so that the same function is
the network itself. Whoever passes another tap sees the inputs and may add to the outputs, which is
all that gradients to pre-activations need.
"""

import dataclasses
import itertools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """A linear layer, output = inputs @ kernel + bias, on the last axis or axes.

    All other axes are positions: examples, and whatever else shares the weights, such as tokens.

    Attributes:
      kernel: path of the kernel `[d, F]` in the parameters, keys joined by slashes, as in
        "hidden/kernel".
      bias: path of the bias `[F]`; None if there is none.
      num_axes: how many axes of the inputs the kernel sums over, its first ones. The kernel
        `[heads, d, F]` of the last layer of attention has 2; `[d, heads, F]` has 1.
    """

    kernel: str
    bias: str | None = None
    num_axes: int = 1

    def output_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the output at one position."""
        return kernel_shape[self.num_axes :]

    def rows(self, inputs: jax.Array, kernel_shape: tuple[int, ...]) -> jax.Array:
        """Returns `[T, d]`: what the kernel multiplies, one row for each position."""
        return inputs.reshape(-1, math.prod(kernel_shape[: self.num_axes]))


@dataclasses.dataclass(frozen=True)
class ConvLayer:
    """A convolution with channels last, of any number of spatial axes, without groups.

    Attributes:
      kernel: path of the kernel `[*window, C, F]`, as for `DenseLayer`.
      bias: path of the bias `[F]`; None if there is none.
      strides: of each spatial axis; None: 1.
      padding: (low, high) of each spatial axis, or "SAME" or "VALID".
      dilation: of the kernel, for each spatial axis; None: 1.
    """

    kernel: str
    bias: str | None = None
    strides: tuple[int, ...] | None = None
    padding: str | tuple[tuple[int, int], ...] = "SAME"
    dilation: tuple[int, ...] | None = None

    def output_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the output at one position."""
        return kernel_shape[-1:]

    def rows(self, inputs: jax.Array, kernel_shape: tuple[int, ...]) -> jax.Array:
        """Returns `[T, window C]`: the patches, in the order of the kernel's entries."""
        window, channels = kernel_shape[:-2], inputs.shape[-1]
        strides = self.strides or (1,) * len(window)
        dilation = self.dilation or (1,) * len(window)
        x = inputs.reshape(-1, *inputs.shape[inputs.ndim - len(window) - 1 :])
        reach = tuple(d * (size - 1) + 1 for d, size in zip(dilation, window, strict=True))
        padding = self.padding
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        ends = [size - r + 1 for size, r in zip(x.shape[1:-1], reach, strict=True)]
        shifted = [
            x[
                (
                    slice(None),
                    *(
                        slice(i * d, i * d + end, stride)
                        for i, d, end, stride in zip(at, dilation, ends, strides, strict=True)
                    ),
                )
            ]
            for at in itertools.product(*map(range, window))
        ]
        return jnp.concatenate(shifted, axis=-1).reshape(-1, math.prod(window) * channels)


Layer = DenseLayer | ConvLayer


class Tap(Protocol):
    """`tap(layer, inputs, output) -> output`, called where a layer has computed its output."""

    def __call__(self, layer: Layer, inputs: jax.Array, output: jax.Array, /) -> jax.Array: ...


class TappedFn(Protocol):
    """`tapped(params, inputs, tap) -> outputs`, which hands its linear layers to `tap`."""

    def __call__(self, params: Any, inputs: Any, tap: Tap, /) -> Any: ...


def no_tap(layer: Layer, inputs: jax.Array, output: jax.Array) -> jax.Array:
    """Returns `output`: the tap that looks at nothing."""
    del layer, inputs
    return output
