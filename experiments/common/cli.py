"""The command line of the experiments: presets, and any setting of theirs as a flag."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import tyro

from jaxpoison import runs
from jaxpoison.core import hosts

# Whole numbers that may be zero; every other one is a count of something, and at least 1.
_FROM_ZERO = {
    "seed", "seeds", "schedule", "milestones", "tau_epochs", "late_epoch", "epoch", "start", "last",
    "base_class", "target_class",
}  # fmt: skip


def main(
    presets: Mapping[str, Any],
    description: str | None,
    experiment: Callable[[Any], None],
    names: str = "",
) -> None:
    """Runs a command line: `--preset NAME`, then any setting of the preset as a flag.

    Without a name it is the last preset on CPU, elsewhere the first. The flags of several processes
    are no part of the settings: a run may go on with others.

    Args:
      presets: settings (dataclasses with `run_dir`) by name.
      description: of the program.
      experiment: runs the settings.
      names: for --help, what the settings may name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets))
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    with runs.program():
        options, rest = parser.parse_known_args()
        by_hand = options.coordinator, options.num_processes, options.process_id
        joined = contextlib.nullcontext()
        if options.distributed or by_hand != (None, None, None):
            joined = hosts.processes(*by_hand)
        with joined:
            # Only now may the devices be asked for.
            on_cpu = jax.default_backend() == "cpu"
            preset = options.preset or list(presets)[-1 if on_cpu else 0]
            text = (
                f"{description}\n{names}\n\nPresets, which set all defaults: --preset\n"
                + "\n".join(f"  {name}{' (now)' * (name == preset)}" for name in presets)
                + "\n\nOn several hosts (docs/hosts.md): --distributed on SLURM, Kubernetes and\n"
                "TPU pods; elsewhere --coordinator ADDRESS:PORT --num-processes N\n"
                "--process-id I."
            )
            if {"-h", "--help"} & {*rest}:
                runs.say(text + "\n")  # tyro would join its lines
            default = presets[preset]
            config = tyro.cli(type(default), args=rest, default=default, description="")
            check_flags(config)
            with runs.program(config.run_dir):
                experiment(config)


def check_flags(config: Any, prefix: str = "--") -> None:
    """Raises ValueError for a setting that no experiment can use; names its flag."""
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            check_flags(value, f"{flag}.")
            continue
        least = 0 if field.name in _FROM_ZERO else 1
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and number < least:
                raise ValueError(f"{flag} must be at least {least}, not {number}")
        if field.name == "blocks" and not value:
            raise ValueError(f"{flag} must name at least one stage")
    if getattr(config, "data", None) == "embedded" and config.data_dir is not None:
        raise ValueError(
            f"--data-dir {config.data_dir} has no effect on the slice inside the package: "
            "add --data full, or leave it out"
        )
