"""How many trusted images a defense needs, and how wrong their labels may be.

`trusted_set.py` gives the settings. Poisons, initial weights and orders of a seed are those of
`study`; only the trusted images differ from cell to cell. They are the split's own, and after them
training images that are left over: the first so many of each class, so a smaller set is part of a
larger one. The labels that an attacker got wrong name the next class, as the poisons of DAP do.
"""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from common import cli, registry, sources, study, tables
from common.settings import SELECTION, Cell, Config, Work
from jaxpoison import runs
from jaxpoison.core import hosts
from jaxpoison.data import Dataset

NO_SET = {"num_trusted": 0, "wrong_share": 0.0}
SELECTED = (*SELECTION, "sizes", "wrong_shares")


@dataclasses.dataclass(frozen=True)
class TrustedConfig(Config):
    """Settings of one run; the same settings in the same folder continue it."""

    sizes: tuple[int, ...] = (10, 30, 100, 300, 1000)
    """Numbers of trusted images, each a multiple of the number of classes."""
    wrong_shares: tuple[float, ...] = (0.01, 0.05, 0.1)
    """Shares of the trusted labels that are wrong."""
    wrong_size: int = 300
    """Number of trusted images where some labels are wrong."""


@dataclasses.dataclass(frozen=True)
class TrustedCell(Cell):
    """One network to train."""

    num_trusted: int
    wrong_share: float

    @property
    def name(self) -> str:
        return f"seed{self.seed}-{self.defense}-{self.num_trusted}-{self.wrong_share:g}"


def main(presets: Mapping[str, TrustedConfig], description: str | None) -> None:
    """Runs the command line of the experiment."""
    names = "Attacks:\n" + registry.listing(registry.UNTARGETED)
    names += "\n" + registry.listing(registry.DEFENSES)
    cli.main(presets, description, experiment, names)


def experiment(config: TrustedConfig) -> None:
    """Trains every cell, writes and prints the table.

    Raises:
      RuntimeError: at the end, if cells failed; their errors are in the results.
    """
    config = runs.plain(config)
    settings = dataclasses.asdict(config)
    lasting = {name: value for name, value in settings.items() if name not in SELECTED}
    model = sources.build_model(config)
    output = runs.Run(config.run_dir, lasting, check=lambda: check(config))
    cells = [cell for seed in config.seeds for cell in cells_of(config, seed)]
    splits = sources.load(config, config.seeds[0])
    with runs.Meter(sum(study.epochs_of(config, cell) for cell in cells)) as meter:
        work = Work(config=config, output=output, meter=meter, model=model)
        for cell in cells:
            if not runs.succeeded(output.finished(cell.name)):
                one = work
                if isinstance(cell, TrustedCell):
                    one = dataclasses.replace(work, trusted=trusted_images(config, cell))
                row = runs.attempt(functools.partial(study.train_cell, one, cell))
                output.finish(cell.name, NO_SET | dataclasses.asdict(cell) | row)
            work.done += study.epochs_of(config, cell)
    for cell in cells:
        hosts.on_main(functools.partial(runs.remove, study.checkpoint_folder(work, cell)))
    rows = sorted(output.rows(), key=tables.trusted_place)
    names = " + ".join(registry.UNTARGETED[name].label for name in config.attacks)
    more = {
        "kind": tables.TRUSTED,
        "source": splits.source,
        "attack": f"{names} {registry.budget(config)}",
    }
    written = {"rows": rows, "config": output.config, "environment": runs.environment(), **more}
    text = tables.trusted(written).markdown()
    output.write_result(rows, text, **more)
    runs.say("\n" + text)
    runs.require_no_errors({str(tables.trusted_place(row)): row for row in rows})


def cells_of(config: TrustedConfig, seed: int) -> list[Cell]:
    """Returns the networks of one seed: without trusted images, then each set of them."""
    ratio = config.poison_ratios[0]
    sets = [(size, 0.0) for size in config.sizes]
    sets += [(config.wrong_size, share) for share in config.wrong_shares]
    return [
        Cell(seed, 0.0, "none"),  # also what the poisons are crafted against
        Cell(seed, ratio, "none"),
        *(TrustedCell(seed, ratio, name, *one) for one in sets for name in config.defenses),
    ]


def trusted_images(config: TrustedConfig, cell: TrustedCell) -> Dataset:
    """Returns the trusted images of a cell, some of their labels wrong.

    Raises:
      ValueError: if there are not enough images of a class.
    """
    splits = sources.load(dataclasses.replace(config, train_examples=None), cell.seed)
    own, spare = splits.validation, splits.train
    rest = slice(config.train_examples, None)
    images = np.concatenate([own.images, spare.images[rest]])
    labels = np.concatenate([own.labels, spare.labels[rest]])
    num_classes = len(splits.class_names)
    each = cell.num_trusted // num_classes
    rows = [np.flatnonzero(labels == label)[:each] for label in range(num_classes)]
    if min(map(len, rows)) < each:
        raise ValueError(
            f"a trusted set of {cell.num_trusted} takes {each} images of each class; there are "
            f"{min(map(len, rows))} of one, so choose smaller --sizes"
        )
    # Class by class within every place, so that no batch lacks a class.
    rows = np.stack(rows, axis=1).reshape(-1)
    given = labels[rows].copy()
    wrong = np.random.default_rng(cell.seed).permutation(len(given))
    wrong = wrong[: round(cell.wrong_share * len(given))]
    given[wrong] = (given[wrong] + 1) % num_classes
    return Dataset(images[rows], given)


def check(config: TrustedConfig) -> None:
    """Raises ValueError for settings that would fail, or do nothing, only after work was done."""
    if len(config.poison_ratios) != 1 or not config.seeds or not config.defenses:
        raise ValueError("name one poison ratio, at least one seed and one defense")
    registry.check_names("attacks", config.attacks, registry.UNTARGETED)
    known = registry.DEFENSES | {"trusted": registry.ROWS["trusted"]}
    registry.check_names("defenses", config.defenses, known)
    num_classes = len(sources.load(config, config.seeds[0]).class_names)
    for size in (*config.sizes, config.wrong_size):
        if size % num_classes:
            raise ValueError(f"--sizes must be multiples of the {num_classes} classes, not {size}")
    for share in config.wrong_shares:
        if not 0 <= share <= 1:
            raise ValueError(f"--wrong-shares must be in [0, 1], not {share:g}")
    for seed in config.seeds:
        for cell in cells_of(config, seed):
            if isinstance(cell, TrustedCell):
                trusted_images(config, cell)
