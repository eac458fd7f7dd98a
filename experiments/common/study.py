"""The comparison behind HINT's Table II: clean model, poisons, and every defense trained on them.

For each seed: train on clean data (the row p = 0, none; also the network that the attacks are
crafted against), craft the poisons, train each defense on each poisoned set, and train on the
trusted images alone. Each of these models is a cell: it resumes by itself, it is trained once, and
if it fails the others go on. `cifar_hint.py`, `mnist_hint.py`, `untargeted.py` and
`sensitivity.py` give the settings.
"""

import dataclasses
import functools
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import cli, figures, predictions, registry, sources, summary, tables
from common.settings import SELECTION, Cell, Config, Work
from jaxpoison import attacks, models, network, runs, training
from jaxpoison.core import devices, hosts
from jaxpoison.core.files import read_npz, replacing
from jaxpoison.data import Dataset, Splits, to_float
from jaxpoison.defenses import Defense
from jaxpoison.training import Checkpoints, Recipe, TrainState
from jaxpoison.training.hooks import with_ids
from jaxpoison.training.recipe import steps_per_epoch

NOISE_OF = ("hint_every", "hint")
"""Defenses whose noise is kept and drawn, the best first."""
NUM_KEPT = 64
SUMMARY_PICTURE = "summary.png"


def main(presets: Mapping[str, Config], description: str | None) -> None:
    """Runs the command line of a grid."""
    names = "Attacks:\n" + registry.listing(registry.UNTARGETED)
    names += "\n" + registry.listing(registry.DEFENSES)
    cli.main(presets, description, study, names)


def study(config: Config) -> None:
    """Trains every cell, writes and prints the table, and draws the pictures.

    Raises:
      RuntimeError: at the end, if cells failed; their errors are in the table and in the results.
    """
    config = runs.plain(config)
    settings = dataclasses.asdict(config)
    lasting = {name: value for name, value in settings.items() if name not in SELECTION}
    model = sources.build_model(config)
    output = runs.Run(config.run_dir, lasting, check=lambda: check(config, model))
    cells = [cell for seed in config.seeds for cell in cells_of(config, seed)]
    budgets = {cell: epochs_of(config, cell) for cell in cells}
    splits = sources.load(config, config.seeds[0])
    if not all(runs.succeeded(output.finished(cell.name)) for cell in cells):
        output.require_space(sources.checkpoint_bytes(model, splits))
    with runs.Meter(sum(budgets.values())) as meter:
        work = Work(config=config, output=output, meter=meter, model=model)
        for cell in cells:
            if not runs.succeeded(output.finished(cell.name)):
                row = runs.attempt(functools.partial(train_cell, work, cell))
                output.finish(cell.name, dataclasses.asdict(cell) | row)
            # Of the clean network poisons are crafted. FRIENDS keeps 600 MB for CIFAR-10. A kill
            # may have left some of it, even of a cell that had finished.
            if cell != Cell(cell.seed, 0.0, "none") and runs.succeeded(output.finished(cell.name)):
                hosts.on_main(functools.partial(runs.remove, checkpoint_folder(work, cell)))
            work.done += budgets[cell]
    rows = sorted(output.rows(), key=tables.place)  # those of earlier runs in this folder, too
    names = " + ".join(registry.UNTARGETED[name].label for name in config.attacks)
    attack = f"{names} {registry.budget(config)}"
    text = tables.comparison(rows, config.dataset, config.data, attack, splits.source)
    output.write_result(rows, text, kind="untargeted", source=splits.source, attack=attack)
    draw_pictures(work, rows)
    lines = summary.summary(rows, len(splits.test.labels), len(splits.validation.labels))
    if lines:
        draw_summary(work, lines)
    else:
        runs.say("\n" + text)
    for path in sorted(output.folder.glob("*.png")):
        runs.say(f"picture: {path}")
    if lines:
        runs.say(conclusion(work, lines))
    runs.require_no_errors({Cell.of(row).name: row for row in rows if Cell.of(row) in budgets})


def draw_summary(work: Work, lines: list[summary.Line]) -> None:
    """Draws accuracies next to a few images, their poison and HINT's noise."""
    noise = noise_of(work)
    if noise is None:
        return
    cell, kept = noise
    splits = sources.load(work.config, cell.seed)
    places = distinct(splits.train.labels[kept["rows"]])
    rows = kept["rows"][places]
    shown = figures.Changed(
        clean=np.asarray(to_float(splits.train.images[rows])),
        received=np.asarray(to_float(poisons(work, cell).dataset.images[rows])),
        noise=kept["noise"][places],
        names=[splits.class_names[label] for label in splits.train.labels[rows]],
    )
    path, title = work.output.folder / SUMMARY_PICTURE, summary.headline(lines)
    hosts.on_main(lambda: figures.summary(path, lines, shown, title))


def conclusion(work: Work, lines: list[summary.Line]) -> str:
    """Returns what a run ends with: a table, what one has just seen, and where to go from here."""
    config, folder = work.config, work.output.folder
    splits = sources.load(config, config.seeds[0])
    num_trusted = len(splits.validation.labels)
    caption = wrapped(
        f"{splits.source[0].upper()}{splits.source[1:]}: {max(config.poison_ratios):.0%} of "
        f"{len(splits.train.labels):,} training images poisoned {registry.budget(config)}, labels "
        "left as they were. Accuracy after the last epoch "
        f"on {len(splits.test.labels):,} test images, by which nothing was chosen."
    )
    story = wrapped(
        f"{summary.headline(lines)}. HINT adds noise of its own to the training images, so that "
        f"the loss on {num_trusted} trusted images falls; `recommended` makes these trusted images "
        "half of what is trained on."
    )
    further = wrapped(
        "Next: the same command with other --attacks, --defenses or --seeds in another --run-dir "
        "(--help lists them); `jaxpoison demo`, which finds planted faults in images; README.md "
        "for HINT in your own training."
    )
    return f"""
{summary.table(lines, caption).markdown()}
{story}

picture  {folder / SUMMARY_PICTURE}
table    {folder / "table.md"}, with the paper's figures

{further}"""


def wrapped(paragraph: str) -> str:
    """Returns a paragraph in lines that fit a terminal."""
    return textwrap.fill(paragraph, 80)


def noise_of(work: Work) -> tuple[Cell, dict[str, Any]] | None:
    """Returns a cell of HINT with what it changed most, None if there is none yet."""
    config = work.config
    for defense in NOISE_OF:
        for ratio in config.poison_ratios:
            cell = Cell(config.seeds[0], ratio, defense)
            path = noise_file(work, cell)
            if hosts.on_main(path.exists):
                return cell, hosts.on_all(functools.partial(read_npz, path, "HINT's noise"))
    return None


def distinct(labels: np.ndarray) -> np.ndarray:
    """Returns the first place of each of the first four labels to come."""
    _, first = np.unique(labels, return_index=True)
    return np.sort(first)[:4]


def cells_of(config: Config, seed: int) -> list[Cell]:
    """Returns the models of one seed, in an order in which each finds what it needs."""
    clean = Cell(seed, 0.0, "none")
    others = [
        Cell(seed, p, name)
        for p in config.poison_ratios
        for name in config.defenses + (config.controls if p in config.control_ratios else ())
    ]
    return [clean, *(cell for cell in others if cell != clean), Cell(seed, 0.0, "trusted")]


def epochs_of(config: Config, cell: Cell) -> int:
    """Returns how many epochs a cell trains."""
    return config.trusted_epochs if cell.defense == "trusted" else config.recipe.epochs


def train_cell(work: Work, cell: Cell) -> dict[str, Any]:
    """Trains one model and returns what became of it."""
    recipe, splits = work.config.recipe, splits_of(work, cell)
    train, is_poisoned = splits.train, np.zeros(len(splits.train.labels))
    if cell.defense == "trusted":
        train = splits.validation
        recipe = trusted_recipe(work.config, len(train.labels))
    elif cell.poison_ratio > 0:
        poisoned = poisons(work, cell)
        train, is_poisoned = poisoned.dataset, poisoned.is_poisoned

    def report(epoch, metrics):
        chosen = metrics.pop("chosen", None)
        if chosen is not None:
            metrics["poison_share_of_chosen"] = float(np.mean(is_poisoned[chosen]))
            if is_poisoned.any():
                hits = np.sum(is_poisoned.astype(bool) & chosen)
                metrics["poison_recall"] = float(hits / is_poisoned.sum())
        work.output.log(cell.name, epoch, metrics)
        work.tell(
            f"{cell.name}: epoch {epoch + 1}/{recipe.epochs}, loss {metrics['loss']:.3f}, "
            f"test accuracy {100 * metrics['test_accuracy']:.1f}%",
            ahead=epoch + 1,
        )

    state = fit(work, cell, train, recipe, report)
    shares = predictions.probabilities(work.model, state.variables, splits.test.images)
    predictions.save(prediction_file(work, cell), shares)
    if cell.defense in NOISE_OF and cell.poison_ratio > 0:
        keep_noise(work, cell)
    history = work.output.metrics(cell.name)
    return {
        "test_accuracy": history[-1]["test_accuracy"],
        "best_test_accuracy": max(line["test_accuracy"] for line in history),
        "train_seconds": sum(line["seconds"] for line in history),
        "defense_seconds": sum(line["defense_seconds"] for line in history),
        "num_train": len(train.labels),
        "epochs": recipe.epochs,
    }


def fit(work: Work, cell: Cell, train: Dataset, recipe: Recipe, report=None) -> TrainState:
    """Trains one cell, or continues it, or just restores it where it has finished."""
    splits = splits_of(work, cell)
    checkpoints = checkpoints_of(work, cell)
    try:
        return training.fit(
            work.model,
            recipe,
            train,
            key=cell.key,
            test=splits.test,
            defense=defense_of(work.config, work.model, splits, cell),
            checkpoints=checkpoints,
            report=report,
        )
    finally:
        checkpoints.close()


def splits_of(work: Work, cell: Cell) -> Splits:
    """Returns the data of a cell: those of its seed, with the trusted images of `work`, if any."""
    splits = sources.load(work.config, cell.seed)
    return splits if work.trusted is None else splits._replace(validation=work.trusted)


def checkpoints_of(work: Work, cell: Cell) -> Checkpoints:
    """Returns the checkpoints of a cell."""
    return Checkpoints(
        checkpoint_folder(work, cell),
        every=work.config.checkpoint_every,
        identity=f"{cell} {work.output.config}",
    )


def checkpoint_folder(work: Work, cell: Cell) -> Path:
    """Returns where the checkpoints of a cell are."""
    return work.output.folder / "checkpoints" / cell.name


def prediction_file(work: Work, cell: Cell) -> Path:
    """Returns where the predictions of a cell are."""
    return work.output.folder / "predictions" / f"{cell.name}.npz"


def defense_of(config: Config, model: models.Classifier, splits: Splits, cell: Cell) -> Defense:
    """Returns the defense of a cell."""
    name = "none" if cell.defense in ("trusted", "surrogate") else cell.defense
    return registry.make_defense(name, config, model, splits)


def draw_pictures(work: Work, rows: list[dict[str, Any]]) -> None:
    """Draws HINT's noise, accuracy over p, and predictions at the largest p (Figure 2)."""
    noise = noise_of(work)
    if noise is not None:
        draw_noise(work, *noise)
    rows = [row for row in tables.trained(rows) if row["defense"] in work.config.defenses]
    cells = [Cell.of(row) for row in rows]
    worst = max((cell.poison_ratio for cell in cells), default=0.0)
    if worst > 0:
        shown = [cell for cell in cells if cell.poison_ratio == worst]
        shown = [cell for cell in shown if cell.seed == shown[0].seed]
        draw_predictions(work, shown)
    if len({cell.poison_ratio for cell in cells}) > 2:
        curves = tables.curves(rows, work.config.dataset)
        path = work.output.folder / "accuracy.png"
        hosts.on_main(lambda: figures.accuracy(path, curves))


def draw_predictions(work: Work, cells: list[Cell]) -> None:
    """Draws test images with what each defense's network sees, as the paper's Figure 2 does.

    One image of each of five classes, the first that the first cell's network gets wrong.
    """
    splits = sources.load(work.config, cells[0].seed)

    def write():
        seen = {
            tables.label(cell.defense): predictions.read(prediction_file(work, cell))
            for cell in cells
        }
        wrong = np.flatnonzero(next(iter(seen.values()))[0] != splits.test.labels)
        _, first = np.unique(splits.test.labels[wrong], return_index=True)
        shown = wrong[np.sort(first)[:5]]
        figures.predictions(
            work.output.folder / "predictions.png",
            splits.test.take(shown),
            {name: (labels[shown], sure[shown]) for name, (labels, sure) in seen.items()},
            class_names=splits.class_names,
            title=f"Test images, and what networks trained at p = {cells[0].poison_ratio:g} see",
        )

    hosts.on_main(write)


def poisons(work: Work, cell: Cell) -> attacks.PoisonedDataset:
    """Returns the poisoned set of a cell, crafted now unless its archive is there."""
    path = work.output.folder / "poisons" / f"seed{cell.seed}-p{cell.poison_ratio:g}.npz"
    if not hosts.on_main(path.exists):
        config, splits = work.config, sources.load(work.config, cell.seed)
        victim = surrogate(work, cell.seed)

        def progress(name, count, total):
            work.tell(f"{path.stem}: crafting {name}, {count}/{total} images")

        poisoned = attacks.mixture(
            jax.random.fold_in(cell.key, 1),
            splits.train,
            cell.poison_ratio,
            [registry.make_attack(config, name) for name in config.attacks],
            victim,
            progress=progress,
        )
        more = {"dataset": config.dataset, "source": splits.source, "seed": cell.seed}
        poisoned = poisoned._replace(config=poisoned.config | more)

        def save():
            path.parent.mkdir(exist_ok=True)
            attacks.save(path, poisoned)

        hosts.on_main(save)
    return hosts.on_all(lambda: attacks.load(path, num_classes=work.model.num_classes))


def surrogate(work: Work, seed: int) -> attacks.Victim:
    """Returns the network that attacks are crafted against, trained on clean data."""
    splits, recipe = sources.load(work.config, seed), work.config.recipe
    if work.config.surrogate == "same":
        state = fit(work, Cell(seed, 0.0, "none"), splits.train, recipe)
        return attacks.Victim(work.model, state.variables)
    cell = Cell(seed, 0.0, "surrogate")
    work = dataclasses.replace(work, model=models.vgg16(width=work.config.width))

    def report(epoch, metrics):
        accuracy = 100 * metrics["test_accuracy"]
        work.tell(f"{cell.name}: epoch {epoch + 1}/{recipe.epochs}, test accuracy {accuracy:.1f}%")

    state = fit(work, cell, splits.train, recipe, report)
    return attacks.Victim(work.model, state.variables)


def keep_noise(work: Work, cell: Cell) -> None:
    """Keeps the noise on the examples that HINT changed most, and what the network sees in them."""
    splits, train = sources.load(work.config, cell.seed), poisons(work, cell).dataset
    defense = defense_of(work.config, work.model, splits, cell)
    state = fit(work, cell, train, work.config.recipe)
    checkpoints = checkpoints_of(work, cell)
    train = devices.replicate(with_ids(train), devices.data_mesh())
    like = (state, defense.init(jax.random.key(0), train, work.config.recipe.epochs))
    _, (state, (_, chosen, noise)) = checkpoints.restore(like)
    checkpoints.close()
    strongest = jnp.argsort(-jnp.mean(jnp.abs(noise), axis=(1, 2, 3)))[:NUM_KEPT]
    rows, added = np.asarray(chosen[strongest]), np.asarray(noise[strongest])
    received = np.asarray(to_float(train.images[rows]))
    before, after = (
        devices.to_host(network.predict(work.model, state.variables, images))
        for images in (received, perturbed(received, added))
    )
    path = noise_file(work, cell)

    def write():
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(file, rows=rows, noise=added, before=before, after=after)

    hosts.on_main(write)


def noise_file(work: Work, cell: Cell) -> Path:
    """Returns where the noise of a cell is."""
    return work.output.folder / "noise" / f"{cell.name}.npz"


def perturbed(received: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Returns what was trained on."""
    return np.clip(received + noise, 0, 1)


def draw_noise(work: Work, cell: Cell, kept: dict[str, Any]) -> None:
    """Draws examples that HINT changed, in the manner of the paper's Figure 1."""
    splits, train = sources.load(work.config, cell.seed), poisons(work, cell).dataset
    rows, noise = kept["rows"][:8], kept["noise"][:8]
    received = Dataset(np.asarray(to_float(train.images[rows])), train.labels[rows])
    hosts.on_main(
        lambda: figures.healthy_noise(
            work.output.folder / "noise.png",
            received,
            noise,
            perturbed(received.images, noise),
            seen=(kept["before"][:8], kept["after"][:8]),
            class_names=splits.class_names,
            beta=work.config.hint.beta,
        )
    )


def trusted_recipe(config: Config, num_trusted: int) -> Recipe:
    """Returns the recipe for the trusted images alone: same schedule, stretched."""
    stretch = config.trusted_epochs / config.recipe.epochs
    num_devices = devices.data_mesh().size
    return dataclasses.replace(
        config.recipe,
        epochs=config.trusted_epochs,
        batch_size=min(config.recipe.batch_size, max(1, num_trusted // num_devices) * num_devices),
        milestones=tuple(round(stretch * epoch) for epoch in config.recipe.milestones),
    )


def check(config: Config, model: models.Classifier) -> None:
    """Raises ValueError for settings that would fail, or do nothing, only after work was done."""
    if not config.seeds:
        raise ValueError("name at least one seed")
    for ratio in (*config.poison_ratios, *config.control_ratios):
        if not 0 <= ratio <= 1:
            raise ValueError(f"poison ratios p must be in [0, 1], not {ratio}")
    if not config.attacks and any(config.poison_ratios):
        raise ValueError("name at least one attack, or only the poison ratio 0")
    registry.check_names("attacks", config.attacks, registry.UNTARGETED)
    devices.check_divisible(config.recipe.batch_size, devices.data_mesh())
    if config.surrogate == "vgg16" and config.dataset != "cifar10":
        raise ValueError(f"--surrogate vgg16 is for cifar10, not {config.dataset}")
    for name in config.attacks:
        registry.make_attack(config, name)
    splits = sources.load(config, config.seeds[0])
    num_train = len(splits.train.labels)
    steps_per_epoch(config.recipe, num_train)
    recipe = trusted_recipe(config, len(splits.validation.labels))
    steps_per_epoch(recipe, len(splits.validation.labels))
    for ratio in config.poison_ratios:
        if ratio * num_train > 0 and round(ratio * num_train) < len(config.attacks):
            raise ValueError(
                f"p = {ratio:g} of {num_train} training images are {round(ratio * num_train)} "
                f"poisons, fewer than the {len(config.attacks)} attacks that share them: choose a "
                "larger p, or more training images"
            )
    sources.check_defenses(config, config.defenses + config.controls, model, splits)
