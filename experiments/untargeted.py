"""The grid of HINT's Table II: all defenses and controls, over p and seeds, at
three scales.

  python experiments/untargeted.py --preset mnist-laptop   # embedded slice, CPU
  python experiments/untargeted.py --preset cifar10-laptop # and a narrow ResNet
  python experiments/untargeted.py --preset mnist-schedule # HINT at every epoch
  python experiments/untargeted.py --preset cifar10-short --data-dir DIR
  python experiments/untargeted.py --preset cifar10-paper --data-dir DIR \\
      --poison-ratios 0.6 1

The same command in the same --run-dir continues: it trains what is missing and
what had failed. Other --seeds, --poison-ratios, --defenses and --controls in
that folder add to what is there.

Work at the scale `laptop`, from an idle machine of 2 cores: an MNIST step on
128 images takes 75 ms, so a cell of 310 steps half a minute; FRIENDS and what
ends in `recommended` cost two and ATDA six of them, and crafting at p = 1 three
minutes. 51 cells a seed are then 50 minutes: 2.5 hours for three seeds.
CIFAR-10, one seed: 45 minutes. Seeds are trained one after another: under
`vmap` each would have filters of its own, which XLA's CPU backend has no fast
convolution for.
"""

import dataclasses
from pathlib import Path

from common import study
from common.settings import Config

from jaxpoison.attacks import DeepConfuseConfig
from jaxpoison.defenses import EpicConfig, FatConfig, FriendsConfig, HintConfig
from jaxpoison.training import CIFAR10, FAST, MNIST

RIVALS = ("none", "hint", "atda", "friends", "epic", "recommended")
CONTROLS = (
    "trusted_added",
    "head_refit",
    "random_noise",
    "hint_random",
    "hint_identity",
    "hint_sign",
    "hint_mass",
    "hint_released",
    "hint_recommended",
    "jpeg",
    "jpeg_recommended",
    "mixup",
    "cutmix",
)
EVERY_RATIO = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

CIFAR10_PAPER = Config(
    dataset="cifar10",
    run_dir=Path("runs/untargeted-cifar10-paper"),
    recipe=CIFAR10,
    hint=HintConfig(),
    epsilon=8 / 255,
    poison_ratios=EVERY_RATIO,
    defenses=RIVALS,
    controls=(*CONTROLS, "grey"),
    seeds=(0, 1, 2, 3, 4),
    trusted_epochs=400,
    checkpoint_every=10,
)
MNIST_PAPER = Config(
    dataset="mnist",
    run_dir=Path("runs/untargeted-mnist-paper"),
    recipe=MNIST,
    hint=HintConfig(schedule=(5, 15)),
    fat=FatConfig(tau_epochs=(12, 22)),
    epic=EpicConfig(start=5, every=2),
    epsilon=0.3,
    poison_ratios=EVERY_RATIO,
    defenses=RIVALS,
    controls=CONTROLS,
    seeds=(0, 1, 2, 3, 4),
    trusted_epochs=300,
)
# Half of the images, half of the epochs.
CIFAR10_HALF = dataclasses.replace(
    CIFAR10_PAPER,
    run_dir=Path("runs/untargeted-cifar10-half"),
    train_examples=24_500,
    recipe=dataclasses.replace(CIFAR10, epochs=40, milestones=(15, 25, 35)),
    hint=HintConfig(schedule=(2, 8, 20)),
    friends=FriendsConfig(epoch=2),
    fat=FatConfig(tau_epochs=(16, 30)),
    epic=EpicConfig(start=5, every=2, last=35),
    seeds=(0, 1, 2),
)
MNIST_HALF = dataclasses.replace(
    MNIST_PAPER,
    run_dir=Path("runs/untargeted-mnist-half"),
    train_examples=29_500,
    recipe=dataclasses.replace(MNIST, epochs=15, learning_rate=0.02),
    hint=HintConfig(schedule=(2, 8)),
    friends=FriendsConfig(epoch=2),
    fat=FatConfig(tau_epochs=(6, 11)),
    epic=EpicConfig(start=2, every=1),
    seeds=(0, 1, 2),
)
# All images, another network: one of over 90 % in minutes.
CIFAR10_FAST = dataclasses.replace(
    CIFAR10_PAPER,
    run_dir=Path("runs/untargeted-cifar10-fast"),
    network="fast",
    recipe=FAST,
    hint=HintConfig(schedule=(1, 2, 4)),
    friends=FriendsConfig(epoch=1),
    fat=FatConfig(tau_epochs=(3, 6)),
    epic=EpicConfig(start=2, every=1, last=7),
    poison_ratios=(0.0, 0.6, 0.8, 1.0),
    seeds=(0, 1),
    trusted_epochs=160,
    checkpoint_every=2,
)
# All images, half of that network's width, a third of its epochs: what two cores can do in hours,
# cells in the order of what decides most. One attack alone, that of Fowl et al. but for their
# augmentation and their many steps.
CIFAR10_SHORT = dataclasses.replace(
    CIFAR10_FAST,
    run_dir=Path("runs/untargeted-cifar10-short"),
    width=32,
    recipe=dataclasses.replace(FAST, epochs=6),
    hint=HintConfig(schedule=(1, 2, 3)),
    friends=FriendsConfig(epoch=1),
    fat=FatConfig(tau_epochs=(2, 4)),
    epic=EpicConfig(start=2, every=1, last=4),
    attacks=("dap",),
    dap_steps=10,
    poison_ratios=(1.0,),
    control_ratios=(1.0,),
    defenses=("none", "recommended", "hint", "hint_every"),
    controls=("jpeg", "jpeg75", "ueraser"),
    seeds=(0,),
    trusted_epochs=100,
)
# In no mixture by default: --attacks pgd dap dc. Twenty minutes of one core at p = 1 on MNIST, and
# the strongest attack there (results/untargeted-mnist-laptop-dc); on CIFAR-10 not yet measured.
DC_LAPTOP = DeepConfuseConfig(
    trials=6, batch_size=64, width=8, generator_rate=1e-3, classifier_rate=0.05
)
# A third of the epochs. At the paper's budget for CIFAR-10, and with DURP in either mixture, so
# few images are hardly hurt.
CIFAR10_LAPTOP = dataclasses.replace(
    CIFAR10_PAPER,
    run_dir=Path("runs/untargeted-cifar10-laptop"),
    data="embedded",
    width=8,
    blocks=(1, 1, 1),
    recipe=dataclasses.replace(CIFAR10, epochs=26, milestones=(10, 16, 23)),
    hint=HintConfig(schedule=(2, 5, 13)),
    friends=FriendsConfig(epoch=2),
    fat=FatConfig(tau_epochs=(11, 20)),
    epic=EpicConfig(start=3, every=1, last=23),
    epsilon=16 / 255,
    attacks=("pgd", "dap"),
    dc=DC_LAPTOP,
    poison_ratios=(0.0, 0.6, 1.0),
    seeds=(0,),
    trusted_epochs=130,  # as often as the recommended defense sees them
    checkpoint_every=5,
)
MNIST_LAPTOP = dataclasses.replace(
    MNIST_PAPER,
    run_dir=Path("runs/untargeted-mnist-laptop"),
    data="embedded",
    train_examples=4_000,
    recipe=dataclasses.replace(MNIST, epochs=10, learning_rate=0.03),
    hint=HintConfig(schedule=(2, 5)),
    friends=FriendsConfig(epoch=2),
    fat=FatConfig(tau_epochs=(4, 7)),
    epic=EpicConfig(start=2, every=1),
    attacks=("pgd", "dap"),
    dc=DC_LAPTOP,
    poison_ratios=(0.0, 0.4, 0.8, 1.0),
    seeds=(0, 1, 2),
    trusted_epochs=80,  # as often as the recommended defense sees them
)
# When to update, and what of HINT it is that helps; then what costs nothing.
MNIST_SCHEDULE = dataclasses.replace(
    MNIST_LAPTOP,
    run_dir=Path("runs/untargeted-mnist-schedule"),
    poison_ratios=(1.0,),
    control_ratios=(1.0,),
    defenses=("none", "hint", "hint_every", "recommended"),
    controls=(
        *("hint_every_all", "hint_every_random", "hint_every_identity", "hint_every_sign"),
        *("hint_every_recommended", "random_noise", "jpeg", "jpeg75", "bit_depth", "ueraser"),
        "projection",
    ),
)
PRESETS = {
    "cifar10-paper": CIFAR10_PAPER,
    "mnist-paper": MNIST_PAPER,
    "cifar10-half": CIFAR10_HALF,
    "mnist-half": MNIST_HALF,
    "cifar10-fast": CIFAR10_FAST,
    "cifar10-short": CIFAR10_SHORT,
    "cifar10-laptop": CIFAR10_LAPTOP,
    "mnist-laptop": MNIST_LAPTOP,
    "mnist-schedule": MNIST_SCHEDULE,
}

if __name__ == "__main__":
    study.main(PRESETS, __doc__)
