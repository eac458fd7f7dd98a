"""Inverse-Hessian-vector products: time and products with H to a residual, and LiSSA's steps.

  python benchmarks/ihvp.py
  python benchmarks/ihvp.py --peers --peers-python peers/bin/python

Solves (H + 2 I) x = v with v the gradient of the trusted examples' mean loss, which is part of
the work, by conjugate gradients from zero; H is the mean over the training examples. A solve makes
a product with H per step and one more to measure the residual; predicted is the arithmetic of
those. The head's features are made again in every solve, unless they are given. The time of a LiSSA
step contains its share of one product with the whole H, by which we alone measure the residual.

The Gauss-Newton matrix is another matrix, the one to take for whole networks: without negative
eigenvalues, and a third cheaper to multiply with. Ratios compare it with products of the Hessian,
which is what the other libraries multiply with.
"""

import argparse
from typing import Any

import jax
import measure
import peers
import problem as problems

from jaxpoison import curvature, influence, solvers
from jaxpoison.core import batches

LISSA_STEPS, LISSA_SCALE = 100, 50.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of conjugate gradients")
    parser.add_argument(
        "--chunk-size", type=int, default=128, help="examples in a pass, and in a step of LiSSA"
    )
    problems.add_arguments(parser)
    measure.add_arguments(parser)
    peers.add_arguments(parser)
    options = parser.parse_args()

    problem = problems.make(
        train=options.train, group=options.group, epochs=options.epochs, dtype=options.dtype
    )
    with peers.Peers(options, problem, problems.direction(problem.params)) as others:
        contenders = [
            *conjugate_gradients(problem, options, others),
            *conjugate_gradients_head(problem, options, others),
            *lissa(problem, options, others),
            *lissa_head(problem, options, others),
        ]
        result = measure.race(
            contenders,
            rounds=options.rounds,
            sample_seconds=options.sample_seconds,
            dtype=options.dtype,
        )
    measure.finish("ihvp.py", options, result | {"peers": others.versions})


def conjugate_gradients(problem, options, others) -> list[measure.Contender]:
    """Returns solves over all parameters."""
    work = f"CG to {options.tolerance:g}, all parameters, {options.train:,} examples"
    found, answers = [], []
    for name, kind, chunk_size, product in (
        ("Hessian, linearised once", None, None, "hessian"),
        ("Hessian in chunks", None, options.chunk_size, "hessian_afresh"),
        ("Gauss-Newton, linearised once", problem.gauss_newton(), None, "gauss_newton"),
        (
            "Gauss-Newton in chunks",
            problem.gauss_newton(),
            options.chunk_size,
            "gauss_newton_afresh",
        ),
    ):
        solver = solvers.cg(damping=problems.DAMPING, tolerance=options.tolerance)

        def solve(params, group, train, solver=solver, kind=kind, chunk_size=chunk_size):
            return influence.group_ihvp(
                problem.loss, params, group, train,
                solver=solver, curvature=kind, chunk_size=chunk_size,
            )  # fmt: skip

        program = measure.compiled(solve, problem.params, problem.group, problem.train)
        solution = program.call()
        answers.append(problems.flat(solution.value))
        num_products = int(solution.num_steps) + 1
        flops = problems.FLOPS[product] * num_products * options.train
        flops += problems.FLOPS["gradient"] * options.group
        found.append(
            measure.contender(
                work, f"{measure.OURS}, {name}", program, flops=flops, **evidence(solution)
            )
        )
    # dattri's cannot stop by itself: it takes as many products as ours.
    return found + others.contenders(
        work,
        "cg",
        want=answers[0],
        part="all",
        tolerance=options.tolerance,
        max_steps=found[0].facts["products"],
    )


def conjugate_gradients_head(problem, options, others) -> list[measure.Contender]:
    """Returns solves over the last layer."""
    head = problem.params["head"]
    group, train = (
        (problem.features(images), labels) for images, labels in (problem.group, problem.train)
    )
    work = f"CG to {options.tolerance:g}, last layer, {options.train:,} examples"

    def solve(head, group, train, tolerance):
        return influence.group_ihvp(
            influence.linear_head_loss, head, group, train,
            solver=solvers.cg(damping=problems.DAMPING, tolerance=tolerance),
            curvature=curvature.linear_head,
        )  # fmt: skip

    def from_images(head, group, train, tolerance):
        group, train = (with_features(problem, options, batch) for batch in (group, train))
        return solve(head, group, train, tolerance)

    found, want = [], None
    for tolerance in (options.tolerance, options.tolerance / 1000):
        for name, fn, data in (
            (f"to {tolerance:g}", from_images, (problem.group, problem.train)),
            (f"to {tolerance:g}, features given", solve, (group, train)),
        ):
            program = measure.compiled(
                lambda head, group, train, fn=fn, tolerance=tolerance: fn(
                    head, group, train, tolerance
                ),
                head,
                *data,
            )
            solution = program.call()
            want = problems.flat(solution.value)  # the last is the most precise
            flops = problems.FLOPS["head_product"] * (int(solution.num_steps) + 1) * options.train
            if fn is from_images:
                flops += problems.FLOPS["forward"] * (options.train + options.group)
            found.append(
                measure.contender(
                    work, f"{measure.OURS}, {name}", program, flops=flops, **evidence(solution)
                )
            )
    return found + others.contenders(
        work,
        "cg",
        want=want,
        part="head",
        tolerance=options.tolerance,
        max_steps=found[0].facts["products"],
    )


def with_features(problem, options, batch):
    """Returns (features, labels); a chunk at a time, which stays in the caches of a CPU."""
    images, labels = batch
    return batches.map_chunks(problem.features, images, options.chunk_size), labels


def lissa(problem, options, others) -> list[measure.Contender]:
    """Returns recursions over all parameters; rates are steps per second."""
    work = f"LiSSA, all parameters, {LISSA_STEPS} steps of {options.chunk_size}"
    found = []
    for name, kind, product in (
        ("Hessian", None, "hessian_afresh"),
        ("Gauss-Newton", problem.gauss_newton(), "gauss_newton_afresh"),
    ):
        program = measure.compiled(
            lambda params, group, train, kind=kind: recursion(
                problem.loss, params, group, train, kind, options.chunk_size
            ),
            problem.params, problem.group, problem.train,
        )  # fmt: skip
        found.append(
            measure.contender(
                work, f"{measure.OURS}, {name}", program, items=LISSA_STEPS,
                flops=problems.FLOPS[product] * examples(problem, options),
            )
        )  # fmt: skip
    return found + others.contenders(
        work, "lissa", items=LISSA_STEPS, part="all", **settings(options)
    )


def lissa_head(problem, options, others) -> list[measure.Contender]:
    """Returns recursions over the last layer, features made once for all examples."""
    work = f"LiSSA, last layer, {LISSA_STEPS} steps of {options.chunk_size}"

    def from_images(head, group, train):
        group, train = (with_features(problem, options, batch) for batch in (group, train))
        return given(head, group, train)

    def given(head, group, train):
        return recursion(
            influence.linear_head_loss, head, group, train, curvature.linear_head,
            options.chunk_size,
        )  # fmt: skip

    head = problem.params["head"]
    features = tuple(
        (problem.features(images), labels) for images, labels in (problem.group, problem.train)
    )
    flops = problems.FLOPS["head_product"] * examples(problem, options)
    forward = problems.FLOPS["forward"] * (len(problem.group[1]) + len(problem.train[1]))
    return [
        measure.contender(
            work, f"{measure.OURS}, features given", measure.compiled(given, head, *features),
            items=LISSA_STEPS, flops=flops,
        ),
        measure.contender(
            work, f"{measure.OURS}, features of all examples too",
            measure.compiled(from_images, head, problem.group, problem.train),
            items=LISSA_STEPS, flops=flops + forward,
        ),
        *others.contenders(work, "lissa", items=LISSA_STEPS, part="head", **settings(options)),
    ]  # fmt: skip


def examples(problem, options) -> int:
    """Returns how many examples LiSSA's products are over, that of its residual among them."""
    return LISSA_STEPS * options.chunk_size + len(problem.train[1])


def recursion(loss_fn, params, group, train, kind, batch_size) -> jax.Array:
    """Returns LiSSA's answer."""
    solver = solvers.lissa(
        damping=problems.DAMPING,
        scale=LISSA_SCALE,
        num_steps=LISSA_STEPS,
        batch_size=batch_size,
        stagnation=0.0,
    )
    return influence.group_ihvp(
        loss_fn, params, group, train, solver=solver, curvature=kind, key=jax.random.key(0)
    ).value


def settings(options) -> dict[str, float]:
    """Returns LiSSA's settings as the peers take them."""
    return {"batch": options.chunk_size, "steps": LISSA_STEPS, "scale": LISSA_SCALE}


def evidence(solution: solvers.Solution) -> dict[str, Any]:
    """Returns what a solution says about itself."""
    return {"products": int(solution.num_steps) + 1, "residual": float(solution.residual)}


if __name__ == "__main__":
    main()
