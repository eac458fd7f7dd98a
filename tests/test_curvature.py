import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.flatten_util import ravel_pytree
from problems import ravel, relative_error

from jaxpoison import curvature

PROBLEMS = [problems.softmax_head, problems.small_network]
KINDS = ["hessian", "gauss_newton"]


def kind_of(problem, kind):
    if kind == "hessian":
        return curvature.hessian(problem.loss_fn)
    return curvature.gauss_newton(problem.output_fn, problem.output_loss)


def vectors(params, seed=0):
    """Returns two pytrees shaped like `params`."""
    flat, unravel = ravel_pytree(params)
    return [unravel(x) for x in jax.random.normal(jax.random.key(seed), (2, flat.size))]


@pytest.mark.parametrize("wrap", problems.COMPOSITIONS)
@pytest.mark.parametrize(("kind", "chunk_size"), [("hessian", None), ("gauss_newton", 3)])
def test_product_equals_dense_matrix_in_every_composition(wrap, kind, chunk_size):
    problem = problems.small_network()
    u, _ = vectors(problem.params)

    def multiply(params, group, train, axis_name):
        del group
        return curvature.product(
            kind_of(problem, kind), params, train, chunk_size=chunk_size, axis_name=axis_name
        )(u)

    got = wrap(multiply, problem.params, problem.group, problem.train)
    want = getattr(problems.dense(problems.small_network), kind) @ ravel(u).astype(np.float64)
    assert relative_error(ravel(got), want) < 2e-6


@pytest.mark.parametrize("problem_fn", PROBLEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_product_in_float64_is_exact(problem_fn, kind):
    problem = problem_fn()
    with jax.enable_x64(True):
        params, train = map(problems.float64, (problem.params, problem.train))
        u = problems.float64(vectors(params)[0])
        got = ravel(curvature.product(kind_of(problem, kind), params, train)(u))
        want = getattr(problems.dense(problem_fn), kind) @ ravel(u)
    assert got.dtype == np.float64
    assert relative_error(got, want) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_product_is_linear_and_symmetric(kind):
    problem = problems.small_network()
    multiply = jax.jit(curvature.product(kind_of(problem, kind), problem.params, problem.train))
    u, v = vectors(problem.params)
    combined = multiply(jax.tree.map(lambda a, b: 2 * a - 3 * b, u, v))
    assert relative_error(ravel(combined), 2 * ravel(multiply(u)) - 3 * ravel(multiply(v))) < 2e-6
    np.testing.assert_allclose(ravel(u) @ ravel(multiply(v)), ravel(v) @ ravel(multiply(u)), 1e-5)


def test_gauss_newton_is_the_hessian_of_a_linear_head_and_semi_definite_for_a_network():
    head, network = map(problems.dense, PROBLEMS)
    assert relative_error(head.gauss_newton, head.hessian) < 1e-14
    assert np.linalg.eigvalsh(network.hessian)[0] < -1e-2
    assert np.linalg.eigvalsh(network.gauss_newton)[0] > -1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 7, 32, 1000])
def test_product_does_not_depend_on_chunk_size_or_order(kind, chunk_size):
    problem = problems.small_network()
    u, _ = vectors(problem.params)
    order = np.random.default_rng(0).permutation(64)
    shuffled = jax.tree.map(lambda x: x[order], problem.train)
    whole = curvature.product(kind_of(problem, kind), problem.params, problem.train)(u)
    chunked = jax.jit(
        curvature.product(kind_of(problem, kind), problem.params, shuffled, chunk_size=chunk_size)
    )(u)
    assert relative_error(ravel(chunked), ravel(whole)) < 2e-6


def test_examples_that_fill_up_the_last_chunk_are_real_ones():
    def loss_fn(params, batch):  # NaN for an input of zeros, even with weight 0
        inputs, _ = batch
        return inputs @ params / jnp.linalg.norm(inputs, axis=1) + jnp.sum(params**2)

    batch = (jnp.ones((5, 3)), jnp.zeros(5))
    u = jnp.arange(3.0)
    multiply = curvature.product(curvature.hessian(loss_fn), jnp.ones(3), batch, chunk_size=4)
    np.testing.assert_allclose(multiply(u), 2 * u, rtol=1e-6)


def test_memory_of_a_chunked_product_is_flat_in_the_number_of_examples():
    def temporary_bytes(num_examples, chunk_size):
        problem = problems.softmax_head(num_train=num_examples, dim=50, num_classes=10)

        def multiply(params, train):
            return curvature.product(
                curvature.hessian(problem.loss_fn), params, train, chunk_size=chunk_size
            )(params)

        compiled = jax.jit(multiply).lower(problem.params, problem.train).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16384, 256) <= 1.1 * temporary_bytes(2048, 256)
    assert temporary_bytes(16384, None) > 5 * temporary_bytes(16384, 256)


def test_half_precision_parameters_are_raised_to_float32():
    problem = problems.small_network()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem.params)
    u, _ = vectors(problem.params)
    kind = curvature.hessian(problem.loss_fn)
    got = curvature.product(kind, half, problem.train)(u)
    raised = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    want = curvature.product(kind, raised, problem.train)(u)
    assert ravel(got).dtype == np.float32
    np.testing.assert_array_equal(ravel(got), ravel(want))


def test_minibatch_products_average_to_the_whole_and_differ_between_devices():
    problem = problems.softmax_head()
    kind = curvature.hessian(problem.loss_fn)
    u, _ = vectors(problem.params)

    def one(key, axis_name=None, train=problem.train):
        return curvature.minibatch_product(
            kind, problem.params, train, key, batch_size=8, axis_name=axis_name
        )(u)

    keys = jax.random.split(jax.random.key(0), 2000)
    mean = jax.tree.map(lambda x: x.mean(0), jax.jit(jax.vmap(one))(keys))
    want = problems.dense(problems.softmax_head).hessian @ ravel(u)
    assert relative_error(ravel(mean), want) < 0.03

    # The same examples on each of 8 devices: equal draws would give one mini-batch of 8.
    same = functools.partial(one, keys[0], "data", problem.train)
    spread = jax.vmap(lambda _: same(), axis_name="data")(jnp.arange(8))
    error = relative_error(ravel(jax.tree.map(lambda x: x[0], spread)), want)
    assert error < relative_error(ravel(one(keys[0])), want)


def test_errors_say_what_is_wrong():
    problem = problems.softmax_head()
    kind = curvature.hessian(problem.loss_fn)
    with pytest.raises(ValueError, match="chunk_size must be at least 1 or None, got 0"):
        curvature.product(kind, problem.params, problem.train, chunk_size=0)
    with pytest.raises(ValueError, match=r"leading axis of examples.*\[0\] \(4, 6\).*\[1\] \(3,\)"):
        curvature.product(kind, problem.params, (jnp.ones((4, 6)), jnp.zeros(3, int)))
    with pytest.raises(ValueError, match="leading axis of examples"):
        curvature.product(kind, problem.params, (jnp.ones((4, 6)), 3))
    with pytest.raises(ValueError, match="batch is empty"):
        curvature.product(kind, problem.params, (jnp.ones((0, 6)), jnp.zeros(0, int)))
    with pytest.raises(ValueError, match="batch holds no arrays"):
        curvature.product(kind, problem.params, (None, None))
    mean = curvature.hessian(lambda p, b: problem.loss_fn(p, b).mean())
    with pytest.raises(ValueError, match=r"shape \(64,\), got shape \(\); return the losses them"):
        curvature.product(mean, problem.params, problem.train)
    columns = curvature.hessian(lambda p, b: problem.loss_fn(p, b)[:, None])
    with pytest.raises(ValueError, match=r"got shape \(64, 1\)"):
        curvature.product(columns, problem.params, problem.train)
    with pytest.raises(ValueError, match="pair"):
        curvature.product(kind_of(problem, "gauss_newton"), problem.params, problem.train[0])


def test_linear_head_is_the_hessian_of_linear_head_loss():
    problem, dense = problems.softmax_head(), problems.dense(problems.softmax_head)
    weights = jnp.linspace(0.1, 2, 64)
    u = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), problem.params)
    closed, automatic = (
        curvature.product(c, problem.params, problem.train, weights=weights, chunk_size=24)(u)
        for c in (curvature.linear_head, curvature.hessian(problem.loss_fn))
    )
    assert relative_error(ravel(closed), ravel(automatic)) < 1e-6
    got = curvature.product(curvature.linear_head, problem.params, problem.train)(u)
    assert relative_error(ravel(got), dense.hessian @ ravel(u)) < 1e-6


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("chunk_size", [None, 24])
def test_weights_are_those_of_a_weighted_mean(kind, chunk_size):
    """A weight of 2 is the example twice, a weight of 0 is the example left out."""
    problem = problems.small_network()
    weights = jnp.asarray(np.random.default_rng(0).integers(0, 3, 64), jnp.float32)
    u = jax.tree.map(jnp.cos, problem.params)
    repeated = jax.tree.map(
        lambda x: np.repeat(np.asarray(x), np.asarray(weights, int), axis=0), problem.train
    )
    make = functools.partial(curvature.product, kind_of(problem, kind), problem.params)
    want = make(repeated)(u)
    got = make(problem.train, weights=3.5 * weights, chunk_size=chunk_size)(u)
    assert relative_error(ravel(got), ravel(want)) < 1e-6


@pytest.mark.parametrize("wrap", [problems.shard_map, problems.pmap, problems.sharded_jit])
def test_weights_that_differ_in_sum_between_devices(wrap):
    problem = problems.softmax_head()
    weights = jnp.arange(64.0)
    u = jax.tree.map(jnp.cos, problem.params)

    def multiply(params, group, train, axis_name):
        del group
        inputs, labels, weights = train
        return curvature.product(
            curvature.hessian(problem.loss_fn),
            params,
            (inputs, labels),
            weights=weights,
            axis_name=axis_name,
        )(u)

    data = problem.params, problem.group, (*problem.train, weights)
    assert relative_error(ravel(wrap(multiply, *data)), ravel(problems.jit(multiply, *data))) < 2e-6


def test_weighted_minibatches_average_to_the_weighted_whole():
    problem = problems.softmax_head()
    weights = jnp.where(jnp.arange(64) < 20, 1.0, 0.0)
    args = curvature.hessian(problem.loss_fn), problem.params, problem.train
    u = jax.tree.map(jnp.cos, problem.params)

    def draw(key):
        return curvature.minibatch_product(*args, key, batch_size=32, weights=weights)(u)

    several = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
    mean = jax.tree.map(lambda x: x.mean(0), several)
    want = curvature.product(*args, weights=weights)(u)
    assert relative_error(ravel(mean), ravel(want)) < 0.03
    unweighted = curvature.product(*args)(u)
    assert relative_error(ravel(unweighted), ravel(want)) > 0.1


@pytest.mark.parametrize("chunk_size", [None, 24])
def test_l2_penalty_adds_its_strength_to_the_diagonal(chunk_size):
    problem, dense = problems.softmax_head(), problems.dense(problems.softmax_head)
    strength = {"kernel": 0.3, "bias": 0.0}
    regularised = curvature.with_l2(curvature.linear_head, strength)
    u = jax.tree.map(jnp.cos, problem.params)
    got = curvature.product(regularised, problem.params, problem.train, chunk_size=chunk_size)(u)
    diagonal = ravel(jax.tree.map(lambda x, s: jnp.full_like(x, s), problem.params, strength))
    assert relative_error(ravel(got), dense.hessian @ ravel(u) + diagonal * ravel(u)) < 1e-6


def test_a_jitted_function_may_return_a_linearised_product():
    problem, dense = problems.small_network(), problems.dense(problems.small_network)
    u = jax.tree.map(jnp.cos, problem.params)
    for kind in ("hessian", "gauss_newton"):
        chosen = kind_of(problem, kind)
        operator = jax.jit(lambda p, t, c=chosen: curvature.product(c, p, t))(
            problem.params, problem.train
        )
        multiply = jax.jit(lambda operator, u: operator(u))
        want = getattr(dense, kind) @ ravel(u)
        assert relative_error(ravel(multiply(operator, u)), want) < 1e-5
        jaxpr = str(jax.make_jaxpr(lambda operator, u: operator(u))(operator, u))
        assert "tanh" not in jaxpr  # no forward pass


def test_errors_of_weights():
    problem = problems.softmax_head()
    make = functools.partial(
        curvature.product, curvature.linear_head, problem.params, problem.train
    )
    with pytest.raises(ValueError, match=r"weights .*shape \(64,\), got shape \(3,\)"):
        make(weights=jnp.ones(3))
    for bad in (jnp.zeros(64), -jnp.ones(64), jnp.ones(64).at[0].set(jnp.nan)):
        with pytest.raises(ValueError, match="finite, not negative, and not all zero"):
            make(weights=bad)
