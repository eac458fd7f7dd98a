"""How the cost grows: with examples N, parameters P, the batch, and devices.

  python benchmarks/scaling.py                      # all four, in processes of their own
  python benchmarks/scaling.py --only examples --examples 1000 4000 16000 60000

Each point is measured in a fresh process, because peak memory (the operating system's, for the
whole process) never goes down again. Slopes are of log time against log size: 1 is linear.

- examples: Hessian products and scores over N images, 128 in a pass; memory above that of the
  smallest N should be that of the images (3.1 kB each) and their scores.
- parameters: the network with its dense layer widened.
- batch: examples in a pass.
- devices: N examples over 1, 2, ... CPU devices that share this machine's cores; what is shown is
  that nothing is lost, not that time is won. On an accelerator: its devices.
"""

import argparse
import json
import os
import resource
import subprocess
import sys

import jax
import measure
import numpy as np
import problem as problems

from jaxpoison import curvature, influence
from jaxpoison.core import devices

KINDS = ("examples", "parameters", "batch", "devices")
BASE = {"examples": 2048, "width": 128, "chunk": 128, "devices": 1}
VARIED = {"examples": "examples", "parameters": "width", "batch": "chunk", "devices": "devices"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument(
        "--examples", type=int, nargs="+", default=[1000, 4000, 16_000, 60_000], help="values of N"
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[32, 128, 512], help="widths of the dense layer"
    )
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[16, 64, 256, 1024], help="examples in a pass"
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4], help="device counts")
    measure.add_arguments(parser)
    parser.add_argument("--point", help=argparse.SUPPRESS)  # one measurement, as JSON
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure_point(json.loads(options.point), options)))
        return

    sizes = {
        "examples": options.examples,
        "parameters": options.widths,
        "batch": options.chunks,
        "devices": options.devices,
    }
    rows, slopes, limits = [], {}, []
    for kind in options.only:
        points = []
        for size in sizes[kind]:
            reply = in_new_process(BASE | {VARIED[kind]: size}, options)
            limits.append(reply["limit_gflops"])
            points += [
                {**row, "work": f"{row['work']}, {kind}: {size:,}", **reply["facts"]}
                for row in reply["rows"]
            ]
        rows += points
        slopes |= slopes_of(kind, sizes[kind], points)
    result = {"limit_gflops": float(np.median(limits)), "rows": rows, "slopes": slopes}
    measure.finish("scaling.py", options, result)


def in_new_process(point: dict[str, int], options: argparse.Namespace) -> dict:
    """Returns the measurement of one point."""
    environment = dict(os.environ)
    if jax.default_backend() == "cpu":
        environment["JAX_NUM_CPU_DEVICES"] = str(point["devices"])
    done = subprocess.run(
        [
            sys.executable, __file__, "--point", json.dumps(point),
            "--rounds", str(options.rounds), "--sample-seconds", str(options.sample_seconds),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure_point(point: dict[str, int], options: argparse.Namespace) -> dict:
    """Returns rows for one product and for scores, with the peak of this process's memory."""
    problem = problems.make(train=point["examples"], group=1, epochs=0, width=point["width"])
    mesh = devices.data_mesh(jax.devices()[: point["devices"]])
    params = devices.replicate(problem.params, mesh)
    u = devices.replicate(problems.direction(params), mesh)
    whole = point["examples"] // mesh.size * mesh.size
    train = devices.shard_examples(jax.tree.map(lambda x: x[:whole], problem.train), mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    product = measure.compiled(
        lambda params, train, u: curvature.product(
            curvature.hessian(problem.loss), params, train, chunk_size=point["chunk"]
        )(u),
        params, train, u,
    )  # fmt: skip
    scores = measure.compiled(
        lambda params, train, u: influence.example_influence(
            problem.loss, params, u, train, chunk_size=point["chunk"]
        ),
        params, train, u,
    )  # fmt: skip
    flops = problems.flops(point["width"])
    result = measure.race(
        [
            measure.contender(
                "Hessian product", measure.OURS, product, items=whole,
                flops=whole * flops["hessian_afresh"],
            ),
            measure.contender(
                "scores", measure.OURS, scores, items=whole, flops=whole * flops["scores"]
            ),
        ],
        rounds=options.rounds,
        sample_seconds=options.sample_seconds,
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    images = 1e-6 * problem.train[0].nbytes
    sizes = {"parameters": count, "peak_megabytes": round(peak), "images_megabytes": round(images)}
    return {**result, "facts": sizes}


def slopes_of(kind: str, sizes: list[int], rows: list[dict]) -> dict[str, float]:
    """Returns d log(time) / d log(size) per work, and of memory, by least squares."""
    slopes = {}
    for work in dict.fromkeys(row["work"].partition(",")[0] for row in rows):
        chosen = [row for row in rows if row["work"].startswith(work)]
        size = [row["parameters"] for row in chosen] if kind == "parameters" else sizes
        for name in ("seconds", "peak_megabytes"):
            values = [row[name] for row in chosen]
            if len(values) > 1:
                slope = np.polyfit(np.log(size), np.log(values), 1)[0]
                slopes[f"{name.replace('_', ' ')} by {kind}, {work}"] = float(slope)
    return slopes


if __name__ == "__main__":
    main()
