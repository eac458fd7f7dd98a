"""Which foreign embedding tells classes apart, and what it costs: candidates for `audit.witness`.

  python benchmarks/witness.py --data-dir DIR

On the first images of CIFAR-10 and MNIST: accuracy of the 10 nearest neighbors, each image left out
of its own; average precision of labels flipped at random (2%, the mean of five draws) when images
are ranked by the share of their neighbors that have another label; images a second in the fastest
of all batches. Whitened embeddings are centered, turned and scaled by `audit.witness.whitening` of
the same images.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import data, models, runs
from jaxpoison.audit import witness
from jaxpoison.data import to_float

NEIGHBORS, FLIPPED, DRAWS = 10, 0.02, 5
TEMPERATURE = 0.07  # of the weights of neighbors by their cosine, for flips
BATCH = 16
STAGES = (3, 4, 5, 6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder of TensorFlow Datasets")
    parser.add_argument("--images", type=int, default=10_000, help="of each data set")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    options = parser.parse_args()
    rows = []
    for name in ("cifar10", "mnist"):
        train = data.load(name, data_dir=options.data_dir, seed=options.seed).train
        images = color(np.asarray(train.images[: options.images]))
        labels = np.asarray(train.labels[: options.images])
        for size in options.sizes:
            rows += of_lite0(name, size, images, labels, options.seed)
        rows += of_others(name, images, labels, options.seed)
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "data_dir")}
    environment = runs.environment()
    header = [
        *("data", "embedding", "", "dimension", "accuracy of neighbors"),
        *("average precision of flips", "images a second"),
    ]
    runs.say(runs.markdown(header, map(cells, rows)))
    if options.out:
        result = {"script": "witness.py", "settings": settings, "rows": rows}
        runs.write_json(options.out, result | {"environment": environment})


def of_lite0(name, size, images, labels, seed) -> list[dict]:
    """Returns the rows of EfficientNet-Lite0 at one input size."""
    model, variables = models.load_efficientnet_lite0()

    def parts(variables, images):
        x = jax.image.resize(to_float(images), (len(images), size, size, 3), "bilinear")
        head, state = model.apply(variables, x, method="features", mutable=["intermediates"])
        sown: Any = state["intermediates"]["body"]
        found = {"head": head}
        for stage in STAGES:
            x = sown[f"stage{stage}"][0]
            found[f"mean{stage}"] = x.mean((1, 2))
            found[f"std{stage}"] = jnp.sqrt(x.var((1, 2)) + 1e-6)
        return found

    found, rate = passed(jax.jit(lambda x: parts(variables, x)), images)
    means, deviations = ([f"{kind}{stage}" for stage in STAGES] for kind in ("mean", "std"))
    groups = {
        "head": ["head"],
        "stage 6": ["mean6"],
        "stages 3 to 6": means,
        "stages 3 to 6 and deviations of 3 to 5": [*means, *deviations[:3]],
    }
    rows = []
    for group, keys in groups.items():
        joined = np.concatenate([unit(found[key]) for key in keys], axis=1)
        rows += both(name, f"Lite0 at {size}, {group}", joined, labels, rate, seed)
    return rows


def of_others(name, images, labels, seed) -> list[dict]:
    """Returns the rows of what is no EfficientNet."""
    rows = []
    found, rate = passed(jax.jit(hog), images)
    rows += both(name, "HOG", found, labels, rate, seed)
    own, own_variables = models.load_pretrained("cifar10")
    found, rate = passed(
        jax.jit(lambda x: own.apply(own_variables, to_float(x), method="features")), images
    )
    title = "fast_cnn trained on CIFAR-10" + (" (itself)" if name == "cifar10" else "")
    rows += both(name, title, found, labels, rate, seed)
    return rows


def passed(fn: Callable, images: np.ndarray) -> tuple:
    """Returns (outputs of `fn` for all images, images a second in the fastest batch)."""
    count = len(images) // BATCH * BATCH
    fn(images[:BATCH])
    outputs, fastest = [], math.inf
    for start in [*range(0, count, BATCH), len(images) - BATCH]:
        begin = time.perf_counter()
        outputs.append(jax.tree.map(np.asarray, fn(images[start : start + BATCH])))
        fastest = min(fastest, time.perf_counter() - begin)
    rest = BATCH - (len(images) - count)
    outputs[-1] = jax.tree.map(lambda x: x[rest:], outputs[-1])
    return jax.tree.map(lambda *xs: np.concatenate(xs), *outputs), BATCH / fastest


def both(name, title, embedding, labels, rate, seed) -> list[dict]:
    """Returns the row of an embedding as it is and whitened, and prints them."""
    rows = []
    for whitened in (False, True):
        rows_of = witness.whitening(embedding)(embedding) if whitened else unit(embedding)
        accuracy, precision = quality(rows_of, labels, seed)
        row = {
            "data": name,
            "embedding": title,
            "whitened": whitened,
            "dimension": embedding.shape[1],
            "neighbor_accuracy": accuracy,
            "flip_average_precision": precision,
            "images_per_second": rate,
        }
        rows.append(row)
        runs.say(", ".join(filter(None, cells(row))))
    return rows


def cells(row: dict) -> list[str]:
    """Returns the cells of a row of the table."""
    return [
        row["data"],
        row["embedding"],
        "whitened" if row["whitened"] else "",
        str(row["dimension"]),
        f"{row['neighbor_accuracy']:.3f}",
        f"{row['flip_average_precision']:.3f}",
        f"{row['images_per_second']:,.0f}",
    ]


def quality(rows: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float]:
    """Returns (accuracy of neighbors, average precision of flipped labels)."""
    cosines, near = neighbors(rows)
    classes = int(labels.max()) + 1

    def votes(labels, weights):
        return (weights[..., None] * (labels[near][..., None] == np.arange(classes))).sum(axis=1)

    weights = np.exp((cosines - cosines[:, :1]) / TEMPERATURE)
    # Equal counts are decided by nearness.
    accuracy = float(np.mean(votes(labels, 1 + 1e-3 * weights).argmax(axis=1) == labels))
    found = []
    for draw in range(DRAWS):
        rng = np.random.default_rng((seed, draw))
        chosen = rng.choice(len(labels), round(FLIPPED * len(labels)), replace=False)
        given = labels.copy()
        given[chosen] = (given[chosen] + rng.integers(1, classes, len(chosen))) % classes
        share = votes(given, weights)[np.arange(len(given)), given] / weights.sum(axis=1)
        found.append(average_precision(share, np.isin(np.arange(len(labels)), chosen)))
    return accuracy, float(np.mean(found))


def neighbors(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines and indices of the nearest others, nearest first, [N, NEIGHBORS] each."""
    found = []
    for start in range(0, len(rows), 1000):
        cosines = rows[start : start + 1000] @ rows.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        near = np.argpartition(cosines, -NEIGHBORS, axis=1)[:, -NEIGHBORS:]
        values = np.take_along_axis(cosines, near, axis=1)
        order = np.argsort(-values, axis=1)
        found.append([np.take_along_axis(x, order, axis=1) for x in (values, near)])
    cosines, near = zip(*found, strict=True)
    return np.concatenate(cosines), np.concatenate(near)


def average_precision(low: np.ndarray, positive: np.ndarray) -> float:
    """Returns the mean over positives of the precision where each is found, lowest first."""
    hits = positive[np.argsort(low, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def hog(images: jax.Array, cell: int = 8, bins: int = 9) -> jax.Array:
    """Returns histograms of oriented gradients of uint8 images at 32x32 (Dalal and Triggs 2005)."""
    x = jax.image.resize(to_float(images), (len(images), 32, 32, 3), "bilinear")
    x = jnp.pad(jnp.sqrt(x), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    down, across = x[:, 2:, 1:-1] - x[:, :-2, 1:-1], x[:, 1:-1, 2:] - x[:, 1:-1, :-2]
    strength = jnp.hypot(down, across)
    strongest = strength.argmax(-1, keepdims=True)
    strength, down, across = (
        jnp.take_along_axis(y, strongest, -1)[..., 0] for y in (strength, down, across)
    )
    angle = (jnp.arctan2(down, across) / jnp.pi % 1 * bins)[..., None]
    away = jnp.abs(angle - jnp.arange(bins))
    shares = jnp.maximum(0, 1 - jnp.minimum(away, bins - away)) * strength[..., None]
    side = 32 // cell
    cells = shares.reshape(-1, side, cell, side, cell, bins).sum((2, 4))
    blocks = jnp.concatenate(
        [cells[:, i : side - 1 + i, j : side - 1 + j] for i in (0, 1) for j in (0, 1)], -1
    )

    def normalized(x):
        return x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-2)

    return normalized(jnp.minimum(normalized(blocks), 0.2)).reshape(len(images), -1)


def color(images: np.ndarray) -> np.ndarray:
    """Returns images with three channels."""
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


def unit(rows: np.ndarray) -> np.ndarray:
    """Returns rows of unit length."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


if __name__ == "__main__":
    main()
