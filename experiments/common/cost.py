"""What each defence costs: training time over plain training (Table V of arXiv 2309.08549).

  python experiments/cost.py                                # narrow ResNet, embedded slice, CPU
  python experiments/cost.py --width 64 --data-dir DIR      # ResNet-18, CIFAR-10

All defences take turns in one run, so that they see the same machine, and each round begins with
another. In each round, for each of them: the steps of one epoch, one update (HINT), selection
(EPIC) or making of noise (FRIENDS), and what is done before every other epoch. Each over the steps
of plain training in the same round; medians over the rounds, added up over the paper's epochs:

    time = epochs * steps + updates * update + (epochs - updates) * other

EPIC's steps are counted as if it had dropped nothing. Beside it `counted`, a floor: the passes of
the defence over the network, at 1 for forward, 2 for forward and backward to the pixels, and 3 for
a training step. The same command in the same --run-dir goes on after the last finished round.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import run
import study
import tables
import untargeted

from jaxpoison import data
from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset, Splits
from jaxpoison.defenses import Defense
from jaxpoison.models import Classifier
from jaxpoison.training import init_state
from jaxpoison.training._fit import epoch_order, train_step
from jaxpoison.training.hooks import with_ids
from jaxpoison.training.recipe import optimizer as optimizer_of

# By their names in study.DEFENSES: what the paper's Table V calls them.
DEFENSES = {
    "none": "none",
    "hint_r0.25": "HINT r=0.25",
    "hint_r0.5": "HINT r=0.5",
    "hint_r0.75": "HINT r=0.75",
    "hint_r1": "HINT r=1.0",
    "atda": "ATDA",
    "friends": "FRIENDS",
    "epic": "EPIC",
    "recommended": "recommended",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a measurement."""

    dataset: Literal["cifar10", "mnist"]
    width: int
    blocks: tuple[int, ...]
    examples: int | None
    data_dir: str | None
    rounds: int
    defenses: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=["cifar10", "mnist"], default="cifar10")
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 2, 2, 2])
    parser.add_argument("--examples", type=int, help="use only the first so many")
    parser.add_argument("--data-dir", help="the whole set; default: the embedded slice")
    parser.add_argument("--rounds", type=int, default=9, help="to time, after one to compile")
    parser.add_argument("--defenses", nargs="+", choices=list(DEFENSES), default=list(DEFENSES))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/cost"))
    options = vars(parser.parse_args())
    run_dir = options.pop("run_dir")
    # Plain training comes first: all else is told in its terms.
    names = ("none", *(name for name in options["defenses"] if name != "none"))
    options |= {"defenses": names, "blocks": tuple(options["blocks"])}
    try:
        measure(Config(**options), run_dir)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def measure(config: Config, run_dir: Path) -> None:
    """Times all rounds that are missing, and prints the table."""
    if config.rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {config.rounds}")
    output = run.Run(run_dir, dataclasses.asdict(config))
    settings = dataclasses.replace(
        untargeted.PRESETS[f"{config.dataset}-paper"], width=config.width, blocks=config.blocks
    )
    model = study.build_model(settings)
    splits = load(config)
    rounds = [output.finished(f"round{number}") for number in range(config.rounds)]
    clocks: dict[str, Clock] = {}
    if None in rounds:
        for name in config.defenses:
            cell = study.Cell(0, 0.0, name)
            defense = study.defense_of(settings, model, splits, cell)
            clocks[name] = Clock(settings, model, defense, splits.train, events(settings, name))
            clocks[name].round()
            run.say(f"{name}: compiled")
    for number, seconds in enumerate(rounds):
        if seconds is None:
            first = number % len(clocks)  # what comes after a dear one is no longer always the same
            order = [*config.defenses[first:], *config.defenses[:first]]
            seconds = {name: clocks[name].round() for name in order}
            rounds[number] = seconds
            output.finish(f"round{number}", seconds)
            run.say(f"round {number + 1} of {config.rounds}")
    sizes = len(splits.train.labels), len(splits.validation.labels)
    rows = [summarise(settings, name, rounds, sizes) for name in config.defenses]
    network = "the MNIST network"
    if config.dataset == "cifar10":
        network = f"ResNet of width {config.width}, blocks {'-'.join(map(str, config.blocks))}"
    source = f"{splits.source}, {sizes[0]:,} images, {network}, the paper's epochs."
    result = {
        "kind": "cost",
        "source": source,
        "num_rounds": config.rounds,
    }
    text = tables.table_V({"rows": rows, "environment": run.environment(), **result}).markdown()
    run.say("\n" + text)
    output.write_result(rows, text, **result)


class Clock:
    """One defence in training, of which `round` times an epoch's parts."""

    def __init__(
        self,
        settings: study.Config,
        model: Classifier,
        defense: Defense,
        train: Dataset,
        events: tuple[int, ...],
    ):
        recipe, self.mesh = settings.recipe, devices.data_mesh()
        self.defense, self.events, self.batch_size = defense, events, recipe.batch_size
        self.last_epoch = recipe.epochs - 1  # nothing is updated or selected before this one
        self.train = devices.replicate(with_ids(train), self.mesh)
        optimizer = optimizer_of(recipe)
        init_key, self.key, defense_key = jax.random.split(jax.random.key(0), 3)
        state = init_state(model, optimizer, init_key, train.images.shape[1:])
        self.state = devices.replicate(state, self.mesh)
        self.defense_state = defense.init(defense_key, self.train, recipe.epochs)
        self.run_steps = loops.scan(
            train_step(model, recipe, optimizer, self.mesh, on_batch=defense.on_batch)
        )
        if events:
            self._before(events[0])  # what the later ones rely on

    def round(self) -> dict[str, float]:
        """Returns seconds of an update, of what else precedes an epoch, and of its steps."""
        seconds = {"event": self._before(self.events[-1])[0] if self.events else 0.0}
        seconds["ordinary"], dataset = self._before(self.last_epoch)
        if len(dataset.labels) < len(self.train.labels):
            dataset = self.train
        order = epoch_order(self.key, 0, len(dataset.labels), self.batch_size)
        constants = dataset, self.defense_state, self.key
        start = time.perf_counter()
        self.state, metrics = self.run_steps(constants, self.state, order)
        jax.block_until_ready((self.state, metrics))
        seconds["steps"] = time.perf_counter() - start
        return seconds

    def _before(self, epoch):
        """Returns how long the defence takes before an epoch, and its training set."""
        start = time.perf_counter()
        self.defense_state, dataset, _ = self.defense.on_epoch(
            self.defense_state, epoch, self.state, self.train
        )
        self.defense_state, dataset = devices.replicate((self.defense_state, dataset), self.mesh)
        jax.block_until_ready((self.defense_state, dataset))
        return time.perf_counter() - start, dataset


def events(settings: study.Config, name: str) -> tuple[int, ...]:
    """Returns the epochs before which a defence does more than before others."""
    if name.startswith("hint"):
        return settings.hint.schedule
    if name == "friends":
        return (settings.friends.epoch,)
    if name == "epic":
        last = min(settings.epic.last, settings.recipe.epochs - 1)
        epochs = range(settings.epic.start, last + 1)
        return tuple(epoch for epoch in epochs if epoch % settings.epic.every == 0)
    return ()


def counted(settings: study.Config, name: str, num_train: int, num_trusted: int) -> float:
    """Returns the passes over the network of a whole training, over those of a plain one."""
    forward, plain = 1.0, 3.0 * settings.recipe.epochs
    num_events = len(events(settings, name))
    match name:
        case "atda":
            return 1 + 2 * settings.fat.num_steps * settings.recipe.epochs / plain
        case "friends":  # the clean prediction, the steps, the last prediction
            return 1 + (2 * forward + 2 * settings.friends.num_steps) / plain
        case "epic":
            return 1 + num_events * forward / plain
        case "recommended":
            return 1 + round(num_train / num_trusted) * num_trusted / num_train
        case "none":
            return 1.0
    ratio = float(name.removeprefix("hint_r"))
    return 1 + num_events * (forward + 2 * ratio) / plain


def summarise(
    settings: study.Config, name: str, rounds: list[Any], sizes: tuple[int, int]
) -> dict[str, Any]:
    """Returns the row of one defence, times in epochs of plain training in the same round."""

    def median(part):
        return statistics.median(of[name][part] / of["none"]["steps"] for of in rounds)

    event, ordinary, steps = map(median, ("event", "ordinary", "steps"))
    epochs, num_events = settings.recipe.epochs, len(events(settings, name))
    return {
        "defense": name,
        "paper_name": DEFENSES[name],
        "ratio": steps + (num_events * event + (epochs - num_events) * ordinary) / epochs,
        "counted": counted(settings, name, *sizes),
        "step_ratio": steps,
        "event_epochs": event,
        "num_events": num_events,
        "ordinary_epochs": ordinary,
        "plain_epoch_seconds": statistics.median(of["none"]["steps"] for of in rounds),
    }


def load(config: Config) -> Splits:
    """Returns the data to train on."""
    splits = (
        data.load_embedded(config.dataset)
        if config.data_dir is None
        else data.load(config.dataset, data_dir=config.data_dir)
    )
    return splits._replace(train=splits.train.take(slice(config.examples)))


if __name__ == "__main__":
    main()
