"""Per-example gradients of layers, each projected on both sides of its kernel.

    phi_il = P^T (sum_t a_t g_t^T) Q = sum_t (P^T a_t) (Q^T g_t)^T,    [k, k] for each layer l

LoGra, Choe et al. 2024 (arXiv:2405.13954): a_t are the rows that the layer's kernel
multiplies, g_t the gradients to its outputs. Neither a gradient to a kernel nor a projection of
the size of one is ever made.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from jaxpoison.core import batches, taps, trees
from jaxpoison.core.batches import Batch
from jaxpoison.core.checks import check_count, check_no_nan, shortened
from jaxpoison.core.kronecker import KroneckerFactors, LayerBlock
from jaxpoison.core.layers import TappedFn, no_tap
from jaxpoison.core.trees import Params

HIGHEST = lax.Precision.HIGHEST


def project_layers(
    tapped: TappedFn,
    output_loss: Any,
    params: Params,
    batch: Batch,
    *,
    rank: int,
    key: jax.Array | None = None,
    factors: Any = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """Returns the projected gradients of the linear layers, `[N, sum of k_in k_out]`.

    In at least float32. k_in is `rank`, or the rows of a kernel and its bias where there are fewer;
    k_out likewise for its columns. The cost is a forward and a backward pass for each example,
    without gradients to kernels. Leaves outside of layers take no part. `projected_scores` and
    `Store.query` make scores of them, as of those of `project_gradients`.

    Args:
      tapped: `tapped(params, inputs, tap) -> outputs[B, ...]`, as for `curvature.ekfac`, e.g. from
        `network.tapped_logits`.
      output_loss: `output_loss(outputs, targets) -> losses[B]`, e.g. `curvature.cross_entropy`.
      params: where the gradients are taken; layers whose weights are not in them are left out.
      batch: `(inputs, targets)` with leading axis N.
      rank: of the projection on either side of a kernel; at least 1.
      key: PRNG key of random projections: one for a training set and all queries to it. Entries
        are normal, of mean 0 and variance 1 / k, so that inner products are kept in expectation.
      factors: in place of `key`: those of `curvature.kfac` or `ekfac` over these layers. The
        projections are then on their top eigenvectors, the paper's LoGra-PCA.
      chunk_size: examples per pass.

    Raises:
      ValueError: without key and factors, or with both; for a function that taps no layer;
        factors of other layers; losses that depend on other examples.
      TypeError: for functions or factors that are none.
    """
    check_count(rank=rank)
    if (key is None) == (factors is None):
        raise ValueError(
            "give either key=jax.random.key(0), for random projections, or factors=, those of "
            "curvature.kfac, for projections on their top eigenvectors"
        )
    for name, value in (("tapped", tapped), ("output_loss", output_loss)):
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {shortened(repr(value))}")
    if factors is not None and not isinstance(factors, KroneckerFactors):
        raise TypeError(
            "factors must be those of curvature.kfac or curvature.ekfac, got "
            f"{shortened(repr(factors))}"
        )
    check_no_nan(params=params, batch=batch)

    def losses(params, batch):
        inputs, targets = batches.split_batch(batch)
        return output_loss(tapped(params, inputs, no_tap), targets)

    batches.check_independent(losses, params, batch, "batch")
    params = trees.at_least_float32(params)
    calls, _ = taps.calls_of(tapped, params, batch)
    if factors is None:
        sides = _random_sides(calls, params, rank, key)
    else:
        sides = _eigenvectors(calls, factors, rank)

    def of_example(example):
        x, y = jax.tree.map(lambda leaf: leaf[None], example)
        outputs, pull, rows = taps.seen(tapped, params, {}, calls, x)
        cotangent = jax.grad(lambda f: batches.losses_per_example(Partial(output_loss), f, y)[0])
        to_outputs = trees.at_least_float32(pull(cotangent(outputs))[0])
        flat = [g.reshape(-1, call.width) for call, g in zip(calls, to_outputs, strict=True)]
        layers = zip(
            sides, taps.by_layer(calls, rows, 0), taps.by_layer(calls, flat, 0), strict=True
        )
        return jnp.concatenate([_projected(*side, a, g) for side, a, g in layers])

    return batches.map_chunks(jax.vmap(of_example), batch, chunk_size)


def _projected(inputs, outputs, a, g):
    a = jnp.matmul(a, inputs, precision=HIGHEST)
    g = jnp.matmul(g, outputs, precision=HIGHEST)
    return jnp.matmul(a.T, g, precision=HIGHEST).ravel()


def _random_sides(calls, params, rank, key):
    """Returns P [d, k] and Q [F, k] of each layer."""
    leaves, _ = trees.named_leaves(params)
    sides = []
    for index, layer in enumerate(taps.layers_of(calls)):
        width = next(call.width for call in calls if call.layer == layer)
        rows = leaves[layer.kernel].size // width + (layer.bias is not None)
        keys = jax.random.split(jax.random.fold_in(key, index))
        shapes = ((size, min(rank, size)) for size in (rows, width))
        sides.append(
            [
                jax.random.normal(one, shape) / shape[1] ** 0.5
                for one, shape in zip(keys, shapes, strict=True)
            ]
        )
    return sides


def _eigenvectors(calls, factors, rank):
    """Returns the top eigenvectors of each layer's factors, [d, k] and [F, k]."""
    blocks = {block.layer: block for block in factors.blocks if isinstance(block, LayerBlock)}
    layers = taps.layers_of(calls)
    missing = [layer.kernel for layer in layers if layer not in blocks]
    if missing:
        raise ValueError(
            f"the factors have no layer {', '.join(missing)}: make them of the same function and "
            "parameters"
        )
    # Ascending, as `eigh` gives them.
    return [(blocks[x].inputs[:, -rank:], blocks[x].outputs[:, -rank:]) for x in layers]
