"""Backdoors, and what stops them: BadNets, blended, SIG, WaNet, label-consistent
poisons and Sleeper Agent, at 0.5 to 10% of the training set, against HINT, its
rivals and the detectors of backdoors.

  python experiments/backdoor.py --preset quick         # embedded MNIST, CPU
  python experiments/backdoor.py --preset mnist-laptop
  python experiments/backdoor.py --preset cifar10-short --data-dir DIR
  python experiments/backdoor.py --preset cifar10-fast --data-dir DIR

Success is the share of triggered test images of other classes that the network
takes for the target class; next to it the accuracy on clean test images. The
same command in the same --run-dir goes on. `mnist-laptop` trains a network in
some 15 seconds of processor time, and 130 of them for a seed.
"""

import dataclasses
from pathlib import Path

import untargeted
from common import backdoor
from common.backdoor import Config

from jaxpoison.defenses import AblConfig
from jaxpoison.training import MNIST

CIFAR10_FAST = Config(
    dataset="cifar10",
    run_dir=Path("runs/backdoor-cifar10-fast"),
    network="fast",
    # Anti-backdoor learning wants losses without smoothed labels.
    recipe=dataclasses.replace(untargeted.CIFAR10_FAST.recipe, label_smoothing=0.0),
    hint=untargeted.CIFAR10_FAST.hint,
    abl=AblConfig(turn=4),
    epsilon=40 / 255,
    checkpoint_every=2,
    seeds=(0, 1, 2),
)
# All images, half of that network's width: some 15 minutes of one core for each network.
CIFAR10_SHORT = dataclasses.replace(
    CIFAR10_FAST,
    run_dir=Path("runs/backdoor-cifar10-short"),
    width=32,
    recipe=dataclasses.replace(CIFAR10_FAST.recipe, epochs=10),
    abl=AblConfig(turn=2),
    shares=(0.1, 0.01),
    defenses=("none",),
    seeds=(0,),
)
MNIST_LAPTOP = Config(
    dataset="mnist",
    run_dir=Path("runs/backdoor-mnist-laptop"),
    data="embedded",
    train_examples=4_000,
    recipe=dataclasses.replace(MNIST, epochs=10, learning_rate=0.03),
    hint=untargeted.MNIST_LAPTOP.hint,
    abl=AblConfig(turn=2),
    epsilon=40 / 255,
)
QUICK = dataclasses.replace(
    MNIST_LAPTOP,
    run_dir=Path("runs/backdoor-mnist-quick"),
    train_examples=2_000,
    attacks=("badnets", "blended"),
    shares=(0.05,),
)
PRESETS = {
    "cifar10-fast": CIFAR10_FAST,
    "cifar10-short": CIFAR10_SHORT,
    "mnist-laptop": MNIST_LAPTOP,
    "quick": QUICK,
}

if __name__ == "__main__":
    backdoor.main(PRESETS, __doc__)
