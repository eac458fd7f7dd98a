"""HINT on CIFAR-10 under untargeted poisoning (Table II of arXiv 2309.08549).

  python experiments/cifar_hint.py --preset quick     # `make demo-cifar`
  python experiments/cifar_hint.py --preset paper --data-dir DIR \\
      --poison-ratios 0.6 1.0

Trains on clean and on poisoned images, without a defense, with HINT and with
what this library recommends, and on the trusted images alone; prints and draws
how many test images each network gets right, and what HINT changed. The same
command in the same --run-dir continues a killed run.

`quick` takes about four minutes of processor time: a quarter of the width of
`models.fast_cnn` on 2,500 images, at twice the paper's budget. HINT updates its
noise as late in training as in the paper, and in a row of its own before every
epoch.
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
    # Chosen on training images that were held out.
    recipe=Recipe(
        epochs=12,
        batch_size=64,
        learning_rate=0.15,
        weight_decay=2e-3,
        milestones=(),
        max_shift=2.0,
        whole_pixels=True,
        schedule="one_cycle",
        decay_vectors=False,
        label_smoothing=0.1,
    ),
    hint=HintConfig(schedule=(1, 2, 6)),  # as late as the paper's
    epsilon=16 / 255,
    attacks=("pgd", "dap"),
    defenses=("none", "hint", "hint_every", "recommended"),
    data="embedded",
    network="fast",
    width=16,
    trusted_epochs=48,
)

if __name__ == "__main__":
    study.main({"paper": PAPER, "quick": QUICK}, __doc__)
