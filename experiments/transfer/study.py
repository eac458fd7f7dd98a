"""Poisons in transfer learning, and the filters that look for them: what `transfer_filter.py` runs.

What is kept in the run's folder, besides what every run has:

checkpoints/NETWORK          the pre-trained network
poisons/CELL.npz             the poisons of all trials of an attack, budget and share, in 8 bits
roc.png, share.png, vectors.png, predictions-ATTACK.png   pictures
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import figures, tables
from common.registry import TRANSFER

from jaxpoison import attacks, evaluation, models, network, runs, training
from jaxpoison.attacks import PoisonedDataset, Victim
from jaxpoison.data import Dataset, catalogue
from jaxpoison.defenses import chain, characteristic_filter, hint, none
from jaxpoison.training import Checkpoints
from transfer import figures as curves
from transfer import poisons as poison_files
from transfer import tables as reports
from transfer import verdicts
from transfer.settings import (
    NETWORKS,
    Config,
    Sets,
    attack_of,
    first_of_each_class,
    load,
    read,
    require_sensible,
)


@dataclasses.dataclass(eq=False, kw_only=True)
class Work(runs.Work):
    """A run in progress, counted in stages, with its data."""

    config: Config
    sets: Sets


class Bench(NamedTuple):
    """What all cells of one network share: an extractor with a clean head, and its targets."""

    network: str
    victim: Victim
    clean_accuracy: float
    right: np.ndarray  # ids of the candidates that the clean head gets right
    num_trials: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """One attack on one network, with all its trials; p = 0 is no attack."""

    network: str
    attack: str
    epsilon_255: float
    share: float

    @property
    def name(self) -> str:
        return f"{self.network}-{self.attack}-eps{self.epsilon_255:g}-p{self.share:g}"


def compare(config: Config) -> None:
    """Runs what is missing, prints the tables and draws the pictures."""
    config = runs.plain(config)
    require_sensible(config)
    sets = load(config)
    output = runs.Run(config.run_dir, dataclasses.asdict(config))
    stages = config.pretraining.epochs + len(grid(config, "")) + len(config.hint_attacks)
    benches, rows, hint_rows = {}, [], []
    with runs.Meter(len(config.networks) * stages) as meter:
        work = Work(config=config, sets=sets, output=output, meter=meter)
        for name in config.networks:
            bench = benches[name] = prepare(work, name)
            for cell in grid(config, name):
                rows.append(judge(work, bench, cell))
                work.tell(f"{cell.name}: {reports.in_short(rows[-1])}", finished=1)
            for attack in config.hint_attacks:
                cell = Cell(name, attack, max(config.epsilons_255), config.hint_share)
                hint_rows += with_hint(work, bench, cell)
                work.tell(f"{cell.name}: with HINT", finished=1)
        text = reports.report(
            rows, hint_rows, source=sets.source, networks=config.networks,
            min_success=config.min_success, trusted_per_class=config.trusted_per_class,
        )  # fmt: skip
        clean = {name: bench.clean_accuracy for name, bench in benches.items()}
        numbers = [{name: row[name] for name in row if name != "roc"} for row in rows]
        output.write_result(
            numbers, text, kind=tables.TRANSFER, hint=hint_rows,
            clean_accuracy=clean, source=sets.source,
        )  # fmt: skip
        pictures = draw(work, benches[config.networks[0]], rows)
        pictures += draw_targets(work, hint_rows)
    runs.say("\n" + text)
    for path in pictures:
        runs.say(f"picture: {path}")


def reopened(folder: Path, data_dir: str | None, meter: runs.Meter) -> tuple[Work, Bench]:
    """Returns the run in `folder` and its first network, for a study that starts from them.

    Args:
      folder: of a run.
      data_dir: where the data are now; None: where they were.
      meter: for progress.

    Raises:
      ValueError: if there is no run.
    """
    config = read(folder)
    output = runs.Run(folder, dataclasses.asdict(config))
    sets = load(dataclasses.replace(config, data_dir=data_dir or config.data_dir))
    work = Work(config=config, sets=sets, output=output, meter=meter)
    return work, prepare(work, config.networks[0])


def grid(config: Config, network: str) -> list[Cell]:
    """Returns the cells of one network; the first one is the clean set."""
    product = itertools.product(config.attacks, config.epsilons_255, config.shares)
    return [Cell(network, "none", 0.0, 0.0), *(Cell(network, *cell) for cell in product)]


def prepare(work: Work, name: str) -> Bench:
    """Trains the extractor, or restores it, and a head on clean images."""
    config, sets = work.config, work.sets
    model, key = NETWORKS[name](), jax.random.key(config.seed)
    variables = extractor(work, name, model, key)
    train, targets, test = (
        network.features(model, variables, part.images)
        for part in (sets.train, sets.targets, sets.test)
    )
    fit = jax.jit(functools.partial(training.fit_head, num_classes=model.num_classes))
    head = fit(jax.random.fold_in(key, 1), train, sets.train.labels)
    right = answers(targets, head) == sets.targets.labels
    allowed = right.copy()
    if config.base_class is not None:
        allowed &= sets.targets.labels != config.base_class
    if config.target_class is not None:
        allowed &= sets.targets.labels == config.target_class
    if not allowed.any():
        raise ValueError(
            f"{name} gets none of the {len(allowed)} candidates right that may be targets: "
            "train it for longer, or allow other classes"
        )
    bench = Bench(
        name,
        Victim(model, network.as_network(model).with_head(variables, head)),
        float(np.mean(answers(test, head) == sets.test.labels)),
        np.flatnonzero(right),
        min(config.num_targets, int(allowed.sum())),
    )
    work.tell(
        f"{name}: a clean head has a test accuracy of {100 * bench.clean_accuracy:.1f}% and "
        f"gets {allowed.sum()} candidates right, {bench.num_trials} become targets",
        finished=config.pretraining.epochs,
    )
    return bench


def extractor(work: Work, name: str, model: models.Classifier, key: jax.Array) -> Any:
    """Returns the variables of a trained network: loaded, or trained now or in an earlier run."""
    if name in models.PRETRAINED:
        return models.load_pretrained(name).variables
    config, sets = work.config, work.sets

    def report(epoch, metrics):
        work.output.log(name, epoch, metrics)
        work.tell(
            f"{name}: epoch {epoch + 1}/{config.pretraining.epochs}, loss "
            f"{metrics['loss']:.3f}, test accuracy {100 * metrics['test_accuracy']:.1f}%"
        )

    # Attacks and filters may change without training the extractor again.
    facts = name, config.pretraining, config.data, config.parts.pretraining, config.seed
    checkpoints = Checkpoints(
        work.output.folder / "checkpoints" / name,
        every=config.checkpoint_every,
        identity=str(facts),
    )
    try:
        state = training.fit(
            model, config.pretraining, sets.pretraining, key=key, test=sets.test,
            checkpoints=checkpoints, report=report,
        )  # fmt: skip
    finally:
        checkpoints.close()
    return state.variables


def answers(features, head) -> np.ndarray:
    """Returns the labels that a head gives, [N]."""
    return np.argmax(features @ head["kernel"] + head["bias"], axis=-1)


def poisons(work: Work, bench: Bench, cell: Cell) -> list[PoisonedDataset]:
    """Returns the training sets of a cell's trials, crafted now unless their archive is there."""
    if not cell.share:
        return poison_files.clean(work.sets.train, draw_trials(work, bench, 0))
    attack = attack_of(work.config, cell.attack, cell.epsilon_255)
    return crafted(work, bench, cell.name, draw_trials(work, bench, cell.share), attack)


def draw_trials(
    work: Work, bench: Bench, share: float, num_trials: int | None = None
) -> attacks.Trials:
    """Returns the trials, or the first so many, in which `share` of the base class is poisoned.

    The targets are always the same, and poisons at a small share are among those at a larger one.
    """
    config, sets = work.config, work.sets
    return attacks.draw_trials(
        jax.random.key(config.seed), sets.train, sets.targets,
        num_trials=min(num_trials or bench.num_trials, bench.num_trials),
        num_poisons=max(1, round(share * config.parts.train)),
        base_class=config.base_class, target_class=config.target_class, target_ids=bench.right,
    )  # fmt: skip


def crafted(
    work: Work, bench: Bench, name: str, trials: attacks.Trials, attack: attacks.TargetedAttack
) -> list[PoisonedDataset]:
    """Returns the training sets of all trials from the archive `name`, crafted if it is missing."""
    path = work.output.folder / "poisons" / f"{name}.npz"
    train = work.sets.train
    if not path.exists():
        poisoned = attacks.poison(
            jax.random.key(work.config.seed), train, trials, attack, [bench.victim],
            progress=lambda _, done, total: work.tell(f"{name}: {done}/{total} poisons"),
        )  # fmt: skip
        poison_files.save(path, poisoned, trials)
    # What is judged is what the archive holds.
    return poison_files.load(path, train, trials)


def judge(work: Work, bench: Bench, cell: Cell) -> dict[str, Any]:
    """Returns what an attack achieves without a defense and after each filter."""
    row = work.output.finished(cell.name)
    if row is not None:
        return row
    config, sets, key = work.config, work.sets, jax.random.key(work.config.seed)
    poisoned = poisons(work, bench, cell)
    outcome = evaluation.transfer_outcome(key, bench.victim, poisoned, sets.test)
    successes = int(outcome.success.sum())
    row = {
        **dataclasses.asdict(cell),
        "trials": len(poisoned),
        "successes": successes,
        "accuracy": float(outcome.accuracy.mean()),
    }
    if not cell.share:
        chosen = [0]  # the clean set is the same in all trials
    elif successes and successes >= config.min_success * len(poisoned):
        chosen = np.flatnonzero(outcome.success)  # as in the paper
    else:
        chosen = []
    if len(chosen):
        work.tell(f"{cell.name}: {successes} attacks succeed, {len(chosen)} sets to be filtered")
        poisoned = [poisoned[trial] for trial in chosen]
        trusted = first_of_each_class(sets.trusted, config.trusted_per_class)
        view = verdicts.view(bench.victim, sets.train, poisoned, trusted)
        found = verdicts.verdicts(view)
        after = evaluation.transfer_outcome(
            key, bench.victim, poisoned * len(found), sets.test,
            keep=~np.concatenate([verdict.flagged for verdict in found.values()]),
        )  # fmt: skip
        row |= verdicts.measure(view, found, after)
    work.output.finish(cell.name, row)
    return row


def with_hint(work: Work, bench: Bench, cell: Cell) -> list[dict[str, Any]]:
    """Returns what becomes of all trials of an attack with HINT, the filter, both, or neither."""
    finished = work.output.finished(f"{cell.name}-hint")
    if finished is not None:
        return finished["rows"]
    config, sets, (model, variables) = work.config, work.sets, bench.victim
    poisoned = poisons(work, bench, cell)
    healthy = hint(model, sets.trusted, config.hint)  # one for all trials: compiled once
    trusted = first_of_each_class(sets.trusted, config.trusted_per_class)
    sieve = characteristic_filter(model, variables, trusted)
    defenses = {
        "none": none(), "hint": healthy, "filter": sieve, "filter + hint": chain(sieve, healthy)
    }  # fmt: skip
    aims = [one.target for one in poisoned if one.target is not None]
    targets, test = (
        network.features(model, variables, images)
        for images in (np.concatenate([aim.images for aim in aims]), sets.test.images)
    )
    rows = []
    for name, defense in defenses.items():
        seen, accuracies = [], []
        for trial, (one, aim) in enumerate(zip(poisoned, aims, strict=True)):
            work.tell(f"{cell.name}, {name}: trial {trial + 1}/{len(poisoned)}")
            key = jax.random.fold_in(jax.random.key(config.seed), aim.target_id)
            head = training.fit_defended_head(key, model, variables, one.dataset, defense)
            seen.append(jax.nn.softmax(targets[trial] @ head["kernel"] + head["bias"]))
            accuracies.append(np.mean(answers(test, head) == sets.test.labels))
        predictions, confidences = np.argmax(seen, axis=1), np.max(seen, axis=1)
        intended = [aim.base_label for aim in aims]
        rows.append(
            {
                **dataclasses.asdict(cell),
                "defense": name,
                "trials": len(poisoned),
                "successes": int(np.sum(predictions == intended)),
                "accuracy": float(np.mean(accuracies)),
                "target_ids": [aim.target_id for aim in aims],
                "intended": intended,
                "predictions": predictions.tolist(),
                "confidences": confidences.tolist(),
            }
        )
    work.output.finish(f"{cell.name}-hint", {"rows": rows})
    return rows


def draw(work: Work, bench: Bench, rows: list[dict[str, Any]]) -> list[Path]:
    """Draws the pictures of one network at the largest budget."""
    wanted = bench.network, max(work.config.epsilons_255)
    judged = [
        row for row in rows if "roc" in row and (row["network"], row["epsilon_255"]) == wanted
    ]
    if not judged:
        return []
    paths = [work.output.folder / name for name in ("roc.png", "share.png", "vectors.png")]
    curves.roc(paths[0], judged)
    curves.found_over_share(paths[1], judged)
    row = min(judged, key=lambda row: abs(row["share"] - 0.5))
    cell = Cell(*(row[field.name] for field in dataclasses.fields(Cell)))
    one = poisons(work, bench, cell)[:1]
    trusted = first_of_each_class(work.sets.trusted, work.config.trusted_per_class)
    view = verdicts.view(bench.victim, work.sets.train, one, trusted)
    curves.vectors(paths[2], view, cell.name)
    return paths


def draw_targets(work: Work, rows: list[dict[str, Any]]) -> list[Path]:
    """Draws five targets of each attack and what the first network's heads see, with HINT too."""
    paths = []
    for attack in work.config.hint_attacks:
        mine = [
            row for row in rows
            if (row["attack"], row["network"]) == (attack, work.config.networks[0])
        ]  # fmt: skip
        shown = np.array(mine[0]["target_ids"][:5])
        paths.append(work.output.folder / f"predictions-{attack}.png")
        figures.predictions(
            paths[-1],
            Dataset(work.sets.targets.images[shown], work.sets.targets.labels[shown]),
            {
                row["defense"].replace("hint", "HINT"): (row["predictions"], row["confidences"])
                for row in mine
            },
            class_names=catalogue.entry("cifar10").class_names,
            title=f"Targets of {TRANSFER[attack].label}; red: what the attack wanted",
            intended=np.array(mine[0]["intended"]),
        )
    return paths
