"""Poisons, the filter and HINT where the extractor does not stay frozen
(arXiv 2403.13523 leaves that open).

  python experiments/transfer_filter.py --preset quick   # its extractor is used
  python experiments/fine_tuning.py --run-dir runs/transfer-cifar10-quick

The last b stages of the extractor are trained on the poisoned set together with
a new head, with BatchNorm's running statistics frozen or not. The poisons are
those of bullseye polytope, which reaches for the features of the extractor as
it was, and of gradient matching through all of its parameters. The filter has
trusted centroids of the last three layers, and takes its characteristic vectors
from the extractor as it was ("before"), from the network as it is, again before
each epoch ("each epoch"), or would take them from the network after so many
epochs ("found after"). HINT sees all trusted images. Rows are printed as they
are measured, and kept: the same command continues.

Writes fine_tuning.json into the run's folder.
"""

import argparse
import warnings
from pathlib import Path

from transfer import tuning

from jaxpoison import runs
from jaxpoison.filters import ContaminationWarning


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="of transfer_filter.py")
    parser.add_argument("--data-dir", help="of tensorflow-datasets; default as in that run")
    parser.add_argument("--attacks", choices=tuning.ATTACKS, nargs="+", default=tuning.ATTACKS)
    parser.add_argument("--share", type=float, default=0.5, help="p of the base class")
    parser.add_argument("--targets", type=runs.count, default=5, help="trials of each attack")
    parser.add_argument("--epochs", type=runs.count, default=20, help="of fine-tuning")
    parser.add_argument("--batch-size", type=runs.count, default=32, help="of fine-tuning")
    parser.add_argument("--depths", type=int, nargs="+", default=(0, 1, 9), help="b, largest: all")
    options = parser.parse_args()
    # That poisons may be the majority of a class is what is studied.
    warnings.simplefilter("ignore", ContaminationWarning)
    with runs.program(options.run_dir):
        tuning.study(options)


if __name__ == "__main__":
    main()
