"""Several threats in one training set, next to each of them alone.

`mixed_threats.py` gives the settings. Each threat is made once per seed and kept as an archive; a
set holds one of them or all. Their images are disjoint, except that untargeted poisons take all
that the others leave, and the images whose labels are flipped as well. Every victim is judged by
what each threat is for: accuracy, triggers that work, targets that are taken for another class.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from common import backdoor, cli, predictions, registry, sources, study, tables
from common.settings import SELECTION, Cell, Config, Work
from common.targeted import Matching
from jaxpoison import attacks, evaluation, models, runs
from jaxpoison.attacks import PoisonedDataset
from jaxpoison.core import hosts
from jaxpoison.data import Dataset, pixels

CLEAN, ALL = "clean", "all"
THREATS = tables.MIXED_THREATS


@dataclasses.dataclass(frozen=True)
class MixedConfig(Config):
    """Settings of one run; the same settings in the same folder continue it."""

    backdoor: str = "blended"
    """The backdoor, by its name above."""
    backdoor_share: float = 0.05
    """Share of the training set that carries its trigger."""
    target_class: int = 0
    """What the trigger shall mean."""
    flip_share: float = 0.1
    """Share of the training set whose labels are any other class's."""
    num_targets: int = 4
    """Targets of gradient matching, no two of which are to be taken for the same class."""
    num_poisons: int = 60
    """Poisons of each target."""
    gm: Matching = dataclasses.field(default_factory=Matching)
    """Settings of gradient matching."""


@dataclasses.dataclass(frozen=True)
class MixedCell(Cell):
    """One network to train: by `defense`, without what `drops` flags, if there is such a filter."""

    threats: str
    drops: str = ""

    @property
    def name(self) -> str:
        drops = f"{self.drops}+" if self.drops else ""
        return f"seed{self.seed}-{self.threats}-{drops}{self.defense}"


def main(presets: Mapping[str, MixedConfig], description: str | None) -> None:
    """Runs the command line of the experiment."""
    names = "Untargeted attacks:\n" + registry.listing(registry.UNTARGETED)
    names += "\nBackdoors:\n" + registry.listing(registry.BACKDOORS)
    names += "\n" + registry.listing(registry.DEFENSES | registry.FILTERS)
    cli.main(presets, description, experiment, names)


def experiment(config: MixedConfig) -> None:
    """Trains every cell, writes and prints the table.

    Raises:
      RuntimeError: at the end, if cells failed; their errors are in the results.
    """
    config = runs.plain(config)
    settings = dataclasses.asdict(config)
    lasting = {name: value for name, value in settings.items() if name not in SELECTION}
    model = sources.build_model(config)
    output = runs.Run(config.run_dir, lasting, check=lambda: check(config, model))
    cells = [cell for seed in config.seeds for cell in cells_of(config, seed)]
    splits = sources.load(config, config.seeds[0])
    with runs.Meter(len(cells) * config.recipe.epochs) as meter:
        work = Work(config=config, output=output, meter=meter, model=model)
        for cell in cells:
            if not runs.succeeded(output.finished(cell.name)):
                row = runs.attempt(functools.partial(train_cell, work, cell))
                output.finish(cell.name, dataclasses.asdict(cell) | row)
            work.done += config.recipe.epochs
        for cell in (*cells, *(Cell(seed, 0.0, "none") for seed in config.seeds)):
            hosts.on_main(functools.partial(runs.remove, study.checkpoint_folder(work, cell)))
    rows = sorted(output.rows(), key=tables.mixed_place)
    names = " + ".join(registry.UNTARGETED[name].label for name in config.attacks)
    attack = f"untargeted: {names} {registry.budget(config)}"
    more = {"kind": tables.MIXED, "source": splits.source, "attack": attack}
    written = {"rows": rows, "config": output.config, "environment": runs.environment(), **more}
    text = tables.mixed(written).markdown()
    output.write_result(rows, text, **more)
    runs.say("\n" + text)
    runs.require_no_errors({MixedCell(**named(row)).name: row for row in rows})


def named(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a row that names its cell."""
    return {field.name: row[field.name] for field in dataclasses.fields(MixedCell)}


def cells_of(config: MixedConfig, seed: int) -> list[MixedCell]:
    """Returns the networks of one seed; first those without a defense, which filters look at."""
    names = ("none", *(name for name in config.defenses if name != "none"))
    cells = []
    for drops, defense in map(parsed, names):
        for threats in (CLEAN, *THREATS, ALL):
            cells.append(MixedCell(seed, float(threats != CLEAN), defense, threats, drops))
    return cells


def parsed(name: str) -> tuple[str, str]:
    """Returns (filter or "", defense) of `FILTER`, `DEFENSE` or `FILTER+DEFENSE`."""
    drops, _, defense = name.rpartition("+")
    return (name, "none") if name in registry.FILTERS else (drops, defense)


def train_cell(work: Work, cell: MixedCell) -> dict[str, Any]:
    """Trains one network and returns what became of it."""
    splits = sources.load(work.config, cell.seed)
    train, threats = composed(work, cell.seed, cell.threats)
    more: dict[str, Any] = {}
    if cell.drops:
        undefended = dataclasses.replace(cell, drops="", defense="none")
        victim = fit(work, undefended, train)
        found = backdoor.FILTERS[cell.drops](work.model, victim, train, splits.validation)
        flagged = np.asarray(found.is_poison)
        more = {name: float(flagged[rows].mean()) for name, rows in threats.items()}
        more = {"flagged": float(flagged.mean()), "found": more}
        train = train.take(~flagged)
    variables = fit(work, cell, train)
    trigger = part(work, cell.seed, "backdoor").trigger
    assert trigger is not None
    opened = evaluation.backdoor_outcome(work.model, variables, splits.test, trigger)
    targets = np.array(part(work, cell.seed, "targeted").config["targets"])
    shares = predictions.probabilities(work.model, variables, splits.test.images[targets[:, 0]])
    return {
        "test_accuracy": opened.accuracy,
        "successes": int(opened.success.sum()),
        "num_triggered": len(opened.success),
        "taken": int(np.sum(shares.argmax(axis=1) == targets[:, 1])),
        "num_targets": len(targets),
        "num_train": len(train.labels),
        **more,
    }


def fit(work: Work, cell: MixedCell, train: Dataset) -> Any:
    """Trains a cell, or continues it, or restores it; returns its variables."""
    epochs = work.config.recipe.epochs
    if (cell.threats, cell.drops, cell.defense) == (CLEAN, "", "none"):
        return study.surrogate(work, cell.seed).variables

    def report(epoch, metrics):
        metrics.pop("chosen", None)
        work.output.log(cell.name, epoch, metrics)
        work.tell(
            f"{cell.name}: epoch {epoch + 1}/{epochs}, "
            f"test accuracy {100 * metrics['test_accuracy']:.1f}%",
            ahead=epoch + 1,
        )

    return study.fit(work, cell, train, work.config.recipe, report).variables


def composed(work: Work, seed: int, threats: str) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Returns a training set in 8 bits, and which rows belong to each threat in it, bool [N]."""
    clean = sources.load(work.config, seed).train
    images, labels = np.array(pixels.to_uint8(clean.images)), np.array(clean.labels)
    wanted = {CLEAN: (), ALL: THREATS}.get(threats, (threats,))
    rows = {}
    for threat in wanted:  # untargeted first: the others write over it
        one = part(work, seed, threat)
        rows[threat] = one.is_poisoned
        if threat != "flips":
            images[one.is_poisoned] = pixels.to_uint8(one.images[one.is_poisoned])
        labels[one.is_poisoned] = one.labels[one.is_poisoned]
    return Dataset(images, labels), rows


def part(work: Work, seed: int, threat: str) -> PoisonedDataset:
    """Returns the set that holds one threat alone from its archive, made now unless it is there."""
    if threat == "untargeted":
        return study.poisons(work, Cell(seed, 1.0, "none"))
    path = work.output.folder / "poisons" / f"seed{seed}-{threat}.npz"
    if not hosts.on_main(path.exists):
        make = {"targeted": targeted, "backdoor": triggered, "flips": flipped}[threat]
        key = jax.random.fold_in(jax.random.key(seed), 2 + THREATS.index(threat))
        made = make(work, seed, key)

        def save():
            path.parent.mkdir(exist_ok=True)
            attacks.save(path, made, as_uint8=True)

        hosts.on_main(save)
    return hosts.on_all(lambda: attacks.load(path, num_classes=work.model.num_classes))


def settings_of(work: Work) -> MixedConfig:
    """Returns the settings of a run of this experiment."""
    assert isinstance(work.config, MixedConfig)
    return work.config


def targeted(work: Work, seed: int, key: jax.Array) -> PoisonedDataset:
    """Returns the training set with the poisons of all targets; no two share a class, or a row."""
    config, splits = settings_of(work), sources.load(work.config, seed)
    known = study.surrogate(work, seed)
    shares, true = predictions.probabilities(*known, splits.test.images), splits.test.labels
    others = np.where(np.arange(shares.shape[1]) == true[:, None], -1, shares).argmax(axis=1)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(shares.argmax(axis=1) == true))
    _, first = np.unique(others[order], return_index=True)
    ids = order[np.sort(first)[: config.num_targets]]
    trials = attacks.draw_trials(
        key, splits.train, splits.test, num_trials=config.num_targets,
        num_poisons=config.num_poisons, base_class=others, target_ids=ids,
    )  # fmt: skip
    attack = registry.TARGETED["gm"].make(config, splits.train)
    sets = attacks.poison(jax.random.fold_in(key, 1), splits.train, trials, attack, [known])
    images = np.array(pixels.to_uint8(splits.train.images))
    attack_id = np.zeros(len(images), np.int8)
    for one in sets:
        images[one.is_poisoned] = one.images[one.is_poisoned]
        attack_id[one.is_poisoned] = 1
    pairs = np.stack([trials.target_ids, trials.base_labels], axis=1).tolist()
    made = {"attacks": sets[0].config["attacks"], "targets": pairs}
    return PoisonedDataset(images, np.asarray(splits.train.labels), attack_id, made)


def triggered(work: Work, seed: int, key: jax.Array) -> PoisonedDataset:
    """Returns the training set with the backdoor, on images that are no targets' poisons."""
    config, clean = settings_of(work), sources.load(work.config, seed).train
    rest = np.flatnonzero(~part(work, seed, "targeted").is_poisoned)
    attack = registry.BACKDOORS[config.backdoor].make(config, study.surrogate(work, seed))
    share = config.backdoor_share * len(clean.labels) / len(rest)
    made = attacks.implant(key, clean.take(rest), share, attack, target_class=config.target_class)
    images, labels = np.array(pixels.to_unit(clean.images)), np.array(clean.labels)
    attack_id = np.zeros(len(labels), np.int8)
    images[rest], labels[rest], attack_id[rest] = made.images, made.labels, made.attack_id
    return made._replace(images=images, labels=labels, attack_id=attack_id)


def flipped(work: Work, seed: int, key: jax.Array) -> PoisonedDataset:
    """Returns the training set with wrong labels, on images that are neither's poisons."""
    config, clean = settings_of(work), sources.load(work.config, seed).train
    taken = part(work, seed, "targeted").is_poisoned | part(work, seed, "backdoor").is_poisoned
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    rows = rng.permutation(np.flatnonzero(~taken))[: round(config.flip_share * len(taken))]
    labels, attack_id = np.array(clean.labels), np.zeros(len(taken), np.int8)
    num_classes = work.model.num_classes
    labels[rows] = (labels[rows] + rng.integers(1, num_classes, len(rows))) % num_classes
    attack_id[rows] = 1
    return PoisonedDataset(clean.images, labels, attack_id, {"attacks": [{"name": "flips"}]})


def check(config: MixedConfig, model: models.Classifier) -> None:
    """Raises ValueError for settings that would fail, or do nothing, only after work was done."""
    if not config.seeds or not config.attacks:
        raise ValueError("name at least one seed and one untargeted attack")
    registry.check_names("attacks", config.attacks, registry.UNTARGETED)
    registry.check_names("backdoors", (config.backdoor,), registry.BACKDOORS)
    filters, names = zip(*map(parsed, ("none", *config.defenses)), strict=True)
    registry.check_names("filters", [name for name in filters if name], registry.FILTERS)
    splits = sources.load(config, config.seeds[0])
    sources.check_defenses(config, names, model, splits)
    for name in ("backdoor_share", "flip_share"):
        share = getattr(config, name)
        if not 0 < share < 0.5 or round(share * len(splits.train.labels)) < 1:
            raise ValueError(f"{name} must be in (0, 0.5) and at least one image, not {share:g}")
    if not 1 <= config.num_targets <= model.num_classes:
        raise ValueError(
            f"num_targets must be from 1 to the {model.num_classes} classes, no two targets being "
            f"meant for the same one, not {config.num_targets}"
        )
    most = np.bincount(splits.train.labels).min()
    if not 1 <= config.num_poisons <= most:
        raise ValueError(
            f"num_poisons must be from 1 to {most}, the images of the smallest class, not "
            f"{config.num_poisons}"
        )
