"""HINT's own scale in one command: ResNet-18 of full width, 80 epochs, all of
CIFAR-10, the paper's budget of 8/255, at p = 1, 0.6 and 0.

  python experiments/paper_scale.py --data-dir DIR      # a GPU or TPU
  python experiments/paper_scale.py --data-dir DIR --parts mixture cost tap
  python experiments/paper_scale.py --preset tiny       # CPU, to try it

Parts, in the order of what decides most; each has a folder in --run-dir, and
report.md joins their tables:

  mixture    PGD + DAP + DURP in equal parts: none, HINT, HINT at every epoch,
             recommended, JPEG
  cost       Table V: what each defense adds to training time
  tap        Fowl et al.'s class-targeted poisons alone, at p = 1
  dap_l2     P1 of Tao et al. as published: L2 0.5, crafted on a VGG-16
  durp_l2    P5 of Tao et al. as published
  error_max  Fowl et al.'s error-maximizing poisons
  dc         DeepConfuse

The same command in the same --run-dir goes on where it was: at the last
checkpoint of the cell that was being trained. Counted for one H100 (989 TFLOP/s
in bfloat16, of which a tenth is to be expected at this size): a training takes
1.6e16 operations, some three minutes. The first two parts are ten trainings.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import untargeted
from common import cli, cost, study
from common.settings import Config

from jaxpoison import runs
from jaxpoison.core import hosts
from jaxpoison.core.files import write_text

Part = Literal["mixture", "cost", "tap", "dap_l2", "durp_l2", "error_max", "dc"]
DEFENSES = ("none", "hint", "hint_every", "recommended", "jpeg")
TITLES: dict[Part, str] = {
    "mixture": "PGD + DAP + DURP",
    "cost": "Cost",
    "tap": "TAP alone",
    "dap_l2": "DAP alone, as Tao et al. have it",
    "durp_l2": "DURP alone, as Tao et al. have it",
    "error_max": "Error-maximizing poisons alone",
    "dc": "DeepConfuse alone",
}


@dataclasses.dataclass(frozen=True)
class PaperScale:
    """What to run."""

    run_dir: Path
    """Folder for a folder of each part, and for report.md."""
    base: Config
    """Settings of all parts; of a part, some are its own (attacks, p, surrogate)."""
    parts: tuple[Part, ...] = ("mixture", "cost")
    """Which parts, in which order."""
    data_dir: str | None = None
    """Folder of tensorflow-datasets, or an .npz; default $TFDS_DATA_DIR."""
    cost_rounds: int = 3
    """Rounds of the measurement of cost."""


def main(config: PaperScale) -> None:
    """Runs the parts one after another; after each, report.md holds what there is.

    Raises:
      RuntimeError: at the end of a part, if cells of it failed.
    """
    config = runs.plain(config)
    for part in config.parts:
        runs.say(f"\n{TITLES[part]}")
        if part == "cost":
            measure_cost(config)
        else:
            study.study(settings(config, part))
        hosts.on_main(lambda: write_text(config.run_dir / "report.md", report(config)))
    runs.say(f"\nreport: {config.run_dir / 'report.md'}")


def settings(config: PaperScale, part: Part) -> Config:
    """Returns the settings of a grid."""
    own: dict = {"attacks": (part,), "poison_ratios": (1.0,), "surrogate": "same"}
    if part == "mixture":
        own = {"attacks": ("pgd", "dap", "durp"), "poison_ratios": (1.0, 0.6)}
    elif part in ("dap_l2", "durp_l2"):
        own["surrogate"] = "vgg16"
    return dataclasses.replace(
        config.base, run_dir=config.run_dir / part, data_dir=config.data_dir, **own
    )


def measure_cost(config: PaperScale) -> None:
    """Measures Table V on the network of the other parts."""
    base = config.base
    measured = cost.Config(
        dataset=base.dataset,
        width=base.width,
        blocks=base.blocks,
        examples=base.train_examples,
        data_dir=None if base.data == "embedded" else config.data_dir,
        rounds=config.cost_rounds,
        defenses=cost.DEFENSES,
    )
    cost.measure(measured, base, config.run_dir / "cost")


def report(config: PaperScale) -> str:
    """Returns the tables that there are, in Markdown."""
    parts = [(title, config.run_dir / part / "table.md") for part, title in TITLES.items()]
    texts = [f"## {title}\n\n{path.read_text()}" for title, path in parts if path.exists()]
    return "\n".join(["# The scale of the papers", "", *texts])


PAPER = PaperScale(
    run_dir=Path("runs/paper-scale"),
    base=dataclasses.replace(
        untargeted.CIFAR10_PAPER,
        defenses=DEFENSES,
        controls=(),
        seeds=(0,),
        bfloat16=True,
        checkpoint_every=4,
    ),
)
TINY = PaperScale(
    run_dir=Path("runs/paper-scale-tiny"),
    base=dataclasses.replace(
        untargeted.CIFAR10_LAPTOP,
        train_examples=256,
        trusted_examples=64,
        test_examples=100,
        width=4,
        blocks=(1, 1),
        recipe=dataclasses.replace(
            untargeted.CIFAR10_LAPTOP.recipe, epochs=2, batch_size=64, milestones=(1,)
        ),
        hint=dataclasses.replace(untargeted.CIFAR10_LAPTOP.hint, schedule=(1,)),
        fowl_steps=2,
        defenses=DEFENSES,
        controls=(),
        trusted_epochs=2,
    ),
    cost_rounds=1,
)

if __name__ == "__main__":
    cli.main({"paper": PAPER, "tiny": TINY}, __doc__, main)
