"""Influence functions for groups, examples and pixels, from one inverse-Hessian-vector product.

    s         = (H + damping I)^-1 v,    v = grad_theta of the mean loss of a group
    I_up(z)   = -<s, grad_theta l(z)>                          `example_influence`   (HINT eq. 8)
    I_pert(z) = -grad_x <s, grad_theta l(z)>                   `pixel_influence`     (HINT eq. 9)

HINT is arXiv:2309.08549; its equations 8 and 9 are those of Koh & Liang 2017 (arXiv:1703.04730)
with the gradient of a group (a validation set) in place of one test point. H is the mean Hessian,
or Gauss-Newton matrix, over `train`.

The model is any `loss_fn(params, batch) -> losses[B]`; `params` is what influence acts through, be
it a network or one last layer over cached features. Neither per-example gradients nor the mixed
derivative are ever formed: <s, grad_theta l(z)> is the derivative of l along s, so scores are one
`jax.jvp` and pixel maps are one `jax.grad` of its sum.

Everything is pure and may be put under `jit`, `vmap`, `grad`, `shard_map` or `pmap`; `jit` over
sharded arrays wants a mesh of `AxisType.Auto` axes, because gathers and padding of sharded arrays
are ambiguous on `Explicit` ones (the default of `jax.make_mesh`). On GPU and TPU matrix products
are rounded to fewer than 24 bits by default, which bounds what a solver can reach: wrap calls in
`jax.default_matmul_precision("highest")` where that matters.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpoison import curvature as curvatures
from jaxpoison import solvers
from jaxpoison.core import batches, heads, loops, programs, spmd, trees
from jaxpoison.core.batches import Batch, LossFn
from jaxpoison.core.batches import Stream as Stream
from jaxpoison.core.checks import check_count, check_no_nan, check_positive, listing, shortened
from jaxpoison.core.spmd import AxisName
from jaxpoison.core.trees import Params
from jaxpoison.curvature import Curvature


def group_ihvp(
    loss_fn: LossFn,
    params: Params,
    group: Batch | Stream,
    train: Batch | Stream,
    *,
    solver: solvers.Solver,
    curvature: Curvature | None = None,
    group_weights: jax.Array | None = None,
    train_weights: jax.Array | None = None,
    chunk_size: int | None = None,
    key: jax.Array | None = None,
    axis_name: AxisName = None,
    progress: Callable[[int, float], None] | None = None,
) -> solvers.Solution:
    """Returns s = (H + damping I)^-1 v, with v the gradient of the mean loss of `group`.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses[B]`, one per example, twice differentiable;
        `batch = (inputs, targets)`. Examples must not interact (BatchNorm in evaluation mode).
      params: pytree of floating-point arrays; half precision is raised to float32 inside.
      group: examples whose mean loss is of interest, pytrees with leading axis M.
      train: examples over which H is the mean, pytrees with leading axis N. Either may be a
        `Stream` of batches, read again for each product with H: then outside `jit` only, with
        `solvers.cg` or `solvers.identity`.
      solver: `solvers.cg(damping=0.5)` or another of `solvers`; it holds the damping.
      curvature: None for the Hessian of `loss_fn`; or `curvature.gauss_newton(...)`, positive
        semi-definite for whole networks; or `curvature.linear_head` for a last layer over cached
        features; any of them `with_l2` where the training objective has a penalty.
      group_weights: `[M]`, for a weighted mean; None for the plain one. See `curvature.product`.
      train_weights: `[N]`, the same for H. Weights of 0 make batches of unequal size equal, as
        `jax.vmap` over several groups needs.
      chunk_size: examples per pass over `group` and `train`; memory is then that of one chunk.
        None: all at once, linearized once for all steps of the solver.
      key: PRNG key for stochastic solvers.
      axis_name: None for one device and for `jit` over sharded arrays. Inside your own `shard_map`,
        `pmap` or `vmap(axis_name=...)`: the axis over which both `group` and `train` are split,
        in shards of equal size; the result is the same on all devices.
      progress: `progress(step, residual)`, called as an iterative solver goes, outside `jit` only.
        LiSSA, which does not know its residual before the end, passes the relative change over its
        last 25 steps.

    Returns:
      A `Solution` whose `value` is shaped like `params`. Sign: moving the parameters by -t s lowers
      the group's loss for small t > 0.

    On CPU, call it outside `jit` for networks with convolutions: the host then drives the solver's
    steps, because XLA's CPU backend runs a convolution inside a loop some 30 times slower. Under
    `jit` a warning tells so.

    Raises:
      ValueError: for losses that are not one per example, empty or ragged batches, weights of
        another shape, negative or all zero, chunk_size < 1, or a random solver without a key.
        Outside `jit` also for NaN or infinite parameters and data, and for a loss of an example
        that depends on the others of its batch, as with BatchNorm in training mode.
      TypeError: for parameters that are not floating point, or a solver that was not called.
    """
    _check_solver(solver)
    if not isinstance(train, Stream):
        batches.count_examples(train, "train")
    check_no_nan(train=None if isinstance(train, Stream) else train)
    if loss_fn is linear_head_loss and not isinstance(train, Stream):
        _check_head(params, train, "train")
    rhs = group_gradient(
        loss_fn, params, group, weights=group_weights, chunk_size=chunk_size, axis_name=axis_name
    )
    curvature = curvatures.hessian(loss_fn) if curvature is None else curvature
    over_train = {"weights": train_weights, "axis_name": axis_name}
    matvec = curvatures.product(curvature, params, train, chunk_size=chunk_size, **over_train)

    def sample(sample_key, batch_size):
        return curvatures.minibatch_product(
            curvature, params, train, sample_key, batch_size=batch_size, **over_train
        )

    told = {} if progress is None else {"progress": progress}
    _warn_of_slow_loops(matvec, rhs, solver)
    solution = solver(matvec, rhs, sample=sample, key=key, **told)
    # Equal on all devices already. Averaging makes its cotangents equal too, as the transposed
    # solve needs where nobody checks them (`pmap`): its products are means over devices.
    value = spmd.device_local(solution.value, axis_name=axis_name)
    return solution._replace(value=spmd.mean_over_devices(value, axis_name))


def group_gradient(
    loss_fn: LossFn,
    params: Params,
    group: Batch | Stream,
    *,
    weights: jax.Array | None = None,
    chunk_size: int | None = None,
    axis_name: AxisName = None,
) -> Params:
    """Returns v = grad_theta (1/M) sum_i l_i over `group`, shaped like `params`.

    Arguments as for `group_ihvp`; with `weights` it is the gradient of the weighted mean.
    Half-precision parameters give a float32 gradient.
    """
    params = _check_floating(params, "params")
    if isinstance(group, Stream):
        if weights is not None or axis_name is not None:
            raise ValueError("group is a stream: weights and axis_name are for arrays")
        return _streamed_gradient(loss_fn, params, group)
    num_examples = batches.count_examples(group, "group")
    _check_values(loss_fn, params, {"group": group})
    params = spmd.device_local(trees.at_least_float32(params), group, weights, axis_name=axis_name)
    weights = batches.normalized_weights(weights, num_examples, "group_weights", axis_name)
    num_chunks, take = batches.chunks(group, chunk_size, weights)

    def gradient(index):
        chunk, chunk_weights = take(index)
        return jax.grad(lambda p: batches.weighted_loss(loss_fn, p, chunk, chunk_weights))(params)

    if num_chunks == 1:
        total = gradient(0)
    else:

        def add(total, index):
            return jax.tree.map(jnp.add, total, gradient(index)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = lax.scan(add, zeros, jnp.arange(num_chunks))
    return spmd.mean_over_devices(total, axis_name)


def _streamed_gradient(loss_fn, params, stream):
    _check_values(loss_fn, params, {"group": stream})
    num_examples = stream.count("group")
    params = trees.at_least_float32(params)

    def add(total, batch):
        gradient = jax.grad(lambda p: batches.weighted_loss(loss_fn, p, batch, 1 / num_examples))
        return jax.tree.map(jnp.add, total, gradient(params))

    return functools.reduce(programs.compiled(add), stream, jax.tree.map(jnp.zeros_like, params))


def example_influence(
    loss_fn: LossFn,
    params: Params,
    ihvp: Params,
    batch: Batch | Stream,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    """Returns I_up(z_i) = -<ihvp, grad_theta l_i> of every example, shape `[N]`; HINT, equation 8.

    It is the derivative of the group's mean loss by the weight of example i in the training sum
    (1/N) sum l + eps l_i: positive means that up-weighting the example raises the group's loss
    (harmful). Removing it changes that loss by about -I_up / N.

    Args:
      loss_fn: as for `group_ihvp`.
      params: as for `group_ihvp`.
      ihvp: `Solution.value`, shaped like `params`.
      batch: `(inputs, targets)` with leading axis N; or a `Stream` of such, outside `jit`, whose
        scores come in its order.
      chunk_size: examples per pass; None for all at once.
    """
    params, ihvp = _direction(params, ihvp)

    def scores(chunk):
        return -_directional_losses(loss_fn, params, ihvp, chunk)

    _check_values(loss_fn, params, {"batch": batch}, ihvp)
    if isinstance(batch, Stream):
        return jnp.concatenate([*map(programs.compiled(scores), batch)])
    return batches.map_chunks(scores, batch, chunk_size)


def renormalized_influence(
    loss_fn: LossFn,
    params: Params,
    ihvp: Params,
    batch: Batch,
    *,
    layerwise: bool = False,
    chunk_size: int | None = None,
) -> jax.Array:
    """Returns -<ihvp, g_i> / ||g_i|| of every example, g_i = grad_theta l_i, shape `[N]`.

    Influence by direction alone (Hammoudeh & Lowd 2022, arXiv 2201.10055). The gradient of an
    example that the model has learned is short, whatever it points to: a few poisons that a network
    has long fitted have little influence and large renormalized influence. With the gradient of the
    group itself for `ihvp` (`solvers.identity`) and `layerwise`, it is the paper's GAS-L at one
    checkpoint; for several, take the sum. Signs are those of `example_influence`: positive is
    harmful. Multiplying the loss by a positive number changes nothing.

    Args:
      loss_fn: as for `group_ihvp`.
      params: as for `group_ihvp`.
      ihvp: `Solution.value`, or any direction shaped like `params`.
      batch: `(inputs, targets)` with leading axis N.
      layerwise: the mean over layers of the cosines -<s_l, g_il> / (||s_l|| ||g_il||), in [-1, 1],
        so that layers with long gradients do not outvote the others. A layer is what lies next to
        each other in `params`, such as a kernel and its bias.
      chunk_size: examples per pass; None for all at once. Gradients of a chunk are in memory
        together, each as large as the parameters.

    Returns:
      Scores `[N]`; 0 for an example without a gradient.
    """
    params, ihvp = _direction(params, ihvp)
    if isinstance(batch, Stream):
        raise TypeError("gradients have lengths one by one: call this for each batch of the stream")
    direction = _layers(ihvp) if layerwise else [jax.tree.leaves(ihvp)]

    def score(example):
        one = jax.tree.map(lambda x: x[None], example)
        gradient = jax.grad(lambda p: batches.losses_per_example(loss_fn, p, one)[0])(params)
        parts = _layers(gradient) if layerwise else [jax.tree.leaves(gradient)]
        along = jnp.stack([trees.dot(s, g) for s, g in zip(direction, parts, strict=True)])
        lengths = jnp.stack([_length(g) for g in parts])
        if layerwise:
            lengths = lengths * jnp.stack([_length(s) for s in direction])
        present = lengths > 0
        return -jnp.mean(jnp.where(present, along, 0) / jnp.where(present, lengths, 1))

    _check_values(loss_fn, params, {"batch": batch}, ihvp)
    batch = jax.tree.map(jnp.asarray, batch)
    return batches.map_chunks(jax.vmap(score), batch, chunk_size)


def delta_influence(scores: jax.Array, transformed: jax.Array, *, tolerance: int) -> jax.Array:
    """Returns by how much each example loses influence when the query is transformed, `[N]`.

    Delta-Influence (Li et al. 2024, arXiv 2411.13731): a poison acts on one image as it is, so its
    influence collapses on every transformed version of it, where that of other examples goes up and
    down. The paper names an example if its influence falls by more than a threshold for all but
    `tolerance` of the T transformations (its boosting rule). This is the largest threshold at which
    it would be named: the fall that all but `tolerance` of the T falls reach.

    Args:
      scores: influence of N training examples on the query, `[N]`, such as a row of `score_matrix`
        with the loss of the label that the query should have: positive is harmful.
      transformed: the same for T transformed versions of the query, `[T, N]`.
      tolerance: how many of them may disagree, 0 to T - 1.

    Raises:
      ValueError: for shapes that do not fit, or a tolerance out of range.
    """
    shape = jnp.shape(transformed)
    if len(shape) != 2 or shape[1:] != jnp.shape(scores) or not shape[0]:
        raise ValueError(
            f"scores {jnp.shape(scores)} and transformed {shape}: expected [N] and [T, N], T > 0"
        )
    if not 0 <= tolerance < shape[0]:
        raise ValueError(
            f"tolerance is {tolerance}; expected 0 to {shape[0] - 1}, fewer than transformations"
        )
    falls = jnp.asarray(scores) - jnp.asarray(transformed)
    return jnp.sort(falls, axis=0)[tolerance]


def self_influence(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    train: Batch,
    *,
    solver: solvers.Solver,
    curvature: Curvature | None = None,
    train_weights: jax.Array | None = None,
    chunk_size: int | None = None,
    examples_at_once: int = 32,
    key: jax.Array | None = None,
) -> tuple[jax.Array, solvers.Solution]:
    """Returns g_i^T (H + damping I)^-1 g_i of every example, with g_i = grad_theta l_i.

    1/N of it is about how much the loss of a training example rises when it is removed: examples
    that the model has to memorize, wrong labels among them, have large values. It is minus the
    diagonal of `score_matrix` of a set with itself (Koh & Liang 2017, section 5.2).

    Args:
      loss_fn: as for `group_ihvp`.
      params: as for `group_ihvp`.
      batch: examples asked about, `(inputs, targets)` with leading axis M; often `train` itself.
      train: as for `group_ihvp`; arrays.
      solver: as for `group_ihvp`. There are M systems: `cholesky` and `nystrom` write out or sketch
        H once for `examples_at_once` of them.
      curvature: as for `group_ihvp`.
      train_weights: as for `group_ihvp`.
      chunk_size: examples of `train` per pass.
      examples_at_once: systems solved together; the memory is that of as many parameter vectors.
      key: as for `group_ihvp`.

    Returns:
      Values `[M]`, not negative where the solve converged; and the evidence of the M solves, a
      `Solution` with fields `[M]` and None for `value`.
    """
    matvec, solve = _many_solves(
        loss_fn, params, batch, train, solver, curvature, train_weights, chunk_size, key
    )

    def values(chunk):
        gradients, solutions = solve(matvec, chunk)
        return jax.vmap(trees.dot)(gradients, solutions.value), solutions._replace(value=None)

    return batches.map_chunks(values, batch, examples_at_once)


class TopScores(NamedTuple):
    """The training examples that matter most for each query, most extreme first.

    Attributes:
      harmful_scores: the k largest scores, `[M, k]`.
      harmful: their indices in `train`, int32 `[M, k]`.
      helpful_scores: the k smallest scores, `[M, k]`.
      helpful: their indices, int32 `[M, k]`.
    """

    harmful_scores: jax.Array
    harmful: jax.Array
    helpful_scores: jax.Array
    helpful: jax.Array


def score_matrix(
    loss_fn: LossFn,
    params: Params,
    queries: Batch,
    train: Batch,
    *,
    solver: solvers.Solver,
    curvature: Curvature | None = None,
    train_weights: jax.Array | None = None,
    top_k: int | None = None,
    chunk_size: int | None = None,
    queries_at_once: int = 32,
    key: jax.Array | None = None,
) -> tuple[jax.Array | TopScores, solvers.Solution]:
    """Returns the influence of every training example on the loss of every query.

    Entry [j, i] is -<(H + damping I)^-1 grad_theta l(query_j), grad_theta l(train_i)>: the score of
    `example_influence` with query j alone for a group. Positive is harmful.

    Args:
      loss_fn: as for `group_ihvp`.
      params: as for `group_ihvp`.
      queries: `(inputs, targets)` with leading axis M, such as test examples.
      train: `(inputs, targets)` with leading axis N; arrays.
      solver: as for `self_influence`.
      curvature: as for `group_ihvp`.
      train_weights: as for `group_ihvp`.
      top_k: None for the whole matrix; k for the k most harmful and the k most helpful of each
        query, without ever holding the matrix.
      chunk_size: examples of `train` per pass.
      queries_at_once: systems solved together. The memory beyond the result is that of as many
        parameter vectors and, with `top_k`, `queries_at_once` x `chunk_size` scores.
      key: as for `group_ihvp`.

    Returns:
      Scores `[M, N]`, or `TopScores`; and the evidence of the M solves, a `Solution` with fields
      `[M]` and None for `value`.

    Raises:
      ValueError: as `group_ihvp`, and unless 1 <= top_k <= N.
    """
    num_train = batches.count_examples(train, "train")
    if top_k is not None:
        check_count(top_k=top_k)
        if top_k > num_train:
            raise ValueError(f"top_k = {top_k} is more than the {num_train} examples of train")
    matvec, solve = _many_solves(
        loss_fn, params, queries, train, solver, curvature, train_weights, chunk_size, key
    )
    params = trees.at_least_float32(params)

    def scores_of(chunk, directions):  # [examples, queries]
        def losses(p):
            return batches.losses_per_example(loss_fn, p, chunk)

        push = jax.linearize(losses, params)[1]
        return -jax.vmap(push, out_axes=1)(trees.cast_like(directions, params))

    def rows(chunk):
        _, solutions = solve(matvec, chunk)
        score = functools.partial(scores_of, directions=solutions.value)
        if top_k is None:
            scores = batches.map_chunks(score, train, chunk_size).T
        else:
            num_queries = batches.count_examples(chunk, "queries")
            scores = _top_scores(score, train, num_queries, top_k, chunk_size)
        return scores, solutions._replace(value=None)

    return batches.map_chunks(rows, queries, queries_at_once)


def _many_solves(loss_fn, params, queries, train, solver, curvature, weights, chunk_size, key):
    """Returns u -> H u, and `solve(matvec, chunk)`: gradients and solutions, one per example."""
    _check_solver(solver)
    params = _check_floating(params, "params")
    if isinstance(train, Stream) or isinstance(queries, Stream):
        raise TypeError("many systems are solved together, over arrays: a stream will not do")
    batches.count_examples(train, "train")
    _check_values(loss_fn, params, {"queries": queries, "train": train})
    curvature = curvatures.hessian(loss_fn) if curvature is None else curvature
    over_train = {"weights": weights}
    matvec = curvatures.product(curvature, params, train, chunk_size=chunk_size, **over_train)
    params = trees.at_least_float32(params)

    def sample(sample_key, batch_size):
        return curvatures.minibatch_product(
            curvature, params, train, sample_key, batch_size=batch_size, **over_train
        )

    def gradient(example):
        one = jax.tree.map(lambda x: x[None], example)
        return jax.grad(lambda p: batches.losses_per_example(loss_fn, p, one)[0])(params)

    def solve(matvec, chunk):
        gradients = jax.vmap(gradient)(jax.tree.map(jnp.asarray, chunk))
        return gradients, jax.vmap(lambda v: solver(matvec, v, sample=sample, key=key))(gradients)

    return matvec, solve


def _top_scores(score, train, num_queries, top_k, chunk_size):
    """Returns the `TopScores` of `score(chunk) -> [examples, queries]`, chunk by chunk."""
    num_train = batches.count_examples(train, "train")
    num_chunks, take = batches.chunks(
        (train, jnp.arange(num_train)), chunk_size, jnp.ones(num_train)
    )

    def best(scores, index):  # of [queries, candidates], the largest
        values, places = lax.top_k(scores, top_k)
        return values, jnp.take_along_axis(index, places, axis=1)

    def merge(kept, chunk_index):
        (chunk, index), real = take(chunk_index)
        scores, index = score(chunk).T, jnp.broadcast_to(index, (num_queries, len(index)))
        found = []
        for sign, (values, places) in zip((1, -1), kept, strict=True):
            # Copies that fill up the last chunk must not be found twice.
            candidates = jnp.where(real > 0, sign * scores, -jnp.inf)
            candidates = jnp.concatenate([values, candidates], axis=1)
            found.append(best(candidates, jnp.concatenate([places, index], axis=1)))
        return tuple(found), None

    dtype = jax.eval_shape(score, jax.eval_shape(take, 0)[0][0]).dtype
    none = jnp.full((num_queries, top_k), -jnp.inf, dtype), jnp.zeros((num_queries, top_k), int)
    kept = lax.scan(merge, (none, none), jnp.arange(num_chunks))[0]
    (harmful_scores, harmful), (negated, helpful) = kept
    harmful, helpful = harmful.astype(jnp.int32), helpful.astype(jnp.int32)
    return TopScores(harmful_scores, harmful, -negated, helpful)


class DampingChoice(NamedTuple):
    """A damping, and what it was chosen by; all arrays are over the candidates, `[D]`.

    Attributes:
      damping: the candidate with the lowest `objective`, shape ().
      candidates: dampings tried, rising.
      objective: the mean of s^T H s / 2 - v^T s over the two halves held out; inf where a solve
        failed.
      spread: half the difference between the two halves.
    """

    damping: jax.Array
    candidates: jax.Array
    objective: jax.Array
    spread: jax.Array


def choose_damping(
    loss_fn: LossFn,
    params: Params,
    group: Batch,
    train: Batch,
    *,
    candidates: jax.Array,
    curvature: Curvature | None = None,
    chunk_size: int | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
) -> DampingChoice:
    """Returns the damping with which s, found on half of the data, fits the other half best.

    H^-1 v minimizes s^T H s / 2 - v^T s. For each candidate, s solves the damped system of every
    other example of `group` and `train`, and this objective is measured with H and v of the rest;
    then the halves change places. Too small a damping fits the noise of one half, too large a one
    ignores H. It is cross-validation of a ridge, not of retraining: where you can, check the choice
    by leaving a few examples out.

    Args:
      loss_fn: as for `group_ihvp`.
      params: as for `group_ihvp`.
      group: as for `group_ihvp`; at least 2 examples, in no particular order.
      train: as for `group_ihvp`; at least 2 examples, in no particular order.
      candidates: dampings `[D]`, positive: such as `jnp.geomspace(1e-4, 1, 9)` times the largest
        eigenvalue of H that `solvers.spectrum` finds.
      curvature: as for `group_ihvp`, positive semi-definite. With an indefinite one the objective
        has no minimum; candidates for which a solve fails are never chosen.
      chunk_size: as for `group_ihvp`.
      tolerance: of `solvers.cg`.
      max_steps: of `solvers.cg`.

    Raises:
      ValueError: for candidates that are not positive numbers `[D]`, fewer than 2 examples, or,
        outside `jit`, if no candidate's systems could be solved.
    """
    candidates = jnp.sort(jnp.asarray(candidates, float))
    if candidates.ndim != 1 or not candidates.size:
        raise ValueError(f"candidates must be dampings [D], got shape {candidates.shape}")
    if not programs.is_traced(candidates):
        for candidate in candidates.tolist():
            check_positive(candidates=candidate)
    for name, batch in (("group", group), ("train", train)):
        if batches.count_examples(batch, name) < 2:
            raise ValueError(f"{name} must have at least 2 examples, to be cut in halves")
    curvature = curvatures.hessian(loss_fn) if curvature is None else curvature

    def half(start):
        parts = jax.tree.map(lambda x: x[start::2], (group, train))
        v = group_gradient(loss_fn, params, parts[0], chunk_size=chunk_size)
        return curvatures.product(curvature, params, parts[1], chunk_size=chunk_size), v

    halves = half(0), half(1)

    def measure(damping):
        solver = solvers.cg(damping=damping, tolerance=tolerance, max_steps=max_steps)
        found = []
        for (matvec, v), (held_matvec, held_v) in (halves, halves[::-1]):
            s = solver(matvec, v)
            value = trees.dot(s.value, held_matvec(s.value)) / 2 - trees.dot(held_v, s.value)
            found.append(jnp.where(s.converged, value, jnp.inf))
        return jnp.stack(found)

    objectives = lax.map(measure, candidates)
    mean = jnp.mean(objectives, axis=1)
    if not programs.is_traced(mean) and not bool(jnp.isfinite(mean).any()):
        raise ValueError(
            "no candidate is a damping whose systems conjugate gradients can solve: choose larger "
            "ones, above minus the smallest eigenvalue that solvers.spectrum finds"
        )
    # Where both failed, inf - inf would be NaN.
    low, high = jnp.min(objectives, axis=1), jnp.max(objectives, axis=1)
    spread = jnp.where(jnp.isfinite(mean), (high - jnp.where(jnp.isfinite(mean), low, 0)) / 2, high)
    return DampingChoice(candidates[jnp.argmin(mean)], candidates, mean, spread)


def pixel_influence(
    loss_fn: LossFn,
    params: Params,
    ihvp: Params,
    batch: Batch,
    *,
    chunk_size: int | None = None,
) -> Any:
    """Returns I_pert(z_i) = -grad_x <ihvp, grad_theta l_i>, shaped like the inputs; equation 9.

    Positive at a pixel means that raising it, and training on, raises the group's loss: moving
    example i by delta changes that loss by about <I_pert, delta> / N. One forward-mode and one
    reverse-mode pass for all examples together; `loss_fn` must include everything between the
    pixels and the loss, and must treat examples one by one.

    Args:
      loss_fn: as for `group_ihvp`; here it must also be differentiable in the inputs.
      params: as for `group_ihvp`.
      ihvp: `Solution.value`, shaped like `params`.
      batch: `(inputs, targets)` with leading axis N; inputs floating point.
      chunk_size: examples per pass; None for all at once.

    Raises:
      TypeError: for inputs that are not floating point.
    """
    params, ihvp = _direction(params, ihvp)
    if isinstance(batch, Stream):
        raise TypeError("maps of a stream would fill the memory: call this for each of its batches")
    inputs, targets = batches.split_batch(batch)
    inputs = _check_floating(
        inputs, "inputs", "convert images to floats in [0, 1]; for tokens, pass their embeddings"
    )

    def maps(chunk):
        x, y = chunk
        # Where the caller replicates inputs but not parameters, each device wants its own map.
        x = spmd.device_local(x, params, ihvp, y)
        total = jax.grad(lambda x: -jnp.sum(_directional_losses(loss_fn, params, ihvp, (x, y))))
        return total(x)

    _check_values(loss_fn, params, {"batch": batch}, ihvp)
    return batches.map_chunks(maps, (inputs, targets), chunk_size)


def linear_head_loss(head_params: Params, batch: Batch) -> jax.Array:
    """Returns softmax cross-entropy of a last linear layer over cached features, shape `[N]`.

    HINT differentiates the last layer only, whose features do not depend on its weights: cache
    them, and `group_ihvp` costs two small matrix products a step. The Hessian is positive
    semi-definite and equals the Gauss-Newton matrix; `curvature.linear_head` is its closed form.

    Args:
      head_params: `{"kernel": [d, K], "bias": [K]}`, the layout of `flax.linen.Dense`, in any
        mapping; "bias" may be missing. A logit of -inf is a class left out.
      batch: features `[N, d]` and labels `[N]`, whole numbers from 0 to K - 1.

    Raises:
      ValueError: for another head, K = 1, or labels of another shape; outside `jit` also for
        labels out of range, whose losses and derivatives are NaN under `jit`.
    """
    features, labels = batches.split_batch(batch)
    heads.check_head(head_params, features)
    num_examples, num_classes = jnp.shape(features)[0], jnp.shape(head_params["kernel"])[1]
    heads.check_labels(labels, num_examples, num_classes)
    logits = heads.head_logits(head_params, features)
    chosen = jnp.asarray(labels)[:, None] == jnp.arange(num_classes)
    # Not 0 times the other logits, which may be -inf.
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    return losses * heads.one_for_classes(labels, num_classes, losses.dtype)


def split_params(
    params: Params, predicate: Callable[[str, jax.Array], bool]
) -> tuple[Params, Callable[[Params], Params]]:
    """Returns the parameters that influence is to act through, and how to put them back.

        head, merge = split_params(params, lambda path, leaf: path.startswith("head/"))
        s = group_ihvp(lambda head, batch: loss_fn(merge(head), batch), head, ...)

    Args:
      params: pytree of arrays.
      predicate: `predicate(path, leaf) -> bool`, with keys and indices joined by slashes for path.

    Returns:
      `selected`, which is `params` with None (for JAX: nothing at all) in place of the leaves that
      were not chosen, and `merge(selected) -> params`.

    Raises:
      ValueError: if no leaf is selected; the message lists the paths.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    chosen = [bool(predicate(path, leaf)) for path, (_, leaf) in zip(paths, leaves, strict=True)]
    if not any(chosen):
        raise ValueError(f"the predicate selects no parameters; there are: {listing(paths, 40)}")
    picked = [leaf if pick else None for pick, (_, leaf) in zip(chosen, leaves, strict=True)]

    def merge(selected):
        own = treedef.flatten_up_to(selected)
        return treedef.unflatten(
            [x if pick else leaf for pick, x, (_, leaf) in zip(chosen, own, leaves, strict=True)]
        )

    return treedef.unflatten(picked), merge


def _directional_losses(loss_fn, params, direction, batch):
    """Returns <direction, grad_theta l_i> for every example of `batch`, shape `[B]`."""

    def losses(p):
        return batches.losses_per_example(loss_fn, p, batch)

    return jax.jvp(losses, (params,), (direction,))[1]


def _layers(tree):
    """Returns a list of lists of leaves: those whose paths differ in the last key only."""
    layers: dict[Any, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        layers.setdefault(path[:-1], []).append(leaf)
    return list(layers.values())


def _length(leaves):
    """Returns the norm, with a gradient of zero where it is zero."""
    square = trees.dot(leaves, leaves)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _direction(params, ihvp):
    """Returns both in at least float32, after checking that they have the same shapes."""
    if isinstance(ihvp, solvers.Solution):
        raise ValueError("ihvp is a Solution: pass its .value, once you know that it converged")
    params = trees.at_least_float32(_check_floating(params, "params"))
    want, got = (
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, ihvp))
    )
    if jax.tree.structure(params) != jax.tree.structure(ihvp) or want != got:
        differing = sorted(k for k in want.keys() | got.keys() if want.get(k) != got.get(k))
        found = listing(
            (f"{k or 'the array'}: params {want.get(k)}, ihvp {got.get(k)}" for k in differing),
            separator="; ",
        )
        raise ValueError(f"ihvp must be shaped like params; {found or 'containers differ'}")
    return params, trees.cast_like(ihvp, params)


def _check_floating(tree, name, advice="differentiate floating-point arrays only"):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            path = name + jax.tree_util.keystr(path)
            raise TypeError(f"{path} must be floating point, got {dtype}: {advice}")
    return jax.tree.map(jnp.asarray, tree)


def _warn_of_slow_loops(matvec, rhs, solver):
    """Warns, while tracing for a CPU, of a convolution inside a solver's loop."""
    if solver is solvers.identity() or not (loops.steps_from_host() and programs.is_traced(rhs)):
        return
    if "conv_general_dilated" in str(jax.make_jaxpr(matvec)(rhs)):
        warnings.warn(
            "group_ihvp under jit on CPU, with convolutions: XLA's CPU backend runs each product "
            "some 30 times slower inside the solver's loop. Call group_ihvp outside jit, where the "
            "host drives the steps (and progress= can be given)",
            stacklevel=3,
        )


def _check_solver(solver):
    factories = {
        solvers.cg: "damping=0.1",
        solvers.cholesky: "damping=0.1",
        solvers.nystrom: "damping=0.1, rank=100",
        solvers.arnoldi: "damping=0.1, rank=50, num_steps=100",
        solvers.lissa: "damping=0.1",
        solvers.lissa_from_authors: "",
        solvers.identity: "",
    }
    if not callable(solver) or solver in factories:
        name = getattr(solver, "__name__", repr(solver))
        example = f"solvers.{name}({factories[solver]})" if callable(solver) else "solvers.cg(...)"
        raise TypeError(f"solver must be a solver, got {shortened(name)}: write {example}")


def _check_values(loss_fn, params, data, ihvp=None):
    """Raises ValueError, outside `jit`, for values with which no answer can be right."""
    check_no_nan(params=params, ihvp=ihvp)
    for name, batch in data.items():
        if isinstance(batch, Stream):
            first = next(iter(batch), None)
            if first is not None:
                batches.check_independent(loss_fn, params, first, name)
            continue
        check_no_nan(**{name: batch})
        if loss_fn is linear_head_loss:
            _check_head(params, batch, name)
        else:
            batches.check_independent(loss_fn, params, batch, name)


def _check_head(params, batch, name):
    features, labels = batches.split_batch(batch)
    heads.check_head(params, features)
    num_examples, num_classes = jnp.shape(features)[0], jnp.shape(params["kernel"])[1]
    heads.check_labels(labels, num_examples, num_classes, f"labels of {name}: labels")
