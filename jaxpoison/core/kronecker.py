"""A symmetric matrix over parameters as blocks whose eigenvectors are known.

    layers   Q = Q_in (x) Q_out,  so that  Q^T U = Q_in^T U Q_out  for U = [kernel; bias]  [d, F]
    others   small blocks with their eigenvectors, or a diagonal

Eigenvalues s are an array over the eigenvectors. Any function of the matrix is then cheap, and
exact for the blocks: C u = Q (s * Q^T u), and (C + damping I)^-1 v = Q (Q^T v / (s + damping)).
No damping is ever split between the two factors.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpoison.core.checks import listing
from jaxpoison.core.layers import Layer
from jaxpoison.core.trees import Params, at_least_float32, named_leaves

HIGHEST = lax.Precision.HIGHEST
Scale = Callable[[jax.Array], jax.Array]


def _block(*static: str) -> Callable[[type[Any]], type[Any]]:
    """Returns the decorator of a block: a frozen pytree whose fields `static` are no arrays.

    Two blocks are equal if they are one and the same; so they may be looked up, arrays and all.
    """

    def decorate(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = [field.name for field in dataclasses.fields(cls) if field.name not in static]
        return jax.tree_util.register_dataclass(cls, names, list(static))

    return decorate


@_block("layer")
class LayerBlock:
    """The block of a linear layer.

    Attributes:
      inputs: orthonormal eigenvectors over the rows of the kernel and the bias, `[d, d]`.
      outputs: those over the columns, `[F, F]`.
      eigenvalues: `[d, F]`, not negative.
      layer: which weights they are.
    """

    inputs: jax.Array
    outputs: jax.Array
    eigenvalues: jax.Array
    layer: Layer

    @property
    def names(self) -> tuple[str, ...]:
        return (self.layer.kernel,) if self.layer.bias is None else (
            self.layer.kernel, self.layer.bias,
        )  # fmt: skip

    def scaled(self, leaves: list[jax.Array], scale: Scale) -> list[jax.Array]:
        kernel, *bias = leaves
        width = len(self.outputs)
        u = jnp.concatenate([leaf.reshape(-1, width) for leaf in leaves])
        u = _rotated(u, self.inputs, self.outputs) * scale(self.eigenvalues)
        u = _rotated(u, self.inputs.T, self.outputs.T)
        last = len(u) - len(bias)
        return [u[:last].reshape(kernel.shape), *(u[last].reshape(b.shape) for b in bias)]


@_block("names")
class DenseBlock:
    """One block over several small leaves, laid end to end.

    Attributes:
      vectors: orthonormal eigenvectors, `[n, n]`.
      eigenvalues: `[n]`, not negative.
      names: paths of the leaves.
    """

    vectors: jax.Array
    eigenvalues: jax.Array
    names: tuple[str, ...]

    def scaled(self, leaves: list[jax.Array], scale: Scale) -> list[jax.Array]:
        flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
        shares = jnp.matmul(flat, self.vectors, precision=HIGHEST) * scale(self.eigenvalues)
        flat = jnp.matmul(self.vectors, shares, precision=HIGHEST)
        found = []
        for leaf in leaves:
            found.append(flat[: leaf.size].reshape(leaf.shape))
            flat = flat[leaf.size :]
        return found


@_block("names")
class DiagonalBlock:
    """The diagonal over one leaf.

    Attributes:
      eigenvalues: of the leaf's shape, not negative.
      names: the path of the leaf, alone.
    """

    eigenvalues: jax.Array
    names: tuple[str, ...]

    def scaled(self, leaves: list[jax.Array], scale: Scale) -> list[jax.Array]:
        return [leaves[0] * scale(self.eigenvalues)]


@_block()
class KroneckerFactors:
    """A positive semi-definite matrix C over parameters, in blocks; see the module.

    A pytree, which `jit`ted functions may take and return. Made by `curvature.kfac` and
    `curvature.ekfac`.

    Attributes:
      blocks: a `LayerBlock` for each layer, then a `DenseBlock` or a `DiagonalBlock` for each group
        of other leaves.
    """

    blocks: tuple[Any, ...]

    def product(self, u: Params) -> Params:
        """Returns C u, for u shaped like the parameters."""
        return self._scaled(u, lambda eigenvalues: eigenvalues)

    def solve(self, v: Params, damping: Any) -> Params:
        """Returns (C + damping I)^-1 v, for v shaped like the parameters; exact for this C.

        Args:
          v: pytree of arrays.
          damping: positive, in the units of C.

        Raises:
          ValueError: if the leaves of `v` are not those that C is a matrix over.
        """
        return self._scaled(v, lambda eigenvalues: 1 / (eigenvalues + damping))

    def _scaled(self, u, scale):
        leaves, treedef = named_leaves(u)
        wide = at_least_float32(leaves)
        names = {name for block in self.blocks for name in block.names}
        if names != leaves.keys():
            raise ValueError(
                f"the factors are over other parameters: only in the factors "
                f"[{listing(sorted(names - leaves.keys()))}], only in what was given "
                f"[{listing(sorted(leaves.keys() - names))}]; make them of the same parameters"
            )
        for block in self.blocks:
            found = block.scaled([wide[name] for name in block.names], scale)
            wide |= dict(zip(block.names, found, strict=True))
        return treedef.unflatten([wide[name].astype(x.dtype) for name, x in leaves.items()])


def _rotated(u: jax.Array, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """Returns inputs^T u outputs, for u `[d, F]`, in full precision."""
    return jnp.linalg.multi_dot([inputs.T, u, outputs], precision=HIGHEST)
