"""The comparison behind HINT's Table II: clean model, poisons, and every defence trained on them.

For each seed: train on clean data (the row p = 0, none; also the network that the attacks are
crafted against), craft the poisons, train each defence on each poisoned set, and train on the
trusted images alone. Each of these models is a cell: it resumes by itself, it is trained once, and
if it fails the others go on. `cifar_hint.py`, `mnist_hint.py`, `untargeted.py` and
`sensitivity.py` give the settings.
"""

import argparse
import contextlib
import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import figures
import jax
import jax.numpy as jnp
import numpy as np
import run
import tables
import tyro

from jaxpoison import attacks, data, defenses, models, network, training
from jaxpoison.attacks import DeepConfuseConfig
from jaxpoison.core import devices, hosts, loops
from jaxpoison.data import Dataset, Splits, to_float
from jaxpoison.defenses import (
    Defense,
    EpicConfig,
    FatConfig,
    FriendsConfig,
    HintConfig,
)
from jaxpoison.training import Checkpoints, Recipe, TrainState
from jaxpoison.training.hooks import with_ids


@dataclasses.dataclass(frozen=True)
class Common:
    """What any experiment with poisons and defences has to say."""

    dataset: Literal["cifar10", "mnist"]
    """Which images."""
    run_dir: Path
    """Folder for configuration, metrics, checkpoints, poisons, table and picture."""
    recipe: Recipe
    """How every model is trained."""
    hint: HintConfig
    """Settings of HINT."""
    epsilon: float
    """Attack budget: largest change of a pixel, in units of [0, 1]."""
    data: Literal["embedded", "full"] = "full"
    """The small slice inside the package, or the whole set (see --data-dir)."""
    data_dir: str | None = None
    """Folder of tensorflow-datasets, or an .npz; default $TFDS_DATA_DIR."""
    train_examples: int | None = None
    """Use only the first so many training images."""
    trusted_examples: int | None = None
    """Use only the first so many trusted images."""
    test_examples: int | None = None
    """Use only the first so many test images."""
    friends: FriendsConfig = dataclasses.field(default_factory=FriendsConfig)
    """Settings of FRIENDS."""
    fat: FatConfig = dataclasses.field(default_factory=FatConfig)
    """Settings of adversarial training."""
    epic: EpicConfig = dataclasses.field(default_factory=EpicConfig)
    """Settings of EPIC."""
    width: int = 64
    """Channels of the ResNet's first stage."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks in each of the ResNet's stages."""
    bfloat16: bool = False
    """Compute the body of the network in bfloat16."""
    checkpoint_every: int = 5
    """Epochs from one checkpoint to the next."""


@dataclasses.dataclass(frozen=True)
class Config(Common):
    """Settings of one run; the same settings in the same folder continue it."""

    attacks: tuple[Literal["pgd", "dap", "durp", "dc"], ...] = ("pgd", "dap", "durp")
    """Attacks that share the poisoned examples equally."""
    dc: DeepConfuseConfig = dataclasses.field(default_factory=DeepConfuseConfig)
    """How long the generator of DeepConfuse, dc, is trained."""
    poison_ratios: tuple[float, ...] = (1.0,)
    """Shares p of the training set that are poisoned; p = 0, none is always run."""
    defenses: tuple[str, ...] = ("none", "hint")
    """Defences to compare at each p, by their names in `DEFENSES`."""
    controls: tuple[str, ...] = ()
    """More of them, for `control_ratios` alone."""
    control_ratios: tuple[float, ...] = (0.0, 1.0)
    """Those of the poison ratios at which the controls are trained."""
    seeds: tuple[int, ...] = (0,)
    """One independent repetition each: split, poisons, initial weights, order."""
    trusted_epochs: int = 300
    """Epochs of the model that is trained on the trusted images alone."""


ATTACKS: dict[str, Callable[[Config], attacks.Attack]] = {
    "pgd": lambda config: attacks.pgd(epsilon=config.epsilon),
    "dap": lambda config: attacks.dap(epsilon=config.epsilon),
    "durp": lambda config: attacks.durp(epsilon=config.epsilon),
    "dc": lambda config: attacks.deep_confuse(epsilon=config.epsilon, config=config.dc),
}


# Which of a cell's settings may differ from run to run of a folder: they only choose cells.
SELECTION = (
    "defenses",
    "controls",
    "poison_ratios",
    "control_ratios",
    "seeds",
)


BY_MASS = {"ratio": 1.0, "mass": 0.9}  # the smallest r that holds 90 % of all influence


def _hint(**changes: Any) -> Callable[..., Defense]:
    """Returns HINT as configured, but for `changes`."""

    def make(config: Common, model: models.Classifier, splits: Splits) -> Defense:
        return defenses.hint(model, splits.validation, dataclasses.replace(config.hint, **changes))

    return make


def _hint_identity(config: Common, model: models.Classifier, splits: Splits) -> Defense:
    # Where curvature is small, (H + damping I)^-1 v is v / damping: steps of that length.
    gamma = config.hint.gamma / config.hint.damping
    return _hint(solver="identity", gamma=gamma)(config, model, splits)


def _hint_released(config: Common, model: models.Classifier, splits: Splits) -> Defense:
    # As often and on as many images as HINT beside it; their steps shrink from the last update on.
    released = dataclasses.replace(
        defenses.RELEASED_CODE,
        ratio=config.hint.ratio,
        schedule=config.hint.schedule,
        late_epoch=config.hint.schedule[-1],
    )
    return defenses.hint(model, splits.validation, released)


def _then_recommended(first: Callable[..., Defense]) -> Callable[..., Defense]:
    """Returns the defence `first`, and the recommended one after it."""

    def make(config: Common, model: models.Classifier, splits: Splits) -> Defense:
        then = defenses.recommended(splits.validation)
        return defenses.chain(first(config, model, splits), then)

    return make


def _friends(kind: Literal["bernoulli", "uniform", "gaussian"]) -> Callable[..., Defense]:
    return lambda config, model, splits: defenses.friends(
        model, dataclasses.replace(config.friends, random=kind)
    )


def _random_noise(config: Common, model: models.Classifier, splits: Splits) -> Defense:
    return defenses.fixed_noise(config.hint.beta, config.hint.ratio)


def _jpeg(config: Common, model: models.Classifier, splits: Splits) -> Defense:
    return defenses.jpeg()


NOISE_PICTURE = "noise.png"
RATIOS, BETAS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0), (0.031, 0.062, 0.125, 0.25)

DEFENSES: dict[str, Callable[[Common, models.Classifier, Splits], Defense]] = {
    "none": lambda config, model, splits: defenses.none(),
    "hint": _hint(),
    "atda": lambda config, model, splits: defenses.adversarial_training(model, config.fat),
    "friends": _friends("bernoulli"),
    "epic": lambda config, model, splits: defenses.epic(model, config.epic),
    "recommended": lambda config, model, splits: defenses.recommended(splits.validation),
    # Controls
    "trusted_added": lambda config, model, splits: defenses.add_trusted(splits.validation),
    "head_refit": lambda config, model, splits: defenses.refit_head(model, splits.validation),
    "random_noise": _random_noise,
    "hint_random": _hint(selection="random"),
    "hint_identity": _hint_identity,
    "hint_sign": _hint(step="sign"),
    "hint_mass": _hint(**BY_MASS),
    "hint_released": _hint_released,
    "hint_recommended": _then_recommended(_hint(**BY_MASS)),
    "friends_uniform": _friends("uniform"),
    "friends_gaussian": _friends("gaussian"),
    "jpeg": _jpeg,
    "jpeg_recommended": _then_recommended(_jpeg),
    "grey": lambda config, model, splits: defenses.gray(),
    "mixup": lambda config, model, splits: defenses.mixup(model.num_classes),
    "cutmix": lambda config, model, splits: defenses.cutmix(model.num_classes),
    # Table IV
    **{f"hint_r{ratio:g}": _hint(ratio=ratio) for ratio in RATIOS},
    **{f"hint_beta{beta:g}": _hint(beta=beta) for beta in BETAS},
}
"""From settings, network and data to the defence, by the names that cells go by. Of the data they
use the trusted part, and how many others there are."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Work(run.Work):
    """A run at work, of which epochs are done, with the network that its cells train."""

    config: Config
    model: models.Classifier


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model to train: one row of the table, for one seed."""

    seed: int
    poison_ratio: float
    defense: str

    @property
    def name(self) -> str:
        if self.defense == "trusted":
            return f"seed{self.seed}-trusted"
        return f"seed{self.seed}-p{self.poison_ratio:g}-{self.defense}"

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Cell":
        """Returns the cell that a row of results is about."""
        return cls(row["seed"], row["poison_ratio"], row["defense"])

    @property
    def key(self) -> jax.Array:
        """The same for all defences at one p: they differ in nothing but the defence."""
        return jax.random.fold_in(jax.random.key(self.seed), round(1000 * self.poison_ratio))


def main(
    presets: Mapping[str, Common],
    description: str | None,
    experiment: Callable[[Any], None] | None = None,
) -> None:
    """Runs the command line: `--preset NAME`, then any setting of the preset as a flag.

    Without a name it is the last preset on CPU, elsewhere the first.

    The flags of several processes are no part of the settings: a run may go on with others.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets))
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    options, rest = parser.parse_known_args()
    by_hand = options.coordinator, options.num_processes, options.process_id
    joined = contextlib.nullcontext()
    if options.distributed or by_hand != (None, None, None):
        joined = hosts.processes(*by_hand)
    try:
        with joined:
            # Only now may the devices be asked for.
            on_cpu = jax.default_backend() == "cpu"
            preset = options.preset or list(presets)[-1 if on_cpu else 0]
            description = (
                f"{description}\nDefences: {', '.join(DEFENSES)}.\n\n"
                f"--preset {{{','.join(presets)}}} sets all defaults (now: {preset}).\n\n"
                "On several hosts (docs/hosts.md): --distributed on SLURM, Kubernetes and TPU "
                "pods; elsewhere --coordinator ADDRESS:PORT --num-processes N --process-id I."
            )
            default, run_all = presets[preset], experiment or cast(Callable[[Any], None], study)
            run_all(tyro.cli(type(default), args=rest, default=default, description=description))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def study(config: Config) -> None:
    """Trains every cell, prints the table and draws the pictures.

    Raises:
      RuntimeError: at the end, if cells failed; their errors are in the table and in the results.
    """
    settings = dataclasses.asdict(config)
    lasting = {name: value for name, value in settings.items() if name not in SELECTION}
    output = run.Run(config.run_dir, lasting)
    model = build_model(config)
    check(config, model)
    cells = [cell for seed in config.seeds for cell in cells_of(config, seed)]
    budgets = {cell: epochs_of(config, cell) for cell in cells}
    source = load(config, config.seeds[0]).source
    with run.Meter(sum(budgets.values())) as meter:
        work = Work(config=config, output=output, meter=meter, model=model)
        for cell in cells:
            if not run.succeeded(output.finished(cell.name)):
                row = run.attempt(functools.partial(train_cell, work, cell))
                output.finish(cell.name, dataclasses.asdict(cell) | row)
                if cell != Cell(cell.seed, 0.0, "none") and run.succeeded(row):
                    # FRIENDS keeps 600 MB for CIFAR-10; of the clean network poisons are crafted.
                    folder = checkpoint_folder(work, cell)
                    hosts.on_main(functools.partial(shutil.rmtree, folder))
            work.done += budgets[cell]
    rows = sorted(output.rows(), key=tables.place)  # those of earlier runs in this folder, too
    attack = f"{' + '.join(config.attacks).upper()} within ±{255 * config.epsilon:.3g}/255"
    text = tables.comparison(rows, config.dataset, config.data, attack, source)
    run.say("\n" + text)
    output.write_result(rows, text, kind="untargeted", source=source, attack=attack)
    pictures(work, rows)
    for path in sorted(config.run_dir.glob("*.png")):
        run.say(f"picture: {path}")
    run.require_no_errors({Cell.of(row).name: row for row in rows if Cell.of(row) in budgets})


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
    recipe, splits = work.config.recipe, load(work.config, cell.seed)
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
    save_predictions(work, cell, state)
    if cell.defense == "hint" and cell.poison_ratio > 0:
        path = work.output.folder / NOISE_PICTURE
        if not hosts.on_main(path.exists):
            draw_noise(work, cell, path)
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
    splits = load(work.config, cell.seed)
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


def defense_of(config: Config, model: models.Classifier, splits: Splits, cell: Cell) -> Defense:
    """Returns the defence of a cell."""
    name = "none" if cell.defense == "trusted" else cell.defense
    return DEFENSES[name](config, model, splits)


def save_predictions(work: Work, cell: Cell, state: TrainState) -> None:
    """Saves what a trained network says of the test images, and how sure it is."""
    images = load(work.config, cell.seed).test.images
    shares = probabilities(work.model, state.variables, images)
    labels, confidences = shares.argmax(axis=1), shares.max(axis=1)

    def save():
        path = prediction_file(work, cell)
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(
            path, labels=labels.astype(np.uint8), confidences=confidences.astype(np.float16)
        )

    hosts.on_main(save)


def probabilities(model: models.Classifier, variables: Any, images: Any) -> np.ndarray:
    """Returns the share that a network gives to each class, float32 [N, K], on the host."""
    mesh = devices.data_mesh()
    predict = predictor(cast(Hashable, model), mesh)
    return devices.to_host(predict(variables, devices.replicate(images, mesh)))


@functools.lru_cache(maxsize=1)  # one function for all cells, so that it is compiled once
def predictor(model: Any, mesh: jax.sharding.Mesh) -> Callable[[Any, Any], Any]:
    """Returns `predict(variables, images) -> shares`, all on the devices."""

    def predict(variables, images):
        return jax.nn.softmax(jnp.asarray(model.apply(variables, to_float(images))))

    return loops.map_batches(predict, mesh=mesh)


def prediction_file(work: Work, cell: Cell) -> Path:
    """Returns where the predictions of a cell are."""
    return work.output.folder / "predictions" / f"{cell.name}.npz"


def pictures(work: Work, rows: list[dict[str, Any]]) -> None:
    """Draws accuracy over p, and predictions at the largest p (Figure 2)."""
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
    """Draws test images with what each defence's network sees, as the paper's Figure 2 does.

    One image of each of five classes, the first that the first cell's network gets wrong.
    """
    splits = load(work.config, cells[0].seed)

    def write():
        seen = {}
        for cell in cells:
            with np.load(prediction_file(work, cell)) as archive:
                seen[tables.label(cell.defense)] = archive["labels"], archive["confidences"]
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
        config, splits = work.config, load(work.config, cell.seed)
        state = fit(work, Cell(cell.seed, 0.0, "none"), splits.train, config.recipe)

        def progress(name, count, total):
            work.tell(f"{path.stem}: crafting {name}, {count}/{total} images")

        poisoned = attacks.mixture(
            jax.random.fold_in(cell.key, 1),
            splits.train,
            cell.poison_ratio,
            [ATTACKS[name](config) for name in config.attacks],
            attacks.Victim(work.model, state.variables),
            progress=progress,
        )
        more = {"dataset": config.dataset, "source": splits.source, "seed": cell.seed}
        poisoned = poisoned._replace(config=poisoned.config | more)

        def save():
            path.parent.mkdir(exist_ok=True)
            attacks.save(path, poisoned)

        hosts.on_main(save)
    return hosts.on_all(lambda: attacks.load(path, num_classes=work.model.num_classes))


def draw_noise(work: Work, cell: Cell, picture: Path) -> None:
    """Draws examples that HINT changed, in the manner of the paper's Figure 1."""
    splits, train = load(work.config, cell.seed), poisons(work, cell).dataset
    defense = defense_of(work.config, work.model, splits, cell)
    state = fit(work, cell, train, work.config.recipe)
    checkpoints = checkpoints_of(work, cell)
    train = devices.replicate(with_ids(train), devices.data_mesh())
    like = (state, defense.init(jax.random.key(0), train, work.config.recipe.epochs))
    _, (state, (_, chosen, noise)) = checkpoints.restore(like)
    checkpoints.close()
    strongest = jnp.argsort(-jnp.mean(jnp.abs(noise), axis=(1, 2, 3)))[:8]
    rows = np.asarray(chosen[strongest])
    received = Dataset(np.asarray(to_float(train.images[rows])), train.labels[rows])
    added = np.asarray(noise[strongest])
    perturbed = np.clip(received.images + added, 0, 1)
    before, after = (
        devices.to_host(network.predict(work.model, state.variables, images))
        for images in (received.images, perturbed)
    )
    hosts.on_main(
        lambda: figures.healthy_noise(
            picture,
            received,
            added,
            perturbed,
            seen=(before, after),
            class_names=splits.class_names,
            beta=work.config.hint.beta,
        )
    )


@functools.lru_cache(maxsize=1)  # the cells of a seed follow each other
def load(config: Common, seed: int) -> Splits:
    """Returns the data of one seed, read once for all its cells, by each process from its disk."""
    if config.data == "embedded":
        splits = data.load_embedded(config.dataset, seed=seed)
    else:
        splits = hosts.on_all(
            lambda: data.load(config.dataset, data_dir=config.data_dir, seed=seed)
        )
    sizes = {
        "train": config.train_examples,
        "validation": config.trusted_examples,
        "test": config.test_examples,
    }
    return splits._replace(
        **{part: getattr(splits, part).take(slice(size)) for part, size in sizes.items()}
    )


def build_model(config: Common) -> models.Classifier:
    """Returns the network of the paper for this data set, at the configured width."""
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    if config.dataset == "mnist":
        return models.mnist_cnn(dtype=dtype)
    return models.resnet18(width=config.width, blocks=config.blocks, dtype=dtype)


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
    """Raises ValueError for settings that would fail only after work was done."""
    if not config.seeds:
        raise ValueError("name at least one seed")
    for ratio in (*config.poison_ratios, *config.control_ratios):
        if not 0 <= ratio <= 1:
            raise ValueError(f"poison ratios p must be in [0, 1], not {ratio}")
    if not config.attacks and any(config.poison_ratios):
        raise ValueError("name at least one attack, or only the poison ratio 0")
    devices.check_divisible(config.recipe.batch_size, devices.data_mesh())
    for name in config.attacks:
        ATTACKS[name](config)
    splits = load(config, config.seeds[0])
    check_defenses(config, config.defenses + config.controls, model, splits)


def check_defenses(
    config: Common, names: Sequence[str], model: models.Classifier, splits: Splits
) -> None:
    """Raises ValueError for a defence that there is not, or that cannot be as configured."""
    unknown = [name for name in names if name not in DEFENSES]
    if unknown:
        raise ValueError(f"unknown defences: {', '.join(unknown)}; there are {', '.join(DEFENSES)}")
    with_hint = any(name.startswith("hint") for name in names)
    if with_hint and max(config.hint.schedule, default=0) >= config.recipe.epochs:
        raise ValueError(
            f"HINT's schedule {config.hint.schedule} goes beyond the {config.recipe.epochs} epochs"
        )
    for family, first in (("friends", config.friends.epoch), ("epic", config.epic.start)):
        if any(name.startswith(family) for name in names) and first >= config.recipe.epochs:
            raise ValueError(
                f"{tables.LABELS[family]} would begin at epoch {first} of {config.recipe.epochs}, "
                f"so never: set --{family}.{'epoch' if family == 'friends' else 'start'}"
            )
    for name in names:
        defense = DEFENSES[name](config, model, splits)
        defense.init(jax.random.key(0), with_ids(splits.train), config.recipe.epochs)
