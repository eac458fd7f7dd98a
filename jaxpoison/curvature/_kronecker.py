"""K-FAC and EK-FAC: the Gauss-Newton matrix in blocks, one Kronecker product for each layer.

For a layer with inputs a_t (patches, for a convolution; with a 1 appended where there is a bias) at
positions t = 1..T, and the gradients g_kt to its outputs of the network's outputs times the k-th
column of a root of their Hessian, L L^T = d^2 l / df^2, means over examples:

    block          C = E sum_k vec(P_k) vec(P_k)^T,     P_k = sum_t a_t g_kt^T          exact
    K-FAC          A (x) G,   A = E sum_t a_t a_t^T,    G = E (1/T) sum_t sum_k g_kt g_kt^T
    EK-FAC         (Q_A (x) Q_G) diag(s) (Q_A (x) Q_G)^T,     s = E sum_k (Q_A^T P_k Q_G)^2

Q_A and Q_G are the eigenvectors of A and G; s is the diagonal of the exact block in that basis, the
best that a diagonal can be in Frobenius norm. Martens & Grosse 2015 (arXiv:1503.05671); Grosse &
Martens 2016 (arXiv:1602.01407), with their homogeneity over positions; George et al. 2018
(arXiv:1806.03884), for influence Grosse et al. 2023 (arXiv:2308.03296). For the cross-entropy of
logits the sum over k is the expectation over the model's own labels: it is the true Fisher matrix,
not the empirical one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxpoison.core import loops
from jaxpoison.core.batches import (
    Batch,
    Stream,
    check_independent,
    chunks,
    count_examples,
    losses_per_example,
    normalized_weights,
    split_batch,
)
from jaxpoison.core.checks import check_count, check_no_nan, shortened
from jaxpoison.core.kronecker import (
    HIGHEST,
    DenseBlock,
    DiagonalBlock,
    KroneckerFactors,
    LayerBlock,
)
from jaxpoison.core.layers import TappedFn, no_tap
from jaxpoison.core.programs import is_traced
from jaxpoison.core.spmd import AxisName, device_local, mean_over_devices
from jaxpoison.core.taps import Call, by_layer, calls_of, layers_of, seen
from jaxpoison.core.trees import Params, at_least_float32, named_leaves

OutputLoss = Callable[[Any, Any], jax.Array]
_MOST_OUTPUTS = 4096


def ekfac(
    tapped: TappedFn,
    output_loss: OutputLoss,
    params: Params,
    batch: Batch | Stream,
    *,
    weights: jax.Array | None = None,
    chunk_size: int | None = None,
    num_samples: int | None = None,
    key: jax.Array | None = None,
    block_size: int = 1024,
    axis_name: AxisName = None,
) -> KroneckerFactors:
    """Returns the EK-FAC approximation of the Gauss-Newton matrix of a mean loss over `batch`.

    Two passes over the data: one for the eigenvectors, one for the eigenvalues in them. Each is one
    forward pass and K backward passes without gradients to kernels. Leaves that no layer holds,
    such as the scales of BatchNorm, get exact blocks, or the exact diagonal where they are large.
    What is left out is the curvature between layers: `solvers.ekfac` and `solvers.cg` measure what
    that does to an answer.

    Args:
      tapped: `tapped(params, inputs, tap) -> outputs[B, ...]`, see `core.layers`; examples
        independent. `network.tapped_logits` makes it of a Flax model. A layer whose weights are not
        in `params` is held fixed.
      output_loss: `output_loss(outputs, targets) -> losses[B]`, convex in `outputs`: negative
        eigenvalues of its Hessian are left out. With many outputs, as of a language model, it must
        know a root of its Hessian, as `cross_entropy` does.
      params: where the matrix is taken; half-precision leaves are raised to float32.
      batch: `(inputs, targets)` with leading axis N, or a `Stream` of such, then outside `jit`.
      weights: non-negative, `[N]`, as for `product`.
      chunk_size: examples per pass; memory is that of a chunk's activations for K outputs, and of
        its patches. None: all at once.
      num_samples: None for the sum over all K outputs of an example. A number for so many random
        signs instead, each the sum over k with random signs, which is right on average and costs
        `num_samples` backward passes rather than K. For a language model K is tokens times
        vocabulary, and 1 is usual.
      key: PRNG key, for `num_samples`.
      block_size: the most numbers in an exact block of leaves outside of layers. In the order of
        `params`, leaves share a block as long as they fit; a leaf that does not gets its diagonal.
      axis_name: as for `product`.

    Returns:
      Factors with `product(u)` and `solve(v, damping)`; take them to `solvers.ekfac` or
      `solvers.kronecker_preconditioner`. Not differentiated through.

    Raises:
      ValueError: for a function that taps no layer of `params`, or a layer that does not fit its
        kernel or is called inside a transformation of its own; num_samples without a key; more than
        4,096 outputs of an example without num_samples or without a root; and as `product`.
    """
    run = functools.partial(_factors, tapped, output_loss, params, batch, corrected=True)
    settings = {"weights": weights, "chunk_size": chunk_size, "num_samples": num_samples}
    return run(**settings, key=key, block_size=block_size, axis_name=axis_name)


def kfac(
    tapped: TappedFn,
    output_loss: OutputLoss,
    params: Params,
    batch: Batch | Stream,
    *,
    weights: jax.Array | None = None,
    chunk_size: int | None = None,
    num_samples: int | None = None,
    key: jax.Array | None = None,
    block_size: int = 1024,
    axis_name: AxisName = None,
) -> KroneckerFactors:
    """Returns the K-FAC approximation of the Gauss-Newton matrix of a mean loss over `batch`.

    One pass over the data in place of `ekfac`'s two; arguments as there. It is exact for one layer
    without weight sharing where inputs and gradients are independent, as for squared errors.
    """
    run = functools.partial(_factors, tapped, output_loss, params, batch, corrected=False)
    settings = {"weights": weights, "chunk_size": chunk_size, "num_samples": num_samples}
    return run(**settings, key=key, block_size=block_size, axis_name=axis_name)


def _factors(
    tapped, output_loss, params, batch, *,
    corrected, weights, chunk_size, num_samples, key, block_size, axis_name,
):  # fmt: skip
    check_count(block_size=block_size)
    if num_samples is not None:
        check_count(num_samples=num_samples)
        if key is None:
            raise ValueError("num_samples draws at random: pass a PRNG key, key=jax.random.key(0)")
    for name, value in (("tapped", tapped), ("output_loss", output_loss)):
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {shortened(repr(value))}")
    tapped, output_loss = (
        fn if isinstance(fn, Partial) else Partial(fn) for fn in (tapped, output_loss)
    )
    params = at_least_float32(params)
    first = next(iter(batch)) if isinstance(batch, Stream) else batch
    _check_values(tapped, output_loss, params, first)
    calls, num_outputs = calls_of(tapped, params, first)
    _check_outputs(num_outputs, output_loss, num_samples)
    layout = _layout(calls, params, block_size)
    static = {"layout": layout, "num_samples": num_samples if key is not None else None}
    if isinstance(batch, Stream):
        if weights is not None or chunk_size is not None or axis_name is not None:
            raise ValueError(
                "weights, chunk_size and axis_name are for arrays: a stream's own batches are its "
                "chunks, and all examples count alike"
            )
        fold = functools.partial(_over_stream, batch, batch.count("batch"))
    else:
        num_examples = count_examples(batch, "batch")
        params = device_local(params, batch, weights, axis_name=axis_name)
        weights = normalized_weights(weights, num_examples, "weights", axis_name)
        if key is not None and axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(axis_name))
        fold = functools.partial(_over_chunks, batch, weights, chunk_size, params)

    def mean(part, *constants):
        part = functools.partial(part, tapped, output_loss, params, key, *constants, **static)
        return mean_over_devices(fold(part), axis_name)

    factors = _decomposed(mean(_moments), layout=layout)
    if corrected:
        factors = _with_eigenvalues(factors, mean(_squares, factors))
    return lax.stop_gradient(factors)


def _check_values(tapped, output_loss, params, batch):
    check_no_nan(params=params, batch=batch)

    def losses(params, batch):
        inputs, targets = split_batch(batch)
        return output_loss(tapped(params, inputs, no_tap), targets)

    check_independent(losses, params, batch, "example")


def _check_outputs(size, output_loss, num_samples):
    if size > _MOST_OUTPUTS and (num_samples is None or _root_of(output_loss) is None):
        raise ValueError(
            f"an example has {size:,} outputs, each a backward pass and together a Hessian of "
            f"{size:,}^2 numbers; give num_samples=1 or more, and as output_loss "
            "curvature.cross_entropy, or a function of yours with an attribute root as it has"
        )


def _over_chunks(batch, weights, chunk_size, params, part):
    """Returns the sum of `part(inputs, targets, ids, weights)` over chunks."""
    ids = jnp.arange(count_examples(batch, "batch"))
    num_chunks, take = chunks((*split_batch(batch), ids), chunk_size, weights)

    def of_chunk(index):
        chunk, chunk_weights = take(index)
        return part(*chunk, chunk_weights)

    if num_chunks == 1 or (loops.steps_from_host() and not is_traced(params, batch)):
        return functools.reduce(_added, map(of_chunk, range(num_chunks)))
    shapes = jax.eval_shape(of_chunk, 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    steps = jnp.arange(num_chunks)
    return lax.scan(
        lambda total, index: (_added(total, of_chunk(index)), None),
        device_local(zeros, shapes),
        steps,
    )[0]


def _over_stream(stream, num_examples, part):
    total, start = None, 0
    for batch in stream:
        count = count_examples(batch, "batch")
        ids = jnp.arange(start, start + count)
        found = part(*split_batch(batch), ids, jnp.asarray(1 / num_examples))
        total = found if total is None else _added(total, found)
        start += count
    return total


@jax.jit
def _added(x, y):
    return jax.tree.map(jnp.add, x, y)


# What is added up.


@functools.partial(jax.jit, static_argnames=("layout", "num_samples"))
def _moments(
    tapped, output_loss, params, key, inputs, targets, ids, weights, *, layout, num_samples
):
    """Returns (A, G) of each layer, the second moments of each group, and of each diagonal."""
    weights = jnp.broadcast_to(weights, ids.shape)
    rows, gradients, others = _gradients(
        tapped, output_loss, params, key, inputs, targets, ids, layout, num_samples
    )

    def second(x):  # [B, n, d] -> [d, d]
        return jnp.einsum("bnd,bne->de", weights[:, None, None] * x, x, precision=HIGHEST)

    factors = [
        (second(a), second(g.reshape(len(g), -1, g.shape[-1])) / a.shape[1])
        for a, g in zip(rows, gradients, strict=True)
    ]
    flat = {name: x.reshape(*x.shape[:2], -1) for name, x in others.items()}
    blocks = [
        second(jnp.concatenate([flat[name] for name in names], -1)) for names in layout.groups
    ]
    diagonals = [
        jnp.tensordot(weights, jnp.sum(others[name] ** 2, 1), 1, precision=HIGHEST)
        for name in layout.diagonals
    ]
    return factors, blocks, diagonals


@functools.partial(jax.jit, static_argnames=("layout", "num_samples"))
def _squares(
    tapped, output_loss, params, key, factors, inputs, targets, ids, weights, *, layout, num_samples
):
    """Returns E sum_k (Q_A^T P_k Q_G)^2 of each layer."""
    weights = jnp.broadcast_to(weights, ids.shape)
    rows, gradients, _ = _gradients(
        tapped, output_loss, params, key, inputs, targets, ids, layout, num_samples
    )
    found = []
    for block, a, g in zip(factors.blocks, rows, gradients, strict=False):
        a = jnp.matmul(a, block.inputs, precision=HIGHEST)
        g = jnp.matmul(g, block.outputs, precision=HIGHEST)
        found.append(_squared_products(weights, a, g))
    return found


def _squared_products(weights, a, g):
    """Returns sum_b weights_b sum_k (sum_t a_bt g_bkt^T)^2, `[d, F]`."""
    if a.shape[1] == 1:  # the square of a product is the product of the squares
        a2, g2 = a[:, 0] ** 2, jnp.sum(g[:, :, 0] ** 2, axis=1)
        return jnp.einsum("bd,bf->df", weights[:, None] * a2, g2, precision=HIGHEST)

    def add(total, g_k):  # the gradients of one output at a time: [B, d, F]
        products = jnp.einsum("btd,btf->bdf", a, g_k, precision=HIGHEST)
        return total + jnp.tensordot(weights, products**2, 1, precision=HIGHEST), None

    zeros = device_local(jnp.zeros((a.shape[-1], g.shape[-1]), a.dtype), a, g, weights)
    return lax.scan(add, zeros, jnp.moveaxis(g, 1, 0))[0]


def _gradients(tapped, output_loss, params, key, inputs, targets, ids, layout, num_samples):
    """Returns what a chunk's layers see, and the gradients of its outputs' roots.

    Rows `[B, T, d]` and gradients `[B, K, T, F]` of each layer, and `[B, K, *leaf]` by name for
    the other leaves.
    """
    leaves, _ = named_leaves(params)
    outside = [name for names in layout.groups for name in names] + list(layout.diagonals)
    others = {name: leaves[name] for name in outside}

    def of_example(example, example_id):
        x, y = jax.tree.map(lambda leaf: leaf[None], example)
        outputs, pull, rows = seen(tapped, params, others, layout.calls, x)
        own = None if num_samples is None else jax.random.fold_in(key, example_id)
        columns = _root_columns(output_loss, outputs, y, own, num_samples)
        to_outputs, to_others = jax.vmap(pull)(columns)
        gradients = [
            g.reshape(len(g), -1, call.width)
            for call, g in zip(layout.calls, at_least_float32(to_outputs), strict=True)
        ]  # [K, T, F]
        return by_layer(layout.calls, rows, 0), by_layer(layout.calls, gradients, 1), to_others

    return jax.vmap(of_example)((inputs, targets), ids)


def _root_columns(output_loss, outputs, targets, key, num_samples):
    """Returns the columns of a root of the Hessian of one example's loss, stacked; see `ekfac`."""
    flat, unravel = ravel_pytree(outputs)
    if num_samples is None:
        signs = jnp.eye(flat.size, dtype=flat.dtype)
    else:
        signs = jax.random.rademacher(key, (num_samples, flat.size), flat.dtype)
        signs /= math.sqrt(num_samples)
    root = _root_of(output_loss)
    if root is not None:
        return jax.vmap(lambda sign: root(outputs, targets, unravel(sign)))(signs)

    def loss(flat):
        return losses_per_example(output_loss, unravel(flat), targets)[0]

    values, vectors = jnp.linalg.eigh(jax.hessian(loss)(flat))
    matrix = vectors * jnp.sqrt(jnp.maximum(values, 0))
    return jax.vmap(unravel)(jnp.matmul(signs, matrix.T, precision=HIGHEST))


def _root_of(output_loss):
    """Returns the attribute `root` of a loss that has one, see `cross_entropy`, or None."""
    return getattr(output_loss.func, "root", None)


# From moments to eigenvectors.


@functools.partial(jax.jit, static_argnames="layout")
def _decomposed(moments, *, layout):
    """Returns the factors of K-FAC."""
    factors, groups, diagonals = moments
    blocks: list[Any] = []
    for layer, (a, g) in zip(layers_of(layout.calls), factors, strict=True):
        (s_a, q_a), (s_g, q_g) = _eigen(a), _eigen(g)
        blocks.append(LayerBlock(q_a, q_g, s_a[:, None] * s_g, layer))
    for names, matrix in zip(layout.groups, groups, strict=True):
        values, vectors = _eigen(matrix)
        blocks.append(DenseBlock(vectors, values, names))
    for name, diagonal in zip(layout.diagonals, diagonals, strict=True):
        blocks.append(DiagonalBlock(diagonal, (name,)))
    return KroneckerFactors(tuple(blocks))


def _eigen(matrix):
    values, vectors = jnp.linalg.eigh(matrix)
    return jnp.maximum(values, 0), vectors


def _with_eigenvalues(factors, eigenvalues):
    count = len(eigenvalues)
    blocks = [
        dataclasses.replace(block, eigenvalues=found)
        for block, found in zip(factors.blocks, eigenvalues, strict=False)
    ]
    return KroneckerFactors((*blocks, *factors.blocks[count:]))


# How the other leaves are grouped.


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The calls of layers in one example's forward pass, and how the other leaves are grouped."""

    calls: tuple[Call, ...]
    groups: tuple[tuple[str, ...], ...]
    diagonals: tuple[str, ...]


def _layout(calls, params, block_size):
    held = {name for call in calls for name in (call.layer.kernel, call.layer.bias)}
    groups, diagonals, room = [], [], 0
    for name, leaf in named_leaves(params)[0].items():
        if name in held:
            continue
        if leaf.size > block_size:
            diagonals.append(name)
        elif leaf.size > room:
            groups.append([name])
            room = block_size - leaf.size
        else:
            groups[-1].append(name)
            room -= leaf.size
    return _Layout(calls, tuple(map(tuple, groups)), tuple(diagonals))
