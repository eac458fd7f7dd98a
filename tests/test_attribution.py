"""TracIn, DataInf, projected gradients, the store of them, and Arnoldi influence."""

import dataclasses
import functools
import itertools
import json
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import ravel, relative_error
from programs import ROOT, environment

from jaxpoison import attribution, curvature, influence, solvers

DAMPING = 0.5
HEAD = problems.softmax_head()
NETWORK = problems.small_network()


def flat_gradients(problem, params, data):
    """Returns gradients `[N, P]` in float64, by the dense tests' way: one example at a time."""
    with jax.enable_x64(True):
        params, data = problems.float64(params), problems.float64(data)
        one = jax.grad(lambda p, x, y: problem.loss_fn(p, (x[None], y[None]))[0])
        grads = jax.vmap(one, (None, 0, 0))(params, *map(jnp.asarray, data))
        return np.stack(
            [ravel(jax.tree.map(lambda g, i=i: g[i], grads)) for i in range(len(data[1]))]
        )


def arnoldi(problem, rank, num_steps, kind):
    return influence.group_ihvp(
        problem.loss_fn, problem.params, problem.group, problem.train, curvature=kind,
        solver=solvers.arnoldi(damping=DAMPING, rank=rank, num_steps=num_steps),
        key=jax.random.key(3),
    )  # fmt: skip


def test_arnoldi_inverts_h_on_its_top_eigenvectors_and_nothing_else():
    dense = problems.dense(problems.softmax_head)
    values, vectors = np.linalg.eigh(dense.hessian)
    top = np.argsort(-np.abs(values))[:4]
    want = vectors[:, top] @ (vectors[:, top].T @ dense.gradient / (values[top] + DAMPING))
    got = arnoldi(HEAD, 4, 21, curvature.linear_head)
    assert relative_error(ravel(got.value), want) < 1e-3
    residual = dense.hessian @ want + DAMPING * want - dense.gradient
    np.testing.assert_allclose(
        got.residual, np.linalg.norm(residual) / np.linalg.norm(dense.gradient), rtol=1e-3
    )


def test_arnoldi_of_full_rank_leaves_what_is_in_the_null_space_alone():
    # 7 of the 21 dimensions are flat, and v has no part there: it solves the system.
    dense = problems.dense(problems.softmax_head)
    got = arnoldi(HEAD, 40, 40, curvature.linear_head)
    assert bool(got.converged) and relative_error(ravel(got.value), dense.solve(DAMPING)) < 1e-4


def test_arnoldi_says_where_damping_is_too_small_for_an_indefinite_hessian():
    solver = solvers.arnoldi(damping=0.01, rank=6, num_steps=6)

    def run(eigenvalues):
        v = jnp.ones(6)
        return solver(lambda u: eigenvalues * u, v, key=jax.random.key(0))

    assert int(run(jnp.array([3.0, 2, 1, 0.5, -1, 4])).status) == solvers.Status.INDEFINITE
    assert bool(run(jnp.array([3.0, 2, 1, 0.5, 0.1, 4])).converged)


def test_arnoldi_is_shared_under_vmap_and_differentiable():
    eigenvalues = jnp.linspace(0.2, 3, 9)
    solver = solvers.arnoldi(damping=0.3, rank=9, num_steps=9)
    assert solver == solvers.arnoldi(damping=0.3, rank=9, num_steps=9)
    many = jax.random.normal(jax.random.key(1), (5, 9))

    def solve(scale, v):
        return solver(lambda u: scale * eigenvalues * u, v, key=jax.random.key(0)).value

    solve_all = jax.jit(jax.vmap(solve, (None, 0)))
    assert relative_error(solve_all(1.0, many), many / (eigenvalues + 0.3)) < 1e-4
    # One basis for all right-hand sides.
    program = str(jax.make_jaxpr(solve_all)(1.0, many))
    assert "f32[9,9]" in program and "f32[5,9,9]" not in program
    got = jax.grad(lambda scale: solve(scale, many[0]).sum())(1.0)
    want = -np.sum(np.asarray(eigenvalues * many[0] / (eigenvalues + 0.3) ** 2, np.float64))
    assert abs(got - want) < 1e-3 * abs(want)


def test_arnoldi_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="raise num_steps"):
        solvers.arnoldi(damping=0.1, rank=9, num_steps=8)
    with pytest.raises(ValueError, match="pass a PRNG key"):
        solvers.arnoldi(damping=0.1, rank=2, num_steps=8)(lambda u: u, jnp.ones(3))


def test_tracin_equals_its_sum_over_checkpoints():
    checkpoints = [jax.tree.map(lambda x, c=c: x * c, NETWORK.params) for c in (0.3, 0.7, 1.0)]
    rates = [0.5, 0.2, 0.1]
    want = -sum(
        rate
        * flat_gradients(NETWORK, params, NETWORK.train)
        @ flat_gradients(NETWORK, params, NETWORK.group).mean(0)
        for rate, params in zip(rates, checkpoints, strict=True)
    )
    run = functools.partial(attribution.tracin, NETWORK.loss_fn)
    got = run(iter(checkpoints), rates, NETWORK.group, NETWORK.train, chunk_size=24)
    assert relative_error(got, want) < 1e-5
    halves = influence.Stream([jax.tree.map(lambda x, s=s: x[s::2], NETWORK.train) for s in (0, 1)])
    streamed = run(checkpoints, rates, NETWORK.group, halves)
    assert relative_error(streamed, np.concatenate([want[::2], want[1::2]])) < 1e-5
    with jax.enable_x64(False):
        traced = jax.jit(lambda r: run(checkpoints, r, NETWORK.group, NETWORK.train))
        assert relative_error(traced(jnp.array(rates)), want) < 1e-5
    for count in (2, 4):
        with pytest.raises(ValueError, match=f"{count} numbers for 3 checkpoints"):
            run(checkpoints, [0.1] * count, NETWORK.group, NETWORK.train)


def test_one_step_on_an_example_lowers_the_groups_loss_by_minus_its_tracin():
    rate, example = 1e-3, jax.tree.map(lambda x: x[:1], NETWORK.train)
    step = influence.group_gradient(NETWORK.loss_fn, NETWORK.params, example)
    moved = jax.tree.map(lambda p, g: p - rate * g, NETWORK.params, step)
    change = [NETWORK.loss_fn(p, NETWORK.group).mean() for p in (moved, NETWORK.params)]
    score = attribution.tracin(NETWORK.loss_fn, [NETWORK.params], [rate], NETWORK.group, example)
    np.testing.assert_allclose(score[0], change[0] - change[1], rtol=0.02)


def datainf_dense(problem_fn, damping):
    problem, dense = problem_fn(), problems.dense(problem_fn)
    sizes = [x.size for x in jax.tree.leaves(problem.params)]
    ends = np.cumsum([0, *sizes])
    x = np.zeros_like(dense.gradient)
    for start, end in itertools.pairwise(ends):
        g = dense.train_gradients[:, start:end]
        inverses = [np.linalg.inv(np.outer(a, a) + damping * np.eye(end - start)) for a in g]
        x[start:end] = np.mean(inverses, 0) @ dense.gradient[start:end]
    fisher = dense.train_gradients.T @ dense.train_gradients / len(dense.train_gradients)
    error = fisher @ x + damping * x - dense.gradient
    return x, np.linalg.norm(error) / np.linalg.norm(dense.gradient)


@pytest.mark.parametrize("chunk_size", [None, 24])
def test_datainf_is_the_mean_of_the_inverses_and_its_residual_that_of_the_fisher_matrix(chunk_size):
    want, residual = datainf_dense(problems.small_network, DAMPING)
    run = functools.partial(
        attribution.datainf, NETWORK.loss_fn, damping=DAMPING, chunk_size=chunk_size
    )
    for way in (lambda f: f, jax.jit):
        got = way(lambda p: run(p, NETWORK.group, NETWORK.train))(NETWORK.params)
        assert relative_error(ravel(got.value), want) < 1e-5
        np.testing.assert_allclose(got.residual, residual, rtol=1e-4)


def test_datainf_of_a_stream_is_that_of_its_arrays_and_exact_at_large_dampings():
    halves = [jax.tree.map(lambda x, s=s: x[s], HEAD.train) for s in (slice(0, 40), slice(40, 64))]
    run = functools.partial(attribution.datainf, HEAD.loss_fn, HEAD.params, HEAD.group)
    whole, stream = run(HEAD.train, damping=1.0), run(influence.Stream(halves), damping=1.0)
    assert relative_error(ravel(stream.value), ravel(whole.value)) < 1e-5
    assert bool(run(HEAD.train, damping=1e5).converged)
    assert int(run(HEAD.train, damping=1e-4).status) >= solvers.Status.OUT_OF_STEPS


def project(data, rank=8, key=0, **settings):
    return attribution.project_gradients(
        HEAD.loss_fn, HEAD.params, data, jax.random.key(key), rank=rank, **settings
    )


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_projection_is_one_random_matrix_whatever_the_chunks(kind):
    # Its rows are what unit gradients become: those of a loss that is linear in the parameters.
    matrix = attribution.project_gradients(
        lambda p, batch: batch @ p, jnp.zeros(21), jnp.eye(21), jax.random.key(0), rank=8,
        kind=kind, rows_at_once=5,
    )  # fmt: skip
    want = problems.dense(problems.softmax_head).train_gradients @ np.asarray(matrix, np.float64)
    for chunk_size in (None, 24):
        got = project(HEAD.train, kind=kind, rows_at_once=5, chunk_size=chunk_size)
        assert relative_error(got, want) < 1e-5
    np.testing.assert_allclose(np.sum(np.asarray(matrix) ** 2, 1).mean(), 1, atol=0.4)
    if kind == "rademacher":
        np.testing.assert_allclose(np.abs(matrix), 8**-0.5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_projection_keeps_inner_products_in_the_mean_with_the_variance_promised(kind):
    g = problems.dense(problems.softmax_head).train_gradients[:2]
    pair = jax.tree.map(lambda x: x[:2], HEAD.train)
    rank, draws = 16, 600
    draw = jax.jit(
        jax.vmap(
            lambda key: attribution.project_gradients(
                HEAD.loss_fn, HEAD.params, pair, key, rank=rank, kind=kind, rows_at_once=8
            )
        )
    )
    phi = np.asarray(draw(jax.random.split(jax.random.key(5), draws)), np.float64)
    products = np.sum(phi[:, 0] * phi[:, 1], axis=1)
    bound = (g[0] @ g[0] * (g[1] @ g[1]) + (g[0] @ g[1]) ** 2) / rank
    assert abs(products.mean() - g[0] @ g[1]) < 4 * np.sqrt(bound / draws)
    assert products.var() < 1.3 * bound  # for signs it is below


def test_projected_scores_equal_a_dense_solve():
    rng = np.random.default_rng(0)
    queries, features = rng.normal(size=(3, 6)), rng.normal(size=(40, 6))
    want = -queries @ np.linalg.inv(features.T @ features / 40 + 0.1 * np.eye(6)) @ features.T
    got = attribution.projected_scores(jnp.float32(queries), jnp.float32(features), damping=0.1)
    assert relative_error(got, want) < 1e-5
    with pytest.raises(ValueError, match="must share rank"):
        attribution.projected_scores(jnp.ones((3, 5)), jnp.ones((4, 6)), damping=0.1)


def two_layers(params, x, tap=curvature.no_tap):
    """The network of `NETWORK`, which hands its layers to a tap."""
    kernel, bias = params["hidden"]
    hidden = jnp.tanh(tap(curvature.DenseLayer("hidden/0", "hidden/1"), x, x @ kernel + bias))
    return tap(curvature.DenseLayer("out/kernel"), hidden, hidden @ params["out"]["kernel"])


project_layers = functools.partial(
    attribution.project_layers, two_layers, problems.cross_entropy, NETWORK.params
)


def layer_gradients():
    """Returns the gradients of `NETWORK.train` as matrices, the bias as the last row."""
    flat = flat_gradients(NETWORK, NETWORK.params, NETWORK.train)
    ends = np.cumsum([40, 8])  # kernel [5, 8], bias [8], kernel [8, 3]
    kernel, bias, out = np.split(flat, ends, axis=1)
    hidden = np.concatenate([kernel.reshape(-1, 5, 8), bias[:, None]], axis=1)
    return hidden, out.reshape(-1, 8, 3)


def test_layers_projected_on_all_eigenvectors_keep_all_inner_products():
    factors = curvature.kfac(two_layers, problems.cross_entropy, NETWORK.params, NETWORK.train)
    phi = project_layers(NETWORK.train, rank=99, factors=factors)
    assert phi.shape == (64, 6 * 8 + 8 * 3)
    g = flat_gradients(NETWORK, NETWORK.params, NETWORK.train)
    assert relative_error(phi @ phi.T, g @ g.T) < 1e-5


def test_layers_are_projected_on_their_top_eigenvectors():
    factors = curvature.kfac(two_layers, problems.cross_entropy, NETWORK.params, NETWORK.train)
    phi = project_layers(NETWORK.train, rank=2, factors=factors, chunk_size=24)
    assert phi.shape == (64, 8)
    want = 0
    inputs = np.concatenate([NETWORK.train[0], np.ones((64, 1))], axis=1).astype(np.float64)
    hidden = np.tanh(NETWORK.train[0] @ NETWORK.params["hidden"][0] + NETWORK.params["hidden"][1])
    for block, rows, gradients in zip(
        factors.blocks, (inputs, np.float64(hidden)), layer_gradients(), strict=True
    ):
        p = np.linalg.eigh(rows.T @ rows / 64)[1][:, -2:]
        q = np.float64(block.outputs[:, -2:])
        kept = p @ p.T @ gradients @ q @ q.T
        want += np.einsum("iab,jab->ij", kept, kept)
    assert relative_error(phi @ phi.T, want) < 1e-4


def test_layers_projected_at_random_keep_inner_products_in_the_mean():
    pair = jax.tree.map(lambda x: x[:2], NETWORK.train)
    phi = jax.jit(jax.vmap(lambda key: project_layers(pair, rank=4, key=key)))(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert phi.shape == (2000, 2, 4 * 4 + 4 * 3)
    products = np.einsum("kir,kjr->kij", phi, phi)
    want = sum(np.einsum("iab,jab->ij", g[:2], g[:2]) for g in layer_gradients())
    error = products.std(0) / 2000**0.5
    assert (np.abs(products.mean(0) - want) < 4 * error).all()
    assert (error < 0.1 * np.abs(want).max()).all()
    # One key, one projection, whatever the chunks.
    one = functools.partial(project_layers, NETWORK.train, rank=4, key=jax.random.key(1))
    assert relative_error(one(chunk_size=24), one()) < 1e-6


def test_projections_of_layers_are_refused_without_what_they_need():
    with pytest.raises(ValueError, match=r"give either key=jax.random.key\(0\)"):
        project_layers(NETWORK.train, rank=2)
    factors = curvature.kfac(two_layers, problems.cross_entropy, NETWORK.params, NETWORK.train)
    other = dataclasses.replace(factors, blocks=factors.blocks[:1])
    with pytest.raises(ValueError, match="the factors have no layer out/kernel"):
        project_layers(NETWORK.train, rank=2, factors=other)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        project_layers(NETWORK.train, rank=0, factors=factors)
    with pytest.raises(TypeError, match=r"factors must be those of curvature.kfac or .* got 3"):
        project_layers(NETWORK.train, rank=2, factors=3)
    with pytest.raises(TypeError, match="output_loss must be a function, got 3"):
        attribution.project_layers(
            two_layers, 3, NETWORK.params, NETWORK.train, rank=2, factors=factors
        )


def make_store(folder, dtype="float32", **settings):
    return attribution.Store.create(folder, rank=8, dtype=dtype, settings={"seed": 0} | settings)


def train_batches(size=16):
    return [jax.tree.map(lambda x, i=i: x[i : i + size], HEAD.train) for i in range(0, 64, size)]


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("float16", 2e-3)])
def test_store_gives_back_what_it_was_given_and_answers_like_the_arrays(tmp_path, dtype, error):
    make_store(tmp_path, dtype).add(train_batches(24), jax.jit(project))
    store = attribution.Store.open(tmp_path)
    features, queries = project(HEAD.train), project(HEAD.group)
    assert len(store) == 64 and store.dtype == dtype and store.settings == {"seed": 0}
    assert relative_error(np.concatenate([*store.shards()]), features) < error
    assert relative_error(store.rows([63, 0, 24]), features[np.array([63, 0, 24])]) < error
    want = np.asarray(attribution.projected_scores(queries, features, damping=0.1))
    scores = store.query(queries, damping=0.1)
    assert relative_error(scores, want) < 20 * error
    top = store.query(queries, damping=0.1, top_k=30)
    order = np.argsort(-scores, axis=1, kind="stable")
    np.testing.assert_array_equal(top.harmful, order[:, :30])
    np.testing.assert_array_equal(top.helpful, order[:, ::-1][:, :30])
    np.testing.assert_allclose(top.helpful_scores, np.sort(scores, 1)[:, :30])
    group = store.query(np.mean(queries, 0), damping=0.1, top_k=3)
    np.testing.assert_allclose(group.harmful_scores, -np.sort(-scores.mean(0))[:3], rtol=1e-4)


def test_store_goes_on_with_its_own_batches_only(tmp_path):
    made = []

    def counted(batch):
        made.append(1)
        return project(batch)

    make_store(tmp_path).add(train_batches()[:2], counted)
    make_store(tmp_path).add(train_batches(), counted)
    assert len(made) == 4 and len(attribution.Store.open(tmp_path)) == 64
    with pytest.raises(ValueError, match="batch 0 is not the one"):
        make_store(tmp_path).add(train_batches()[::-1], counted)
    with pytest.raises(ValueError, match="the stream has 1 batches"):
        make_store(tmp_path).add(train_batches()[:1], counted)
    with pytest.raises(ValueError, match=r"settings = \{'seed': 0\}, not"):
        make_store(tmp_path, seed=1)
    with pytest.raises(ValueError, match="not finite in float16"):
        make_store(tmp_path / "b", "float16").add(train_batches(), lambda b: 1e6 * project(b))
    with pytest.raises(ValueError, match=r"must have shape \(16, 8\)"):
        make_store(tmp_path / "c").add(train_batches(), lambda b: project(b)[:1])


KILLED = """
import sys, time
import numpy as np
from jaxpoison.attribution import Store
store = Store.create(sys.argv[1], rank=8, settings={})
def project(batch):
    time.sleep(0.05)
    return batch @ np.ones((4, 8))
store.add((np.full((500, 4), i / 100, np.float32) for i in range(40)), project)
"""


def test_store_survives_kill_9(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment(PYTHONPATH=str(ROOT)), cwd=ROOT)
    path = tmp_path / "killed" / "shard-00003.npy"
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(attribution.Store.open(tmp_path / "killed"))
    assert 0 < done < 20000
    assert subprocess.run(command, env=environment(PYTHONPATH=str(ROOT)), cwd=ROOT).returncode == 0
    rows = np.concatenate([*attribution.Store.open(tmp_path / "killed").shards()])
    np.testing.assert_allclose(rows[:, 0], np.repeat(np.arange(40), 500) / 25, rtol=1e-6)


def test_damaged_and_foreign_shards_are_refused(tmp_path):
    make_store(tmp_path).add(train_batches(), project)
    path = tmp_path / "shard-00002.npy"
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:200], b"", train_shard(tmp_path)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard-00002\.npy is damaged or of another store"):
            attribution.Store.open(tmp_path).query(np.ones(8), damping=1.0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00002\.npy does not exist"):
        attribution.Store.open(tmp_path).query(np.ones(8), damping=1.0)
    index = tmp_path / "index.json"
    for text in ("{", "[]", json.dumps({"format": "other"})):
        index.write_text(text)
        with pytest.raises(ValueError, match="cannot be read as the index of a store"):
            attribution.Store.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        attribution.Store.open(tmp_path / "none")


def train_shard(folder):
    return (folder / "shard-00001.npy").read_bytes()


def test_memory_of_a_query_does_not_grow_with_the_store(tmp_path):
    peaks = []
    for shards in (4, 40):
        store = attribution.Store.create(tmp_path / str(shards), rank=64, settings={})
        stream = (np.full((1000, 2), i, np.float32) for i in range(shards))
        store.add(stream, lambda b: np.tile(b, 32) + np.eye(1000, 64))
        tracemalloc.start()
        store.query(np.ones((3, 64)), damping=1.0, top_k=5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
