"""Loops over batches, in the form that the backend runs fast: decided here and nowhere else.

On an accelerator a loop is one `lax.scan` under one `jit`: no host work between steps. XLA's CPU
backend compiles a convolution inside a loop to a generic kernel (a filter gradient becomes about
30 times slower), so there the same step is compiled once and driven from the host. Both forms run
the same step on the same values.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.core import devices

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def steps_from_host() -> bool:
    """Returns True where the host drives each step: on CPU."""
    return jax.default_backend() == "cpu"


def scan(step: Step) -> Callable[..., tuple[Any, Any]]:
    """Returns `run(constants, carry, xs, length=None) -> (carry, ys)`: folds `step` over `xs`.

    Args:
      step: `step(constants, carry, x) -> (carry, y)`; pure; `y` a pytree of arrays.

    Returns:
      A compiled function of `constants` (any pytree, the same at every step), `carry` (donated:
      its buffers are gone after the call) and `xs` (leading axis: steps). `ys` are stacked along
      a new leading axis. With `length`, only that many steps are taken; another length does not
      compile again, as shorter `xs` would. `steps_from_host()` is asked at each call.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def whole(constants, carry, xs):
        return jax.lax.scan(functools.partial(step, constants), carry, xs)

    @functools.partial(jax.jit, donate_argnums=1)
    def beginning(constants, carry, xs, length):
        shapes = jax.eval_shape(functools.partial(step, constants), carry, at(xs, 0))[1]

        def step_or_not(carry, index):
            def stay(carry):
                return carry, jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)

            def go(carry):
                return step(constants, carry, at(xs, index))

            return jax.lax.cond(index < length, go, stay, carry)

        return jax.lax.scan(step_or_not, carry, jnp.arange(jax.tree.leaves(xs)[0].shape[0]))

    @functools.partial(jax.jit, donate_argnums=1)
    def single(constants, carry, xs, index):
        return step(constants, carry, at(xs, index))

    def at(xs, index):
        return jax.tree.map(lambda x: x[index], xs)

    stack = jax.jit(lambda ys: jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys))

    def run(constants, carry, xs, length=None):
        num_steps = jax.tree.leaves(xs)[0].shape[0] if length is None else length
        if num_steps == 0 or not steps_from_host():
            if length is None:
                return whole(constants, carry, xs)
            carry, ys = beginning(constants, carry, xs, length)
            return carry, jax.tree.map(lambda y: y[:length], ys)
        ys = []
        for index in range(num_steps):
            carry, y = single(constants, carry, xs, index)
            ys.append(y)
        return carry, stack(ys) if jax.tree.leaves(ys) else ys[0]

    return run


def inner_scan(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """Returns `lax.scan(step, carry, xs)`, for a short loop inside a compiled step.

    Written out where convolutions inside loops are slow: its length there is that of the program.
    (`lax.scan(..., unroll=True)` leaves a loop of one turn, which XLA's CPU backend keeps.)
    """
    if not steps_from_host():
        return jax.lax.scan(step, carry, xs)
    ys = []
    for index in range(jax.tree.leaves(xs)[0].shape[0]):
        carry, y = step(carry, jax.tree.map(lambda x, index=index: x[index], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def map_batches(
    fn: Callable[[Any, Any], Any], *, batch_size: int | None = None, mesh: jax.sharding.Mesh
) -> Callable[[Any, Any], Any]:
    """Returns `run(constants, xs) -> ys`, `fn` applied to all examples a batch at a time.

    Memory beyond inputs and outputs stays that of one batch. The last batch is filled up by
    repeating the last example, whose extra outputs are dropped; so `fn` must treat examples one
    by one (a network in evaluation mode does).

    Args:
      fn: `fn(constants, batch) -> outputs`; leading axis of both: examples.
      batch_size: most examples in a call of `fn`, see `even_batches`.
      mesh: devices over which each batch is spread.
    """
    fold = fold_batches(
        lambda constants, carry, batch, present: (carry, fn(constants, batch)),
        batch_size=batch_size,
        mesh=mesh,
    )
    return lambda constants, xs: fold(constants, (), xs)[1]


def fold_batches(
    fn: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]],
    *,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Returns `run(constants, carry, xs) -> (carry, ys)`: as `map_batches`, with sums on the way.

    Args:
      fn: `fn(constants, carry, batch, present) -> (carry, outputs)`; `present`, bool [B], is False
        for the repeated examples that fill up the last batch: leave them out of what is carried.
      batch_size: most examples in a call of `fn`, see `even_batches`.
      mesh: devices over which each batch is spread.
    """

    def step(constants, carry, batch):
        return fn(constants, carry, *devices.constrain_examples(batch, mesh))

    apply = scan(step)

    def run(constants, carry, xs):
        num_examples = jax.tree.leaves(xs)[0].shape[0]
        size, num_batches = even_batches(num_examples, batch_size, mesh)
        present = jnp.arange(size * num_batches).reshape(num_batches, size) < num_examples
        carry, ys = apply(constants, carry, (_fold(xs, size, num_batches), present))
        return carry, _unfold(ys, num_examples)

    return run


def even_batches(
    num_examples: int, batch_size: int | None, mesh: jax.sharding.Mesh
) -> tuple[int, int]:
    """Returns (size, number) of equal batches that cover all examples and waste little work.

    As few batches as `batch_size` allows, each no larger than it must be: 1,250 examples at 512 are
    3 batches of 417. Sizes are multiples of the number of devices, and so may exceed `batch_size`.
    None stands for 512, on CPU for 128: a narrow ResNet's forward pass takes two thirds of the time
    where its activations stay in the caches.
    """
    if batch_size is None:
        batch_size = 128 if steps_from_host() else 512
    num_batches = math.ceil(num_examples / batch_size)
    size = math.ceil(num_examples / num_batches / mesh.size) * mesh.size
    return size, math.ceil(num_examples / size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fold(xs, size, num_batches):
    def fold(x):
        missing = size * num_batches - x.shape[0]
        x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return x.reshape(num_batches, size, *x.shape[1:])

    return jax.tree.map(fold, xs)


@functools.partial(jax.jit, static_argnums=1)
def _unfold(ys, num_examples):
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:num_examples], ys)
