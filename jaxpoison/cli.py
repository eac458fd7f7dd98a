"""The command `jaxpoison`; `python -m jaxpoison` is the same."""

import argparse
from collections.abc import Sequence

import jaxpoison

COMMANDS = {
    "audit": "find what is poisoned, mislabeled or broken in a folder of images",
    "clean": "copy audited data without what was flagged",
    "explain": "name the training images behind one prediction, and train without them",
    "demo": "audit embedded images with planted faults, in a few minutes",
    "prepare": "write a folder of CIFAR-10 or MNIST that data.load reads",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="jaxpoison",
        description="Find poisoned training data, and defend against it, in JAX.",
        epilog="The experiments are scripts of the source tree: python experiments/NAME.py --help.",
    )
    parser.add_argument("--version", action="version", version=jaxpoison.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    options, rest = parser.parse_known_args(arguments)
    # Only now: --help and --version need not wait for JAX.
    from jaxpoison import runs

    status = 0
    with runs.program():
        if options.command == "prepare":
            from jaxpoison.data import prepare

            status = prepare.main(rest, "jaxpoison prepare")
        else:
            from jaxpoison.audit import command

            status = getattr(command, f"{options.command}_main")(rest)
    return status
