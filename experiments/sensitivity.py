"""HINT over its two settings, r and beta, at p = 0.6 (Table IV of
arXiv 2309.08549).

  python experiments/sensitivity.py --preset mnist-laptop
  python experiments/sensitivity.py --preset cifar10-paper --data-dir DIR

Scales, flags and resuming are those of `untargeted.py`. Beyond the paper's
values of r: 0.05 and 0.1, as its best value is its smallest, and the smallest r
that holds 90 % of all influence.
"""

import dataclasses
from pathlib import Path

import untargeted
from common import registry, study, tables

CELLS = (
    "none",
    *(name for name, entry in registry.DEFENSES.items() if entry.setting is not None),
    "hint_mass",
)
PRESETS = {
    name: dataclasses.replace(
        preset,
        run_dir=Path(f"runs/sensitivity-{name}"),
        poison_ratios=(tables.SENSITIVITY_RATIO,),
        defenses=CELLS,
        controls=(),
    )
    for name, preset in untargeted.PRESETS.items()
}

if __name__ == "__main__":
    study.main(PRESETS, __doc__)
