"""Characteristic vectors without images: tables, and a network of dense layers
with BatchNorm.

  python experiments/tabular_filter.py

An example is a row of a table, so a BatchNorm layer sees each channel once: its
mean is the value itself and its variance is zero. What is left of arXiv
2403.13523 is the input of every BatchNorm layer, compared by cosine (beta = 1).
The control is the nearest centroid of features, the last layer alone: what
characteristic vectors find beyond it, the layers before have added.

The extractor learns on a part of each data set of scikit-learn and is frozen. A
share p of a class of the training set is poisoned, by feature collision and by
bullseye polytope, each column within a budget in standard deviations; a new
head is trained on what a filter keeps.
"""

import argparse
import functools
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn.preprocessing import StandardScaler

from jaxpoison import filters, runs, training
from jaxpoison.attacks.bullseye import bullseye
from jaxpoison.attacks.collision import collision
from jaxpoison.attacks.transfer import View
from jaxpoison.core.files import check_writable

TABLES = {"digits": datasets.load_digits, "breast cancer": datasets.load_breast_cancer}
ATTACKS = {
    "feature collision": collision,
    "bullseye polytope": bullseye,
}
BUDGETS = (0.1, 0.25, 0.5, 1.0)  # in standard deviations of a column
PRETRAINING, TRAIN, TRUSTED = 90, 40, 5  # examples of each class; the others are test examples
CRAFTING_STEPS = 300
FALSE_ALARMS = 0.05  # at which filters are compared
MIN_SUCCESS = 0.6  # of the trials without a filter: below, there is nothing to compare


class MLP(nn.Module):
    """Dense layers, each with BatchNorm and ReLU, and a linear head."""

    num_classes: int
    widths: tuple[int, ...] = (128, 128, 64)

    def setup(self):
        self.layers = [nn.Dense(width, use_bias=False) for width in self.widths]
        self.norms = [nn.BatchNorm(momentum=0.9) for _ in self.widths]
        self.head = nn.Dense(self.num_classes)

    def features(self, x, train=False):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nn.relu(norm(layer(x), use_running_average=not train))
        return x

    def __call__(self, x, train=False):
        return self.head(self.features(x, train))


class Sets(NamedTuple):
    """Rows, float32 [N, F], and labels, int32 [N], of each part of a table."""

    pretraining: tuple[np.ndarray, np.ndarray]
    train: tuple[np.ndarray, np.ndarray]
    trusted: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


class Trials(NamedTuple):
    """T attacks: the row of the test set to be taken for another class, and P rows to change."""

    targets: np.ndarray  # int [T], rows of the test set
    base_labels: np.ndarray  # int32 [T], what the targets are to be taken for
    rows: np.ndarray  # int [T, P], rows of the training set, of that class


def load(name: str, seed: int) -> Sets:
    """Returns a table in parts with as many examples of each class, columns standardised."""
    x, y = TABLES[name](return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    x, y = x[order], y[order].astype(np.int32)
    members = [np.flatnonzero(y == label) for label in np.unique(y)]
    ends = np.cumsum((0, PRETRAINING, TRAIN, TRUSTED))
    parts = [
        np.concatenate([rows[first:last] for rows in members])
        for first, last in zip(ends, (*ends[1:], None), strict=True)
    ]
    scaler = StandardScaler().fit(x[parts[0]])
    x = np.asarray(scaler.transform(x), np.float32)
    return Sets(*((x[rows], y[rows]) for rows in parts))


def pretrain(key: jax.Array, model: MLP, x: jax.Array, y: jax.Array) -> Any:
    """Returns the variables of a network trained by 300 full-batch steps of Adam."""
    variables = model.init(key, x)
    rule = optax.adam(3e-3)

    def loss_fn(params, batch_stats):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(losses), updated["batch_stats"]

    def step(carry, _):
        params, batch_stats, state = carry
        gradient, batch_stats = jax.grad(loss_fn, has_aux=True)(params, batch_stats)
        updates, state = rule.update(gradient, state)
        return (optax.apply_updates(params, updates), batch_stats, state), ()

    start = (variables["params"], variables["batch_stats"], rule.init(variables["params"]))
    params, batch_stats, _ = jax.lax.scan(step, start, length=300)[0]
    return {"params": params, "batch_stats": batch_stats}


@functools.partial(jax.jit, static_argnums=(0, 2))
def craft(model, variables, objective, bases, targets, labels, budget):
    """Returns the poisons of all trials, float32 [T, P, F], within ±budget of their bases.

    Args:
      model: the network.
      variables: of the extractor; its own head plays no part.
      objective: of an attack, a function of `View`s.
      bases: float32 [T, P, F].
      targets: float32 [T, F].
      labels: int32 [T], of the bases.
      budget: float32 [].
    """
    rule = optax.adam(0.04)

    def loss_fn(poisons, target, label):
        features = model.apply(variables, poisons, method="features")
        view = View(features, target, variables["params"]["head"], label)
        return jnp.sum(objective([view]))

    def craft_one(base, target, label):
        def step(carry, _):
            poisons, state = carry
            updates, state = rule.update(jax.grad(loss_fn)(poisons, target, label), state)
            return (jnp.clip(poisons + updates, base - budget, base + budget), state), ()

        return jax.lax.scan(step, (base, rule.init(base)), length=CRAFTING_STEPS)[0][0]

    return jax.vmap(craft_one)(bases, model.apply(variables, targets, method="features"), labels)


def draw(sets: Sets, right: np.ndarray, num_trials: int, num_poisons: int, seed: int) -> Trials:
    """Returns trials with targets of those test examples that a clean head gets right."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(np.flatnonzero(right), num_trials, replace=False)
    num_classes = sets.train[1].max() + 1
    offsets = rng.integers(1, num_classes, num_trials)
    base_labels = ((sets.test[1][targets] + offsets) % num_classes).astype(np.int32)
    rows = [
        rng.choice(np.flatnonzero(sets.train[1] == label), num_poisons, replace=False)
        for label in base_labels
    ]
    return Trials(targets, base_labels, np.stack(rows))


@functools.partial(jax.jit, static_argnums=0)
def measure(model, variables, x):
    """Returns features and characteristic vectors of x, [T, N, F]."""
    return jax.vmap(
        lambda one: filters.apply_and_extract(model, variables, one, method="features")
    )(x)


@functools.partial(jax.jit, static_argnums=3)
def characteristic(charvec, labels, centroids, num_classes):
    """Returns (flagged, score), [T, N], by given centroids or, for None, by those of each set."""

    def one(charvec):
        own = centroids or filters.fit_centroids(charvec, labels, num_classes)
        found = filters.nearest_centroid_filter(charvec, labels, own, beta=1.0)
        return found.is_poison, found.score

    return jax.vmap(one)(charvec)


def judge(model, variables, sets: Sets, x: jax.Array) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns what each filter says of T training sets, x [T, N, F]: (flagged, score), [T, N]."""
    y, (trusted_x, trusted_y) = jnp.asarray(sets.train[1]), sets.trusted
    features, charvec = measure(model, variables, x)
    trusted_features, trusted_charvec = jax.tree.map(
        lambda array: array[0], measure(model, variables, trusted_x[None])
    )
    known = filters.fit_centroids(trusted_charvec, jnp.asarray(trusted_y), model.num_classes)

    def rival(find):
        found = [find(np.asarray(one)) for one in features]
        return np.stack([f.is_poison for f in found]), np.stack([f.score for f in found])

    trusted = np.asarray(trusted_features), trusted_y
    verdicts = {
        "characteristic vectors": characteristic(charvec, y, None, model.num_classes),
        "characteristic vectors, trusted": characteristic(charvec, y, known, model.num_classes),
        "nearest feature centroid": rival(lambda f: filters.feature_centroid(f, y)),
        "nearest feature centroid, trusted": rival(
            lambda f: filters.feature_centroid(f, y, trusted=trusted)
        ),
        "confident learning": rival(lambda f: filters.confident_learning(f, y)),
    }
    return {name: (np.asarray(f), np.asarray(s)) for name, (f, s) in verdicts.items()}


def outcome(flagged, score, is_poisoned, answers, x, trials: Trials, sets: Sets) -> dict[str, Any]:
    """Returns what a filter found in T training sets, and what heads learn from what it keeps."""
    found = np.asarray(answers(x, jnp.asarray(~flagged)))
    taken = found[np.arange(len(found)), trials.targets] == trials.base_labels
    at_limit = [
        s[p] > np.quantile(s[~p], 1 - FALSE_ALARMS) for s, p in zip(score, is_poisoned, strict=True)
    ]
    return {
        "successes": int(taken.sum()),
        "tpr": float(flagged[is_poisoned].mean()),
        "fpr": float(flagged[~is_poisoned].mean()),
        "tpr_at_limit": float(np.mean(at_limit)),
        "accuracy": float(np.mean(found == sets.test[1])),
    }


def compare(name: str, num_trials: int, shares: tuple[float, ...], seed: int) -> dict[str, Any]:
    """Returns the rows of one table: every attack, budget and share, every filter."""
    sets, key = load(name, seed), jax.random.key(seed)
    labels = jnp.asarray(sets.train[1])
    model = MLP(num_classes=int(labels.max()) + 1)
    variables = jax.jit(pretrain, static_argnums=1)(key, model, *map(jnp.asarray, sets.pretraining))

    def features(x):
        return jnp.asarray(model.apply(variables, x, method="features"))

    @jax.jit
    def answers(x, keep):
        """Classes of the test examples by heads trained on T sets [T, N, F], of what is kept."""

        def one(x, keep):
            head = training.fit_head(
                key, features(x), labels, num_classes=model.num_classes, keep=keep
            )
            return jnp.argmax(features(sets.test[0]) @ head["kernel"] + head["bias"], axis=-1)

        return jax.vmap(one)(x, keep)

    clean = jnp.asarray(sets.train[0])[None]
    right = np.asarray(answers(clean, jnp.ones(clean.shape[:2], bool))[0] == sets.test[1])
    rows = []
    for share in shares:
        trials = draw(sets, right, num_trials, round(share * TRAIN), seed)
        each = np.arange(num_trials)
        is_poisoned = np.zeros((num_trials, len(labels)), bool)
        is_poisoned[each[:, None], trials.rows] = True
        for attack, objective in ATTACKS.items():
            for budget in BUDGETS:
                poisons = craft(
                    model, variables, objective, clean[0][trials.rows],
                    sets.test[0][trials.targets], trials.base_labels, budget,
                )  # fmt: skip
                x = jnp.tile(clean, (num_trials, 1, 1)).at[each[:, None], trials.rows].set(poisons)
                undefended = np.zeros_like(is_poisoned), np.zeros(is_poisoned.shape)
                row = {"attack": attack, "budget": budget, "share": share, "filters": {}}
                row["filters"]["none"] = outcome(*undefended, is_poisoned, answers, x, trials, sets)
                successes = row["filters"]["none"]["successes"]
                if successes >= MIN_SUCCESS * num_trials:
                    for found_by, verdict in judge(model, variables, sets, x).items():
                        row["filters"][found_by] = outcome(
                            *verdict, is_poisoned, answers, x, trials, sets
                        )
                rows.append(row)
                runs.say(f"{name}, {attack}, ±{budget} sd, p = {share}: {successes}/{num_trials}")
    return {"clean_accuracy": float(right.mean()), "rows": rows}


def report(tables: dict[str, Any], num_trials: int) -> str:
    """Returns a Markdown table of each data set, a line for each filter on each attack."""
    header = [
        *("attack", "± sd", "p", "filter", "poisons found", "with 5 % false alarms"),
        *("clean flagged", "attacks succeed", "accuracy (%)"),
    ]
    parts = []
    for name, table in tables.items():
        lines = []
        for row in table["rows"]:
            for found_by, measured in row["filters"].items():
                shares = [
                    "-" if found_by == "none" else f"{100 * measured[key]:.0f} %"
                    for key in ("tpr", "tpr_at_limit", "fpr")
                ]
                lines.append(
                    [
                        *(row["attack"], str(row["budget"]), str(row["share"]), found_by, *shares),
                        f"{measured['successes']}/{num_trials}",
                        f"{100 * measured['accuracy']:.1f}",
                    ]
                )
        parts += [
            f"{name}: a clean head has a test accuracy of {100 * table['clean_accuracy']:.1f} %.",
            "",
            runs.markdown(header, lines),
            "",
        ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=runs.count, default=20, help="targets of each attack")
    parser.add_argument(
        "--tables", choices=TABLES, nargs="+", default=list(TABLES), metavar="NAME",
        help=f"some of {', '.join(TABLES)}",
    )  # fmt: skip
    parser.add_argument(
        "--shares", type=float, nargs="+", default=(0.25, 0.5), help="p of a class; at most 1"
    )
    parser.add_argument("--seed", type=int, default=0)
    default = Path("runs/tabular-sklearn-laptop/result.json")
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    if not all(1 <= round(p * TRAIN) <= TRAIN for p in options.shares):
        parser.error(f"--shares must be between {1 / TRAIN} and 1")
    with runs.program(options.out.parent):
        check_writable(options.out.parent)
        tables = {
            name: compare(name, options.trials, tuple(options.shares), options.seed)
            for name in options.tables
        }
        settings = {"trials": options.trials, "shares": list(options.shares), "seed": options.seed}
        result = {**tables, "settings": settings, "environment": runs.environment()}
        runs.write_json(options.out, result)
        runs.say("\n" + report(tables, options.trials))


if __name__ == "__main__":
    main()
