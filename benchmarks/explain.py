"""Does `audit.explain` name the poisons? Targeted attacks, one target each.

  python benchmarks/explain.py --out benchmarks/results/explain.json
  python benchmarks/explain.py --show benchmarks/results/explain.json

Transfer: a new last layer on the features of the network for CIFAR-10 that comes with the package,
trained on 500 embedded images, five of them poisons. From scratch: a small network, trained on
2,500 embedded images, 100 of them poisons by gradient matching, and the easiest targets: those
that a clean network is least sure of, to get the label that comes next. An attack worked if the
target gets the label that it wants, and from scratch, if it does not get it from a network of the
same seed trained on clean images. Of these trials: the share of the poisons among the first 2 P of
N images, by each ranking, and what is predicted without the images that were named, next to the
same number of others at random. Baselines see the same features and the same last layer: the cosine
of features among images of the predicted class, and representer values (Yeh et al. 2018, arXiv
1811.09720).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison import attacks, audit, models, network, runs, training
from jaxpoison.audit import worth
from jaxpoison.core.heads import head_logits
from jaxpoison.data import Dataset, load_embedded

EPSILON = 16 / 255
PER_CLASS, POISONS = 50, 5
SCRATCH_POISONS = 100
ATTACKS = {
    "feature collision": attacks.feature_collision(epsilon=EPSILON),
    "bullseye polytope": attacks.bullseye_polytope(epsilon=EPSILON, num_steps=200),
    "head gradient matching": attacks.head_gradient_matching(
        epsilon=EPSILON, num_steps=100, restarts=1, draws=attacks.Draws()
    ),
}
SCRATCH = "gradient matching, from scratch"
RANKINGS = {
    "both": "both, as `explain` ranks",
    "renormalized": "renormalized",
    "delta": "Delta",
    "influence": "influence",
    "cosine": "cosine",
    "representer": "representer",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=8, help="targets of each transfer attack")
    parser.add_argument("--scratch-trials", type=int, default=3, help="targets from scratch")
    parser.add_argument("--scratch-steps", type=int, default=40, help="of crafting, from scratch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument("--show", type=Path, help="print the table of a results file")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    splits = load_embedded("cifar10")
    rows = [*transfer(splits, options), *from_scratch(splits, options)]
    settings = {name: getattr(options, name) for name in ("trials", "scratch_trials", "seed")}
    settings |= {"scratch_steps": options.scratch_steps, "epsilon": EPSILON}
    settings |= {name: attack.settings for name, attack in ATTACKS.items()}
    result = {
        "script": "explain.py",
        "settings": settings,
        "data": "embedded CIFAR-10",
        "rows": rows,
        "environment": runs.environment(),
    }
    print(table(result))
    if options.out:
        runs.write_json(options.out, result)


def transfer(splits: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each trial of each attack on a new last layer."""
    labels = np.asarray(splits.train.labels)
    rows = [np.flatnonzero(labels == label)[:PER_CLASS] for label in range(10)]
    train = splits.train.take(np.sort(np.concatenate(rows)))
    victim = attacks.Victim(*models.load_pretrained("cifar10-48k"))
    net = network.as_network(victim.model)
    right = np.flatnonzero(
        network.predict(net, victim.variables, splits.validation.images) == splits.validation.labels
    )
    trials = attacks.draw_trials(
        jax.random.key(options.seed), train, splits.validation, num_trials=options.trials,
        num_poisons=POISONS, target_ids=right,
    )  # fmt: skip
    found = []
    for name, attack in ATTACKS.items():
        sets = attacks.poison(jax.random.key(options.seed + 1), train, trials, attack, [victim])
        for number, poisoned in enumerate(sets):
            features = network.features(net, victim.variables, poisoned.images)
            head = training.fit_head(
                jax.random.key(number), features, jnp.asarray(poisoned.labels), num_classes=10
            )
            found.append(
                row(name, net, net.with_head(victim.variables, head), poisoned, False, number)
            )
            runs.say(f"{name} {number}: {found[-1]}")
    return found


def from_scratch(splits: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each trial of gradient matching on networks trained from scratch."""
    train, number = splits.train, len(splits.train.labels)
    steps = worth.steps_for(number)

    def fit(dataset, seed):
        batches = worth.drawn(np.ones(number, bool), steps * worth.BATCH_SIZE, seed)
        return worth.fitted(dataset, batches.reshape(steps, -1), 10, seed=seed, part=steps)

    substitute = attacks.Victim(*fit(train, 100 + options.seed))
    said = np.asarray(network.logits(*substitute, splits.validation.images))
    order = np.argsort(-said, axis=1)
    margins = -np.diff(np.take_along_axis(said, order[:, :2], axis=1))[:, 0]
    margins[order[:, 0] != splits.validation.labels] = np.inf
    trials = attacks.draw_trials(
        jax.random.key(options.seed), train, splits.validation, base_class=order[:, 1],
        num_trials=options.scratch_trials, num_poisons=SCRATCH_POISONS,
        target_ids=np.argsort(margins)[: options.scratch_trials],
    )  # fmt: skip
    attack = attacks.gradient_matching(epsilon=EPSILON, num_steps=options.scratch_steps, restarts=1)
    sets = attacks.poison(jax.random.key(options.seed + 1), train, trials, attack, [substitute])
    found = []
    for trial, poisoned in enumerate(sets):
        assert poisoned.target is not None
        seed = options.seed + trial
        victim = fit(Dataset(poisoned.images, poisoned.labels), seed)
        before = int(network.predict(*fit(train, seed), poisoned.target.images)[0])
        if before == poisoned.target.base_label:
            found.append(failed(SCRATCH, poisoned))
        else:
            found.append(row(SCRATCH, *victim, poisoned, True, trial))
        runs.say(f"{SCRATCH} {trial}: {found[-1]}")
    return found


def row(name, net, variables, poisoned, retrain, seed) -> dict[str, Any]:
    """Returns what `explain` says of a target, if the attack worked."""
    target = poisoned.target
    said = int(network.predict(net, variables, target.images)[0])
    if said != target.base_label:
        return failed(name, poisoned)
    poisons = np.flatnonzero(poisoned.attack_id)
    dataset = Dataset(poisoned.images, poisoned.labels)
    found = audit.explain(
        net, variables, dataset, target.images[0], target.label, key=jax.random.key(seed),
        retrain=retrain,
    )  # fmt: skip
    scores = {
        "renormalized": found.renormalized,
        "delta": found.delta,
        "influence": found.influence,
        **baselines(net, variables, dataset, target.images, said),
    }
    orders = {"both": found.rows}
    orders |= {each: np.argsort(-score, kind="stable") for each, score in scores.items()}
    return {
        **failed(name, poisoned),
        "worked": True,
        "recall": {
            each: float(np.isin(poisons, order[: 2 * len(poisons)]).mean())
            for each, order in orders.items()
        },
        "named": found.num_causes,
        "poisons_named": int(np.isin(found.causes, poisons).sum()),
        "removals": [
            {"name": one.name, "method": one.method, "changed": one.changed,
             "trainings": len(one.predictions)}
            for one in found.removals
        ],
    }  # fmt: skip


def failed(name, poisoned) -> dict[str, Any]:
    """Returns the row of a trial in which the attack did not work."""
    number = int(np.count_nonzero(poisoned.attack_id))
    return {
        "attack": name,
        "target_id": poisoned.target.target_id,
        "poisons": number,
        "worked": False,
    }


def baselines(net, variables, dataset, image, said) -> dict[str, np.ndarray]:
    """Returns scores [N] of the cosine of features, and of representer values."""
    features = network.features(net, variables, dataset.images)
    query = network.features(net, variables, image)[0]
    labels = jnp.asarray(dataset.labels)
    cosine = features @ query / jnp.linalg.norm(features, axis=1) / jnp.linalg.norm(query)
    errors = jax.nn.softmax(head_logits(net.head(variables), features))
    errors = errors[:, said] - (labels == said)
    return {
        "cosine": np.asarray(jnp.where(labels == said, cosine, -2)),
        "representer": np.asarray(-errors * (features @ query + 1)),
    }


def table(result: dict[str, Any]) -> str:
    """Returns the rows of a results file as Markdown, one line for each attack."""
    header = ["attack", "worked", *RANKINGS.values(), "changed without them", "at random"]
    header += ["retrained without", "at random"]
    lines = []
    for name in dict.fromkeys(row["attack"] for row in result["rows"]):
        trials = [row for row in result["rows"] if row["attack"] == name]
        worked = [row for row in trials if row["worked"]]
        cells = [name, f"{len(worked)} of {len(trials)}"]
        for each in RANKINGS:
            shares = [row["recall"][each] for row in worked]
            cells.append(f"{100 * np.mean(shares):.0f}%" if shares else "")
        for method in ("refit", "retrained"):
            for removal in ("without", "random"):
                some = [
                    one for row in worked for one in row["removals"]
                    if (one["name"], one["method"]) == (removal, method)
                ]  # fmt: skip
                changed, number = (sum(one[k] for one in some) for k in ("changed", "trainings"))
                cells.append(f"{changed} of {number}" if some else "")
        lines.append(cells)
    return runs.markdown(header, lines)


if __name__ == "__main__":
    main()
