"""The command `jaxpoison`; `python -m jaxpoison` is the same."""

import argparse
from collections.abc import Sequence

import jaxpoison


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="jaxpoison",
        description="Influence functions, and defenses of training data against poisoning, in JAX.",
        epilog="The experiments are scripts of the source tree: python experiments/NAME.py --help.",
    )
    parser.add_argument("--version", action="version", version=jaxpoison.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "prepare",
        help="write a folder of CIFAR-10 or MNIST that data.load reads",
        add_help=False,
    )
    options, rest = parser.parse_known_args(arguments)
    assert options.command == "prepare"
    # Only now: --help and --version need not wait for JAX.
    from jaxpoison import runs
    from jaxpoison.data import prepare

    status = 0
    with runs.program():
        status = prepare.main(rest, "jaxpoison prepare")
    return status
