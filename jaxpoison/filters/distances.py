"""Distances from characteristic vectors to class centroids, and the weights of layers in them.

A block b is one layer's means or its variances, with C_b channels and weight w_b (sum 1):

    cosine  sum_b w_b (1 - x_b . c_b / |x_b| |c_b|)          (the paper, eqs. 8 and 9)
    l2      sum_b w_b |x_b - c_b| / sqrt(C_b)
    z       sum_b w_b mean over channels of ((x - c) / s)^2   s: sd within classes
    maha    (x - c)' Sigma^-1 (x - c) after division by s     Sigma: shrunk covariance

w_b is gamma_i beta for means, gamma_i (1 - beta) for variances; gamma and beta are not given in
the paper. A variance over one position is always 0 and has no weight.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxpoison.filters.centroids import Centroids, class_numbers
from jaxpoison.filters.extraction import CharVec

Metric = Literal["cosine", "l2", "z", "maha"]
_TINY = jnp.finfo(jnp.float32).tiny
_EXACT = jax.lax.Precision.HIGHEST
_CELLS = 2**24  # numbers that the Mahalanobis distance holds at a time


def layer_weights(gamma: str | Sequence[float] | jax.Array, num_layers: int) -> jax.Array:
    """Returns gamma, float32 [num_layers], sum 1.

    Args:
      gamma: "uniform"; "linear" (proportional to 1, 2, 3, ...); "last_3" or another number (the
        last layers alone); or one number >= 0 for each layer. `fisher_weights` gives the last.
      num_layers: number of layers, as in `CharVec.paths`.

    Raises:
      ValueError: for another name, or weights that are negative, all zero or too few or many.
    """
    if isinstance(gamma, str):
        last = re.fullmatch(r"last_(\d+)", gamma)
        index = np.arange(num_layers)
        if gamma == "uniform":
            weights = np.ones(num_layers)
        elif gamma == "linear":
            weights = index + 1.0
        elif last and 1 <= int(last[1]) <= num_layers:
            weights = 1.0 * (index >= num_layers - int(last[1]))
        else:
            raise ValueError(
                f'gamma must be "uniform", "linear", "last_1" to "last_{num_layers}" or '
                f"{num_layers} numbers, not {gamma!r}"
            )
        return jnp.asarray(weights / weights.sum(), jnp.float32)
    # The values of all but a tracer are known, also while `jit` traces.
    weights = gamma if isinstance(gamma, Tracer) else np.asarray(gamma, np.float32)
    if weights.shape != (num_layers,):
        raise ValueError(
            f"gamma has shape {weights.shape}; expected one weight for each of {num_layers} layers"
        )
    if isinstance(weights, np.ndarray) and not ((weights >= 0).all() and weights.sum()):
        raise ValueError(f"gamma must not be negative, nor 0 for every layer; it is {weights}")
    return jnp.asarray(weights / weights.sum())


def fisher_weights(centroids: Centroids) -> jax.Array:
    """Returns gamma, float32 [l], by how well each layer tells the classes apart; sum 1.

    gamma_i ~ max(0, F - 1) with F the ratio of the mean squares between and within classes, of the
    layer's means and variances on average. Only for centroids of trusted examples, two or more of
    each class: on poisoned data an attacker would choose the weights.
    """
    count = centroids.count[:, None]
    total = jnp.sum(count)
    num_classes = jnp.sum(count > 0)

    def ratio(center, spread):
        grand = jnp.sum(count * center, axis=0) / total
        between = jnp.sum(count * jnp.square(center - grand)) / (num_classes - 1)
        within = jnp.sum(count * spread) / (total - num_classes)
        # No more than 1e6, so that a layer without any variation within classes stays finite.
        return jnp.clip(between / jnp.maximum(within, 1e-6 * between + _TINY) - 1, 0)

    def layer(size, center, spread):
        ratios = [ratio(*pair) for pair in zip(center, spread, strict=True)]
        return jnp.mean(jnp.stack(ratios[: _num_parts(size)]))

    layers = zip(centroids.sizes, centroids.center, centroids.spread, strict=True)
    gamma = jnp.stack([layer(*each) for each in layers])
    gamma = jnp.where(jnp.any(gamma > 0), gamma, 1)
    return gamma / jnp.sum(gamma)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mahalanobis:
    """A covariance within classes, of standardized and weighted coordinates u = factor (x - c).

    Sigma = ridge I + slope Z'Z, for fewer examples than coordinates inverted by way of the n x n
    matrix of their products:

        u' Sigma^-1 u = (|u|^2 - slope uZ' (ridge I + slope ZZ')^-1 Zu') / ridge

    Attributes:
      factor: float32 [D], square root of a block's weight (relative to the mean) over the sd.
      residuals: Z, float32 [n, D], the examples around their class centroid, times `factor`.
      cholesky: float32 [n, n], lower factor of ridge I + slope ZZ'.
      ridge: rho tr / D, scalar.
      slope: (1 - rho) / n, scalar.
      shrinkage: rho of Ledoit and Wolf (2004), scalar in [0, 1].
    """

    factor: jax.Array
    residuals: jax.Array
    cholesky: jax.Array
    ridge: jax.Array
    slope: jax.Array
    shrinkage: jax.Array


def fit_mahalanobis(
    charvec: CharVec,
    labels: jax.Array,
    centroids: Centroids,
    *,
    gamma: str | Sequence[float] | jax.Array = "uniform",
    beta: float = 0.5,
) -> Mahalanobis:
    """Returns the covariance within classes of n examples, shrunk by Ledoit and Wolf's rule.

    Memory n D + n^2; meant for trusted sets and small data sets. An invertible rescaling of the
    coordinates leaves Mahalanobis distances as they are, so gamma and beta act by way of the
    shrinkage alone, but where they are 0.

    Args:
      charvec: n examples.
      labels: int32 [n], their classes.
      centroids: of the same classes; residuals are around their `center`.
      gamma: see `layer_weights`.
      beta: share of the means in each layer's weight.
    """
    weights = _block_weights(gamma, beta, charvec.sizes)
    scale = _parts(centroids.scale(), charvec.sizes)
    factor = jnp.concatenate(
        [jnp.sqrt(w * len(scale)) / s for w, s in zip(weights, scale, strict=True)]
    )
    labels = class_numbers(labels, charvec.num_examples, len(centroids.count))
    own = jax.tree.map(lambda a: jnp.asarray(a)[labels], centroids.center)
    residuals = _flat(charvec.blocks, charvec.sizes) - _flat(own, charvec.sizes)
    residuals = residuals * factor
    num_examples, dim = residuals.shape[0], jnp.sum(factor > 0)
    products = jnp.matmul(residuals, residuals.T, precision=_EXACT)
    variance = jnp.trace(products) / (num_examples * dim)
    squared_norm = jnp.sum(jnp.square(products)) / num_examples**2
    noise = jnp.sum(jnp.square(jnp.diag(products))) / num_examples - squared_norm
    excess = squared_norm - dim * jnp.square(variance)
    shrinkage = jnp.clip(noise / num_examples / jnp.maximum(excess, _TINY), 0, 1)
    ridge, slope = shrinkage * variance, (1 - shrinkage) / num_examples
    return Mahalanobis(
        factor=factor,
        residuals=residuals,
        cholesky=jnp.linalg.cholesky(
            ridge * jnp.eye(num_examples, dtype=products.dtype) + slope * products
        ),
        ridge=ridge,
        slope=slope,
        shrinkage=shrinkage,
    )


def centroid_distances(
    charvec: CharVec,
    centroids: Centroids,
    *,
    metric: Metric | Mahalanobis = "cosine",
    gamma: str | Sequence[float] | jax.Array = "uniform",
    beta: float = 0.5,
    left_out: jax.Array | None = None,
) -> jax.Array:
    """Returns the distances to all centroids, float32 [N, K]; inf for classes without examples.

    A block that is 0 throughout, in the example or in the centroid, is at cosine distance 1.

    Args:
      charvec: N examples.
      centroids: K classes, of the same layers.
      metric: "cosine", "l2", "z", or the result of `fit_mahalanobis` (whose weights then count).
      gamma: see `layer_weights`.
      beta: share of the means in each layer's weight, in [0, 1]; the rest is the variances'.
      left_out: int32 [N], classes of the examples if they took part in the centroids and each is
        to be compared with its own class without itself.

    Raises:
      ValueError: for unknown settings or other layers.
    """
    if charvec.paths != centroids.paths or charvec.sizes != centroids.sizes:
        raise ValueError(
            f"the examples have layers {_layers(charvec)}, but the centroids {_layers(centroids)}: "
            "both must come from the same network, predicate and image size"
        )
    pairwise = _pairwise(metric, gamma, beta, centroids)
    distances = jnp.where(centroids.count > 0, pairwise(charvec.blocks, centroids.blocks), jnp.inf)
    if left_out is None:
        return distances
    without = centroids.without(charvec, left_out)

    def one(x, c):
        return pairwise(*jax.tree.map(lambda a: a[None], (x, c)))[0, 0]

    own = jnp.where(without.count > 0, jax.vmap(one)(charvec.blocks, without.blocks), jnp.inf)
    return jnp.where(jnp.arange(len(centroids.count)) == left_out[:, None], own[:, None], distances)


def _pairwise(metric, gamma, beta, centroids):
    """Returns the function of blocks [N, C_i] and [K, C_i] to distances [N, K]."""
    sizes = centroids.sizes
    if isinstance(metric, Mahalanobis):
        return lambda x, c: _mahalanobis(_flat(x, sizes), _flat(c, sizes), metric)
    if metric not in _METRICS:
        raise ValueError(
            f"metric must be {', '.join(_METRICS)} or the result of fit_mahalanobis, not {metric!r}"
        )
    weights = _block_weights(gamma, beta, sizes)
    scale = _parts(centroids.scale(), sizes)

    def blockwise(x, c):
        parts = zip(_parts(x, sizes), _parts(c, sizes), scale, strict=True)
        by_block = jnp.stack([_METRICS[metric](*part) for part in parts])
        return jnp.einsum("b,bnk->nk", weights, by_block, precision=_EXACT)

    return blockwise


def _cosine(x, c, scale):
    return 1 - jnp.matmul(_unit(x), _unit(c).T, precision=_EXACT)


def _unit(x):
    x = x / _power_of_two(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    square = jnp.sum(jnp.square(x), axis=1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square < _TINY, 1, square))


def _l2(x, c, scale):
    # Differences first: |x|^2 - 2 x.c + |c|^2 would cancel to nothing for near neighbors.
    unit = _power_of_two(jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(c))))
    square = jnp.mean(jnp.square((x / unit)[:, None] - c / unit), axis=-1)
    equal = square == 0  # where the root has no gradient
    return unit * jnp.where(equal, 0, jnp.sqrt(jnp.where(equal, 1, square)))


def _power_of_two(size):
    """Returns a power of two near `size` where squares would leave float32's range, else 1.

    To divide by it loses no digit, and by 1 changes nothing.
    """
    size = jax.lax.stop_gradient(size)
    ordinary = ((size > 1e-15) & (size < 1e15)) | (size == 0) | ~jnp.isfinite(size)
    _, exponent = jnp.frexp(jnp.where(ordinary, 1, size))
    # Half of the exponent at a time, for the largest is out of range.
    half = jnp.ldexp(jnp.ones_like(size), exponent // 2)
    return jnp.where(ordinary, 1, half * half)


def _z(x, c, scale):
    return jnp.mean(jnp.square((x[:, None] - c) / scale), axis=-1)


_METRICS = {"cosine": _cosine, "l2": _l2, "z": _z}


def _mahalanobis(x, c, metric):
    x, c = x * metric.factor, c * metric.factor
    square = jnp.sum(jnp.square(x[:, None] - c), axis=-1)
    examples, classes = (jnp.matmul(a, metric.residuals.T, precision=_EXACT) for a in (x, c))

    def explained(one_class):
        products = (examples - one_class).T
        half = jax.scipy.linalg.solve_triangular(metric.cholesky, products, lower=True)
        return jnp.sum(jnp.square(half), axis=0)

    # A few classes at a time: all of them are N x K x n numbers.
    at_once = max(1, _CELLS // max(1, examples.size))
    explained = jax.lax.map(explained, classes, batch_size=at_once).T
    return (square - metric.slope * explained) / metric.ridge


def _num_parts(size):
    """The blocks of a layer that say anything: without variance where there is one position."""
    return 1 if size == 1 else 2


def _parts(blocks, sizes):
    layers = zip(blocks, sizes, strict=True)
    return [array for block, size in layers for array in block[: _num_parts(size)]]


def _flat(blocks, sizes):
    return jnp.concatenate(_parts(blocks, sizes), axis=-1)


def _block_weights(gamma, beta, sizes):
    """Returns the weights w_b of `_parts`, float32 [number of blocks], sum 1."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is the share of the means, in [0, 1], not {beta}")
    if beta == 0 and max(sizes) == 1:
        raise ValueError(
            "beta = 0 weighs variances alone, but every layer has a single position and so no "
            "variance: choose beta = 1"
        )
    gamma = layer_weights(gamma, len(sizes))
    weights = jnp.stack(
        [
            share * gamma[layer]
            for layer, size in enumerate(sizes)
            for share in (beta, 1 - beta)[: _num_parts(size)]
        ]
    )
    return weights / jnp.sum(weights)


def _layers(described):
    return ", ".join(
        f"{path} ({size} positions)"
        for path, size in zip(described.paths, described.sizes, strict=True)
    )
