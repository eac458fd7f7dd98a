"""Extreme eigenvalues of a curvature matrix: what to choose damping and scale by."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpoison.core.checks import check_count
from jaxpoison.core.spmd import device_local
from jaxpoison.core.trees import LinearMap, Params, at_least_float32, dot, norm
from jaxpoison.solvers.base import Loop, choose_loop


class Spectrum(NamedTuple):
    """Both ends of the spectrum of a symmetric matrix.

    Attributes:
      smallest: estimate of the most negative eigenvalue, never below it; shape ().
      largest: estimate of the largest eigenvalue, never above it; shape ().
      smallest_error: some eigenvalue lies within this of `smallest`; shape ().
      largest_error: some eigenvalue lies within this of `largest`; shape ().
    """

    smallest: jax.Array
    largest: jax.Array
    smallest_error: jax.Array
    largest_error: jax.Array


def spectrum(matvec: LinearMap, like: Params, key: jax.Array, *, num_steps: int = 32) -> Spectrum:
    """Returns the ends of the spectrum of a symmetric `matvec`, by the Lanczos method.

    What it is for: H + damping I is positive definite, as `cg` needs, if damping > -`smallest`; a
    `lissa` on full batches converges if scale > (damping + `largest`) / 2; `cg` takes about
    sqrt((damping + `largest`) / damping) steps for each factor of e^2 in the residual.

    The start vectors are orthogonalized fully, so the memory is that of `num_steps` vectors.
    Not differentiated through. Lanczos 1950; the error bounds are those of Parlett 1980, ch. 13.

    Args:
      matvec: u -> H u, linear and symmetric: `curvature.product(...)`.
      like: pytree with the shapes and dtypes of u: the parameters.
      key: PRNG key of the start vector.
      num_steps: products with H; at least 1. More steps than dimensions do no harm.

    Raises:
      ValueError: if num_steps < 1.
    """
    check_count(num_steps=num_steps)
    start = random_start(like, key)

    def run(start, loop):
        _, diagonal, off_diagonal = lanczos(matvec, num_steps, start, loop)
        ritz, vectors = eigh_tridiagonal(diagonal, off_diagonal)
        errors = jnp.abs(off_diagonal[-1] * vectors[-1])
        return Spectrum(ritz[0], ritz[-1], errors[0], errors[-1])

    return lax.stop_gradient(run(start, choose_loop(run, start, matvec)))


def lanczos(
    matvec: LinearMap, num_steps: int, start: Params, loop: Loop
) -> tuple[Params, jax.Array, jax.Array]:
    """Returns the basis, and the diagonals of the tridiagonal matrix that it makes of `matvec`.

    Args:
      matvec: u -> H u, linear and symmetric.
      num_steps: products with H, m.
      start: unit vector, as from `random_start`.
      loop: how the steps are run.

    Returns:
      Orthonormal vectors, shaped like `start` with a leading axis `[m]`: zeros from where the
      vectors before span an invariant subspace. The diagonal `[m]`, there filled up with its first
      entry; and what stands next to it, `[m]`, whose last entry is the size of the remainder.
    """
    if not loop.from_host:
        start = device_local(start, jax.eval_shape(matvec, start))

    def against(basis, u):  # removes from u what lies in the span of the basis
        shares = jax.vmap(functools.partial(dot, u))(basis)
        inside = jax.tree.map(
            lambda b: jnp.tensordot(shares, b, axes=1, precision="highest"), basis
        )
        return jax.tree.map(jnp.subtract, u, inside)

    def step(index, state):
        basis, diagonal, off_diagonal, q = state
        basis = jax.tree.map(lambda b, x: b.at[index].set(x), basis, q)
        hq = matvec(q)
        alpha = dot(q, hq)
        following, beta = _normalized(against(basis, against(basis, hq)))
        # Rounding is all that is left of a vector in an invariant subspace: the method is done.
        # The rest of the tridiagonal matrix then repeats its first entry, which lies inside the
        # spectrum and moves no end of it.
        size = jnp.sqrt(alpha**2 + jnp.sum(diagonal**2) + jnp.sum(off_diagonal**2))
        alive = beta > 10 * jnp.finfo(beta.dtype).eps * size
        following = jax.tree.map(lambda x: jnp.where(alive, x, 0).astype(x.dtype), following)
        ended = dot(q, q) == 0
        alpha = jnp.where(ended, diagonal[0], alpha)
        beta = jnp.where(alive & ~ended, beta, 0.0)
        return basis, diagonal.at[index].set(alpha), off_diagonal.at[index].set(beta), following

    basis = jax.tree.map(lambda x: jnp.zeros_like(x, shape=(num_steps, *x.shape)), start)
    basis = device_local(basis, start)
    zeros = jnp.broadcast_to(jnp.zeros_like(dot(start, start)), (num_steps,))
    state = basis, zeros, zeros, start
    state = loop.fori_loop(0, num_steps, loop.with_products(step), state)
    return state[:3]


def eigh_tridiagonal(diagonal: jax.Array, off_diagonal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns eigenvalues, rising, and eigenvectors of what `lanczos` found."""
    within = off_diagonal[:-1]
    return jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(within, 1) + jnp.diag(within, -1))


def random_start(like: Params, key: jax.Array) -> Params:
    """Returns a random unit vector shaped like `like`, in at least float32."""
    return _normalized(_random_like(like, key))[0]


def power_iteration(
    matvec: LinearMap, like: Params, key: jax.Array, num_steps: int = 20
) -> jax.Array:
    """Returns an estimate of max |lambda| of a symmetric `matvec`, from below, shape ().

    It is ||H u|| for the unit vector u reached after `num_steps` products, never above the truth
    and not below the Rayleigh quotient. Needs the memory of two vectors; `spectrum` needs fewer
    products. Not differentiated through.

    Args:
      matvec: u -> H u, linear and symmetric.
      like: pytree with the shapes and dtypes of u.
      key: PRNG key of the start vector.
      num_steps: products with H; at least 1.
    """
    check_count(num_steps=num_steps)

    def run(like, loop):
        return top_eigenvalue(matvec, like, key, num_steps, loop)

    return run(like, choose_loop(run, like, matvec))


def top_eigenvalue(
    matvec: LinearMap, like: Params, key: jax.Array, num_steps: int, loop: Loop
) -> jax.Array:
    def step(_, state):
        return _normalized(matvec(state[0]))

    step = loop.with_products(step)
    # The first product stands outside the loop: it settles over which devices the state varies.
    state = step(0, _normalized(_random_like(like, key)))
    return lax.stop_gradient(loop.fori_loop(1, num_steps, step, state)[1])


def _random_like(like, key):
    leaves, treedef = jax.tree.flatten(at_least_float32(like))
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def _normalized(u):
    """Returns u / ||u|| (zero if u is) and ||u||."""
    size = norm(u)
    inverse = jnp.where(size > 0, 1.0 / jnp.where(size > 0, size, 1), 0.0)
    return jax.tree.map(lambda x: (inverse * x).astype(x.dtype), u), size
