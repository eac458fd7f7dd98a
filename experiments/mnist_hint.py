"""HINT on MNIST under untargeted poisoning (Table II of arXiv 2309.08549).

  python experiments/mnist_hint.py --preset quick     # embedded slice, CPU
  python experiments/mnist_hint.py --preset paper --data-dir DIR \\
      --poison-ratios 0.0 1.0

Prints test accuracy with and without HINT next to the paper's, and draws what
HINT changed. The same command in the same --run-dir continues a killed run.
"""

from pathlib import Path

from common import study
from common.settings import Config

from jaxpoison.defenses import HintConfig
from jaxpoison.training import MNIST

PAPER = Config(
    dataset="mnist",
    run_dir=Path("runs/hint-mnist-paper"),
    recipe=MNIST,
    hint=HintConfig(schedule=(5, 15)),
    epsilon=0.3,
    poison_ratios=(0.0, 1.0),
    trusted_epochs=300,
)
QUICK = Config(
    dataset="mnist",
    run_dir=Path("runs/hint-mnist-quick"),
    recipe=MNIST,
    hint=HintConfig(schedule=(5, 15)),
    epsilon=0.3,
    data="embedded",
    train_examples=2000,
    attacks=("pgd", "dap"),  # with DURP's third in the mixture the slice is hardly hurt
    trusted_epochs=100,
)

if __name__ == "__main__":
    study.main({"paper": PAPER, "quick": QUICK}, __doc__)
