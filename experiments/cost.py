"""What each defense costs: training time over plain training (Table V of
arXiv 2309.08549).

  python experiments/cost.py              # narrow ResNet, embedded slice, CPU
  python experiments/cost.py --width 64 --data-dir DIR    # ResNet-18, CIFAR-10

All defenses take turns in one run, so that they see the same machine, and each
round begins with another. In each round, for each of them: the steps of one
epoch, one update (HINT), selection (EPIC) or making of noise (FRIENDS), and
what is done before every other epoch. Each over the steps of plain training in
the same round; medians over the rounds, added up over the paper's epochs:

    time = epochs * steps + updates * update + (epochs - updates) * other

EPIC's steps are counted as if it had dropped nothing. Next to it `counted`, a
floor: the passes of the defense over the network, at 1 for forward, 2 for
forward and backward to the pixels, and 3 for a training step. The same command
in the same --run-dir goes on after the last finished round.
"""

import argparse
from pathlib import Path

import untargeted
from common import cost

from jaxpoison import runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=["cifar10", "mnist"], default="cifar10")
    parser.add_argument("--width", type=runs.count, default=8, help="channels of the first stage")
    parser.add_argument("--blocks", type=runs.count, nargs="+", default=[2, 2, 2, 2])
    parser.add_argument("--examples", type=runs.count, help="use only the first so many")
    parser.add_argument("--data-dir", help="the whole set; default: the embedded slice")
    parser.add_argument("--rounds", type=runs.count, default=9, help="to time, after compiling")
    parser.add_argument(
        "--defenses", nargs="+", choices=cost.DEFENSES, default=cost.DEFENSES, metavar="NAME",
        help=f"some of {', '.join(cost.DEFENSES)}",
    )  # fmt: skip
    parser.add_argument("--run-dir", type=Path, default=Path("runs/cost-cifar10-laptop"))
    options = vars(parser.parse_args())
    run_dir = options.pop("run_dir")
    names = ("none", *(name for name in options["defenses"] if name != "none"))
    options |= {"defenses": names, "blocks": tuple(options["blocks"])}
    with runs.program(run_dir):
        paper = untargeted.PRESETS[f"{options['dataset']}-paper"]
        cost.measure(cost.Config(**options), paper, run_dir)


if __name__ == "__main__":
    main()
