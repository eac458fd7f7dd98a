"""Linear algebra on pytrees: each is one vector of the concatenation of its leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = Any  # a pytree of arrays
LinearMap = Callable[[Params], Params]


def dot(x: Params, y: Params) -> jax.Array:
    # Full precision: the default on accelerators rounds the factors to 8 or 11 bits.
    parts = jax.tree.map(lambda a, b: jnp.vdot(a, b, precision=lax.Precision.HIGHEST), x, y)
    return jnp.asarray(sum(jax.tree.leaves(parts)))


def norm(x: Params) -> jax.Array:
    return jnp.sqrt(dot(x, x))


def add_scaled(x: Params, scale: Any, y: Params) -> Params:
    return jax.tree.map(lambda a, b: (a + scale * b).astype(a.dtype), x, y)


def at_least_float32(tree: Any) -> Any:
    """Returns `tree` with half-precision leaves raised to float32; float64 stays."""

    def raise_precision(x):
        x = jnp.asarray(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(raise_precision, tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Returns `tree` with the dtypes of `like`."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), tree, like)


def named_leaves(tree: Params) -> tuple[dict[str, jax.Array], Any]:
    """Returns the leaves by path, keys joined by slashes, in order; and the structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.asarray(leaf)
        for path, leaf in leaves
    }
    if len(named) < len(leaves):
        raise ValueError("two parameters have the same path: name them differently")
    return named, treedef
