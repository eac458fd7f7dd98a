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
