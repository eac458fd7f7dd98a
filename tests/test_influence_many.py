"""Self-influence, the matrix of scores, streams of batches and the choice of a damping."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import ravel, relative_error

from jaxpoison import curvature, influence, solvers

DAMPING = 0.5
CG = solvers.cg(damping=DAMPING, tolerance=1e-7)
HEAD = problems.softmax_head()
DATA = HEAD.loss_fn, HEAD.params


def inverse():
    dense = problems.dense(problems.softmax_head)
    return np.linalg.inv(dense.hessian + DAMPING * np.eye(21)), dense.train_gradients


def test_self_influence_equals_a_dense_solve():
    matrix, gradients = inverse()
    want = np.einsum("np,pq,nq->n", gradients, matrix, gradients)
    got, solution = influence.self_influence(
        *DATA, HEAD.train, HEAD.train, solver=CG, chunk_size=24, examples_at_once=10
    )
    assert relative_error(got, want) < 1e-5
    assert solution.value is None and solution.converged.shape == (64,)
    solvers.require_converged(solution)


def query_gradients():
    with jax.enable_x64(True):
        params, queries = map(problems.float64, (HEAD.params, HEAD.group))
        one = jax.grad(lambda p, x, y: HEAD.loss_fn(p, (x[None], y[None]))[0])
        per_query = jax.vmap(one, (None, 0, 0))(params, *map(jnp.asarray, queries))
        return np.stack([ravel(jax.tree.map(lambda g, i=i: g[i], per_query)) for i in range(16)])


@pytest.mark.parametrize("way", [lambda f: f, jax.jit])
def test_score_matrix_equals_dense_solves_and_top_k_is_its_best(way):
    matrix, gradients = inverse()
    want = -query_gradients() @ matrix @ gradients.T

    def scores(queries, top_k):
        return influence.score_matrix(
            *DATA, queries, HEAD.train, solver=CG, curvature=curvature.linear_head,
            top_k=top_k, chunk_size=24, queries_at_once=6,
        )  # fmt: skip

    got, solution = way(lambda q: scores(q, None))(HEAD.group)
    assert got.shape == (16, 64) and solution.converged.shape == (16,)
    assert relative_error(got, want) < 1e-5
    top, _ = way(lambda q: scores(q, 5))(HEAD.group)
    order = np.argsort(-want, axis=1)
    np.testing.assert_array_equal(top.harmful, order[:, :5])
    np.testing.assert_array_equal(top.helpful, order[:, ::-1][:, :5])
    np.testing.assert_allclose(
        top.helpful_scores, np.take_along_axis(want, order[:, ::-1][:, :5], 1), rtol=1e-3, atol=1e-5
    )
    every, _ = scores(HEAD.group, 64)  # copies that fill up the last chunk are not found
    np.testing.assert_array_equal(np.sort(every.harmful, axis=1), np.tile(np.arange(64), (16, 1)))


def test_top_scores_never_hold_the_matrix():
    problem = problems.softmax_head(num_train=20_000, num_group=64)

    def top(queries):
        return influence.score_matrix(
            problem.loss_fn, problem.params, queries, problem.train, solver=solvers.identity(),
            top_k=3, chunk_size=500, queries_at_once=4,
        )  # fmt: skip

    compiled = jax.jit(top).lower(problem.group).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 20_000 * 4 / 2


def batches_of(data, size):
    num_examples = len(data[1])
    starts = range(0, num_examples, size)
    return [jax.tree.map(lambda x, i=i: x[i : i + size], data) for i in starts]


def test_streams_give_what_arrays_give():
    problem, dense = problems.small_network(), problems.dense(problems.small_network)
    reads = []

    def read():
        reads.append(1)
        yield from batches_of(problem.train, 24)  # the last is smaller

    gauss_newton = curvature.gauss_newton(problem.output_fn, problem.output_loss)
    told = []
    solution = influence.group_ihvp(
        problem.loss_fn,
        problem.params,
        influence.Stream(batches_of(problem.group, 5)),
        influence.Stream(read),
        solver=CG,
        curvature=gauss_newton,
        progress=lambda step, residual: told.append((step, residual)),
    )
    want = dense.solve(DAMPING, dense.gauss_newton)
    assert relative_error(ravel(solution.value), want) < 1e-5
    assert solution.converged and len(reads) >= int(solution.num_steps) + 1
    assert [step for step, _ in told] == list(range(1, int(solution.num_steps) + 1))
    scores = influence.example_influence(
        problem.loss_fn, problem.params, solution.value, influence.Stream(read)
    )
    assert relative_error(scores, -dense.train_gradients @ want) < 1e-5


def test_streams_refuse_what_they_cannot_do():
    stream = influence.Stream(batches_of(HEAD.train, 24))
    with pytest.raises(TypeError, match="read many times, which a list_iterator does not allow"):
        influence.Stream(iter(batches_of(HEAD.train, 24)))
    with pytest.raises(ValueError, match="stream without batches"):
        influence.group_gradient(*DATA, influence.Stream([]))
    with pytest.raises(ValueError, match="only the host can read: call this outside jit"):
        jax.jit(lambda p: influence.group_ihvp(HEAD.loss_fn, p, HEAD.group, stream, solver=CG))(
            HEAD.params
        )
    with pytest.raises(ValueError, match="only the host can read"):
        influence.group_ihvp(*DATA, HEAD.group, stream, solver=solvers.cholesky(damping=1.0))
    with pytest.raises(ValueError, match="drawn from arrays, not from a stream"):
        influence.group_ihvp(
            *DATA, HEAD.group, stream, solver=solvers.lissa(damping=1.0), key=jax.random.key(0)
        )
    shrinking = iter([24, 24, 24, 20, 20, 20, 20])

    def fewer():
        return iter(batches_of(HEAD.train, 64)[:1] if next(shrinking) == 24 else
                    batches_of(HEAD.group, 16))  # fmt: skip

    with pytest.raises(ValueError, match="same ones every time"):
        influence.group_ihvp(*DATA, HEAD.group, influence.Stream(fewer), solver=CG)
    broken = HEAD.train[0].at[3, 0].set(jnp.nan), HEAD.train[1]
    with pytest.raises(ValueError, match=r"train, batch 1\[0\] must be finite"):
        influence.group_ihvp(
            *DATA, HEAD.group, influence.Stream([HEAD.train, broken]), solver=CG,
            curvature=curvature.linear_head,
        )  # fmt: skip


def test_the_damping_chosen_is_the_best_on_held_out_halves():
    candidates = np.geomspace(1e-3, 100, 6)
    choice = influence.choose_damping(*DATA, HEAD.group, HEAD.train, candidates=candidates[::-1])
    with jax.enable_x64(True):
        params, group, train = map(problems.float64, (HEAD.params, HEAD.group, HEAD.train))
        flat, unravel = jax.flatten_util.ravel_pytree(params)

        def mean_loss(p, batch):
            return HEAD.loss_fn(unravel(p), batch).mean()

        halves = []
        for start in (0, 1):
            cut = [jax.tree.map(lambda x, i=start: x[i::2], data) for data in (group, train)]
            halves.append(
                (np.asarray(jax.grad(mean_loss)(flat, cut[0])),
                 np.asarray(jax.hessian(mean_loss)(flat, cut[1])))
            )  # fmt: skip
    want = []
    for damping in candidates:
        values = []
        for (v, H), (held_v, held_H) in (halves, halves[::-1]):
            s = np.linalg.solve(H + damping * np.eye(21), v)
            values.append(s @ held_H @ s / 2 - held_v @ s)
        want.append(np.mean(values))
    np.testing.assert_allclose(choice.objective, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(choice.damping, candidates[np.argmin(want)], rtol=1e-6)
    assert 0 < np.argmin(want) < 5
    np.testing.assert_allclose(choice.candidates, candidates, rtol=1e-6)


def test_errors_of_many():
    with pytest.raises(ValueError, match="top_k = 65 is more than the 64"):
        influence.score_matrix(*DATA, HEAD.group, HEAD.train, solver=CG, top_k=65)
    with pytest.raises(TypeError, match="a stream will not do"):
        influence.self_influence(*DATA, HEAD.group, influence.Stream([HEAD.train]), solver=CG)
    with pytest.raises(ValueError, match="candidates must be positive"):
        influence.choose_damping(*DATA, HEAD.group, HEAD.train, candidates=[1.0, -1.0])
    network = problems.small_network()
    with pytest.raises(ValueError, match="choose larger"):
        influence.choose_damping(
            network.loss_fn, network.params, network.group, network.train, candidates=[1e-6]
        )


def per_example_gradients():
    with jax.enable_x64(True):
        params, train = map(problems.float64, (HEAD.params, HEAD.train))
        one = jax.grad(lambda p, x, y: HEAD.loss_fn(p, (x[None], y[None]))[0])
        return jax.tree.map(
            np.asarray, jax.vmap(one, (None, 0, 0))(params, *map(jnp.asarray, train))
        )


def network_loss(params, batch):
    inputs, labels = batch
    hidden = jnp.tanh(inputs @ params["body"]["kernel"] + params["body"]["bias"])
    return problems.cross_entropy(hidden @ params["head"]["kernel"], labels)


def network_params(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "body": {
            "kernel": jax.random.normal(keys[0], (6, 4)),
            "bias": jax.random.normal(keys[1], (4,)),
        },
        "head": {"kernel": jax.random.normal(keys[2], (4, 3))},
    }


@pytest.mark.parametrize("way", [lambda f: f, jax.jit])
def test_renormalized_influence_is_influence_by_length_of_the_gradient(way):
    gradients = ravel_each(per_example_gradients())
    direction = jax.tree.map(lambda x: x + 1, HEAD.params)
    want = -(gradients @ ravel(direction)) / np.linalg.norm(gradients, axis=1)

    def scores(direction):
        return influence.renormalized_influence(*DATA, direction, HEAD.train, chunk_size=24)

    # A gradient of 1e-4, the difference of numbers next to 1, has three digits in float32.
    assert relative_error(way(scores)(direction), want) < 1e-3
    many = jax.vmap(scores)(jax.tree.map(lambda x: jnp.stack([x, -2 * x]), direction))
    assert relative_error(many[1], -2 * want) < 1e-3


def ravel_each(tree):
    leaves = jax.tree.leaves(tree)
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def test_layerwise_it_is_the_mean_of_cosines_and_the_scale_of_the_loss_does_not_matter():
    params, direction = network_params(0), network_params(1)
    with jax.enable_x64(True):
        wide, train = problems.float64(params), problems.float64(HEAD.train)
        one = jax.grad(lambda p, x, y: network_loss(p, (x[None], y[None]))[0])
        gradients = jax.vmap(one, (None, 0, 0))(wide, *map(jnp.asarray, train))
        cosines = []
        for layer in ("body", "head"):
            g, s = ravel_each(gradients[layer]), ravel(problems.float64(direction[layer]))
            cosines.append(g @ s / np.linalg.norm(g, axis=1) / np.linalg.norm(s))

    def scores(loss_fn, direction):
        return influence.renormalized_influence(
            loss_fn, params, direction, HEAD.train, layerwise=True
        )

    got = scores(network_loss, direction)
    assert relative_error(got, -np.mean(cosines, axis=0)) < 1e-5
    scaled = scores(lambda p, batch: 7 * network_loss(p, batch), direction)
    np.testing.assert_allclose(scaled, got, rtol=1e-4, atol=1e-6)
    longer = scores(network_loss, jax.tree.map(lambda x: 3 * x, direction))
    np.testing.assert_allclose(longer, got, rtol=1e-4, atol=1e-6)


def test_an_example_without_a_gradient_has_no_renormalized_influence():
    def loss_fn(p, batch):
        return batch[1] * (batch[0] @ p)

    inputs, weights = jnp.eye(3)[:2], jnp.array([0.0, 5.0])

    def score(direction, params):
        return influence.renormalized_influence(loss_fn, params, direction, (inputs, weights))

    direction = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(score(direction, jnp.ones(3)), [0, -2], rtol=1e-6)
    slopes = jax.jacobian(score)(direction, jnp.ones(3))
    np.testing.assert_allclose(slopes, [[0, 0, 0], [0, -1, 0]], rtol=1e-6)


def test_delta_influence_is_the_largest_threshold_of_the_boosting_rule():
    rng = np.random.default_rng(0)
    scores, transformed = rng.normal(size=40), rng.normal(size=(9, 40))
    for tolerance in (0, 2, 8):
        got = np.asarray(influence.delta_influence(scores, transformed, tolerance=tolerance))
        for threshold in np.linspace(-2, 2, 9):
            named = ((scores - transformed) > threshold).sum(axis=0) >= 9 - tolerance
            np.testing.assert_array_equal(got > threshold, named)
    many = jax.vmap(lambda t: influence.delta_influence(scores, t, tolerance=2))
    assert many(np.stack([transformed, transformed + 1])).shape == (2, 40)


@pytest.mark.parametrize(
    ("shape", "tolerance", "message"),
    [((9, 3), 0, r"expected \[N\] and \[T, N\]"), ((9, 4), 9, "expected 0 to 8"),
     ((0, 4), 0, "T > 0"), ((9, 4), -1, "tolerance is -1")],
)  # fmt: skip
def test_delta_influence_of_what_does_not_fit(shape, tolerance, message):
    with pytest.raises(ValueError, match=message):
        influence.delta_influence(np.zeros(4), np.zeros(shape), tolerance=tolerance)
