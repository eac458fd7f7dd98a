"""How many trusted images HINT and its rivals need, and what wrong labels among
them do: an attacker who reaches the trusted set.

  python experiments/trusted_set.py --preset mnist-laptop  # embedded MNIST, CPU
  python experiments/trusted_set.py --preset quick

All training images are poisoned. Trusted sets of 10 to 1,000 images, the same
number of each class, then one of 300 images with 1, 5 and 10% of its labels
wrong, each the next class's: HINT with an update before every epoch, trusted
images as half of each epoch (`recommended`), and trusted images alone. The same
command in the same --run-dir continues. A network takes half a minute.
"""

import dataclasses
from pathlib import Path

import untargeted
from common import trusted
from common.trusted import TrustedConfig

MNIST_LAPTOP = TrustedConfig(
    **vars(untargeted.MNIST_SCHEDULE)
    | {
        "run_dir": Path("runs/trusted-mnist-laptop"),
        "defenses": ("hint_every", "recommended", "trusted"),
        "controls": (),
        "seeds": (0,),
    }
)
QUICK = dataclasses.replace(
    MNIST_LAPTOP,
    run_dir=Path("runs/trusted-mnist-quick"),
    train_examples=1_000,
    sizes=(10, 100),
    wrong_shares=(0.1,),
    wrong_size=100,
)
PRESETS = {"mnist-laptop": MNIST_LAPTOP, "quick": QUICK}

if __name__ == "__main__":
    trusted.main(PRESETS, __doc__)
