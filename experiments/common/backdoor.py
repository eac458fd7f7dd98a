"""Backdoors in networks trained from scratch, and the defenses against them.

`backdoor.py` gives the settings. For each seed: a network trained on clean data, which tells how
often a trigger is taken for the target class by chance; and for each attack and share of poisons a
victim under each defense. A filter looks at the features that the undefended victim has of its own
training set, and a new victim is trained without what it flags.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import cli, registry, sources, tables
from common.settings import Common
from jaxpoison import attacks, data, evaluation, filters, models, network, runs, training
from jaxpoison.attacks import PoisonedDataset
from jaxpoison.core import devices, hosts
from jaxpoison.data import Dataset
from jaxpoison.training import Checkpoints, TrainState
from jaxpoison.training.recipe import steps_per_epoch

Judge = Callable[[models.Classifier, Any, Dataset, Dataset], filters.FilterResult]


def _of_features(make: Callable[..., filters.FilterResult]) -> Judge:
    """Returns the verdict of a filter that sees the features that the victim has of its data."""
    return lambda model, variables, train, trusted: make(
        np.asarray(network.features(model, variables, train.images)), train.labels
    )


def _by_layers(model, variables, train, trusted):
    net = network.as_network(model)
    extract = jax.jit(lambda images: filters.extract_charvec(net, variables, data.to_float(images)))
    steps = range(0, len(train.labels), 500)
    parts = [extract(train.images[start : start + 500]) for start in steps]
    vectors = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return filters.layer_clustering(vectors, train.labels)


def _by_trusted(model, variables, train, trusted):
    known, own = (
        np.asarray(network.features(model, variables, part.images)) for part in (trusted, train)
    )
    return filters.trusted_attribution(own, train.labels, trusted=(known, trusted.labels))


FILTERS: dict[str, Judge] = {
    "spectral": _of_features(filters.spectral_signatures),
    "spectre": _of_features(filters.spectre),
    "activation": _of_features(filters.activation_clustering),
    "layers": _by_layers,
    "attribution": _by_trusted,
}
"""What may follow `none`, by its name among the rows of the registry: a function of the undefended
network, its variables, the training set and the trusted images."""
SELECTION = ("attacks", "shares", "defenses", "seeds")  # they only choose cells


@dataclasses.dataclass(frozen=True)
class Config(Common):
    """Settings of one run; the same settings in the same folder continue it."""

    attacks: tuple[str, ...] = ("badnets", "blended", "sig", "wanet")
    """Backdoors, by their names above."""
    shares: tuple[float, ...] = (0.005, 0.01, 0.05, 0.1)
    """Shares of the training set that are poisons; what an attack cannot reach is left out."""
    target_class: int = 0
    """What a trigger shall mean."""
    patch: int = 8
    """Side in pixels of the trigger of sleeper."""
    defenses: tuple[str, ...] = (
        *("none", "hint", "hint_every", "recommended", "jpeg", "abl"),
        *FILTERS,
    )
    """Defenses to compare; none is always run, and first."""
    seeds: tuple[int, ...] = (0,)
    """One independent repetition each: split, poisons, initial weights, order."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One network to train."""

    seed: int
    attack: str
    share: float
    defense: str

    @property
    def name(self) -> str:
        return f"seed{self.seed}-{self.attack}-{self.share:g}-{self.defense}"

    @property
    def key(self) -> jax.Array:
        """The same for all defenses of a poisoned set: they differ in nothing but the defense."""
        return jax.random.fold_in(jax.random.key(self.seed), round(1000 * self.share))


@dataclasses.dataclass(eq=False, kw_only=True)
class Work(runs.Work):
    """A run in progress, counted in epochs, with the network that its cells train."""

    config: Config
    model: models.Classifier


def main(presets: Mapping[str, Config], description: str | None) -> None:
    """Runs the command line of the experiment."""
    names = "Backdoors:\n" + registry.listing(registry.BACKDOORS)
    names += "\n" + registry.listing(registry.DEFENSES | registry.FILTERS)
    cli.main(presets, description, experiment, names)


def experiment(config: Config) -> None:
    """Trains every cell, writes and prints the table.

    Raises:
      RuntimeError: at the end, if cells failed; their errors are in the results.
    """
    config = runs.plain(config)
    settings = dataclasses.asdict(config)
    lasting = {name: value for name, value in settings.items() if name not in SELECTION}
    model = sources.build_model(config)
    output = runs.Run(config.run_dir, lasting, check=lambda: check(config, model))
    cells = cells_of(config)
    splits = sources.load(config, config.seeds[0])
    output.require_space(sources.checkpoint_bytes(model, splits))
    with runs.Meter(len(cells) * config.recipe.epochs) as meter:
        work = Work(config=config, output=output, meter=meter, model=model)
        for cell in cells:
            if not runs.succeeded(output.finished(cell.name)):
                row = runs.attempt(functools.partial(train_cell, work, cell))
                output.finish(cell.name, dataclasses.asdict(cell) | row)
            work.done += config.recipe.epochs
        for cell in cells:
            hosts.on_main(functools.partial(runs.remove, checkpoint_folder(work, cell)))
    rows = sorted(output.rows(), key=tables.backdoor_place)  # those of earlier runs, too
    result = {"kind": tables.BACKDOOR, "source": splits.source, "attack": "backdoors"}
    written = {"rows": rows, "config": output.config, "environment": runs.environment(), **result}
    text = tables.backdoors(written).markdown()
    output.write_result(rows, text, **result)
    runs.say("\n" + text)
    asked = {cell.name for cell in cells}
    fields = [field.name for field in dataclasses.fields(Cell)]
    named = {Cell(**{name: row[name] for name in fields}).name: row for row in rows}
    runs.require_no_errors({name: row for name, row in named.items() if name in asked})


def cells_of(config: Config) -> list[Cell]:
    """Returns the networks to train, in an order in which each finds what it needs."""
    names = ("none", *(name for name in config.defenses if name != "none"))
    found = []
    for seed in config.seeds:
        found.append(Cell(seed, "clean", 0.0, "none"))
        for attack in config.attacks:
            for share in config.shares:
                if reachable(config, seed, attack, share):
                    found += [Cell(seed, attack, share, name) for name in names]
    return found


def reachable(config: Config, seed: int, attack: str, share: float) -> bool:
    """Returns whether there are images enough for a share: clean labels need the target class."""
    labels = sources.load(config, seed).train.labels
    own = np.sum(labels == config.target_class)
    clean_label = registry.BACKDOORS[attack].clean_label
    return 1 <= round(share * len(labels)) <= (own if clean_label else len(labels) - own)


def train_cell(work: Work, cell: Cell) -> dict[str, Any]:
    """Trains one network and returns what became of it."""
    splits = sources.load(work.config, cell.seed)
    if cell.attack == "clean":
        state = fit(work, cell, splits.train, "none")
        right = accuracy(work, state, cell.seed)
        return {"test_accuracy": right, "num_train": len(splits.train.labels)}
    poisoned = poisons(work, cell)
    train, more = poisoned.dataset, {}
    if cell.defense in FILTERS:
        kept, more = filtered(work, cell, poisoned)
        state = fit(work, cell, train.take(kept), "none")
    else:
        state = fit(work, cell, train, cell.defense, poisoned)
    assert poisoned.trigger is not None
    judged = functools.partial(
        evaluation.backdoor_outcome, work.model, test=splits.test, trigger=poisoned.trigger
    )
    outcome = judged(variables=state.variables)
    if cell.defense == "none":
        clean = fit(work, Cell(cell.seed, "clean", 0.0, "none"), splits.train, "none")
        more = {"by_chance": judged(variables=clean.variables).success_rate}
    return {
        "successes": int(outcome.success.sum()),
        "num_triggered": len(outcome.success),
        "test_accuracy": outcome.accuracy,
        "num_train": len(train.labels),
        **more,
    }


def filtered(
    work: Work, cell: Cell, poisoned: PoisonedDataset
) -> tuple[np.ndarray, dict[str, float]]:
    """Returns which examples a filter keeps, bool [N], and how right it is."""
    train = poisoned.dataset
    victim = fit(work, dataclasses.replace(cell, defense="none"), train, "none", poisoned)
    trusted = sources.load(work.config, cell.seed).validation
    found = FILTERS[cell.defense](work.model, victim.variables, train, trusted)
    flagged = np.asarray(found.is_poison)
    real = poisoned.attack_id == 1
    rates = {
        "poison_recall": float(flagged[real].mean()),
        "false_alarms": float(flagged[~real].mean()),
    }
    return ~flagged, rates


def fit(
    work: Work, cell: Cell, train: Dataset, defense: str, poisoned: PoisonedDataset | None = None
) -> TrainState:
    """Trains one network, or continues it, or restores it where it has finished."""
    recipe, splits = work.config.recipe, sources.load(work.config, cell.seed)
    checkpoints = Checkpoints(
        checkpoint_folder(work, cell),
        every=work.config.checkpoint_every,
        identity=f"{cell} {work.output.config}",
    )

    def report(epoch, metrics):
        chosen = metrics.pop("chosen", None)
        if chosen is not None and poisoned is not None:
            metrics["poison_recall"] = float(np.mean(chosen[poisoned.attack_id == 1]))
        work.output.log(cell.name, epoch, metrics)
        work.tell(
            f"{cell.name}: epoch {epoch + 1}/{recipe.epochs}, loss {metrics['loss']:.3f}",
            ahead=epoch + 1,
        )

    try:
        return training.fit(
            work.model, recipe, train, key=cell.key, checkpoints=checkpoints, report=report,
            defense=registry.make_defense(defense, work.config, work.model, splits),
        )  # fmt: skip
    finally:
        checkpoints.close()


def accuracy(work: Work, state: TrainState, seed: int) -> float:
    """Returns the share of test images that a network gets right."""
    test = sources.load(work.config, seed).test
    return network.accuracy(work.model, state.variables, test.images, test.labels)


def poisons(work: Work, cell: Cell) -> PoisonedDataset:
    """Returns the poisoned set of a cell from its archive, made now unless it is there."""
    config = work.config
    name = f"seed{cell.seed}-{cell.attack}-{cell.share:g}.npz"
    path = work.output.folder / "poisons" / name
    if not hosts.on_main(path.exists):
        train = sources.load(config, cell.seed).train
        clean = fit(work, Cell(cell.seed, "clean", 0.0, "none"), train, "none")
        victim = attacks.Victim(work.model, clean.variables)
        poisoned = attacks.implant(
            jax.random.fold_in(cell.key, 1),
            train,
            cell.share,
            registry.BACKDOORS[cell.attack].make(config, victim),
            target_class=config.target_class,
        )

        def save():
            path.parent.mkdir(exist_ok=True)
            attacks.save(path, poisoned, as_uint8=True)

        hosts.on_main(save)
    return hosts.on_all(lambda: attacks.load(path, num_classes=work.model.num_classes))


def checkpoint_folder(work: Work, cell: Cell) -> Path:
    """Returns where the checkpoints of a cell are."""
    return work.output.folder / "checkpoints" / cell.name


def check(config: Config, model: models.Classifier) -> None:
    """Raises ValueError for settings that would fail, or do nothing, only after work was done."""
    if not config.seeds or not config.attacks or not config.shares:
        raise ValueError("name at least one seed, one attack and one share")
    registry.check_names("attacks", config.attacks, registry.BACKDOORS)
    splits = sources.load(config, config.seeds[0])
    if config.target_class not in splits.train.labels:
        raise ValueError(f"target class {config.target_class} does not occur in the training set")
    for share in config.shares:
        if not 0 < share < 1 or round(share * len(splits.train.labels)) < 1:
            raise ValueError(
                f"a share of poisons must be in (0, 1) and at least one of the "
                f"{len(splits.train.labels)} training images, not {share}"
            )
    devices.check_divisible(config.recipe.batch_size, devices.data_mesh())
    steps_per_epoch(config.recipe, len(splits.train.labels))
    names = tuple(name for name in config.defenses if name not in FILTERS)
    sources.check_defenses(config, names, model, splits)
