"""Poisons in transfer learning, and the filters that look for them
(arXiv 2403.13523).

  python experiments/transfer_filter.py --preset quick    # embedded slice, CPU
  python experiments/transfer_filter.py --preset laptop --data-dir DIR
  python experiments/transfer_filter.py --preset paper --data-dir DIR

The paper's set-up A: a network is trained on the first 4,800 images of each
class of CIFAR-10 and frozen; a head is trained on the next 50 of each class,
among which are clean-label poisons. An attack counts where it succeeds often
enough without a defense; then every filter looks for its poisons, and new heads
are trained on what is left. Last HINT: none, HINT, filter, both.

Every stage is kept in --run-dir, and the same command continues a killed run.
"""

import warnings
from pathlib import Path

from common import cli, registry
from transfer import study
from transfer.settings import Config, Crafting, Parts

from jaxpoison.filters import ContaminationWarning
from jaxpoison.training import Recipe

PAPER = Config(run_dir=Path("runs/transfer-cifar10-paper"))
# With the network inside the package, which has seen the same 48,000 images.
FAST = Config(
    run_dir=Path("runs/transfer-cifar10-fast"),
    networks=("cifar10-48k",),
    crafting=Crafting(bp_steps=400, gm_steps=150, gm_restarts=1),
    num_targets=20,
)
# Sized for two cores and three quarters of an hour.
LAPTOP = Config(
    run_dir=Path("runs/transfer-cifar10-laptop"),
    pretraining=Recipe(epochs=10, milestones=(5, 8)),
    networks=("narrow",),
    crafting=Crafting(bp_steps=200, gm_steps=150, gm_restarts=1),
    num_targets=20,
    test_examples=2000,
)
QUICK = Config(
    run_dir=Path("runs/transfer-cifar10-quick"),
    pretraining=Recipe(epochs=20, milestones=(10, 16), batch_size=64),
    data="embedded",
    parts=Parts(pretraining=230, train=30, trusted=20, targets=20),
    networks=("tiny",),
    crafting=Crafting(fc_steps=60, bp_steps=100, gm_steps=80, gm_restarts=1),
    epsilons_255=(16.0,),
    shares=(0.1, 0.5, 0.8),
    num_targets=8,
    base_class=None,
    target_class=None,
)
PRESETS = {"paper": PAPER, "fast": FAST, "laptop": LAPTOP, "quick": QUICK}

if __name__ == "__main__":
    # That poisons may be the majority of a class is what the table is about.
    warnings.simplefilter("ignore", ContaminationWarning)
    names = "Attacks:\n" + registry.listing(registry.TRANSFER)
    cli.main(PRESETS, __doc__, study.compare, names)
