"""Products with the Gauss-Newton matrix of whole networks that solvers need, EK-FAC among them.

  python benchmarks/kronecker.py
  python benchmarks/kronecker.py --networks "ResNet-18 of width 16" --images 64

Solves (H + damping I) x = v: v is the gradient of the mean loss of test images, H the Gauss-Newton
matrix of the cross-entropy over the first training images, all parameters. Dampings are shares of
H's largest eigenvalue. Of conjugate gradients, plain and preconditioned, it gives the products
until the residual that they watch is below 1e-2 and 1e-4, or none if `--most` were not enough;
preconditioners are taken at the damping of the system, and at `--softer` times it. LiSSA takes as
many steps on all images as plain conjugate gradients needed. EK-FAC and K-FAC alone take none: what
their answer is worth is its residual with H, its cosine to the answer of conjugate gradients, and
the correlation of the scores of the training images by the two.

"fast CNN" has the weights inside the package. The other networks are trained on the embedded images
first: "narrow fast CNN" is small enough for more images than it could learn by heart.
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import curvature, data, influence, models, network, runs, solvers, training

NETWORKS = ("narrow fast CNN", "fast CNN", "ResNet-18 of width 16")
RESIDUALS = (1e-2, 1e-4)
LOOK = 10  # products in the search for the largest eigenvalue


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS[:2])
    parser.add_argument("--images", type=int, default=16, help="training images of wide networks")
    parser.add_argument("--narrow-images", type=int, default=512, help="of the narrow one")
    parser.add_argument("--queries", type=int, default=64, help="test images")
    parser.add_argument("--epochs", type=int, default=8, help="of training beforehand")
    parser.add_argument("--dampings", type=float, nargs="+", default=[1e-1, 1e-2, 1e-3, 1e-4])
    parser.add_argument("--softer", type=float, default=30.0, help="times damping, see above")
    parser.add_argument("--rank", type=int, default=32, help="of Nystrom's sketch")
    parser.add_argument("--most", type=int, default=200, help="products of a solve")
    parser.add_argument("--chunk-size", type=int, default=32, help="images in a pass for factors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    options = parser.parse_args()
    rows, about = [], {}
    for name in options.networks:
        problem = make(name, options)
        about[name], found = of_network(problem, options)
        rows += [{"network": name, **row} for row in found]
        runs.say(runs.markdown(*as_table(name, about[name], found)))
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    if options.out:
        result = {"script": "kronecker.py", "settings": settings, "networks": about, "rows": rows}
        runs.write_json(options.out, result | {"environment": runs.environment()})


class Problem(NamedTuple):
    """A network as a tapped function of its parameters, and the two sets."""

    apply: Any
    params: Any
    train: tuple[jax.Array, jax.Array]
    queries: tuple[jax.Array, jax.Array]

    def loss(self, params, batch):
        images, labels = batch
        return cross_entropy(self.apply(params, images), labels)


@dataclasses.dataclass(frozen=True)
class OnHost:
    """A compiled product, which solvers call as it is: it is then compiled once for all of them."""

    multiply: Any
    on_host = True

    def __call__(self, u):
        return self.multiply(u)


def cross_entropy(logits, labels):
    picked = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def make(name: str, options: argparse.Namespace) -> Problem:
    """Returns the network with trained weights, and its sets."""
    splits = data.load_embedded("cifar10")
    if name == "fast CNN":
        model, variables = models.load_pretrained("cifar10")
    else:
        narrow = name == "narrow fast CNN"
        model = models.fast_cnn(widths=(4, 8, 8)) if narrow else models.resnet18(width=16)
        recipe = dataclasses.replace(training.FAST, epochs=options.epochs, batch_size=50)
        state = training.fit(model, recipe, splits.train, key=jax.random.key(options.seed))
        variables = state.variables
    count = options.narrow_images if name == "narrow fast CNN" else options.images

    def first(dataset, count):
        return data.to_float(dataset.images[:count]), jnp.asarray(dataset.labels[:count])

    return Problem(
        network.tapped_logits(model, variables),
        variables["params"],
        first(splits.train, count),
        first(splits.test, options.queries),
    )


def of_network(problem: Problem, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict]]:
    """Returns what the network is and costs, and the rows of all solves."""
    gauss_newton = curvature.gauss_newton(problem.apply, cross_entropy)
    v = influence.group_gradient(problem.loss, problem.params, problem.queries)
    operator = jax.jit(lambda p: curvature.product(gauss_newton, p, problem.train))(problem.params)
    multiply = jax.jit(lambda operator, u: operator(u))

    matvec = OnHost(functools.partial(multiply, operator))
    key = jax.random.key(options.seed)
    top = float(solvers.power_iteration(matvec, v, key, LOOK))
    factors, seconds = {}, {}
    for name, estimate in (("K-FAC", curvature.kfac), ("EK-FAC", curvature.ekfac)):
        build = functools.partial(
            estimate, problem.apply, cross_entropy, problem.params, problem.train,
            chunk_size=options.chunk_size,
        )  # fmt: skip
        factors[name] = jax.block_until_ready(build())  # compiles
        seconds[name] = timed(build)
    logits = problem.apply(problem.params, problem.train[0])
    about = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        "images": len(problem.train[1]),
        "accuracy": float(jnp.mean(jnp.argmax(logits, -1) == problem.train[1])),
        "top_eigenvalue": top,
        "product_seconds": timed(lambda: matvec(v)),
        "factor_seconds": seconds,
    }
    rows = []
    for share in options.dampings:
        rows += of_damping(problem, options, matvec, v, key, share, share * top, factors)
    return about, rows


def of_damping(problem, options, matvec, v, key, share, damping, factors) -> list[dict]:
    """Returns the rows of one damping."""

    def conjugate_gradients(name, preconditioner, before=0):
        products: dict[float, int] = {}

        def watch(step, residual):
            for limit in RESIDUALS:
                if residual <= limit:
                    products.setdefault(limit, step)

        solver = solvers.cg(
            damping=damping, tolerance=RESIDUALS[-1], max_steps=options.most,
            preconditioner=preconditioner,
        )  # fmt: skip
        solution = solver(matvec, v, progress=watch)
        row = {
            "damping": share, "solver": name, "before": before,
            "products": [products.get(limit) for limit in RESIDUALS],
            "residual": float(solution.residual),
        }  # fmt: skip
        return row, solution

    plain, exact = conjugate_gradients("cg", None)
    rows = [plain]
    for times in (1.0, options.softer):
        preconditioner = solvers.kronecker_preconditioner(
            factors["EK-FAC"], damping=times * damping
        )
        title = "cg, EK-FAC" + ("" if times == 1 else f" at {times:g} times the damping")
        rows.append(conjugate_gradients(title, preconditioner)[0])
    sketched = solvers.nystrom_preconditioner(
        matvec, v, key, damping=damping, rank=options.rank, columns_at_once=1
    )
    rows.append(conjugate_gradients("cg, Nystrom", sketched, options.rank)[0])
    for name, found in factors.items():
        solution = solvers.ekfac(found, damping=damping)(matvec, v)
        rows.append(alone(problem, name, share, solution, exact, 0))
    steps = int(exact.num_steps)
    top = float(jnp.maximum(exact.top_eigenvalue, damping))
    lissa = solvers.lissa(
        damping=damping, scale=1.25 * top, num_steps=steps, batch_size=None, stagnation=0.0
    )
    rows.append(alone(problem, "LiSSA", share, lissa(matvec, v), exact, steps))
    return rows


def alone(problem, name, share, solution, exact, steps) -> dict[str, Any]:
    """Returns the row of an answer that is not exact, next to one that is."""

    def scores(solution):
        return influence.example_influence(
            problem.loss, problem.params, solution.value, problem.train
        )

    x, y = (np.concatenate([*map(np.ravel, jax.tree.leaves(s.value))]) for s in (solution, exact))
    cosine = float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    correlation = float(np.corrcoef(scores(solution), scores(exact))[0, 1])
    return {
        "damping": share, "solver": name, "before": steps, "residual": float(solution.residual),
        "cosine": cosine, "correlation": correlation,
    }  # fmt: skip


def timed(call) -> float:
    """Returns the seconds of one call, of what is compiled already."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def as_table(name, about, rows):
    """Returns the header and the lines of a network's table."""

    def number(value, digits="{:.3g}"):
        return "" if value is None else digits.format(value)

    header = [
        *(f"{name}, {about['images']} images: damping / top", "solver", "products before"),
        *("to 1e-2", "to 1e-4", "residual", "cosine", "correlation of scores"),
    ]
    lines = [
        [
            f"{row['damping']:g}", row["solver"], str(row["before"]),
            *(number(count) for count in row.get("products", (None, None))),
            number(row["residual"]), number(row.get("cosine")), number(row.get("correlation")),
        ]
        for row in rows
    ]  # fmt: skip
    return header, lines


if __name__ == "__main__":
    main()
