"""Functions as programs: whether values can be looked at now, and compilation without constants."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.sharding import AxisType


def is_traced(*trees: Any) -> bool:
    """Returns whether any leaf is a tracer, or all operations are being traced (inside `jit`)."""
    leaves = (*jax.tree.leaves(trees), lax.full((), 0))
    return any(isinstance(leaf, core.Tracer) for leaf in leaves)


def is_visible(*trees: Any) -> bool:
    """Returns whether a check may read these arrays: not traced, and all on this process.

    Arrays on a mesh with explicit axes are left alone: taking rows of them is ambiguous.
    """

    def is_readable(leaf):
        if not isinstance(leaf, jax.Array):
            return True
        axis_types = getattr(getattr(leaf.sharding, "mesh", None), "axis_types", ())
        return leaf.is_fully_addressable and AxisType.Explicit not in axis_types

    return not is_traced(trees) and all(map(is_readable, jax.tree.leaves(trees)))


def hoist(fn: Callable, *arguments: Any) -> tuple[Callable, list[Any]]:
    """Returns `hoisted(constants, *arguments)` and the constants: all arrays that `fn` closes over.

    `jax.closure_convert` leaves integers and keys inside, which then leak out of `shard_map`.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    structure = jax.tree.structure(shape)

    def hoisted(constants, *arguments):
        leaves = core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(arguments))
        return structure.unflatten(leaves)

    return hoisted, closed.consts


def compiled(fn: Callable) -> Callable:
    """Returns `jax.jit(fn)`, but with the arrays that `fn` closes over passed as arguments.

    XLA would fold them as constants, at length. It compiles once for each shape of the arguments;
    the programs live as long as what is returned.
    """
    programs = {}

    def run(*arguments):
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if (structure, shapes) not in programs:
            hoisted, constants = hoist(fn, *arguments)
            programs[structure, shapes] = jax.jit(hoisted), constants
        program, constants = programs[structure, shapes]
        return program(constants, *arguments)

    return run


def jit_once(fn: Callable, static_argnums: tuple[int, ...] = ()) -> Callable:
    """Returns `jax.jit(fn)` for what runs once: it compiles several times faster and runs slower.

    LLVM's optimizations are most of what the initial values of a network take. Values agree with
    those of `jax.jit` to rounding. Under a transformation `fn` becomes part of the program around
    it.
    """
    options = {"xla_backend_optimization_level": 0}
    outside = jax.jit(fn, static_argnums=static_argnums, compiler_options=options)
    inside = jax.jit(fn, static_argnums=static_argnums)  # options are for whole programs

    @functools.wraps(fn)
    def run(*arguments):
        return (inside if is_traced(arguments) else outside)(*arguments)

    return run
