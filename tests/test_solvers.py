import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import ravel, relative_error

from jaxpoison import curvature, influence, solvers

DAMPING = 0.5


def quadratic(eigenvalues, seed=0):
    """Returns a symmetric matrix with these eigenvalues, its matvec on a pytree, and a pytree."""
    size = len(eigenvalues)
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    matrix = (basis * np.asarray(eigenvalues)) @ basis.T
    rhs = rng.normal(size=size)

    def tree(flat):
        return {"a": flat[:2], "b": [flat[2:].reshape(-1, 1)]}

    def matvec(u):
        return tree(jnp.asarray(matrix, u["a"].dtype) @ jnp.concatenate([u["a"], u["b"][0][:, 0]]))

    return matrix, matvec, tree(jnp.asarray(rhs, jnp.float32)), rhs


EXACT = {
    "cg": solvers.cg(damping=DAMPING),
    "preconditioned": solvers.cg(
        damping=DAMPING, preconditioner=lambda r: jax.tree.map(lambda x: x / 3, r)
    ),
    "cholesky": solvers.cholesky(damping=DAMPING, rows_at_once=4),
    "lissa": solvers.lissa(damping=DAMPING, batch_size=None, num_steps=400),
}


@pytest.mark.parametrize("name", EXACT)
def test_solution_equals_dense_solve(name):
    matrix, matvec, rhs, flat = quadratic(np.linspace(0, 4, 9))
    solution = jax.jit(lambda v: EXACT[name](matvec, v, key=jax.random.key(0)))(rhs)
    want = np.linalg.solve(matrix + DAMPING * np.eye(9), flat)
    assert relative_error(ravel(solution.value), want) < 1e-5
    assert solution.converged
    assert solution.residual < 1e-5
    assert solution.num_steps.dtype == np.int32
    assert jax.tree.structure(solution.value) == jax.tree.structure(rhs)


@pytest.mark.parametrize("name", EXACT)
def test_residual_is_that_of_the_value(name):
    matrix, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    few = {
        "cg": solvers.cg(damping=DAMPING, max_steps=2),
        "preconditioned": solvers.cg(damping=DAMPING, max_steps=2, preconditioner=lambda r: r),
        "cholesky": EXACT["cholesky"],
        "lissa": solvers.lissa(damping=DAMPING, batch_size=None, num_steps=3, scale=6.0),
    }[name]
    solution = few(matvec, rhs)
    error = (matrix + DAMPING * np.eye(9)) @ ravel(solution.value) - ravel(rhs)
    want = np.linalg.norm(error) / np.linalg.norm(ravel(rhs))
    np.testing.assert_allclose(solution.residual, want, rtol=1e-3, atol=1e-6)
    if name in ("cg", "preconditioned"):
        assert solution.num_steps == 2 and not solution.converged


def test_solvers_stay_in_float64_where_it_is_on():
    with jax.enable_x64(True):
        matrix, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
        rhs = problems.float64(rhs)
        for solver in (solvers.cg(damping=DAMPING, tolerance=1e-14), EXACT["cholesky"]):
            solution = solver(matvec, rhs)
            assert solution.residual.dtype == np.float64
            want = np.linalg.solve(matrix + DAMPING * np.eye(9), ravel(rhs))
            assert relative_error(ravel(solution.value), want) < 1e-13
            assert solution.converged


def test_half_precision_right_hand_side_is_solved_in_float32():
    _, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), rhs)
    solution = EXACT["cg"](matvec, half)
    assert ravel(solution.value).dtype == np.float32
    assert solution.residual < 1e-6


def test_cg_reports_an_indefinite_system_and_a_larger_damping_cures_it():
    _, matvec, rhs, _ = quadratic([-1.0, *np.linspace(0.1, 4, 8)])
    solution = jax.jit(lambda v: solvers.cg(damping=0.5)(matvec, v))(rhs)
    assert not solution.converged
    assert np.isfinite(ravel(solution.value)).all()
    assert np.isfinite(solution.residual)
    assert solvers.cg(damping=1.5)(matvec, rhs).converged


def test_cholesky_reports_an_indefinite_system():
    _, matvec, rhs, _ = quadratic([-1.0, *np.linspace(0.1, 4, 8)])
    assert not solvers.cholesky(damping=0.5)(matvec, rhs).converged
    assert solvers.cholesky(damping=1.5)(matvec, rhs).converged


def test_nan_is_not_convergence():
    def broken(u):
        return jax.tree.map(lambda x: x * jnp.nan, u)

    rhs = {"a": jnp.ones(3)}
    for solver in EXACT.values():
        assert not solver(broken, rhs, key=jax.random.key(0)).converged


@pytest.mark.parametrize("name", EXACT)
def test_zero_right_hand_side_gives_zero(name):
    _, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    zero = jax.tree.map(jnp.zeros_like, rhs)
    solution = EXACT[name](matvec, zero, key=jax.random.key(0))
    np.testing.assert_array_equal(ravel(solution.value), 0)
    assert solution.residual == 0 and solution.converged


def test_preconditioner_saves_steps():
    diagonal = jnp.logspace(0, 4, 200)

    def solve(preconditioner):
        solver = solvers.cg(damping=1e-3, tolerance=1e-4, preconditioner=preconditioner)
        return solver(lambda u: diagonal * u, jnp.ones(200))

    plain, helped = solve(None), solve(lambda r: r / diagonal)
    assert plain.converged and helped.converged
    assert helped.num_steps < 5 < plain.num_steps


def test_identity_returns_the_right_hand_side_and_claims_no_residual():
    _, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    solution = solvers.identity()(matvec, rhs)
    np.testing.assert_array_equal(ravel(solution.value), ravel(rhs))
    assert solution.residual == solution.top_eigenvalue == -1  # not measured
    assert solution.converged and solution.num_steps == 0


def authors_recursion(matrix, v, damp, scale, num_steps):
    u = v
    for _ in range(num_steps):
        u = v + (1 - damp) * u - matrix @ u / scale
    return u / scale


def test_lissa_takes_the_same_steps_as_the_authors_code():
    matrix, matvec, rhs, _ = quadratic(np.linspace(0, 40, 9))
    solver = solvers.lissa_from_authors(damp=0.02, scale=30.0, num_steps=7, batch_size=None)
    want = authors_recursion(matrix, ravel(rhs).astype(np.float64), 0.02, 30.0, 7)
    assert relative_error(ravel(solver(matvec, rhs).value), want) < 1e-6


def test_authors_damp_of_0_01_at_scale_50_is_a_damping_of_one_half():
    dense = problems.dense(problems.softmax_head)
    problem = problems.softmax_head()
    solution = influence.group_ihvp(
        problem.loss_fn,
        problem.params,
        problem.group,
        problem.train,
        solver=solvers.lissa_from_authors(damp=0.01, scale=50.0, batch_size=None, num_steps=1500),
    )
    assert relative_error(ravel(solution.value), dense.solve(0.5)) < 1e-3
    assert relative_error(ravel(solution.value), dense.solve(0.01)) > 0.3
    assert solution.residual < 1e-3 and solution.num_steps == 1500


def run_lissa(key=None, problem_fn=problems.softmax_head, **settings):
    problem = problem_fn()
    key = jax.random.key(0) if key is None else key
    solver = solvers.lissa(damping=DAMPING, **settings)
    return influence.group_ihvp(
        problem.loss_fn, problem.params, problem.group, problem.train, solver=solver, key=key
    )


def test_lissa_with_mini_batches_finds_its_scale_and_comes_near():
    want = problems.dense(problems.softmax_head).solve(DAMPING)
    one, many = (
        jax.jit(lambda key, n=n: run_lissa(key, batch_size=16, num_steps=200, num_repeats=n))(
            jax.random.key(1)
        )
        for n in (1, 20)
    )
    assert one.usable and not one.converged and one.status == solvers.Status.NOISY
    assert relative_error(ravel(one.value), want) < 0.15
    assert many.usable and relative_error(ravel(many.value), want) < 0.03
    largest = np.linalg.eigvalsh(problems.dense(problems.softmax_head).hessian)[-1]
    assert one.top_eigenvalue >= largest  # of mini-batches: at least that of their mean


def test_lissa_is_reproducible_by_its_key():
    run = jax.jit(lambda key: run_lissa(key, num_steps=50))
    first, again, other = (run(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(ravel(first.value), ravel(again.value))
    assert not np.array_equal(ravel(first.value), ravel(other.value))


def test_lissa_survives_skewed_features_with_its_own_scale():
    solution = jax.jit(
        lambda key: run_lissa(key, problems.mnist_head, batch_size=8, num_steps=300)
    )(jax.random.key(0))
    assert np.isfinite(ravel(solution.value)).all() and solution.residual < 1


@pytest.mark.parametrize("num_steps", [20, 2000])
def test_diverging_lissa_says_so(num_steps):
    solution = run_lissa(scale=0.05, num_steps=num_steps, batch_size=16)
    assert not solution.converged
    assert not solution.residual < 1
    with pytest.raises(solvers.DivergedError, match="the test's ihvp did not converge") as error:
        solvers.require_converged(solution, "the test's ihvp")
    assert "raise scale tenfold" in str(error.value)
    assert isinstance(error.value, RuntimeError)


def test_require_converged_passes_solutions_on_and_advises_on_slow_ones():
    _, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    solution = EXACT["cg"](matvec, rhs)
    assert solvers.require_converged(solution) is solution
    slow = solvers.cg(damping=DAMPING, max_steps=1)(matvec, rhs)
    with pytest.raises(solvers.DivergedError, match=r"relative residual 0\.\d+ after 1 steps"):
        solvers.require_converged(slow)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), solution, slow)
    with pytest.raises(solvers.DivergedError, match=r"\(1 of 2 systems\)"):
        solvers.require_converged(stacked)
    top = slow._replace(top_eigenvalue=jnp.float32(3.5))
    with pytest.raises(solvers.DivergedError, match=r"largest eigenvalue met is about 3\.5"):
        solvers.require_converged(top)


@pytest.mark.parametrize("eigenvalues", [np.linspace(0, 4, 9), [-5.0, *np.linspace(0, 4, 8)]])
def test_power_iteration_approaches_the_largest_absolute_eigenvalue_from_below(eigenvalues):
    _, matvec, rhs, _ = quadratic(eigenvalues)
    largest = np.max(np.abs(eigenvalues))
    few, many = (solvers.power_iteration(matvec, rhs, jax.random.key(0), n) for n in (1, 200))
    assert few <= largest * (1 + 1e-6)
    np.testing.assert_allclose(many, largest, rtol=1e-4)
    zero = solvers.power_iteration(
        lambda u: jax.tree.map(jnp.zeros_like, u), rhs, jax.random.key(0)
    )
    assert zero == 0


@pytest.mark.parametrize("name", ["cg", "cholesky", "lissa"])
def test_solution_passes_through_vmap_and_grad(name):
    matrix, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))

    def solve(damping, v):
        solver = {
            "cg": lambda: solvers.cg(damping=damping, tolerance=1e-7),
            "cholesky": lambda: solvers.cholesky(damping=damping),
            "lissa": lambda: solvers.lissa(
                damping=damping, scale=5.0, batch_size=None, num_steps=500
            ),
        }[name]()
        return solver(matvec, v)

    dampings = jnp.array([0.3, 2.0])
    several = jax.jit(jax.vmap(solve, in_axes=(0, None)))(dampings, rhs)
    assert several.residual.shape == several.converged.shape == (2,)
    assert several.converged.all()
    for i, damping in enumerate(dampings):
        inverse = np.linalg.inv(matrix + float(damping) * np.eye(9))
        value = jax.tree.map(lambda x, i=i: x[i], several.value)
        assert relative_error(ravel(value), inverse @ ravel(rhs)) < 1e-5
        by_damping, by_rhs = jax.grad(
            lambda d, v: sum(jnp.sum(x) for x in jax.tree.leaves(solve(d, v).value)), (0, 1)
        )(damping, rhs)
        assert relative_error(ravel(by_rhs), inverse.sum(0)) < 1e-5
        np.testing.assert_allclose(by_damping, -inverse.sum(0) @ inverse @ ravel(rhs), rtol=1e-4)
        _, forward = jax.jvp(lambda d: ravel_sum(solve(d, rhs).value), (damping,), (1.0,))
        np.testing.assert_allclose(forward, by_damping, rtol=1e-4)


def ravel_sum(tree):
    return sum(jnp.sum(x) for x in jax.tree.leaves(tree))


def test_cg_solves_the_mnist_head_in_few_steps():
    problem = problems.mnist_head()
    solve = jax.jit(
        lambda p: influence.group_ihvp(
            problem.loss_fn, p, problem.group, problem.train, solver=EXACT["cg"]
        )
    )
    solution = solve(problem.params)
    assert solution.converged
    # The rank of the Hessian is at most 304 * 9; far fewer of its eigenvalues stand out of 0.5.
    assert solution.num_steps < 200


def test_linearised_once_the_loop_of_cg_holds_no_forward_pass():
    problem = problems.softmax_head()

    def solve(chunk_size):
        jaxpr = jax.make_jaxpr(
            lambda p, t: influence.group_ihvp(
                problem.loss_fn, p, problem.group, t, solver=EXACT["cg"], chunk_size=chunk_size
            )
        )(problem.params, problem.train)
        return "\n".join(str(body) for body in bodies_of_while(jaxpr.jaxpr))

    assert " log " not in solve(None)  # of logsumexp
    assert " log " in solve(16)


def bodies_of_while(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation.params["body_jaxpr"]
        else:
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
                if hasattr(value, "jaxpr"):
                    yield from bodies_of_while(value.jaxpr)


def test_errors_say_what_is_wrong():
    _, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    for factory in (solvers.cg, solvers.cholesky, solvers.lissa):
        for damping in (0.0, -1.0, np.nan):
            with pytest.raises(ValueError, match="damping must be positive"):
                factory(damping=damping)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        solvers.cg(damping=1.0, tolerance=0.0)
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        solvers.cg(damping=1.0, max_steps=0)
    with pytest.raises(ValueError, match="scale must be positive"):
        solvers.lissa(damping=1.0, scale=-1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        solvers.lissa_from_authors(scale=0.0)
    with pytest.raises(ValueError, match="damp must be positive"):
        solvers.lissa_from_authors(damp=0.0)
    for name in ("num_steps", "num_repeats", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            solvers.lissa(damping=1.0, **{name: 0})
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        solvers.power_iteration(matvec, rhs, jax.random.key(0), 0)
    with pytest.raises(ValueError, match=r"9 x 9 .*use cg, or raise max_size=8"):
        solvers.cholesky(damping=1.0, max_size=8)(matvec, rhs)
    with pytest.raises(ValueError, match=r"for a bare matvec choose batch_size=None"):
        solvers.lissa(damping=1.0)(matvec, rhs, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"pass a PRNG key, as in key=jax.random.key\(0\)"):
        solvers.lissa(damping=1.0, batch_size=None)(matvec, rhs)
    with pytest.raises(ValueError, match=r"pass a PRNG key"):
        problem = problems.softmax_head()
        influence.group_ihvp(
            problem.loss_fn,
            problem.params,
            problem.group,
            problem.train,
            solver=solvers.lissa(damping=1.0, scale=10.0),
        )


def test_lissa_stops_once_it_has_come_to_rest_and_not_before():
    _, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))

    def run(**settings):
        return solvers.lissa(damping=DAMPING, scale=5.0, batch_size=None, num_steps=2000)(
            matvec, rhs, **settings
        )

    rested = run()
    assert rested.converged and 25 <= rested.num_steps < 400
    assert rested.residual < 1e-4
    with_batches = run_lissa(key=jax.random.key(0), batch_size=8, num_steps=60)
    assert with_batches.num_steps == 60


def test_lissa_gives_up_once_it_has_exploded():
    solution = run_lissa(scale=0.05, num_steps=2000, batch_size=16)
    assert solution.num_steps <= 100 and not solution.converged


@pytest.mark.parametrize(
    ("problem_fn", "damping"),
    [(problems.softmax_head, 0.5), (problems.mnist_head, 0.5), (problems.small_network, 2.0)],
)
def test_automatic_scale_of_lissa_never_diverges(problem_fn, damping):
    """Over 16 keys; the damping of the network makes its indefinite Hessian definite."""
    problem = problem_fn()
    solver = solvers.lissa(damping=damping, batch_size=8, num_steps=150)

    def ihvp(key):
        return influence.group_ihvp(
            problem.loss_fn, problem.params, problem.group, problem.train, solver=solver, key=key
        )

    solutions = jax.jit(jax.vmap(ihvp))(jax.random.split(jax.random.key(5), 16))
    assert np.isfinite(solutions.residual).all() and (solutions.residual < 1).all()
    assert (solutions.num_steps == 150).all()


def test_lissa_on_an_indefinite_system_is_not_converged():
    _, matvec, rhs, _ = quadratic([-1.0, *np.linspace(0.1, 4, 8)])
    solution = solvers.lissa(damping=0.5, batch_size=None)(matvec, rhs, key=jax.random.key(0))
    assert not solution.converged


@pytest.mark.parametrize("rank", [9, 30])
def test_nystrom_of_full_rank_equals_a_dense_solve(rank):
    matrix, matvec, rhs, flat = quadratic(np.linspace(0, 4, 9))
    solver = solvers.nystrom(damping=DAMPING, rank=rank, columns_at_once=4)
    solution = jax.jit(lambda v, key: solver(matvec, v, key=key))(rhs, jax.random.key(0))
    want = np.linalg.solve(matrix + DAMPING * np.eye(9), flat)
    assert relative_error(ravel(solution.value), want) < 1e-5
    assert solution.converged and solution.residual < 1e-5


def test_nystrom_is_exact_beyond_the_rank_of_the_matrix_and_honest_below_it():
    eigenvalues = [0.0] * 30 + [1.0, 2.0, 5.0, 20.0]
    matrix, matvec, rhs, flat = quadratic(eigenvalues)
    want = np.linalg.solve(matrix + DAMPING * np.eye(34), flat)
    solve = {
        rank: solvers.nystrom(damping=DAMPING, rank=rank)(matvec, rhs, key=jax.random.key(0))
        for rank in (2, 8)
    }
    assert relative_error(ravel(solve[8].value), want) < 1e-5 and solve[8].converged
    assert solve[2].residual > 0.1 and not solve[2].converged


def test_nystrom_preconditioner_saves_steps_of_cg():
    eigenvalues = [*np.logspace(0, 2, 10), *np.linspace(0, 0.1, 90)]
    matrix, matvec, rhs, flat = quadratic(eigenvalues)
    precondition = solvers.nystrom_preconditioner(
        matvec, rhs, jax.random.key(0), damping=0.1, rank=20
    )
    plain, helped = (
        solvers.cg(damping=0.1, tolerance=1e-5, preconditioner=m)(matvec, rhs)
        for m in (None, precondition)
    )
    assert plain.converged and helped.converged
    assert helped.num_steps <= 8 < plain.num_steps
    want = np.linalg.solve(matrix + 0.1 * np.eye(100), flat)
    assert relative_error(ravel(helped.value), want) < 1e-4


@pytest.mark.parametrize("name", ["cg", "cholesky", "nystrom"])
def test_many_right_hand_sides_under_vmap_share_what_does_not_depend_on_them(name):
    matrix, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    solver = {
        "cg": EXACT["cg"],
        "cholesky": solvers.cholesky(damping=DAMPING),
        "nystrom": solvers.nystrom(damping=DAMPING, rank=9),
    }[name]
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x + 1]), rhs)

    def solve(several):
        return jax.vmap(lambda v: solver(matvec, v, key=jax.random.key(0)))(several)

    solutions = jax.jit(solve)(several)
    assert solutions.residual.shape == (3,) and solutions.converged.all()
    inverse = np.linalg.inv(matrix + DAMPING * np.eye(9))
    for i in range(3):
        value, v = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (solutions.value, several))
        assert relative_error(ravel(value), inverse @ ravel(v)) < 1e-5
    if name != "cg":  # one factorisation of a 9 x 9 matrix, not three
        assert "3,9,9" not in str(jax.make_jaxpr(solve)(several))


@pytest.mark.parametrize("eigenvalues", [np.linspace(0, 4, 12), [-5.0, *np.linspace(0, 40, 11)]])
@pytest.mark.parametrize("num_steps", [12, 40])  # 40 are more than there are dimensions
def test_spectrum_equals_dense_eigenvalues(eigenvalues, num_steps):
    _, matvec, rhs, _ = quadratic(eigenvalues)
    found = jax.jit(lambda k: solvers.spectrum(matvec, rhs, k, num_steps=num_steps))(
        jax.random.key(0)
    )
    np.testing.assert_allclose(found.smallest, min(eigenvalues), atol=1e-5 * max(eigenvalues))
    np.testing.assert_allclose(found.largest, max(eigenvalues), rtol=1e-5)
    assert found.smallest_error < 1e-3 * max(eigenvalues) > found.largest_error


def test_spectrum_comes_from_inside_and_its_error_bounds_hold():
    eigenvalues = np.concatenate([[-3.0], np.random.default_rng(0).normal(size=200), [9.0]])
    _, matvec, rhs, _ = quadratic(eigenvalues)
    errors = []
    for num_steps in (1, 4, 8, 24):
        found = solvers.spectrum(matvec, rhs, jax.random.key(1), num_steps=num_steps)
        assert found.smallest >= -3 - 1e-4 and found.largest <= 9 + 1e-4
        for value, error in zip(found[:2], found[2:], strict=True):
            assert np.min(np.abs(eigenvalues - value)) <= error + 1e-4
        errors.append(9 - found.largest)
    assert errors[-1] < 1e-4 < errors[0]


def test_spectrum_of_zero_and_of_the_identity():
    rhs = {"a": jnp.ones((3, 2))}
    for factor in (0.0, 2.0):
        found = solvers.spectrum(
            lambda u, factor=factor: jax.tree.map(lambda x: factor * x, u), rhs, jax.random.key(0)
        )
        np.testing.assert_allclose(found, (factor, factor, 0, 0), atol=1e-5)


def test_spectrum_tells_which_damping_makes_cg_converge():
    problem, dense = problems.small_network(), problems.dense(problems.small_network)
    matvec = curvature.product(curvature.hessian(problem.loss_fn), problem.params, problem.train)
    found = solvers.spectrum(matvec, problem.params, jax.random.key(0), num_steps=72)
    eigenvalues = np.linalg.eigvalsh(dense.hessian)
    np.testing.assert_allclose(found.smallest, eigenvalues[0], rtol=1e-3)
    np.testing.assert_allclose(found.largest, eigenvalues[-1], rtol=1e-3)
    assert eigenvalues[0] < -0.01
    enough = solvers.cg(damping=float(-1.2 * found.smallest))
    assert enough(matvec, problem.params).converged


def test_errors_of_low_rank_and_spectrum():
    _, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        solvers.nystrom(damping=1.0, rank=0)
    with pytest.raises(ValueError, match="damping must be positive"):
        solvers.nystrom(damping=0.0, rank=4)
    with pytest.raises(ValueError, match="pass a PRNG key"):
        solvers.nystrom(damping=1.0, rank=4)(matvec, rhs)
    with pytest.raises(ValueError, match="damping must be positive"):
        solvers.nystrom_preconditioner(matvec, rhs, jax.random.key(0), damping=-1.0, rank=4)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        solvers.spectrum(matvec, rhs, jax.random.key(0), num_steps=0)


def test_two_solvers_of_the_same_settings_compile_once():
    _, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    factories = {
        lambda damping: solvers.cg(damping=damping),
        lambda damping: solvers.cholesky(damping=damping),
        lambda damping: solvers.nystrom(damping=damping, rank=3),
        lambda damping: solvers.lissa(damping=damping, batch_size=None, num_steps=3),
        lambda damping: solvers.identity(),
    }
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def solve(solver, v):
        traces.append(solver)
        return solver(matvec, v, key=jax.random.key(0)).residual

    for factory in factories:
        for damping in (0.5, np.float32(0.5), jnp.float32(0.5)):
            solve(factory(damping), rhs)
    assert len(traces) == len(factories)
    assert solvers.cg(damping=0.5) != solvers.cg(damping=0.25)


def convolutional_problem():
    """A network with a convolution, and its loss."""

    def outputs(params, x):
        hidden = jax.lax.conv(x, params["kernel"], (1, 1), "SAME")
        return jnp.tanh(hidden).mean((2, 3)) @ params["out"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": jax.random.normal(keys[0], (4, 1, 3, 3)), "out": jnp.eye(4, 3)}
    data = jax.random.normal(keys[1], (12, 1, 5, 5)), jnp.arange(12) % 3

    def loss(p, batch):
        return problems.cross_entropy(outputs(p, batch[0]), batch[1])

    return loss, params, data, curvature.gauss_newton(outputs, problems.cross_entropy)


@pytest.mark.filterwarnings("ignore:group_ihvp under jit on CPU")
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize(
    "solver",
    [solvers.cg(damping=0.1), solvers.lissa(damping=0.5, num_steps=60, batch_size=6)],
    ids=["cg", "lissa"],
)
def test_outside_jit_the_host_takes_the_steps_that_a_loop_takes_inside(
    solver, chunk_size, monkeypatch
):
    loss, params, data, kind = convolutional_problem()
    told = []

    def ihvp(params, progress=None):
        return influence.group_ihvp(
            loss, params, data, data, solver=solver, curvature=kind, chunk_size=chunk_size,
            key=jax.random.key(0), progress=progress,
        )  # fmt: skip

    inside = jax.jit(ihvp)(params)
    assert "while" in str(jax.make_jaxpr(ihvp)(params))
    executed = []
    while_loop = jax.lax.while_loop

    def watched(cond, body, state):
        executed.append(not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)))
        return while_loop(cond, body, state)

    monkeypatch.setattr(jax.lax, "while_loop", watched)
    outside = ihvp(params, lambda step, residual: told.append((step, residual)))
    assert not any(executed)  # traced perhaps, to see whether it could be, but never run
    assert relative_error(ravel(outside.value), ravel(inside.value)) < 1e-4
    assert outside.num_steps == inside.num_steps and outside.status == inside.status
    assert told and told[-1][0] == int(outside.num_steps)
    assert all(np.isfinite(residual) for _, residual in told)
    with pytest.raises(ValueError, match="leave it out inside jit"):
        jax.jit(lambda p: ihvp(p, print))(params)


def test_a_derivative_outside_jit_is_that_of_the_loop():
    matrix, matvec, rhs, flat = quadratic(np.linspace(0, 4, 9))
    solve = solvers.cg(damping=DAMPING, tolerance=1e-7)
    by_rhs = jax.grad(lambda v: ravel_sum(solve(matvec, v).value))(rhs)
    want = np.linalg.inv(matrix + DAMPING * np.eye(9)).sum(0)
    assert relative_error(ravel(by_rhs), want) < 1e-5
    # What varies may be in the product or the preconditioner alone.
    several = jax.vmap(lambda c: solve(lambda u: jax.tree.map(lambda x: c * x, u), rhs).value)(
        jnp.array([1.0, 2.0])
    )
    first = jax.tree.map(lambda x: x[1], several)
    assert relative_error(ravel(first), flat / 2.5) < 1e-6


def test_status_tells_what_went_wrong_and_what_to_change():
    _, indefinite, rhs, _ = quadratic([-1.0, *np.linspace(0.1, 4, 8)])
    _, skewed, _, _ = quadratic([0.0, 0.0, *np.geomspace(1e-6, 1e9, 7)])
    _, mild, _, _ = quadratic(np.linspace(1, 4, 9))
    _, singular, _, _ = quadratic(np.linspace(0, 4, 9))
    nan = jax.tree.map(lambda x: x * jnp.nan, rhs)
    status = solvers.Status
    cg, cholesky = solvers.cg(damping=1e-3), solvers.cholesky(damping=1e-3)
    for solver, matvec, v, want, words in (
        (cg, mild, rhs, {status.CONVERGED}, "converged to the tolerance"),
        (cg, singular, rhs, {status.NOISY}, "For cg rounding is the limit"),
        (cg, indefinite, rhs, {status.INDEFINITE}, "must exceed the most negative eigenvalue"),
        (cholesky, indefinite, rhs, {status.INDEFINITE}, "not positive definite"),
        (cg, skewed, rhs, {status.ROUNDING, status.OUT_OF_STEPS}, "ill-conditioned for float32"),
        (cholesky, skewed, rhs, {status.ROUNDING}, r"ill-conditioned .*scale the features"),
        (solvers.cg(damping=1e-3, max_steps=2), mild, rhs, {status.OUT_OF_STEPS}, "max_steps"),
        (cg, mild, nan, {status.RHS_NOT_FINITE}, "right-hand side"),
    ):
        solution = solver(matvec, v)
        assert int(solution.status) in want
        assert re.search(words, solution.describe())
        assert bool(solution.converged) == (want == {status.CONVERGED})
        np.testing.assert_allclose(solution.damping, 1e-3, rtol=1e-6)


def test_usable_is_less_than_converged():
    _, matvec, rhs, _ = quadratic(np.linspace(0, 4, 9))
    lissa = solvers.lissa(damping=DAMPING, scale=5.0, batch_size=None, num_steps=10)
    noisy = lissa(matvec, rhs)
    assert 0.01 < noisy.residual < 0.5 and noisy.usable and not noisy.converged
    assert solvers.require_usable(noisy) is noisy
    with pytest.raises(solvers.DivergedError, match=r"my solve did not .*usable but noisy"):
        solvers.require_converged(noisy, "my solve")
    short = solvers.cg(damping=DAMPING, max_steps=1)(matvec, rhs)
    with pytest.raises(solvers.DivergedError, match=r"my solve is not usable.*out of steps"):
        solvers.require_usable(short, "my solve")


def test_settings_that_are_no_numbers_are_refused():
    for damping in ("0.5", None, True, np.ones(3)):
        with pytest.raises(TypeError, match="damping must be one number"):
            solvers.cg(damping=damping)
    with pytest.raises(ValueError, match="damping must be positive and finite, got inf"):
        solvers.cholesky(damping=np.inf)
    with pytest.raises(TypeError, match=r"max_steps must be a whole number, got 20\.0"):
        solvers.cg(damping=1.0, max_steps=20.0)
