"""An attacker who knows the filter of arXiv 2403.13523 and pays a price for being flagged.

`adaptive_filter.py` runs it and has the objective.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison import evaluation, filters, runs
from jaxpoison.attacks.bullseye import bullseye
from jaxpoison.attacks.transfer import View
from jaxpoison.core import loops
from jaxpoison.data import to_float
from jaxpoison.data.pixels import quantize
from transfer import poisons as poison_files
from transfer import verdicts
from transfer.settings import first_of_each_class, read
from transfer.study import Bench, Work, draw_trials, reopened

LAMBDAS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
KAPPA = 0.01
ROUNDS = 8
FILTERS = ("none", "dataset", "trusted")


def study(options: argparse.Namespace) -> None:
    """Sweeps and bisects lambda, and prints the table."""
    if options.steps < 1 or not 0 < options.share <= 1:
        raise ValueError("expected at least one step and a share in (0, 1]")
    epochs = read(options.run_dir).pretraining.epochs
    with runs.Meter(epochs + len(LAMBDAS) + ROUNDS) as meter:
        work, bench = reopened(options.run_dir, options.data_dir, meter)
        config, sets = work.config, work.sets
        trials = draw_trials(work, bench, options.share)
        epsilon = max(config.epsilons_255) / 255
        bases = to_float(sets.train.images)[trials.rows]
        craft = crafting(
            bench.victim, sets.train, trials, bases, epsilon, options.gamma, options.steps
        )

        def judged(name, poisons, potency):
            images = quantize(np.asarray(poisons), np.asarray(bases), epsilon)
            outcome = judge(work, bench, trials, images, options.gamma)
            return {"lambda": name, "objective": float(np.mean(potency)), **outcome}

        rows = []
        for weight in LAMBDAS:
            poisons, potency, _ = craft(jnp.full(bench.num_trials, weight), bases)
            rows.append(judged(weight, poisons, potency))
            work.tell(f"lambda = {weight:g}: objective {rows[-1]['objective']:.3f}", finished=1)
        low, high = jnp.full(bench.num_trials, -4.0), jnp.full(bench.num_trials, 2.0)
        start, best, best_potency = bases, bases, jnp.ones(bench.num_trials)
        for number in range(ROUNDS):
            middle = (low + high) / 2
            start, potency, passing_share = craft(10.0**middle, start)
            passes = passing_share >= 0.95
            best = jnp.where(passes[:, None, None, None, None], start, best)
            best_potency = jnp.where(passes, potency, best_potency)
            low, high = jnp.where(passes, low, middle), jnp.where(passes, middle, high)
            work.tell(f"bisection, round {number + 1}/{ROUNDS}", finished=1)
        rows.append(judged("bisected", best, best_potency))
    result = {
        "rows": rows,
        "share": options.share,
        "gamma": options.gamma,
        "epsilon_255": 255 * epsilon,
        "steps": options.steps,
        "log10_lambda": np.asarray(high).tolist(),
        "config": work.output.config,
        "environment": runs.environment(),
    }
    runs.write_json(options.run_dir / f"adaptive-{options.gamma}.json", result)
    runs.say(report(rows))


def crafting(victim, train, trials, bases, epsilon, gamma, num_steps):
    """Returns `craft(lambdas [T], start) -> (poisons, objective [T], share that passes [T])`.

    `start` and the poisons are float32 [T, P, H, W, C].
    """
    model, variables = victim
    num_classes, rule, std = model.num_classes, optax.adam(0.04), jnp.asarray(model.std)

    @jax.jit
    def reference(variables, images, labels):
        charvec = filters.extract_charvec(model, variables, to_float(images))
        centroids = filters.fit_centroids(charvec, labels, num_classes)
        distances = filters.centroid_distances(charvec, centroids, gamma=gamma)
        return centroids, jnp.median(distances[jnp.arange(len(labels)), labels])

    centroids, scale = reference(variables, jnp.asarray(train.images), jnp.asarray(train.labels))
    low, high = jnp.maximum(bases - epsilon, 0), jnp.minimum(bases + epsilon, 1)
    targets = model.apply(variables, to_float(trials.targets[:, 0]), method="features")

    def step_one(variables, centroids, scale, carry, trial):
        poisons, state = carry
        target, label, low, high, weight = trial

        def loss(poisons):
            features, charvec = filters.apply_and_extract(
                model, variables, poisons, method="features"
            )
            view = View(features, target, variables["params"]["head"], label)
            labels = jnp.full(len(poisons), label)
            margins = filters.nearest_centroid_filter(charvec, labels, centroids, gamma=gamma).score
            potency = bullseye([view])
            price = jnp.mean(jax.nn.relu(margins / scale + KAPPA))
            return potency + weight * price, (potency, jnp.mean(margins <= 0))

        gradient, told = jax.grad(loss, has_aux=True)(poisons)
        updates, state = rule.update(gradient, state)
        return (jnp.clip(poisons + std * jnp.asarray(updates), low, high), state), told

    def step(constants, carry, index):
        variables, centroids, scale, trial = constants
        each = jax.vmap(step_one, (None, None, None, 0, 0))
        return each(variables, centroids, scale, carry, trial)

    steps = loops.scan(step)

    def craft(weights, start):
        trial = (targets, jnp.asarray(trials.base_labels), low, high, weights)
        carry = jnp.array(start), jax.vmap(rule.init)(start)  # a copy: the loop donates it
        constants = variables, centroids, scale, trial
        (poisons, _), (potency, passing) = steps(constants, carry, jnp.arange(num_steps))
        return poisons, potency[-1], passing[-1]

    return craft


def judge(work: Work, bench: Bench, trials, images, gamma: str) -> dict[str, Any]:
    """Returns poisons found, and which targets are taken, without and with the filters."""
    config, sets = work.config, work.sets
    poisoned = poison_files.restored(
        sets.train, trials, images, [{"attacks": [{"name": "adaptive"}]}] * len(images)
    )
    trusted = first_of_each_class(sets.trusted, config.trusted_per_class)
    view = verdicts.view(bench.victim, sets.train, poisoned, trusted)
    references = {"dataset": None, "trusted": (view.trusted[0], view.trusted[2])}
    flagged = {"none": np.zeros_like(view.is_poisoned)}
    for name, reference in references.items():
        flagged[name] = np.asarray(
            verdicts.characteristic(
                view.charvec,
                view.places,
                view.labels,
                reference,
                bench.victim.model.num_classes,
                gamma,
            )[0]
        )
    outcome = evaluation.transfer_outcome(
        jax.random.key(config.seed), bench.victim, poisoned * len(flagged), sets.test,
        keep=~np.concatenate([*flagged.values()]),
    )  # fmt: skip
    taken = outcome.success.reshape(len(flagged), -1)
    return {
        "found": {n: float(f[view.is_poisoned].mean()) for n, f in flagged.items()},
        "taken": {name: taken[row].tolist() for row, name in enumerate(flagged)},
    }


def report(rows: list[dict[str, Any]]) -> str:
    """Returns a table of all lambdas, and of the best one for each target."""
    header = [
        *("lambda", "objective", "taken, no filter", "found, data's centroids", "taken"),
        *("found, trusted", "taken"),
    ]
    lines = []
    for row in rows:
        taken = {name: f"{sum(hits)}/{len(hits)}" for name, hits in row["taken"].items()}
        found = {name: f"{100 * share:.0f} %" for name, share in row["found"].items()}
        lines.append(
            [
                *(str(row["lambda"]), f"{row['objective']:.3f}", taken["none"]),
                *(found["dataset"], taken["dataset"], found["trusted"], taken["trusted"]),
            ]
        )
    ever = {name: np.any([row["taken"][name] for row in rows], axis=0) for name in FILTERS}
    best = {}
    for name, hits in ever.items():
        low, high = evaluation.wilson(int(hits.sum()), len(hits))
        best[name] = f"{hits.sum()}/{len(hits)} [{100 * low:.0f}, {100 * high:.0f}] %"
    lines.append(
        [
            *("the best for each target", "-", best["none"]),
            *("-", best["dataset"], "-", best["trusted"]),
        ]
    )
    return runs.markdown(header, lines)
