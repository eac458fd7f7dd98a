"""HINT on CIFAR-10 under untargeted poisoning (Table II of arXiv 2309.08549).

  python experiments/cifar_hint.py --preset quick     # embedded slice, CPU
  python experiments/cifar_hint.py --preset paper --data-dir DIR \\
      --poison-ratios 0.6 1.0

Prints test accuracy with and without HINT next to the paper's, and draws what
HINT changed. The same command in the same --run-dir continues a killed run.
"""

from pathlib import Path

from common import study
from common.settings import Config

from jaxpoison.defenses import HintConfig
from jaxpoison.training import CIFAR10, Recipe

PAPER = Config(
    dataset="cifar10",
    run_dir=Path("runs/hint-cifar10-paper"),
    recipe=CIFAR10,
    hint=HintConfig(),
    epsilon=8 / 255,
    poison_ratios=(0.6, 1.0),
    trusted_epochs=400,
    checkpoint_every=10,
)
QUICK = Config(
    dataset="cifar10",
    run_dir=Path("runs/hint-cifar10-quick"),
    recipe=Recipe(epochs=26, milestones=(13, 21)),
    hint=HintConfig(schedule=(5, 10, 18)),
    # At 8/255, or with DURP's third in the mixture, so small a set is hurt by 8 points only.
    epsilon=16 / 255,
    attacks=("pgd", "dap"),
    data="embedded",
    width=8,
    blocks=(1, 1, 1),
    trusted_epochs=52,
)

if __name__ == "__main__":
    study.main({"paper": PAPER, "quick": QUICK}, __doc__)
