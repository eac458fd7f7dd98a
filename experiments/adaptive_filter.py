"""An attacker who knows the filter of arXiv 2403.13523, and pays a price for
being flagged.

  python experiments/transfer_filter.py --preset quick   # its extractor is used
  python experiments/adaptive_filter.py --run-dir runs/transfer-cifar10-quick

The poisons of a trial minimize the objective of bullseye polytope and that
price:

    |f(x^t) - mean_j f(x_j)| / |f(x^t)|  +  lambda mean_j relu(m_j / d0 + 0.01),
    m_j = d(X(x_j), C_b) - min_{k != b} d(X(x_j), C_k)

where m_j > 0 is what the filter flags. Centroids C are those of the clean
training images, which this attacker knows; d0 is the median distance of those
images to their own. lambda is swept, and bisected for each target: the smallest
one at which 95 % of its poisons pass. A filter is then charged with each target
that any lambda takes past it.

Writes adaptive-GAMMA.json into the run's folder.
"""

import argparse
from pathlib import Path

from transfer import adaptive

from jaxpoison import runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="of transfer_filter.py")
    parser.add_argument("--data-dir", help="of tensorflow-datasets; default as in that run")
    parser.add_argument("--share", type=float, default=0.24, help="p of the base class")
    parser.add_argument("--gamma", default="last_3", help="layers that the filter looks at")
    parser.add_argument("--steps", type=runs.count, default=200, help="of each crafting")
    options = parser.parse_args()
    with runs.program(options.run_dir):
        adaptive.study(options)


if __name__ == "__main__":
    main()
