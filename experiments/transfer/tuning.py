"""Poisons, the filter and HINT where the extractor does not stay frozen: `fine_tuning.py`."""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxpoison import attacks, defenses, network, runs, training
from jaxpoison.attacks import PoisonedDataset, TargetedAttack, Victim
from jaxpoison.data import Dataset
from jaxpoison.defenses import Defense
from jaxpoison.training import Recipe, Transfer
from jaxpoison.training.hooks import Info, select
from transfer import verdicts
from transfer.settings import attack_of, first_of_each_class, read
from transfer.study import Bench, Work, crafted, draw_trials, reopened

ATTACKS = ("bp", "gm")
FROZEN_EXTRACTOR = 0
LAYERS = "last_3"  # that the filter looks at


def study(options: argparse.Namespace) -> None:
    """Trains what is missing and prints the table."""
    if options.targets < 1 or min(options.depths) < 0 or not 0 < options.share <= 1:
        raise ValueError("expected at least one target, depths from 0 on and a share in (0, 1]")
    epochs, most_defenses = read(options.run_dir).pretraining.epochs, 4
    recipe = Recipe(
        epochs=options.epochs, batch_size=options.batch_size, learning_rate=0.01, milestones=(),
        max_shift=0.0, flip=False,
    )  # fmt: skip
    rows = []
    with runs.Meter(
        epochs + len(options.attacks) * len(options.depths) * 2 * most_defenses
    ) as meter:
        work, bench = reopened(options.run_dir, options.data_dir, meter)
        stages = stages_of(bench)
        trials = draw_trials(work, bench, options.share, options.targets)
        for attack in options.attacks:
            name = f"tuned-{attack}-p{options.share:g}-targets{len(trials.rows)}"
            settings = f"{name}-epochs{recipe.epochs}-batch{recipe.batch_size}"
            poisoned = crafted(work, bench, name, trials, crafting(work, attack))
            for depth, bn_frozen in itertools.product(options.depths, (True, False)):
                depth = min(depth, len(stages))
                unfrozen = tuple(itertools.chain(*stages[len(stages) - depth :]))
                transfer = Transfer(bench.victim.variables, bn_frozen, unfrozen)
                for defense_name, defense in defenses_of(work, bench, depth, recipe).items():
                    cell = f"{settings}-b{depth}-bn{bn_frozen:d}-{defense_name.replace(' ', '-')}"
                    row = work.output.finished(cell)
                    if row is None:
                        row = {"attack": attack, "depth": depth, "bn_frozen": bn_frozen}
                        row |= {"defense": defense_name, "trials": len(poisoned)}
                        row |= tuned(work, bench, poisoned, recipe, transfer, defense)
                        work.output.finish(cell, row)
                    rows.append(row)
                    work.tell(", ".join(cells(row)), finished=1)
    result = {
        "rows": rows,
        "share": options.share,
        "epsilon_255": max(work.config.epsilons_255),
        "recipe": dataclasses.asdict(recipe),
        "stages": stages,
        "config": work.output.config,
        "environment": runs.environment(),
    }
    runs.write_json(options.run_dir / "fine_tuning.json", result)
    runs.say(runs.markdown(header(recipe), map(cells, rows)))


def stages_of(bench: Bench) -> list[tuple[str, ...]]:
    """Returns the names of a ResNet's parts, stage by stage from the stem on."""
    names = sorted(
        bench.victim.variables["params"]["body"], key=lambda name: ("stem" not in name, name)
    )
    return [tuple(group) for _, group in itertools.groupby(names, lambda name: name.split("_")[0])]


def crafting(work: Work, attack: str) -> TargetedAttack:
    """Returns bullseye polytope, or gradient matching through all parameters."""
    config = work.config
    if attack == "bp":
        return attack_of(config, attack, max(config.epsilons_255))
    return attacks.gradient_matching(
        epsilon=max(config.epsilons_255) / 255,
        num_steps=config.crafting.gm_steps,
        restarts=config.crafting.gm_restarts,
        max_shift=0.0,
        flip=False,
    )


def defenses_of(work: Work, bench: Bench, depth: int, recipe: Recipe) -> dict[str, Defense]:
    """Returns what is compared; HINT where the extractor is frozen, as its paper has it."""
    config, sets, (model, variables) = work.config, work.sets, bench.victim
    trusted = first_of_each_class(sets.trusted, config.trusted_per_class)
    compared = {
        "none": defenses.none(),
        "before": defenses.characteristic_filter(model, variables, trusted, gamma=LAYERS),
        "each epoch": filter_again(model, trusted),
    }
    if depth == FROZEN_EXTRACTOR:
        schedule = recipe.epochs // 10, recipe.epochs // 4, recipe.epochs // 2
        settings = dataclasses.replace(config.hint, schedule=schedule)
        compared["hint"] = defenses.hint(model, sets.trusted, settings)
    return compared


def filter_again(model, trusted: Dataset) -> Defense:
    """Returns the filter whose characteristic vectors are the current network's."""

    def on_epoch(state, epoch, train_state, dataset):
        flagged, _ = look(Victim(model, train_state.variables), dataset, trusted)
        return state, select(dataset, ~flagged), Info(changed=True)

    return Defense(on_epoch=on_epoch)


def look(victim: Victim, dataset: Dataset, trusted: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the filter flags by this network, bool [N], and the `directions`, [N, D]."""
    charvec, reference = (verdicts.extract(victim, part.images) for part in (dataset, trusted))
    places = np.arange(len(dataset.labels))[None]
    flagged, _ = verdicts.characteristic(
        charvec,
        places,
        dataset.labels,
        (reference, trusted.labels),
        victim.model.num_classes,
        LAYERS,
    )
    return np.asarray(flagged[0]), verdicts.directions(charvec)


def tuned(
    work: Work,
    bench: Bench,
    poisoned: list[PoisonedDataset],
    recipe: Recipe,
    transfer: Transfer,
    defense: Defense,
) -> dict[str, Any]:
    """Returns what becomes of all trials: successes, accuracy, and what the filter would find."""
    config, sets, model = work.config, work.sets, bench.victim.model
    trusted = first_of_each_class(sets.trusted, config.trusted_per_class)
    predict = functools.partial(network.predict, model)
    seen: dict[int, list[tuple[np.floating, ...]]] = {epoch: [] for epoch in looks(recipe)}
    successes, accuracies = 0, []
    for one in poisoned:
        aim = one.target
        assert aim is not None
        _, before = look(bench.victim, one.dataset, trusted)

        def watch(epoch, variables, one=one, before=before):
            flagged, now = look(Victim(model, variables), one.dataset, trusted)
            cosine = np.mean(np.sum(before * now, axis=1))  # rows of both have unit length
            found = np.mean(flagged[one.is_poisoned]), np.mean(flagged[~one.is_poisoned])
            seen[epoch].append((*found, cosine))

        state = training.fit(
            model, recipe, one.dataset,
            key=jax.random.fold_in(jax.random.key(config.seed), aim.target_id),
            defense=watched(defense, watch, looks(recipe)), transfer=transfer,
        )  # fmt: skip
        watch(recipe.epochs, state.variables)
        answers = predict(state.variables, np.concatenate([aim.images[:1], sets.test.images]))
        successes += int(answers[0] == aim.base_label)
        accuracies.append(np.mean(answers[1:] == sets.test.labels))
    found = {
        str(epoch): dict(zip(("tpr", "fpr", "cosine"), np.mean(told, axis=0).tolist(), strict=True))
        for epoch, told in seen.items()
    }
    return {"successes": successes, "accuracy": float(np.mean(accuracies)), "found_after": found}


def looks(recipe: Recipe) -> tuple[int, ...]:
    """Returns the numbers of epochs after which the network is looked at."""
    return tuple(sorted({1, max(1, recipe.epochs // 4), recipe.epochs}))


def watched(
    defense: Defense, watch: Callable[[int, Any], None], epochs: tuple[int, ...]
) -> Defense:
    """Returns the defense, which calls `watch(epoch, variables)` before it begins these epochs."""

    def on_epoch(state, epoch, train_state, dataset):
        if epoch in epochs:
            watch(epoch, train_state.variables)
        return defense.on_epoch(state, epoch, train_state, dataset)

    return defense._replace(on_epoch=on_epoch)


def header(recipe: Recipe) -> list[str]:
    """Returns the names of the table's columns."""
    found = (f"found after {epoch} (of clean; cosine)" for epoch in looks(recipe))
    return ["attack", "b", "BatchNorm", "defense", "success", "accuracy", *found]


def cells(row: dict[str, Any]) -> list[str]:
    """Returns the cells of a row of the table."""
    found = (
        f"{100 * seen['tpr']:.0f} % ({100 * seen['fpr']:.0f} %; {seen['cosine']:.3f})"
        for seen in row["found_after"].values()
    )
    return [
        row["attack"],
        str(row["depth"]),
        "frozen" if row["bn_frozen"] else "updated",
        row["defense"],
        f"{row['successes']}/{row['trials']}",
        f"{100 * row['accuracy']:.1f}",
        *found,
    ]
