"""Linear algebra on pytrees: each is one vector of the concatenation of its leaves."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpoison.curvature import Params


def dot(x: Params, y: Params) -> jax.Array:
    # Full precision: the default on accelerators rounds the factors to 8 or 11 bits.
    parts = jax.tree.map(lambda a, b: jnp.vdot(a, b, precision=lax.Precision.HIGHEST), x, y)
    return jnp.asarray(sum(jax.tree.leaves(parts)))


def norm(x: Params) -> jax.Array:
    return jnp.sqrt(dot(x, x))


def add_scaled(x: Params, scale: Any, y: Params) -> Params:
    return jax.tree.map(lambda a, b: (a + scale * b).astype(a.dtype), x, y)
