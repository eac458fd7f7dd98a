"""How good attributions are: retrained subsets, wrong labels and removed examples, on MNIST.

  python benchmarks/attribution_quality.py --out benchmarks/results/attribution_quality.json

A network of one hidden layer on images of 14x14, with some labels flipped, is trained again and
again, all trainings of a kind under one `vmap`:

- LDS, the linear datamodeling score of TRAK (arXiv:2303.14186): the Spearman correlation, over
  random halves of the training set, of a query's loss after training on the half with the sum of
  its scores of the half; the mean over queries and twice its standard error. Each half is trained
  from the same first parameters as the network that the scores were computed on.
- AUC: area under the ROC curve of the flipped labels by the score of each example for itself.
- Removal: the change of accuracy, in points, on images never used otherwise, once the examples
  that are most harmful to the trusted images' mean loss are removed; paired over trainings of
  several seeds, the mean and twice its standard error.
- Seconds for the scores of all trusted images, compilation included.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison import attribution, curvature, data, influence, runs, solvers
from jaxpoison.core.batches import Batch
from jaxpoison.data import to_float
from jaxpoison.evaluation import roc_auc

CHECKPOINTS = 5
L2 = 1e-3  # of the training objective


class Trained(NamedTuple):
    """What a method may look at.

    Attributes:
      params: at the end of training.
      checkpoints: parameters at equal distances, with a leading axis.
      rate: the sum of the learning rates between two checkpoints.
      train: images `[N, d]` and labels.
    """

    params: Any
    checkpoints: Any
    rate: float
    train: Batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=400, help="training examples")
    parser.add_argument("--trusted", type=int, default=100, help="queries, never flipped")
    parser.add_argument("--flipped", type=float, default=0.05, help="share of wrong labels")
    parser.add_argument("--removed", type=int, default=20, help="examples removed")
    parser.add_argument("--subsets", type=int, default=128, help="halves retrained")
    parser.add_argument("--removal-seeds", type=int, default=8, help="trainings without them")
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200, help="of gradient descent")
    parser.add_argument("--learning-rate", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    options = parser.parse_args()
    train, trusted, held_out, is_flipped = examples(options)

    def fit(weights, key):
        return train_network(options, train, weights, key)

    key = jax.random.key(options.seed)
    whole = jnp.ones(options.train)
    params, checkpoints = jax.jit(fit)(whole, key)
    rate = options.learning_rate * options.steps / CHECKPOINTS
    trained = Trained(params, checkpoints, rate, train)
    rng = np.random.default_rng(options.seed)
    halves = np.stack([rng.permutation(options.train) < options.train // 2
                       for _ in range(options.subsets)])  # fmt: skip
    start = time.perf_counter()
    losses = jax.jit(jax.vmap(lambda half: loss_fn(fit(half, key)[0], trusted)))(
        jnp.asarray(halves, float)
    )
    runs.say(f"{options.subsets} halves in {time.perf_counter() - start:.0f} s")

    seeds = jax.random.split(jax.random.key(options.seed + 1), options.removal_seeds)

    @jax.jit
    def accuracies(weights):
        fitted = jax.vmap(lambda key: fit(weights, key)[0])(seeds)
        logits = jax.vmap(outputs, (0, None))(fitted, held_out[0])
        return jnp.mean(logits.argmax(-1) == held_out[1], axis=1)

    before = np.asarray(accuracies(whole))
    random = rng.permutation(options.train) >= options.removed
    rows = [{"method": "random", "removal": change(accuracies(jnp.asarray(random, float)), before)}]
    for name, method in METHODS.items():
        start = time.perf_counter()
        scores = np.asarray(jax.jit(method)(trained, trusted), np.float64)
        seconds = time.perf_counter() - start
        own = -np.diag(np.asarray(jax.jit(method)(trained, train)))
        harmful = np.argsort(-scores.mean(0))[: options.removed]
        weights = whole.at[harmful].set(0)
        rows.append(
            {
                "method": name,
                "lds": mean_and_error(datamodeling_scores(scores, halves, np.asarray(losses))),
                "auc": float(roc_auc(own, is_flipped)),
                "removal": change(accuracies(weights), before),
                "flipped_among_removed": int(is_flipped[harmful].sum()),
                "seconds": seconds,
            }
        )
        runs.say(f"{name}: {rows[-1]}")
    header = ["method", "LDS", "AUC", "removal, points", "flipped among them", "seconds"]
    runs.say(runs.markdown(header, map(cells, rows)))
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        result = {"script": "attribution_quality.py", "settings": settings, "rows": rows}
        result["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
        result["accuracy"] = mean_and_error(before)
        runs.write_json(options.out, result | {"environment": runs.environment()})


def examples(options):
    """Returns training examples, trusted and held-out ones, and which training labels are wrong."""
    mnist = data.load_embedded("mnist")
    sets = []
    for part in (mnist.train, mnist.test):
        images = to_float(jnp.asarray(part.images))[..., 0]
        small = images.reshape(len(images), 14, 2, 14, 2).mean((2, 4)).reshape(len(images), -1)
        sets.append((small, jnp.asarray(part.labels, jnp.int32)))
    (images, labels), rest = sets
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(labels))[: options.train]
    is_flipped = np.arange(options.train) < round(options.flipped * options.train)
    wrong = (labels[order] + rng.integers(1, 10, options.train)) % 10
    train = images[order], jnp.where(is_flipped, wrong, labels[order])
    trusted = jax.tree.map(lambda x: x[: options.trusted], rest)
    held_out = jax.tree.map(lambda x: x[options.trusted :], rest)
    return train, trusted, held_out, is_flipped


def hidden(params, inputs):
    return jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])


def outputs(params, inputs, tap=curvature.no_tap):
    before = inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    before = tap(curvature.DenseLayer("hidden/kernel", "hidden/bias"), inputs, before)
    features = jnp.tanh(before)
    logits = features @ params["head"]["kernel"] + params["head"]["bias"]
    return tap(curvature.DenseLayer("head/kernel", "head/bias"), features, logits)


output_loss = optax.softmax_cross_entropy_with_integer_labels


def loss_fn(params, batch):
    return output_loss(outputs(params, batch[0]), batch[1])


def train_network(options, train, weights, key):
    """Returns parameters after gradient descent on the weighted mean, and on the way there."""
    keys = jax.random.split(key)
    sizes = {"hidden": (train[0].shape[1], options.hidden), "head": (options.hidden, 10)}
    params = {
        name: {"kernel": jax.random.normal(k, size) / size[0] ** 0.5, "bias": jnp.zeros(size[1])}
        for k, (name, size) in zip(keys, sizes.items(), strict=True)
    }

    def objective(params):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return jnp.sum(weights * loss_fn(params, train)) / jnp.sum(weights) + L2 / 2 * squares

    def step(params, _):
        gradient = jax.grad(objective)(params)
        return jax.tree.map(lambda p, g: p - options.learning_rate * g, params, gradient), None

    def stretch(params, _):
        params, _ = jax.lax.scan(step, params, None, options.steps // CHECKPOINTS)
        return params, params

    return jax.lax.scan(stretch, params, None, CHECKPOINTS)


def solved(solver):
    """Returns the method that solves with the Gauss-Newton matrix of all parameters."""

    def scores(trained, queries):
        return influence.score_matrix(
            loss_fn, trained.params, queries, trained.train, solver=solver,
            curvature=curvature.gauss_newton(outputs, output_loss), key=jax.random.key(0),
        )[0]  # fmt: skip

    return scores


def kronecker(damping):
    """Returns the method that solves with EK-FAC's factors in place of the matrix."""

    def scores(trained, queries):
        factors = curvature.ekfac(outputs, output_loss, trained.params, trained.train)
        return solved(solvers.ekfac(factors, damping=damping))(trained, queries)

    return scores


def last_layer(trained, queries):
    """The exact solve, but for the last layer alone, over cached features."""

    def features(batch):
        return hidden(trained.params, batch[0]), batch[1]

    return influence.score_matrix(
        influence.linear_head_loss, trained.params["head"], features(queries),
        features(trained.train), solver=solvers.cholesky(damping=0.01),
        curvature=curvature.linear_head,
    )[0]  # fmt: skip


def each(score):
    """Returns the scores of `score(query as a group)` for every query, `[M, N]`."""

    def scores(queries):
        return jax.lax.map(score, jax.tree.map(lambda x: x[:, None], queries), batch_size=25)

    return scores


def datainf(trained, queries):
    def score(group):
        solution = attribution.datainf(loss_fn, trained.params, group, trained.train, damping=0.1)
        return influence.example_influence(loss_fn, trained.params, solution.value, trained.train)

    return each(score)(queries)


def tracin(trained, queries):
    checkpoints = [jax.tree.map(lambda x, i=i: x[i], trained.checkpoints)
                   for i in range(CHECKPOINTS)]  # fmt: skip
    rates = jnp.full(CHECKPOINTS, trained.rate)
    return each(lambda g: attribution.tracin(loss_fn, checkpoints, rates, g, trained.train))(
        queries
    )


def projected(trained, queries):
    def phi(batch):
        key = jax.random.key(0)
        return attribution.project_gradients(loss_fn, trained.params, batch, key, rank=512)

    return attribution.projected_scores(phi(queries), phi(trained.train), damping=0.01)


def logra(on_eigenvectors):
    """Returns LoGra: each layer projected on 16 directions on either side of its kernel."""

    def scores(trained, queries):
        sides: dict[str, Any] = {"key": jax.random.key(0)}
        if on_eigenvectors:
            factors = curvature.kfac(outputs, output_loss, trained.params, trained.train)
            sides = {"factors": factors}

        def phi(batch):
            return attribution.project_layers(
                outputs, output_loss, trained.params, batch, rank=16, **sides
            )

        return attribution.projected_scores(phi(queries), phi(trained.train), damping=0.01)

    return scores


# Name to `method(trained, queries) -> [M, N]`, positive for harmful.
METHODS = {
    "Gauss-Newton, CG, damping 0.01": solved(solvers.cg(damping=0.01, tolerance=1e-3)),
    "Gauss-Newton, CG, damping 0.1": solved(solvers.cg(damping=0.1, tolerance=1e-3)),
    "EK-FAC, damping 0.01": kronecker(0.01),
    "EK-FAC, damping 0.1": kronecker(0.1),
    "last layer, damping 0.01": last_layer,
    "Nystrom, rank 100, damping 0.01": solved(solvers.nystrom(damping=0.01, rank=100)),
    "Arnoldi, rank 50, damping 0.01": solved(solvers.arnoldi(damping=0.01, rank=50, num_steps=100)),
    "LiSSA, damping 0.1": solved(solvers.lissa(damping=0.1, num_steps=200, batch_size=50)),
    "DataInf, damping 0.1": datainf,
    "TracIn, 5 checkpoints": tracin,
    "projected, rank 512, damping 0.01": projected,
    "LoGra, random, rank 16, damping 0.01": logra(on_eigenvectors=False),
    "LoGra-PCA, rank 16, damping 0.01": logra(on_eigenvectors=True),
    "gradient products": solved(solvers.identity()),
}


def datamodeling_scores(scores, halves, losses):
    """Returns the Spearman correlation of each query, `[M]`.

    Args:
      scores: `[M, N]`.
      halves: bool `[R, N]`, the examples trained on.
      losses: `[R, M]`, of the queries after training on each.
    """
    ranks = [np.argsort(np.argsort(x, axis=0), axis=0) for x in (halves @ scores.T, losses)]
    predicted, real = (x - x.mean(0) for x in ranks)
    return (predicted * real).sum(0) / np.sqrt((predicted**2).sum(0) * (real**2).sum(0))


def mean_and_error(values) -> list[float]:
    """Returns the mean and twice its standard error."""
    values = np.asarray(values, np.float64)
    return [float(values.mean()), float(2 * values.std(ddof=1) / len(values) ** 0.5)]


def change(after, before) -> list[float]:
    return mean_and_error(100 * (np.asarray(after, np.float64) - before))


def cells(row):
    """Returns the cells of a row of the table."""

    def pair(value, digits):
        return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"

    removal = pair(row["removal"], 1)
    if "lds" not in row:
        return row["method"], "-", "-", removal, "-", "-"
    flipped, seconds = str(row["flipped_among_removed"]), f"{row['seconds']:.1f}"
    return row["method"], pair(row["lds"], 2), f"{row['auc']:.2f}", removal, flipped, seconds


if __name__ == "__main__":
    main()
