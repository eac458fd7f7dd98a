"""Products with the Hessian: how many a second, and how near to the matrix product's arithmetic.

  python benchmarks/hvp.py
  python benchmarks/hvp.py --peers --peers-python peers/bin/python

Afresh: parameters and batch are new each time, as in LiSSA. At a fixed point: linearised once, as
in conjugate gradients. Predicted is the number of operations (see `problem.py`) at the rate of a
large matrix product; ratios are to jaxpoison in the same rounds.
"""

import argparse

import jax
import jax.numpy as jnp
import measure
import peers
import problem as problems

from jaxpoison import curvature

CHUNK_SIZE = 128  # which suits the caches of a CPU


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512], help="batch sizes")
    problems.add_arguments(parser)
    measure.add_arguments(parser)
    peers.add_arguments(parser)
    options = parser.parse_args()

    problem = problems.make(
        train=max(options.train, *options.batches),
        group=options.group,
        epochs=options.epochs,
        dtype=options.dtype,
    )
    u = problems.direction(problem.params)
    with peers.Peers(options, problem, u) as others:
        contenders = [
            each
            for batch_size in options.batches
            for each in (
                *whole_network(problem, u, batch_size, others),
                *last_layer(problem, u["head"], batch_size, others),
            )
        ]
        result = measure.race(
            contenders,
            rounds=options.rounds,
            sample_seconds=options.sample_seconds,
            dtype=options.dtype,
        )
    measure.finish("hvp.py", options, result | {"peers": others.versions})


def whole_network(problem, u, batch_size, others) -> list[measure.Contender]:
    """Returns those that multiply with the curvature of all parameters."""
    batch = jax.tree.map(lambda x: x[:batch_size], problem.train)
    plain = problem.with_plain_convolutions()
    hessian, gauss_newton = curvature.hessian(problem.loss), problem.gauss_newton()
    flops = {name: batch_size * count for name, count in problems.FLOPS.items()}

    def afresh(kind, chunk_size=None):
        return measure.compiled(
            lambda params, batch, u: curvature.product(
                kind, params, batch, chunk_size=chunk_size
            )(u),
            problem.params, batch, u,
        )  # fmt: skip

    def fixed(kind):
        linearise = jax.jit(lambda params, batch: curvature.product(kind, params, batch))
        return measure.compiled(lambda product, u: product(u), linearise(problem.params, batch), u)

    def by_hand(params, batch, u):
        gradient = jax.grad(lambda params: jnp.mean(plain.loss(params, batch)))
        return jax.jvp(gradient, (params,), (u,))[1]

    work = f"Hessian product, all parameters, B = {batch_size}, afresh"
    ours = afresh(hessian)
    hand = measure.compiled(by_hand, problem.params, batch, u)
    want = problems.flat(ours.call())
    same = {"part": "all", "batch": batch_size}
    contenders = [
        measure.contender(work, measure.OURS, ours, flops=flops["hessian_afresh"]),
        measure.contender(
            work, "JAX by hand", hand, flops=flops["hessian_afresh"],
            difference=measure.difference(problems.flat(hand.call()), want),
        ),
        *others.contenders(work, "hvp", want=want, **same),
    ]  # fmt: skip
    if batch_size > CHUNK_SIZE:
        in_chunks = afresh(hessian, CHUNK_SIZE)
        name = f"{measure.OURS}, {CHUNK_SIZE} at a time"
        contenders.append(measure.contender(work, name, in_chunks, flops=flops["hessian_afresh"]))
    work = work.replace("afresh", "at a fixed point")
    contenders += [
        measure.contender(work, measure.OURS, fixed(hessian), flops=flops["hessian"]),
        *others.contenders(work, "hvp_fixed", want=want, **same),
    ]
    for name, program, count in (
        ("afresh", afresh(gauss_newton), "gauss_newton_afresh"),
        ("at a fixed point", fixed(gauss_newton), "gauss_newton"),
    ):
        work = f"Gauss-Newton product, all parameters, B = {batch_size}, {name}"
        contenders.append(measure.contender(work, measure.OURS, program, flops=flops[count]))
    return contenders


def last_layer(problem, u, batch_size, others) -> list[measure.Contender]:
    """Returns those that multiply with the Hessian of the last layer."""
    images, labels = jax.tree.map(lambda x: x[:batch_size], problem.train)
    head = problem.params["head"]
    anew = curvature.hessian(problem.head_loss)

    def program(kind, inputs):
        return measure.compiled(
            lambda head, inputs, u: curvature.product(kind, head, (inputs, labels))(u),
            head, inputs, u,
        )  # fmt: skip

    work = f"Hessian product, last layer, B = {batch_size}"
    ours = program(curvature.linear_head, problem.features(images))
    want = problems.flat(ours.call())
    product, forward = problems.FLOPS["head_product"], problems.FLOPS["forward"]
    return [
        measure.contender(
            work, f"{measure.OURS}, features cached", ours, flops=batch_size * product
        ),
        measure.contender(
            work, f"{measure.OURS}, features anew", program(anew, images),
            flops=batch_size * (product + forward),
        ),
        *others.contenders(work, "hvp", want=want, part="head", batch=batch_size),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
