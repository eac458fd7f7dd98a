"""Times that can be compared: compilation apart, contenders in turn, medians, matmuls beside them.

A `Contender` is one way to do one piece of work. `race` runs all contenders of a script one after
the other, round after round, a product of large matrices among them, so that all see the same
machine; what is reported are medians over rounds, ratios within rounds, and arithmetic as a
fraction of the matrix product's.

  python benchmarks/measure.py benchmarks/results/hvp.json    # prints the tables of results files
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import runs
from jaxpoison.core import memory

OURS = "jaxpoison"
LIMIT = "matrix product"
KEEPS_FREED = memory.keep_freed()
"""Whether freed memory stays with the process, as in all programs of ours."""


class Contender(NamedTuple):
    """One way to do one piece of work.

    Attributes:
      work: what is done; ratios are taken among contenders of the same work.
      name: who does it.
      sample: `sample(repeats) -> seconds` that so many calls take.
      flops: operations of one call; None where they are not counted.
      items: things made by one call (examples, steps), for rates.
      compile_seconds: time until the first call could start; None where nothing is compiled.
      facts: more to report, numbers that are not times.
    """

    work: str
    name: str
    sample: Callable[[int], float]
    flops: float | None = None
    items: int = 1
    compile_seconds: float | None = None
    facts: dict[str, Any] = {}  # noqa: RUF012  (never changed)


class Compiled(NamedTuple):
    """A compiled function with its arguments."""

    call: Callable[[], Any]
    seconds: float


def compiled(fn: Callable[..., Any], *args: Any) -> Compiled:
    """Returns `fn` compiled for `args`, and how long tracing and compiling took."""
    start = time.perf_counter()
    executable = jax.jit(fn).lower(*args).compile()
    return Compiled(lambda: jax.block_until_ready(executable(*args)), time.perf_counter() - start)


def contender(
    work: str, name: str, program: Compiled, *, flops: float | None = None, items: int = 1, **facts
) -> Contender:
    """Returns a contender that runs `program` in this process."""
    return Contender(work, name, sampler(program.call), flops, items, program.seconds, facts)


def sampler(call: Callable[[], Any]) -> Callable[[int], float]:
    """Returns `sample(repeats)` of a call that returns when its work is done."""

    def sample(repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    return sample


def race(
    contenders: Sequence[Contender], *, rounds: int, sample_seconds: float, dtype: str = "float32"
) -> dict[str, Any]:
    """Returns the limit of this machine, and a row of results per contender.

    A sample repeats the work until it takes about `sample_seconds`. One call of each contender is
    thrown away first; rounds then start with another contender each.

    Returns:
      `limit_gflops`: of the product of two large matrices of `dtype`, the median of as many
      samples; `rows`: one dict per contender, times in seconds per call. `ratio` is the median
      over rounds of its time per item divided by that of the first contender of the same work.
    """
    everyone = [_matrix_product(dtype), *contenders]
    repeats = [max(1, round(sample_seconds / each.sample(1))) for each in everyone]
    seconds: list[list[float]] = [[] for _ in everyone]
    for turn in range(rounds):
        for place in range(len(everyone)):
            index = (turn + place) % len(everyone)
            seconds[index].append(everyone[index].sample(repeats[index]) / repeats[index])

    def gflops(index):
        flops = everyone[index].flops
        return None if flops is None else 1e-9 * flops / statistics.median(seconds[index])

    limit = gflops(0)
    assert limit is not None
    first = {}
    rows = []
    for index, each in enumerate(everyone[1:], start=1):
        other = first.setdefault(each.work, index)
        scale = everyone[other].items / each.items
        ratios = [
            scale * mine / theirs
            for mine, theirs in zip(seconds[index], seconds[other], strict=True)
        ]
        rate = gflops(index)
        rows.append(
            {
                "work": each.work,
                "name": each.name,
                "seconds": statistics.median(seconds[index]),
                "seconds_min": min(seconds[index]),
                "seconds_max": max(seconds[index]),
                "items_per_second": each.items / statistics.median(seconds[index]),
                "ratio": statistics.median(ratios),
                "gflops": rate,
                "of_limit": None if rate is None else rate / limit,
                "seconds_at_limit": None if each.flops is None else 1e-9 * each.flops / limit,
                "compile_seconds": each.compile_seconds,
                **each.facts,
            }
        )
    return {"limit_gflops": limit, "rounds": rounds, "rows": rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what all benchmarks have in common."""
    parser.add_argument("--rounds", type=int, default=7, help="rounds of interleaved samples")
    parser.add_argument(
        "--sample-seconds", type=float, default=0.3, help="a sample repeats its work for so long"
    )
    parser.add_argument("--out", type=Path, help="results file (JSON)")


def finish(script: str, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Prints the table of `race`'s rows, and writes the results file if one is asked for."""
    paths = {"out", "peers_python"}  # of this machine
    settings = {name: value for name, value in vars(options).items() if name not in paths}
    environment = runs.environment() | {"keeps_freed_memory": KEEPS_FREED}
    result = {"script": script, "settings": settings, **result, "environment": environment}
    show(result)
    if options.out:
        runs.write_json(options.out, result)


def show(result: dict[str, Any]) -> None:
    """Prints the content of a results file."""
    environment = result["environment"]
    print(
        f"\n{result['script']}: {environment['device']}, {environment['cpu_cores']} cores, "
        f"JAX {environment['versions']['jax']}; limit: {result['limit_gflops']:.0f} GFLOP/s"
    )
    print(table(result["rows"]), flush=True)
    for name, slope in result.get("slopes", {}).items():
        print(f"slope of {name}: {slope:.2f}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows of `race` as Markdown."""
    standard = {
        "work", "name", "seconds", "seconds_min", "seconds_max", "items_per_second", "ratio",
        "gflops", "of_limit", "seconds_at_limit", "compile_seconds",
    }  # fmt: skip
    header = [
        *("work", "by", "time", "of first", "per second", "of limit", "at the limit"),
        *("compiled in", ""),
    ]
    lines = []
    for row in rows:
        more = {key: value for key, value in row.items() if key not in standard}
        share = "" if row["of_limit"] is None else f"{row['of_limit']:.2f}"
        floor = "" if row["seconds_at_limit"] is None else duration(row["seconds_at_limit"])
        compile_time = "" if row["compile_seconds"] is None else duration(row["compile_seconds"])
        cells = [
            row["work"],
            row["name"],
            duration(row["seconds"]),
            f"{row['ratio']:.2f}",
            f"{row['items_per_second']:,.4g}",
            share,
            floor,
            compile_time,
            ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in more.items()),
        ]
        lines.append(cells)
    return runs.markdown(header, lines)


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def difference(got: Any, want: Any) -> float:
    """Returns ||got - want|| / ||want||, in float64."""
    got, want = (np.asarray(x, np.float64).ravel() for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _matrix_product(dtype: str) -> Contender:
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    return contender(LIMIT, LIMIT, compiled(jnp.matmul, square, square), flops=2.0 * size**3)


def _short(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        show(json.loads(Path(path).read_text()))
