import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.flatten_util import ravel_pytree
from problems import ravel, relative_error

from jaxpoison import curvature, influence, solvers

DAMPING = 0.5
SOLVERS = {
    "cg": solvers.cg(damping=DAMPING),
    "cholesky": solvers.cholesky(damping=DAMPING),
    "lissa": solvers.lissa(damping=DAMPING, scale=2.0, batch_size=None, num_steps=60),
    "nystrom": solvers.nystrom(damping=DAMPING, rank=72),
}
CASES = {  # the Hessian of the small network is indefinite beyond this damping
    "head": (problems.softmax_head, "hessian"),
    "closed_head": (problems.softmax_head, "linear_head"),
    "network": (problems.small_network, "gauss_newton"),
}


def curvature_of(problem, kind):
    return {
        "hessian": None,
        "linear_head": curvature.linear_head,
        "gauss_newton": curvature.gauss_newton(problem.output_fn, problem.output_loss),
    }[kind]


@pytest.mark.parametrize(
    ("wrap", "solver", "case"),
    [
        *((wrap, "cg", "head") for wrap in problems.COMPOSITIONS),
        *((wrap, "cg", "network") for wrap in problems.COMPOSITIONS),
        *((wrap, "cg", "closed_head") for wrap in (problems.sharded_jit, problems.shard_map)),
        *((wrap, "cholesky", "head") for wrap in problems.COMPOSITIONS),
        *((wrap, "lissa", "head") for wrap in problems.COMPOSITIONS),
        *((wrap, "nystrom", "closed_head") for wrap in problems.COMPOSITIONS),
        *((problems.jit, solver, "network") for solver in ("cholesky", "lissa", "nystrom")),
    ],
)
def test_group_ihvp_equals_dense_solve_in_every_composition(wrap, solver, case):
    problem_fn, kind = CASES[case]
    problem, dense = problem_fn(), problems.dense(problem_fn)

    def ihvp(params, group, train, axis_name):
        return influence.group_ihvp(
            problem.loss_fn,
            params,
            group,
            train,
            solver=SOLVERS[solver],
            curvature=curvature_of(problem, kind),
            key=jax.random.key(0),
            axis_name=axis_name,
        )

    solution = wrap(ihvp, problem.params, problem.group, problem.train)
    matrix = dense.gauss_newton if kind == "gauss_newton" else dense.hessian
    assert relative_error(ravel(solution.value), dense.solve(DAMPING, matrix)) < 1e-5
    assert solution.residual < 1e-5
    assert solution.converged
    assert jax.tree.structure(solution.value) == jax.tree.structure(problem.params)


@pytest.mark.parametrize("wrap", problems.COMPOSITIONS)
def test_chunks_agree_in_every_composition(wrap):
    problem, dense = problems.softmax_head(), problems.dense(problems.softmax_head)

    def ihvp(params, group, train, axis_name):
        chunk_size = 24 if axis_name is None else 3  # neither divides the number of examples
        return influence.group_ihvp(
            problem.loss_fn,
            params,
            group,
            train,
            solver=SOLVERS["cg"],
            chunk_size=chunk_size,
            axis_name=axis_name,
        )

    solution = wrap(ihvp, problem.params, problem.group, problem.train)
    assert relative_error(ravel(solution.value), dense.solve(DAMPING)) < 1e-5


@pytest.mark.parametrize("num_devices", [1, 2, 4])  # 8 is `COMPOSITIONS`
@pytest.mark.parametrize("wrap", [problems.sharded_jit, problems.shard_map])
def test_any_number_of_devices_gives_the_same(wrap, num_devices):
    problem = problems.softmax_head()

    def ihvp(params, group, train, axis_name):
        return influence.group_ihvp(
            problem.loss_fn, params, group, train, solver=SOLVERS["cg"], axis_name=axis_name
        )

    data = problem.params, problem.group, problem.train
    one = problems.jit(ihvp, *data)
    several = wrap(ihvp, *data, num_devices=num_devices)
    assert relative_error(ravel(several.value), ravel(one.value)) < 2e-6


@pytest.mark.parametrize("wrap", [problems.shard_map, problems.pmap])
def test_stochastic_solver_works_inside_mapped_code(wrap):
    problem, dense = problems.softmax_head(), problems.dense(problems.softmax_head)
    solver = solvers.lissa(damping=DAMPING, batch_size=4, num_steps=500)

    def ihvp(params, group, train, axis_name):
        return influence.group_ihvp(
            problem.loss_fn,
            params,
            group,
            train,
            solver=solver,
            key=jax.random.key(0),
            axis_name=axis_name,
        )

    solution = wrap(ihvp, problem.params, problem.group, problem.train)
    assert solution.usable
    assert relative_error(ravel(solution.value), dense.solve(DAMPING)) < 0.1


@pytest.mark.parametrize(
    ("wrap", "solver", "kind"),
    [
        *((wrap, "cg", "hessian") for wrap in problems.COMPOSITIONS),
        (problems.shard_map, "cholesky", "hessian"),
        (problems.jit, "nystrom", "linear_head"),
        (problems.shard_map, "cg", "linear_head"),
    ],
)
def test_gradient_through_the_solution_is_right_in_every_composition(wrap, solver, kind):
    """d <w, s> / d params and / d train inputs, with the derivative taken outside."""
    problem = problems.softmax_head()
    weights = np.random.default_rng(0).normal(size=21).astype(np.float32)

    def readout(params, group, train, axis_name):
        solution = influence.group_ihvp(
            problem.loss_fn,
            params,
            group,
            train,
            solver=SOLVERS[solver],
            curvature=curvature_of(problem, kind),
            key=jax.random.key(0),
            axis_name=axis_name,
        )
        return weights @ ravel_pytree(solution.value)[0]

    def by_dense_solve(params, inputs):
        flat, unravel = ravel_pytree(params)

        def mean_loss(p, batch):
            return problem.loss_fn(unravel(p), batch).mean()

        matrix = jax.hessian(mean_loss)(flat, (inputs, problem.train[1]))
        gradient = jax.grad(mean_loss)(flat, problem.group)
        return weights @ jnp.linalg.solve(matrix + DAMPING * jnp.eye(21), gradient)

    want = jax.jit(jax.grad(by_dense_solve, (0, 1)))(problem.params, problem.train[0])
    got = jax.grad(lambda p, x: wrap(readout, p, problem.group, (x, problem.train[1])), (0, 1))(
        problem.params, problem.train[0]
    )
    for left, right in zip(got, want, strict=True):
        assert relative_error(ravel(left), ravel(right)) < 2e-5


def test_gradient_inside_pmap_of_values_that_differ_between_devices():
    """Each device asks for the derivative of its own read-out; their sum must be right."""
    problem = problems.softmax_head()
    shares = jnp.arange(8.0) / 28
    weights = np.random.default_rng(0).normal(size=21).astype(np.float32)

    def readout(params, group, train, share, axis_name):
        solution = influence.group_ihvp(
            problem.loss_fn, params, group, train, solver=SOLVERS["cg"], axis_name=axis_name
        )
        return share * (weights @ ravel_pytree(solution.value)[0])

    shards = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), (problem.group, problem.train))
    mapped = jax.pmap(
        functools.partial(readout, axis_name="data"), axis_name="data", in_axes=(None, 0, 0, 0)
    )
    got = jax.grad(lambda p: mapped(p, *shards, shares).sum())(problem.params)
    want = jax.grad(readout)(problem.params, problem.group, problem.train, 1.0, None)
    assert relative_error(ravel(got), ravel(want)) < 1e-5


def float64_head_solution(problem, damping):
    """Returns s for a linear head by CG to 1e-14 in NumPy, from the closed form of H V."""
    params, group, train = map(problems.float64, (problem.params, problem.group, problem.train))

    def extend(features):
        return np.concatenate([np.ones((len(features), 1)), features], axis=1)

    def probabilities(features):
        logits = extend(features) @ theta
        logits -= logits.max(axis=1, keepdims=True)
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    theta = np.concatenate([params["bias"][None], params["kernel"]])  # [d + 1, K]
    v = extend(group[0]).T @ (probabilities(group[0]) - np.eye(10)[group[1]]) / len(group[0])
    features, p = extend(train[0]), probabilities(train[0])

    def multiply(u):
        z = features @ u
        return (
            features.T @ (p * z - p * np.sum(p * z, axis=1, keepdims=True)) / len(p) + damping * u
        )

    x, r = np.zeros_like(v), v
    q, rr = r, np.vdot(r, r)
    while np.linalg.norm(r) > 1e-14 * np.linalg.norm(v):
        product = multiply(q)
        alpha = rr / np.vdot(q, product)
        x, r = x + alpha * q, r - alpha * product
        rr, before = np.vdot(r, r), rr
        q = r + rr / before * q
    return {"bias": x[0], "kernel": x[1:]}


def test_cg_equals_a_float64_solve_on_the_mnist_head():
    problem = problems.mnist_head()
    solution = jax.jit(
        lambda p, g, t: influence.group_ihvp(problem.loss_fn, p, g, t, solver=SOLVERS["cg"])
    )(problem.params, problem.group, problem.train)
    want = float64_head_solution(problem, DAMPING)
    assert relative_error(ravel(solution.value), ravel(want)) < 1e-5
    assert solution.converged


def reduced_mnist_head():
    problem = problems.mnist_head()
    keep = slice(0, 100)
    params = {"kernel": problem.params["kernel"][keep], "bias": problem.params["bias"]}
    group, train = ((x[:, keep], y) for x, y in (problem.group, problem.train))
    return problem._replace(params=params, group=group, train=train)


@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_direct_and_iterative_solutions_agree_on_a_reduced_mnist_head(solver):
    problem = reduced_mnist_head()
    solution = jax.jit(
        lambda p, g, t: influence.group_ihvp(problem.loss_fn, p, g, t, solver=SOLVERS[solver])
    )(problem.params, problem.group, problem.train)
    want = float64_head_solution(problem, DAMPING)
    assert relative_error(ravel(solution.value), ravel(want)) < 1e-5
    assert solution.converged


def test_group_gradient_is_the_mean_and_chunks_do_not_matter():
    problem, dense = problems.small_network(), problems.dense(problems.small_network)
    for chunk_size in (None, 1, 5, 16, 99):
        got = influence.group_gradient(
            problem.loss_fn, problem.params, problem.group, chunk_size=chunk_size
        )
        assert relative_error(ravel(got), dense.gradient) < 2e-6


def test_group_ihvp_is_linear_in_the_group_and_blind_to_order():
    problem = problems.softmax_head()
    ihvp = jax.jit(
        lambda g, t: (
            influence.group_ihvp(problem.loss_fn, problem.params, g, t, solver=SOLVERS["cg"]).value
        )
    )
    whole = ravel(ihvp(problem.group, problem.train))
    halves = [jax.tree.map(lambda x, i=i: x[i::2], problem.group) for i in (0, 1)]
    parts = [ravel(ihvp(half, problem.train)) for half in halves]
    assert relative_error((parts[0] + parts[1]) / 2, whole) < 1e-5
    rng = np.random.default_rng(0)
    orders = rng.permutation(16), rng.permutation(64)
    group, train = (
        jax.tree.map(lambda x, o=order: x[o], data)
        for data, order in zip((problem.group, problem.train), orders, strict=True)
    )
    assert relative_error(ravel(ihvp(group, train)), whole) < 1e-5


def test_one_ihvp_per_class_under_vmap_with_weights():
    """Groups of unequal size, as weights over one batch: each is the IHVP of its class alone."""
    problem = problems.softmax_head()
    inputs, labels = problem.group

    def ihvp(group, weights=None):
        return influence.group_ihvp(
            problem.loss_fn,
            problem.params,
            group,
            problem.train,
            solver=SOLVERS["cg"],
            group_weights=weights,
        )

    weights = (labels == jnp.arange(3)[:, None]).astype(jnp.float32)
    sizes = weights.sum(axis=1)
    assert len(set(sizes.tolist())) > 1
    together = jax.jit(jax.vmap(lambda w: ihvp(problem.group, w)))(weights)
    assert together.converged.all()
    for label in range(3):
        alone = ihvp((inputs[labels == label], labels[labels == label]))
        value = jax.tree.map(lambda x, label=label: x[label], together.value)
        assert relative_error(ravel(value), ravel(alone.value)) < 1e-5


@pytest.mark.parametrize("wrap", problems.COMPOSITIONS)
def test_padded_batches_with_weights_of_zero_in_every_composition(wrap):
    """Five copies of the last example fill up the group, eight fill up the training set."""
    problem = problems.softmax_head()

    def fill_up(data, num_real):
        last = num_real - 1
        return jax.tree.map(lambda x: x[np.minimum(np.arange(len(x)), last)], data)

    def ihvp(params, group, train, axis_name):
        (group, group_weights), (train, train_weights) = group, train
        return influence.group_ihvp(
            problem.loss_fn,
            params,
            group,
            train,
            solver=SOLVERS["cg"],
            group_weights=group_weights,
            train_weights=train_weights,
            axis_name=axis_name,
        )

    got = wrap(
        ihvp,
        problem.params,
        (fill_up(problem.group, 11), (jnp.arange(16) < 11).astype(jnp.float32)),
        (fill_up(problem.train, 56), (jnp.arange(64) < 56).astype(jnp.float32)),
    )
    want = influence.group_ihvp(
        problem.loss_fn,
        problem.params,
        jax.tree.map(lambda x: x[:11], problem.group),
        jax.tree.map(lambda x: x[:56], problem.train),
        solver=SOLVERS["cg"],
    )
    assert relative_error(ravel(got.value), ravel(want.value)) < 1e-5


def test_influence_through_a_part_of_the_parameters():
    problem = problems.small_network()
    out, merge = influence.split_params(problem.params, lambda path, leaf: path == "out/kernel")
    assert [x.shape for x in jax.tree.leaves(out)] == [(8, 3)]
    np.testing.assert_array_equal(ravel(merge(out)), ravel(problem.params))

    def loss_fn(out, batch):
        return problem.loss_fn(merge(out), batch)

    def features(batch):
        inputs, labels = batch
        kernel, bias = problem.params["hidden"]
        return jnp.tanh(inputs @ kernel + bias), labels

    def head_loss(kernel, batch):
        return influence.linear_head_loss({"kernel": kernel, "bias": jnp.zeros(3)}, batch)

    part = influence.group_ihvp(loss_fn, out, problem.group, problem.train, solver=SOLVERS["cg"])
    cached = influence.group_ihvp(
        head_loss,
        problem.params["out"]["kernel"],
        features(problem.group),
        features(problem.train),
        solver=SOLVERS["cg"],
    )
    assert relative_error(ravel(part.value), ravel(cached.value)) < 1e-5
    scores = influence.example_influence(loss_fn, out, part.value, problem.train)
    want = influence.example_influence(
        head_loss, problem.params["out"]["kernel"], cached.value, features(problem.train)
    )
    assert relative_error(scores, want) < 1e-5
    with pytest.raises(ValueError, match="selects no parameters; there are: hidden/0, hidden/1"):
        influence.split_params(problem.params, lambda path, leaf: False)


def direction(problem, seed=3):
    flat, unravel = ravel_pytree(problem.params)
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape))


@pytest.mark.parametrize("problem_fn", [problems.softmax_head, problems.small_network])
@pytest.mark.parametrize(
    ("chunk_size", "transform"), [(None, lambda f: f), (None, jax.jit), (7, jax.jit), (16, jax.jit)]
)
def test_scores_and_pixel_maps_equal_explicit_derivatives(problem_fn, chunk_size, transform):
    problem, dense = problem_fn(), problems.dense(problem_fn)
    s = direction(problem)

    @transform
    def both(params, s, train):
        return (
            influence.example_influence(problem.loss_fn, params, s, train, chunk_size=chunk_size),
            influence.pixel_influence(problem.loss_fn, params, s, train, chunk_size=chunk_size),
        )

    scores, pixels = both(problem.params, s, problem.train)
    assert scores.shape == (64,)
    assert relative_error(scores, -dense.train_gradients @ ravel(s)) < 1e-5
    assert pixels.shape == problem.train[0].shape
    assert relative_error(pixels, -dense.mixed @ ravel(s)) < 1e-5


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("over", ["examples", "directions"])
def test_scores_and_pixel_maps_inside_shard_map(check_vma, over):
    """Split over examples, or over 8 directions with all examples on every device."""
    problem = problems.small_network()
    spec = jax.sharding.PartitionSpec
    s = jax.vmap(lambda seed: direction(problem, seed))(jnp.arange(8))

    def both(s, train):
        return (
            influence.example_influence(problem.loss_fn, problem.params, s, train),
            influence.pixel_influence(problem.loss_fn, problem.params, s, train),
        )

    if over == "examples":
        s = jax.tree.map(lambda x: x[0], s)
        mapped = jax.shard_map(
            both,
            mesh=problems.auto_mesh(),
            in_specs=(spec(), spec("data")),
            out_specs=spec("data"),
            check_vma=check_vma,
        )
        want = both(s, problem.train)
    else:

        def each(s, train):
            one = both(jax.tree.map(lambda x: x[0], s), train)
            return jax.tree.map(lambda x: x[None], one)

        mapped = jax.shard_map(
            each,
            mesh=problems.auto_mesh(),
            in_specs=(spec("data"), spec()),
            out_specs=spec("data"),
            check_vma=check_vma,
        )
        want = jax.vmap(both, in_axes=(0, None))(s, problem.train)
    got = jax.jit(mapped)(s, problem.train)
    for left, right in zip(got, want, strict=True):
        assert relative_error(left, right) < 1e-6


def test_scores_and_pixel_maps_of_sharded_examples_and_under_vmap_and_grad():
    problem, dense = problems.small_network(), problems.dense(problems.small_network)
    s = direction(problem)

    def pixels(params, group, train, axis_name):
        del group, axis_name
        return influence.pixel_influence(problem.loss_fn, params, s, train, chunk_size=16)

    for wrap in (problems.sharded_jit, problems.vmap):
        got = wrap(pixels, problem.params, problem.group, problem.train)
        assert relative_error(got, -dense.mixed @ ravel(s)) < 1e-5

    # The pixel map is by definition the derivative of the scores by the inputs.
    got = jax.grad(
        lambda x: influence.example_influence(
            problem.loss_fn, problem.params, s, (x, problem.train[1])
        ).sum()
    )(problem.train[0])
    assert relative_error(got, -dense.mixed @ ravel(s)) < 1e-5


def test_scores_never_hold_a_gradient_per_example():
    problem = problems.mnist_head()
    s = direction(problem)
    compiled = (
        jax.jit(lambda p, s, t: influence.example_influence(problem.loss_fn, p, s, t))
        .lower(problem.params, s, problem.train)
        .compile()
    )
    per_example = 304 * 16_010 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < per_example / 10


def test_inputs_and_targets_may_be_trees():
    problem, dense = problems.softmax_head(), problems.dense(problems.softmax_head)

    def loss_fn(params, batch):
        inputs, targets = batch
        return problem.loss_fn(params, (inputs["x"] * inputs["mask"], targets["y"]))

    def nest(batch):
        x, y = batch
        return {"x": x, "mask": jnp.ones_like(x)}, {"y": y, "unused": None}

    s = direction(problem)
    train = nest(problem.train)
    pixels = influence.pixel_influence(loss_fn, problem.params, s, train, chunk_size=10)
    assert set(pixels) == {"x", "mask"}
    assert relative_error(pixels["x"], -dense.mixed @ ravel(s)) < 1e-5
    solution = influence.group_ihvp(
        loss_fn, problem.params, nest(problem.group), train, solver=SOLVERS["cg"]
    )
    assert relative_error(ravel(solution.value), dense.solve(DAMPING)) < 1e-5


def test_half_precision_parameters_and_inputs():
    problem = problems.small_network()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem.params)
    raised = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    kind = curvature_of(problem, "gauss_newton")

    def ihvp(params):
        return influence.group_ihvp(
            problem.loss_fn,
            params,
            problem.group,
            problem.train,
            solver=SOLVERS["cg"],
            curvature=kind,
        )

    assert ravel(ihvp(half).value).dtype == np.float32
    np.testing.assert_array_equal(ravel(ihvp(half).value), ravel(ihvp(raised).value))
    s = direction(problem)
    inputs = problem.train[0].astype(jnp.bfloat16), problem.train[1]
    assert influence.example_influence(problem.loss_fn, half, s, inputs).dtype == np.float32
    pixels = influence.pixel_influence(problem.loss_fn, half, s, inputs)
    assert pixels.dtype == jnp.bfloat16
    dense = problems.dense(problems.small_network)
    assert relative_error(pixels, -dense.mixed @ ravel(s)) < 0.05


def test_float64_end_to_end():
    problem, dense = problems.softmax_head(), problems.dense(problems.softmax_head)
    with jax.enable_x64(True):
        params, group, train = map(problems.float64, (problem.params, problem.group, problem.train))
        solver = solvers.cg(damping=DAMPING, tolerance=1e-14)
        solution = influence.group_ihvp(problem.loss_fn, params, group, train, solver=solver)
        scores = influence.example_influence(problem.loss_fn, params, solution.value, train)
        assert relative_error(ravel(solution.value), dense.solve(DAMPING)) < 1e-12
        assert relative_error(scores, -dense.train_gradients @ dense.solve(DAMPING)) < 1e-12


# Influence against what really happens when the training set changes. A binary logistic regression
# with an L2 penalty, fitted by Newton's method in float64 until nothing moves; `damping` is the
# penalty, so that H + damping I is exactly the Hessian of what was minimised.

PENALTY = 0.05


def logistic_loss(theta, batch):
    inputs, signs = batch
    return jnp.logaddexp(0.0, -signs * (inputs @ theta))


def fit(inputs, signs, weights):
    """Minimises sum_i weights_i l_i + PENALTY / 2 ||theta||^2."""
    theta = np.zeros(inputs.shape[1])
    for _ in range(30):
        margins = signs * (inputs @ theta)
        p = 1 / (1 + np.exp(margins))
        gradient = -inputs.T @ (weights * signs * p) + PENALTY * theta
        matrix = (inputs * (weights * p * (1 - p))[:, None]).T @ inputs
        step = np.linalg.solve(matrix + PENALTY * np.eye(len(theta)), gradient)
        theta = theta - step
        if np.linalg.norm(step) < 1e-14:
            break
    assert np.linalg.norm(gradient) < 1e-12
    return theta


def logistic_data(seed, num_examples, dim=6):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_examples, dim))
    slope = np.linspace(-1.5, 1.5, dim)
    signs = np.where(rng.uniform(size=num_examples) < 1 / (1 + np.exp(-inputs @ slope)), 1.0, -1.0)
    return inputs, signs


def group_loss(theta, group):
    return np.mean(np.logaddexp(0.0, -group[1] * (group[0] @ theta)))


def logistic_ihvp(theta, group, train):
    solver = solvers.cg(damping=PENALTY, tolerance=1e-12)
    return influence.group_ihvp(logistic_loss, theta, group, train, solver=solver)


def test_scores_predict_leave_one_out_retraining():
    train, group = logistic_data(0, 120), logistic_data(1, 80)
    weights = np.full(120, 1 / 120)
    theta = fit(*train, weights)
    with jax.enable_x64(True):
        solution = solvers.require_converged(logistic_ihvp(theta, group, train))
        scores = np.asarray(
            influence.example_influence(logistic_loss, theta, solution.value, train)
        )
    changes = []
    for i in range(120):
        without = weights.copy()
        without[i] = 0
        changes.append(group_loss(fit(*train, without), group) - group_loss(theta, group))
    predicted = -scores / 120  # removing an example is eps = -1/N
    assert np.corrcoef(predicted, changes)[0, 1] >= 0.99
    assert np.mean(np.sign(predicted) == np.sign(changes)) > 0.95
    np.testing.assert_allclose(np.polyfit(predicted, changes, 1)[0], 1, atol=0.1)


def test_pixel_maps_predict_retraining_on_moved_examples():
    train, group = logistic_data(0, 120), logistic_data(1, 80)
    weights = np.full(120, 1 / 120)
    theta = fit(*train, weights)
    with jax.enable_x64(True):
        solution = logistic_ihvp(theta, group, train)
        maps = np.asarray(influence.pixel_influence(logistic_loss, theta, solution.value, train))
    rng = np.random.default_rng(2)
    predicted, changes = [], []
    for i in range(60):
        delta = 0.1 * rng.normal(size=6)
        moved = train[0].copy()
        moved[i] += delta
        predicted.append(maps[i] @ delta / 120)
        changes.append(group_loss(fit(moved, train[1], weights), group) - group_loss(theta, group))
    assert np.corrcoef(predicted, changes)[0, 1] >= 0.99
    np.testing.assert_allclose(np.polyfit(predicted, changes, 1)[0], 1, atol=0.05)


def test_flipped_labels_score_as_harmful():
    inputs, trusted = logistic_data(3, 200)[0], logistic_data(4, 200)[0]
    slope = np.linspace(-1.5, 1.5, 6)
    signs, group = np.sign(inputs @ slope), (trusted, np.sign(trusted @ slope))
    flipped = np.random.default_rng(5).permutation(200) < 20
    train = inputs, np.where(flipped, -signs, signs)
    theta = fit(*train, np.full(200, 1 / 200))
    with jax.enable_x64(True):
        solution = logistic_ihvp(theta, group, train)
        scores = np.asarray(
            influence.example_influence(logistic_loss, theta, solution.value, train)
        )
    assert scores[flipped].mean() > 0 > scores[~flipped].mean()
    ranked_above = np.mean(scores[flipped][:, None] > scores[~flipped][None])  # area under ROC
    assert ranked_above > 0.95


def test_following_the_pixel_maps_downhill_lowers_the_loss_of_the_group():
    train, group = logistic_data(0, 120), logistic_data(1, 80)
    weights = np.full(120, 1 / 120)
    theta = fit(*train, weights)
    with jax.enable_x64(True):
        solution = logistic_ihvp(theta, group, train)
        maps = np.asarray(influence.pixel_influence(logistic_loss, theta, solution.value, train))
    before = group_loss(theta, group)
    for sign in (-1, 1):  # HINT moves by minus the map
        moved = train[0] + sign * 0.05 * np.sign(maps)
        change = group_loss(fit(moved, train[1], weights), group) - before
        assert np.sign(change) == sign


def test_linear_head_loss_is_softmax_cross_entropy():
    problem = problems.softmax_head()
    features, labels = problem.train
    logits = features @ problem.params["kernel"] + problem.params["bias"]
    want = -jax.nn.log_softmax(logits)[jnp.arange(64), labels]
    got = influence.linear_head_loss(problem.params, problem.train)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    half = influence.linear_head_loss(problem.params, (features.astype(jnp.bfloat16), labels))
    assert half.dtype == jnp.float32


def test_errors_say_what_is_wrong():
    problem = problems.softmax_head()
    loss_fn, params, group, train = (
        problem.loss_fn,
        problem.params,
        problem.group,
        problem.train,
    )
    ihvp = functools.partial(influence.group_ihvp, solver=SOLVERS["cg"])
    s = direction(problem)

    def mean_loss(p, b):
        return loss_fn(p, b).mean()

    scores = influence.example_influence
    pixels = influence.pixel_influence
    for call in (
        lambda: ihvp(mean_loss, params, group, train),
        lambda: scores(mean_loss, params, s, train),
        lambda: pixels(mean_loss, params, s, train),
        lambda: influence.group_gradient(mean_loss, params, group),
        lambda: jax.jit(ihvp, static_argnums=0)(mean_loss, params, group, train),
    ):
        with pytest.raises(ValueError, match="return the losses themselves, not their mean"):
            call()
    ragged = train[0], train[1][:-1]
    empty = train[0][:0], train[1][:0]
    with pytest.raises(ValueError, match=r"group\[0\] \(64, 6\), group\[1\] \(63,\)"):
        ihvp(loss_fn, params, ragged, train)
    with pytest.raises(ValueError, match=r"train\[0\] \(64, 6\), train\[1\] \(63,\)"):
        ihvp(loss_fn, params, group, ragged)
    with pytest.raises(ValueError, match="group is empty"):
        ihvp(loss_fn, params, empty, train)
    with pytest.raises(ValueError, match="train is empty"):
        ihvp(loss_fn, params, group, empty)
    for call in (
        lambda: ihvp(loss_fn, params, group, train, chunk_size=0),
        lambda: scores(loss_fn, params, s, train, chunk_size=-1),
        lambda: pixels(loss_fn, params, s, train, chunk_size=0),
        lambda: influence.group_gradient(loss_fn, params, group, chunk_size=0),
    ):
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            call()
    for fn in (scores, pixels):
        with pytest.raises(ValueError, match=r"\['bias'\]: params \(3,\), ihvp None"):
            fn(loss_fn, params, {"kernel": s["kernel"]}, train)
        with pytest.raises(ValueError, match=r"\['kernel'\]: params \(6, 3\), ihvp \(3, 6\)"):
            fn(loss_fn, params, {**s, "kernel": s["kernel"].T}, train)
        with pytest.raises(ValueError, match=r"pass its \.value"):
            fn(loss_fn, params, solvers.identity()(None, s), train)
        with pytest.raises(TypeError, match=r"params\['bias'\] must be floating point, got int32"):
            fn(loss_fn, {**params, "bias": jnp.zeros(3, jnp.int32)}, s, train)
    with pytest.raises(TypeError, match=r"params.* must be floating point"):
        ihvp(loss_fn, {**params, "bias": jnp.zeros(3, jnp.int32)}, group, train)
    images = jnp.zeros((64, 6), jnp.uint8), train[1]
    with pytest.raises(TypeError, match=r"inputs must be floating point, got uint8: convert"):
        pixels(loss_fn, params, s, images)
    with pytest.raises(ValueError, match=r"pair \(inputs, targets\)"):
        pixels(loss_fn, params, s, train[0])
