"""Several threats at once: untargeted poisons, flipped labels, a backdoor and
targeted poisons, each alone and all in one training set, and the defense that
holds against all of them.

  python experiments/mixed_threats.py --preset mnist-laptop  # embedded MNIST
  python experiments/mixed_threats.py --preset quick

Every network is judged by all that the attackers want: accuracy, the share of
triggered test images that are taken for the trigger's class, and targets that
are taken for the class that they were meant for. A defense is a name from
below, a filter, or both: `activation+recommended` drops what the filter flags
and trains on the rest as recommended. The same command in the same --run-dir
continues. A network takes half a minute, and a seed 42 of them.
"""

import dataclasses
from pathlib import Path

import untargeted
from common import mixed
from common.mixed import MixedConfig
from common.targeted import Matching

MNIST_LAPTOP = MixedConfig(
    **vars(untargeted.MNIST_SCHEDULE)
    | {
        "run_dir": Path("runs/mixed-mnist-laptop"),
        "defenses": (
            *("none", "hint_every", "recommended", "ueraser", "activation"),
            *("activation+recommended", "activation+ueraser"),
        ),
        "controls": (),
        "seeds": (0,),
        "gm": Matching(num_steps=150, restarts=1),
    }
)
QUICK = dataclasses.replace(
    MNIST_LAPTOP,
    run_dir=Path("runs/mixed-mnist-quick"),
    train_examples=1_000,
    dap_steps=10,
    num_targets=2,
    num_poisons=20,
    gm=dataclasses.replace(MNIST_LAPTOP.gm, num_steps=20),
    defenses=("none", "recommended", "activation+recommended"),
)
PRESETS = {"mnist-laptop": MNIST_LAPTOP, "quick": QUICK}

if __name__ == "__main__":
    mixed.main(PRESETS, __doc__)
