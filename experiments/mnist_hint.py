"""HINT on MNIST under untargeted poisoning (Table II of arXiv 2309.08549).

  python experiments/mnist_hint.py --preset quick     # `make demo`
  python experiments/mnist_hint.py --preset paper --data-dir DIR \\
      --poison-ratios 0.0 1.0

Trains on clean and on poisoned images, without a defense, with HINT and with
what this library recommends, and on the trusted images alone; prints and draws
how many test images each network gets right, and what HINT changed. The same
command in the same --run-dir continues a killed run.

`quick` takes about 160 seconds on two cores: the paper's network on 2,000
images. HINT updates its noise as late in training as in the paper, and in a row
of its own before every epoch.
"""

import dataclasses
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
    # Chosen on training images that were held out.
    recipe=dataclasses.replace(MNIST, epochs=8, batch_size=64, learning_rate=0.02, momentum=0.9),
    hint=HintConfig(schedule=(1, 4)),  # as late as the paper's
    epsilon=0.3,
    data="embedded",
    train_examples=2000,
    attacks=("pgd", "dap"),  # with DURP's third in the mixture the slice is hardly hurt
    defenses=("none", "hint", "hint_every", "recommended"),
    dap_steps=10,
    trusted_epochs=16,
)

if __name__ == "__main__":
    study.main({"paper": PAPER, "quick": QUICK}, __doc__)
