"""Influence on the group, given its inverse-Hessian-vector product: examples and maps a second.

  python benchmarks/influence.py
  python benchmarks/influence.py --peers --peers-python peers/bin/python

Scores are one forward-mode pass (three forward passes' arithmetic; one for the last layer), pixel
maps its gradient to the images (six; two for the last layer, as in HINT). In place of the product s
a random direction is taken: the work is the same. Ratios are per example or map.
"""

import argparse
from typing import Any, NamedTuple

import jax
import measure
import peers
import problem as problems

from jaxpoison import influence


class Task(NamedTuple):
    """What is asked, of which function of ours, and of which of the peers."""

    items: str
    ours: Any
    theirs: str


TASKS = (
    Task("scores", influence.example_influence, "scores"),
    Task("pixel maps", influence.pixel_influence, "pixel_maps"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=512, help="examples in one call")
    parser.add_argument("--chunk-size", type=int, default=128, help="examples in a pass")
    parser.add_argument(
        "--dense-batch",
        type=int,
        default=4,
        help="maps a call where all mixed derivatives are formed",
    )
    problems.add_arguments(parser)
    measure.add_arguments(parser)
    peers.add_arguments(parser)
    options = parser.parse_args()

    problem = problems.make(
        train=max(options.train, options.batch),
        group=options.group,
        epochs=options.epochs,
        dtype=options.dtype,
    )
    s = problems.direction(problem.params)
    forward = problems.FLOPS["forward"]
    with peers.Peers(options, problem, s) as others:
        contenders = []
        for task, whole_flops, head_flops in zip(
            TASKS,
            (problems.FLOPS["scores"], problems.FLOPS["pixel_map"]),
            (forward, 2 * forward),
            strict=True,
        ):
            contenders += [
                *against(task, "all", problem.loss, problem.params, s, whole_flops,
                         problem, options, others),
                *against(task, "head", problem.head_loss, problem.params["head"], s["head"],
                         head_flops, problem, options, others),
            ]  # fmt: skip
        result = measure.race(
            contenders,
            rounds=options.rounds,
            sample_seconds=options.sample_seconds,
            dtype=options.dtype,
        )
    measure.finish("influence.py", options, result | {"peers": others.versions})


def against(
    task, part, loss_fn, params, s, flops, problem, options, others
) -> list[measure.Contender]:
    """Returns our function, in one pass and in chunks, and what the peers have for it."""
    batch = jax.tree.map(lambda x: x[: options.batch], problem.train)
    work = f"{task.items}, {'all parameters' if part == 'all' else 'last layer'}"
    found, want = [], None
    for chunk_size in (options.chunk_size, None):
        program = measure.compiled(
            lambda params, s, batch, chunk_size=chunk_size: task.ours(
                loss_fn, params, s, batch, chunk_size=chunk_size
            ),
            params, s, batch,
        )  # fmt: skip
        want = program.call()
        name = measure.OURS if chunk_size is None else f"{measure.OURS}, {chunk_size} at a time"
        found.append(
            measure.contender(work, name, program, flops=options.batch * flops, items=options.batch)
        )
    if task.theirs == "pixel_maps":
        few = min(options.dense_batch, options.batch)
        settings = {"part": part, "batch": options.batch, "dense_batch": few}
    else:
        settings = {"part": part, "batch": options.batch}
    return found + others.contenders(work, task.theirs, want=want, items=options.batch, **settings)


if __name__ == "__main__":
    main()
