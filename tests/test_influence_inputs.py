"""What influence does with wrong labels, heads of all kinds, NaN, and losses that mix examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from flax.core import freeze
from problems import ravel, relative_error

from jaxpoison import curvature, influence, solvers

CG = solvers.cg(damping=0.5)


def with_label(value, dtype=np.int32, place=7):
    """Returns the training set of the softmax head with one label changed."""
    problem = problems.softmax_head()
    labels = np.array(problem.train[1], dtype)
    labels[place] = value
    return np.asarray(problem.train[0]), labels


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (3, np.int32, r"\[7\] is 3, but the head has 3 classes, 0 to 2 \(1 of 64 are wrong\)"),
        (-1, np.int32, r"\[7\] is -1.*leave those examples out"),
        (255, np.uint8, r"\[7\] is 255"),
        (2**32 + 1, np.int64, r"\[7\] is 4294967297"),
        (0.5, np.float32, r"\[7\] is 0.5.*whole"),
        (np.nan, np.float32, r"\[7\] is nan|\[1\] must be finite, got nan at index \(7,\)"),
    ],
)
def test_labels_that_are_no_classes_are_named(value, dtype, message):
    problem, bad = problems.softmax_head(), with_label(value, dtype)
    ihvp = functools.partial(
        influence.group_ihvp, problem.loss_fn, problem.params, solver=CG,
        curvature=curvature.linear_head,
    )  # fmt: skip
    s = jax.tree.map(jnp.ones_like, problem.params)
    for call in (
        lambda: influence.linear_head_loss(problem.params, bad),
        lambda: curvature.product(curvature.linear_head, problem.params, bad),
        lambda: ihvp(problem.group, bad, chunk_size=16),
        lambda: ihvp(bad, problem.train),
        lambda: influence.example_influence(problem.loss_fn, problem.params, s, bad, chunk_size=9),
        lambda: influence.pixel_influence(problem.loss_fn, problem.params, s, bad, chunk_size=9),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_labels_that_count_from_one_get_the_advice_to_subtract_it():
    problem = problems.softmax_head()
    with pytest.raises(ValueError, match="count from 1: subtract 1"):
        influence.linear_head_loss(problem.params, (problem.train[0], problem.train[1] + 1))


def test_under_jit_a_wrong_label_makes_its_example_nan_and_no_other():
    problem = problems.softmax_head()
    features, labels = with_label(-1)
    s = jax.tree.map(jnp.ones_like, problem.params)

    @jax.jit
    def all_kinds(features, labels):
        batch = features, labels
        losses = problem.loss_fn(problem.params, batch)
        scores = influence.example_influence(problem.loss_fn, problem.params, s, batch)
        maps = influence.pixel_influence(problem.loss_fn, problem.params, s, batch)
        return losses, scores, maps[:, 0]

    for values in all_kinds(features, labels):
        np.testing.assert_array_equal(np.isnan(values), np.arange(64) == 7)

    @jax.jit
    def solve(labels):
        return influence.group_ihvp(
            problem.loss_fn, problem.params, problem.group, (features, labels), solver=CG,
            curvature=curvature.linear_head,
        )  # fmt: skip

    solution = solve(labels)
    assert np.isnan(ravel(solution.value)).all()
    assert solution.status == solvers.Status.PRODUCT_NOT_FINITE
    with pytest.raises(solvers.DivergedError, match="labels that are no classes"):
        solvers.require_usable(solution)


def test_labels_of_other_shapes_are_refused_before_they_broadcast():
    problem = problems.softmax_head()
    features, labels = problem.train
    one_hot = jax.nn.one_hot(labels, 3)
    for bad, message in (
        (labels[:, None], r"shape \(64,\), got \(64, 1\).*labels\[:, 0\]"),
        (one_hot, r"got \(64, 3\).*argmax"),
        (labels[:-1], r"got \(63,\)"),
        (labels[0], r"got \(\)"),
    ):
        for loss in (problem.loss_fn, jax.jit(problem.loss_fn)):
            with pytest.raises(ValueError, match=message):
                loss(problem.params, (features, bad))
    with pytest.raises(ValueError, match=r"features must be \[N, d\] with d = 6"):
        problem.loss_fn(problem.params, (features[:, :5], labels))
    whole = influence.linear_head_loss(problem.params, (features, labels.astype(jnp.float32)))
    np.testing.assert_array_equal(whole, problem.loss_fn(problem.params, problem.train))


def test_an_absent_class_may_have_a_logit_of_minus_infinity():
    """As if its column did not exist: losses, scores and the solve."""
    problem = problems.softmax_head(num_classes=4)
    labels = [np.asarray(y) % 3 for _, y in (problem.group, problem.train)]
    group, train = (problem.group[0], labels[0]), (problem.train[0], labels[1])
    bias = np.asarray(problem.params["bias"])
    masked = {**problem.params, "bias": np.append(bias[:3], np.float32(-np.inf))}
    reduced = {"kernel": problem.params["kernel"][:, :3], "bias": bias[:3]}

    def answers(params):
        solution = influence.group_ihvp(
            problem.loss_fn, params, group, train, solver=CG, curvature=curvature.linear_head
        )
        scores = influence.example_influence(problem.loss_fn, params, solution.value, train)
        return problem.loss_fn(params, train), scores, solution

    got, want = answers(masked), answers(reduced)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)
    assert got[2].converged
    np.testing.assert_array_equal(got[2].value["kernel"][:, 3], 0)


@pytest.mark.parametrize("curve", [None, curvature.linear_head])
def test_heads_without_a_bias_and_frozen_ones(curve):
    problem = problems.softmax_head()
    without = {"kernel": problem.params["kernel"]}
    zero = {**without, "bias": jnp.zeros(3)}

    def ihvp(params):
        return influence.group_ihvp(
            problem.loss_fn, params, problem.group, problem.train, solver=CG, curvature=curve
        )

    frozen, plain = ihvp(freeze(zero)), ihvp(zero)
    np.testing.assert_allclose(ravel(frozen.value), ravel(plain.value), rtol=1e-6)
    assert jax.tree.structure(frozen.value) == jax.tree.structure(freeze(zero))
    # Dense truth: the rows and columns of the bias left out.
    with jax.enable_x64(True):
        kernel, group, train = map(
            problems.float64, (without["kernel"], problem.group, problem.train)
        )

        def mean_loss(flat, batch):
            logits = batch[0] @ flat.reshape(6, 3)
            return problems.cross_entropy(logits, batch[1]).mean()

        matrix = jax.hessian(mean_loss)(kernel.ravel(), train) + 0.5 * np.eye(18)
        want = np.linalg.solve(matrix, jax.grad(mean_loss)(kernel.ravel(), group))
    assert relative_error(ravel(ihvp(without).value), want) < 1e-5


def test_other_things_than_heads_are_refused_in_words():
    kernel = jnp.ones((6, 3))
    batch = problems.softmax_head().train
    for head, message in (
        ({"w": kernel}, r"dict with 'kernel' \[d, K\].*got keys 'w'"),
        ({"kernel": kernel, "bias": jnp.zeros(3), "scale": 1.0}, "got keys"),
        (kernel, "head_params must be a dict"),
        ({"kernel": kernel[0]}, r"got kernel \(3,\)"),
        ({"kernel": kernel, "bias": jnp.zeros(2)}, r"bias \(2,\)"),
        ({"kernel": kernel[:, :1], "bias": jnp.zeros(1)}, "one logit"),
    ):
        with pytest.raises(ValueError, match=message):
            influence.linear_head_loss(head, batch)
        with pytest.raises(ValueError, match=message):
            curvature.linear_head(head, batch, 1.0)


def broadcasting_loss(w, batch):
    """Outputs [B, 1] against targets [B]: every example meets every target."""
    outputs = batch[0] @ w
    return ((outputs - batch[1]) ** 2).mean(-1)


def normalizing_loss(w, batch):
    """As BatchNorm in training mode."""
    inputs = (batch[0] - batch[0].mean(0)) / (batch[0].std(0) + 1e-3)
    return ((inputs @ w)[:, 0] - batch[1]) ** 2


def regression(num_examples=40, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_examples, 4)).astype(np.float32)
    return inputs, np.sort(rng.normal(size=num_examples)).astype(np.float32)


@pytest.mark.parametrize("mixed", [broadcasting_loss, normalizing_loss])
def test_losses_in_which_examples_mix_are_found(mixed):
    w, data = jnp.ones((4, 1)), regression()
    gauss_newton = curvature.gauss_newton(lambda w, x: x @ w, lambda f, y: ((f - y) ** 2).mean(-1))

    def right(w, batch):
        return ((batch[0] @ w)[:, 0] - batch[1]) ** 2

    match = "loss of an example depends on the others of its batch"
    for call in (
        lambda: influence.group_ihvp(mixed, w, data, data, solver=CG),
        lambda: influence.group_ihvp(mixed, w, data, data, solver=CG, chunk_size=8),
        lambda: influence.group_gradient(mixed, w, data),
        lambda: influence.example_influence(mixed, w, w, data),
        lambda: influence.pixel_influence(mixed, w, w, data),
        lambda: curvature.product(curvature.hessian(mixed), w, data),
        lambda: influence.group_ihvp(right, w, data, data, solver=CG, curvature=gauss_newton),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert influence.group_ihvp(right, w, data, data, solver=CG).converged
    assert jax.jit(lambda w: influence.example_influence(mixed, w, w, data))(w).shape == (40,)


def test_rounding_in_half_precision_is_not_mixing():
    def loss(w, batch):
        inputs = batch[0].astype(jnp.bfloat16)
        return ((inputs @ w.astype(jnp.bfloat16))[:, 0] - batch[1].astype(jnp.bfloat16)) ** 2

    w, data = jnp.ones((4, 1)), regression()
    influence.example_influence(loss, w, w, data)


def test_nan_is_said_to_be_nan_and_where():
    problem = problems.softmax_head()
    params, group, train = problem.params, problem.group, problem.train
    s = jax.tree.map(jnp.ones_like, params)
    broken = np.array(train[0]), train[1]
    broken[0][17, 3] = np.nan
    lost = {**params, "kernel": params["kernel"].at[2, 1].set(jnp.nan)}
    endless = train[0].at[5, 0].set(jnp.inf), train[1]
    ihvp = functools.partial(influence.group_ihvp, problem.loss_fn, solver=CG)
    for call, message in (
        (
            lambda: ihvp(params, group, broken),
            r"train\[0\] must be finite, got nan at index \(17, ",
        ),
        (lambda: ihvp(params, broken, train), r"group\[0\] must be finite, got nan"),
        (lambda: ihvp(lost, group, train), r"params\['kernel'\] .* got nan at index \(2, 1\)"),
        (lambda: ihvp(params, group, endless), r"train\[0\] must be finite, got inf"),
        (
            lambda: influence.example_influence(problem.loss_fn, params, s, broken),
            r"batch\[0\] must be finite",
        ),
        (
            lambda: influence.pixel_influence(problem.loss_fn, params, lost, train),
            r"ihvp\['kernel'\] must be finite",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_under_jit_nan_gives_nan_scores_and_the_reason():
    problem = problems.softmax_head()
    broken = jnp.asarray(problem.train[0]).at[17, 3].set(jnp.nan), problem.train[1]

    @jax.jit
    def run(group, train):
        solution = influence.group_ihvp(problem.loss_fn, problem.params, group, train, solver=CG)
        return solution, influence.example_influence(
            problem.loss_fn, problem.params, solution.value, problem.train
        )

    for data, status, word in (
        ((problem.group, broken), solvers.Status.PRODUCT_NOT_FINITE, "product with H is NaN"),
        ((broken, problem.train), solvers.Status.RHS_NOT_FINITE, "right-hand side, the gradient"),
    ):
        solution, scores = run(*data)
        assert np.isnan(scores).all() and solution.status == status
        assert word in solution.describe()


def test_weights_that_overflow_are_no_zero_solution():
    problem = problems.softmax_head()
    huge = np.full(16, 3e38)

    def ihvp(weights):
        return influence.group_ihvp(
            problem.loss_fn, problem.params, problem.group, problem.train, solver=CG,
            group_weights=weights,
        )  # fmt: skip

    with pytest.raises(ValueError, match="group_weights sum to inf in float32: scale them"):
        ihvp(huge)
    for bad in (huge.astype(np.float32), np.full(16, -1, np.float32)):
        solution = jax.jit(ihvp)(bad)
        assert np.isnan(ravel(solution.value)).all() and not solution.usable


def test_near_kind_arguments_are_answered_in_words():
    problem = problems.softmax_head()
    data = problem.params, problem.group, problem.train
    ihvp = functools.partial(influence.group_ihvp, problem.loss_fn)
    for solver in (solvers.cg, solvers.identity, "cg", None):
        with pytest.raises(TypeError, match=r"solver must be a solver.*write solvers\."):
            ihvp(*data, solver=solver)
    for kind in (curvature.hessian, curvature.gauss_newton, curvature, "hessian"):
        with pytest.raises(TypeError, match="call the function that makes it"):
            ihvp(*data, solver=CG, curvature=kind)
    for empty in ({}, {"kernel": jnp.zeros((0, 3))}):
        with pytest.raises(ValueError, match="parameters hold no numbers"):
            influence.group_ihvp(lambda p, b: jnp.sum(b[0], axis=1), empty, *data[1:], solver=CG)
    lists = np.ones((300, 6)).tolist(), [0] * 300
    with pytest.raises(ValueError, match="nested lists into arrays") as error:
        ihvp(problem.params, lists, lists, solver=CG)
    assert len(str(error.value)) < 500
    with pytest.raises(TypeError, match=r"influence\.Stream\(batches\)"):
        ihvp(problem.params, problem.group, iter([problem.train]), solver=CG)
    many = {f"layer_{i}": jnp.ones(3) for i in range(5000)}
    with pytest.raises(ValueError, match=r"and 4,960 more") as error:
        influence.split_params(many, lambda path, leaf: False)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "solver",
    [
        CG,
        solvers.identity(),
        solvers.cholesky(damping=0.5),
        solvers.nystrom(damping=0.5, rank=8),
        solvers.lissa(damping=0.5, num_steps=30, batch_size=16),
    ],
)
def test_solves_run_under_debug_nans_and_in_float64(solver):
    problem = problems.softmax_head()

    def run(params, group, train):
        solution = influence.group_ihvp(
            problem.loss_fn, params, group, train, solver=solver, key=jax.random.key(0)
        )
        return solution, influence.example_influence(problem.loss_fn, params, solution.value, train)

    data = problem.params, problem.group, problem.train
    with jax.debug_nans(True):
        for way in (run, jax.jit(run)):
            solution, scores = way(*data)
            assert np.isfinite(scores).all() and np.isfinite(solution.top_eigenvalue)
    with jax.enable_x64(True):
        wide = tuple(map(problems.float64, data))
        for way in (run, jax.jit(run)):
            assert ravel(way(*wide)[0].value).dtype == np.float64
            assert ravel(way(*data)[0].value).dtype == np.float32


def test_convolutions_in_a_solver_under_jit_on_cpu_are_warned_of():
    inputs, targets = jnp.ones((4, 6, 6, 4)), jnp.zeros((4, 6, 6, 4))

    def loss(kernel, batch):
        outputs = jax.lax.conv_general_dilated(
            batch[0], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean((outputs - batch[1]) ** 2, axis=(1, 2, 3))

    def solve(kernel):
        batch = inputs, targets
        return influence.group_ihvp(loss, kernel, batch, batch, solver=solvers.cg(damping=1.0))

    kernel = jnp.ones((3, 3, 4, 4))
    with pytest.warns(UserWarning, match="Call group_ihvp outside jit"):
        under_jit = jax.jit(solve)(kernel)
    eager = solve(kernel)  # without a warning: they are errors here
    np.testing.assert_allclose(under_jit.value, eager.value, rtol=1e-4, atol=1e-6)
