"""Targeted attacks on networks trained from scratch, and the defenses against them (Table III).

`targeted.py` gives the settings. For each target: poisons crafted against surrogates of the
attacker's own, shipped in 8 bits, and for each defense a victim from new weights.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from common import cli, figures, predictions, registry, sources, tables
from common.settings import Common
from jaxpoison import attacks, evaluation, models, runs, training
from jaxpoison.attacks import MetaPoisonConfig, PoisonedDataset, TargetedAttack, Trials, Victim
from jaxpoison.core import devices, hosts
from jaxpoison.data import Dataset, Splits
from jaxpoison.defenses import Defense
from jaxpoison.training import Checkpoints
from jaxpoison.training.recipe import steps_per_epoch

GATE = 0.5  # the least rate of success without a defense for which defenses are worth comparing


@dataclasses.dataclass(frozen=True)
class Matching:
    """Settings of gradient matching."""

    num_steps: int = 250
    """Steps of each start."""
    restarts: int = 8
    """Random starts, of which the best is kept."""
    batch_size: int = 512
    """Most poisons in one pass."""


@dataclasses.dataclass(frozen=True)
class Config(Common):
    """Settings of one run; the same settings in the same folder continue it."""

    attack: str = "gm"
    """Gradient matching or MetaPoison."""
    num_targets: int = 20
    """Targets, each with a class it is to be taken for, poisons, and victims of its own."""
    num_poisons: int = 490
    """Poisons for each target, of that class."""
    intended: Literal["random", "runner_up"] = "random"
    """The class that a target is to be taken for: any other, or the one that a network trained on
    clean data finds likeliest after the true one."""
    surrogates: int = 1
    """Networks that the attacker trains on clean data. MetaPoison trains its own besides."""
    gm: Matching = Matching()
    """Settings of gradient matching."""
    mp: MetaPoisonConfig = dataclasses.field(default_factory=MetaPoisonConfig)
    """Settings of MetaPoison."""
    defenses: tuple[str, ...] = ("none", "hint", "friends", "atda", "epic")
    """Defenses to compare, by their names above; none is always run, and first."""
    seed: int = 0
    """Of the split, the surrogates, the choice of targets and poisons, and the victims."""

    def key(self, use: int) -> jax.Array:
        """Returns the PRNG key of one use; nothing is drawn from the same one twice."""
        return jax.random.fold_in(jax.random.key(self.seed), use)


@dataclasses.dataclass(eq=False, kw_only=True)
class Work(runs.Work):
    """A run in progress, counted in epochs, with the network that victims train and the data."""

    config: Config
    model: models.Classifier
    splits: Splits


SURROGATE, CHOICE, CRAFT, VICTIM = range(4)
SELECTION = ("defenses", "num_targets")  # other ones may continue a run: they only choose cells


def main(presets: Mapping[str, Config], description: str | None) -> None:
    """Runs the command line of the experiment."""
    names = "Attacks:\n" + registry.listing(registry.TARGETED)
    names += "\n" + registry.listing(registry.DEFENSES)
    cli.main(presets, description, experiment, names)


def experiment(config: Config) -> None:
    """Crafts all poisons, trains all victims, prints the table.

    Raises:
      RuntimeError: at the end, if cells failed; their errors are in the results.
    """
    config = runs.plain(config)
    settings = dataclasses.asdict(config)
    lasting = {name: value for name, value in settings.items() if name not in SELECTION}
    model = sources.build_model(config)
    output = runs.Run(config.run_dir, lasting, check=lambda: check(config, model))
    splits = sources.load(config, config.seed)
    output.require_space(sources.checkpoint_bytes(model, splits))
    names = ("none", *(name for name in config.defenses if name != "none"))
    with runs.Meter(len(names) * config.num_targets * config.recipe.epochs) as meter:
        work = Work(config=config, output=output, meter=meter, model=model, splits=splits)
        asked = unpoisoned(work)
        for name in names:
            # One defense for all its victims, so that what it compiles serves them all.
            defense = registry.make_defense(name, config, model, splits)
            for target in range(config.num_targets):
                asked.append(cell(work, name, target, defense))
                work.done += config.recipe.epochs
            if name == "none":
                runs.say("\n" + gate(asked) + "\n")
    # Those of earlier runs in this folder, too.
    rows = sorted(output.rows(), key=place)
    most = 255 * attack_of(config).epsilon
    attack = registry.TARGETED[config.attack].label
    result = {
        "kind": "targeted",
        "source": splits.source,
        "attack": f"{attack} within ±{most:.3g}/255, {config.num_poisons} poisons",
        "gate": gate(rows),
    }
    written = {"rows": rows, "config": output.config, "environment": runs.environment(), **result}
    table = f"{gate(rows)}\n\n{tables.table_III(written).markdown()}"
    output.write_result(rows, table, **result)
    runs.say(table)
    hosts.on_main(lambda: draw_targets(work, rows))
    runs.require_no_errors({row["cell"]: row for row in asked})


def draw_targets(work: Work, rows: list[dict[str, Any]]) -> None:
    """Draws up to five targets and what all victims see in them, as the paper's Figure 3 does."""
    rows = [row for row in rows if runs.succeeded(row)]
    defenses = list(dict.fromkeys(row["defense"] for row in rows))
    judged = {name: {r["target"]: r for r in rows if r["defense"] == name} for name in defenses}
    shown = sorted(set.intersection(*map(set, judged.values())))[:5] if judged else []
    if not shown:
        return
    of_first = [judged[defenses[0]][target] for target in shown]
    images = work.splits.test.images[[row["target_id"] for row in of_first]]

    def told(name, what):
        return np.array([judged[name][target][what] for target in shown])

    seen = {
        tables.label(name): (told(name, "prediction"), told(name, "confidence"))
        for name in defenses
    }
    path = work.output.folder / "predictions.png"
    figures.predictions(
        path,
        Dataset(images, np.array([row["target_label"] for row in of_first])),
        seen,
        class_names=work.splits.class_names,
        title="Targets, and what victims see; red: what the attack wanted",
        intended=np.array([row["base_label"] for row in of_first]),
    )
    runs.say(f"picture: {path}")


def place(row: dict[str, Any]) -> tuple[bool, bool, str]:
    """Returns what rows are sorted by: those without poisons first, then without a defense."""
    return row["defense"] != "clean", row["defense"] != "none", row["cell"]


def gate(rows: list[dict[str, Any]]) -> str:
    """Returns what undefended victims say of the attack's strength."""
    undefended = [row for row in rows if row["defense"] == "none" and runs.succeeded(row)]
    if not undefended:
        return "No undefended victim was trained: the attack's strength is unknown."
    hits = sum(row["success"] for row in undefended)
    verdict = "strong enough" if hits >= GATE * len(undefended) else "weak: it tests no defense"
    chance = tables.success([row for row in rows if row["defense"] == "clean"])
    return (
        f"Strength: of undefended victims from new weights, {tables.success(undefended)} take the "
        f"target for the intended class: {verdict}. Without poisons, a network from new weights "
        f"does so for {chance}."
    )


def start(work: Work, name: str, target: int) -> dict[str, Any]:
    """Returns what a row tells of its cell, whatever becomes of it."""
    attack = work.config.attack
    label = f"{attack}-target{target:03d}-{name}"
    return {
        "cell": label, "attack": attack, "defense": name, "seed": work.config.seed, "target": target
    }  # fmt: skip


def unpoisoned(work: Work) -> list[dict[str, Any]]:
    """Returns a row for each target: what a network sees in it that was trained without poisons."""
    starts = [start(work, "clean", target) for target in range(work.config.num_targets)]
    recorded = [work.output.finished(row["cell"]) for row in starts]
    rows = [row for row in recorded if runs.succeeded(row)]
    if len(rows) < len(starts):
        made = runs.attempt(lambda: {"seen": without_poisons(work)})
        found = made.get("seen", [made] * len(starts))
        rows = [first | more for first, more in zip(starts, found, strict=True)]
        for row in rows:
            work.output.finish(row["cell"], row)
    return rows


def without_poisons(work: Work) -> list[dict[str, Any]]:
    """Trains a network from new weights on clean data and returns what it makes of each target."""
    numbers = 0, work.config.surrogates  # the first draws the targets; no attacker has the last
    drawing, judging = (surrogate(work, number) for number in numbers)
    trials, test = draw(work, drawing), work.splits.test
    shares = predictions.probabilities(*judging, test.images)
    accuracy = float(np.mean(shares.argmax(axis=1) == test.labels))
    return [
        judged(shares[target], int(test.labels[target]), int(base_label), int(target))
        | {"test_accuracy": accuracy, "num_train": len(work.splits.train.labels)}
        for target, base_label in zip(trials.target_ids, trials.base_labels, strict=True)
    ]


def judged(shares: np.ndarray, label: int, base_label: int, target_id: int) -> dict[str, Any]:
    """Returns what a network that gives a target these `shares`, [K], makes of it."""
    return {
        "success": bool(shares.argmax() == base_label),
        "prediction": int(shares.argmax()),
        "confidence": float(shares.max()),
        "intended_confidence": float(shares[base_label]),
        "target_label": label,
        "base_label": base_label,
        "target_id": target_id,
    }


def cell(work: Work, name: str, target: int, defense: Defense) -> dict[str, Any]:
    """Returns the row of one victim: recorded, or trained now, or with the `error` that it had."""
    first = start(work, name, target)
    row = work.output.finished(first["cell"])
    if not runs.succeeded(row):
        row = first | runs.attempt(lambda: victim(work, first["cell"], target, defense))
        work.output.finish(first["cell"], row)
    return row


def victim(work: Work, label: str, target_number: int, defense: Defense) -> dict[str, Any]:
    """Trains a victim from new weights and returns what became of it."""
    poisoned, epochs = poisons(work, target_number), work.config.recipe.epochs

    def report(_, epoch, metrics):
        chosen = metrics.pop("chosen", None)
        if chosen is not None:
            metrics["poison_recall"] = float(np.mean(chosen[poisoned.is_poisoned]))
        work.output.log(label, epoch, metrics)
        work.tell(
            f"{label}: epoch {epoch + 1}/{epochs}, loss {metrics['loss']:.3f}", ahead=epoch + 1
        )

    started = time.perf_counter()
    outcome = evaluation.scratch_outcome(
        work.config.key(VICTIM), work.model, work.config.recipe, [poisoned], work.splits.test,
        defense=defense, report=report,
    )  # fmt: skip
    target = poisoned.target
    assert target is not None
    return {
        **judged(outcome.probabilities[0], target.label, target.base_label, target.target_id),
        "test_accuracy": float(outcome.accuracy[0]),
        "objective": list(poisoned.config["objective"]),
        "num_train": len(poisoned.labels),
        "seconds": time.perf_counter() - started,
        "archive_sha256": hashlib.sha256(archive(work, target_number).read_bytes()).hexdigest(),
    }


def poisons(work: Work, target: int) -> PoisonedDataset:
    """Returns the poisoned set of a target from its archive, crafted first if that is missing."""
    config, path = work.config, archive(work, target)
    if not hosts.on_main(path.exists):
        surrogates = [surrogate(work, number) for number in range(config.surrogates)]
        trials = draw(work, surrogates[0])
        # MetaPoison's own surrogates are trained for all trials at once.
        wanted = [target]
        if config.attack == "mp":
            wanted = [n for n in range(config.num_targets) if not archive(work, n).exists()]

        def progress(name, count, total):
            work.tell(f"crafting {name} for {path.stem}, {count}/{total} poisons")

        sets = attacks.poison(
            config.key(CRAFT),
            work.splits.train,
            Trials(*(leaf[np.array(wanted)] for leaf in trials)),
            attack_of(config),
            surrogates,
            progress=progress,
        )

        source = {
            "dataset": config.dataset, "source": work.splits.source, "seed": config.seed
        }  # fmt: skip

        def save():
            path.parent.mkdir(exist_ok=True)
            for number, one in zip(wanted, sets, strict=True):
                one = one._replace(config=one.config | source)
                attacks.save(archive(work, number), one, as_uint8=True)

        hosts.on_main(save)
    return hosts.on_all(lambda: attacks.load(path, num_classes=work.model.num_classes))


def archive(work: Work, target: int) -> Path:
    """Returns where the poisoned set of a target is."""
    return work.output.folder / "poisons" / f"target{target:03d}.npz"


def surrogate(work: Work, number: int) -> Victim:
    """Returns a network of the attacker's, trained on clean data or restored."""
    recipe = work.config.recipe
    checkpoints = Checkpoints(
        work.output.folder / "checkpoints" / f"surrogate{number}",
        every=work.config.checkpoint_every,
        identity=f"surrogate {number} {work.output.config}",
    )

    def report(epoch, metrics):
        work.tell(
            f"surrogate {number}: epoch {epoch + 1}/{recipe.epochs}, loss {metrics['loss']:.3f}"
        )

    try:
        key = jax.random.fold_in(work.config.key(SURROGATE), number)
        state = training.fit(
            work.model, recipe, work.splits.train, key=key, checkpoints=checkpoints, report=report
        )
    finally:
        checkpoints.close()
    return Victim(work.model, state.variables)


def draw(work: Work, known: Victim) -> Trials:
    """Returns the trials; targets are test images that a network trained on clean data gets right.

    The first so many of them are the same, however many are drawn.
    """
    config, true = work.config, work.splits.test.labels
    shares = predictions.probabilities(*known, work.splits.test.images)
    others = np.where(np.arange(shares.shape[1]) == true[:, None], -1, shares)
    return attacks.draw_trials(
        config.key(CHOICE),
        work.splits.train,
        work.splits.test,
        num_trials=config.num_targets,
        num_poisons=config.num_poisons,
        base_class=others.argmax(axis=1) if config.intended == "runner_up" else None,
        target_ids=np.flatnonzero(shares.argmax(axis=1) == true),
    )


@functools.lru_cache(maxsize=1)  # one attack for all targets, so that it is compiled once
def attack_of(config: Config) -> TargetedAttack:
    """Returns the attack as configured."""
    return registry.TARGETED[config.attack].make(config, sources.load(config, config.seed).train)


def check(config: Config, model: models.Classifier) -> None:
    """Raises ValueError for settings that would fail, or do nothing, only after work was done."""
    registry.check_names("attacks", (config.attack,), registry.TARGETED)
    splits = sources.load(config, config.seed)
    for name in ("num_targets", "num_poisons", "surrogates"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    most = np.bincount(splits.train.labels).max()
    if config.num_poisons > most:
        raise ValueError(
            f"{config.num_poisons} poisons of one class: the largest has {most} training images"
        )
    if config.num_targets > len(splits.test.labels):
        raise ValueError(
            f"{config.num_targets} targets, but there are {len(splits.test.labels)} test images"
        )
    devices.check_divisible(config.recipe.batch_size, devices.data_mesh())
    steps_per_epoch(config.recipe, len(splits.train.labels))
    attack_of(config)
    sources.check_defenses(config, config.defenses, model, splits)
