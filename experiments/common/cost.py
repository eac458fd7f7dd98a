"""Measures what each defense costs: training time over plain training; `cost.py` runs it."""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import jax

from common import registry, sources, tables
from common.settings import Common
from jaxpoison import data, runs
from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset, Splits
from jaxpoison.defenses import Defense
from jaxpoison.models import Classifier
from jaxpoison.training import init_state
from jaxpoison.training._fit import epoch_order, train_step
from jaxpoison.training.hooks import with_ids
from jaxpoison.training.recipe import optimizer as optimizer_of
from jaxpoison.training.recipe import steps_per_epoch

# Plain training comes first: all else is told in its terms. Then HINT, then its rivals.
DEFENSES = tuple(
    sorted(
        (name for name, entry in registry.DEFENSES.items() if entry.cost is not None),
        key=lambda name: (name != "none", registry.DEFENSES[name].setting is None),
    )
)


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


def measure(config: Config, paper: Common, run_dir: Path) -> None:
    """Times all rounds that are missing, and prints the table; `paper` has the settings."""
    settings = dataclasses.replace(paper, width=config.width, blocks=config.blocks)
    splits = load(config)
    output = runs.Run(
        run_dir,
        dataclasses.asdict(config),
        check=lambda: check(config, settings, splits),
    )
    model = sources.build_model(settings)
    rounds = [output.finished(f"round{number}") for number in range(config.rounds)]
    clocks: dict[str, Clock] = {}
    if None in rounds:
        for name in config.defenses:
            defense = registry.make_defense(name, settings, model, splits)
            clocks[name] = Clock(settings, model, defense, splits.train, events(settings, name))
            clocks[name].round()
            runs.say(f"{name}: compiled")
    for number, seconds in enumerate(rounds):
        if seconds is None:
            first = number % len(clocks)  # what comes after a dear one is no longer always the same
            order = [*config.defenses[first:], *config.defenses[:first]]
            seconds = {name: clocks[name].round() for name in order}
            rounds[number] = seconds
            output.finish(f"round{number}", seconds)
            runs.say(f"round {number + 1} of {config.rounds}")
    sizes = len(splits.train.labels), len(splits.validation.labels)
    rows = [summarize(settings, name, rounds, sizes) for name in config.defenses]
    network = "the MNIST network"
    if config.dataset == "cifar10":
        network = f"ResNet of width {config.width}, blocks {'-'.join(map(str, config.blocks))}"
    source = f"{splits.source}, {sizes[0]:,} images, {network}, the paper's epochs."
    result = {
        "kind": "cost",
        "source": source,
        "num_rounds": config.rounds,
    }
    text = tables.table_V({"rows": rows, "environment": runs.environment(), **result}).markdown()
    output.write_result(rows, text, **result)
    runs.say("\n" + text)


def check(config: Config, settings: Common, splits: Splits) -> None:
    """Raises ValueError for settings that would fail only after work was done."""
    if config.rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {config.rounds}")
    steps_per_epoch(settings.recipe, len(splits.train.labels))
    for name in config.defenses:
        cost_of(name)


class Clock:
    """One defense in training, of which `round` times an epoch's parts."""

    def __init__(
        self,
        settings: Common,
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
        """Returns how long the defense takes before an epoch, and its training set."""
        start = time.perf_counter()
        self.defense_state, dataset, _ = self.defense.on_epoch(
            self.defense_state, epoch, self.state, self.train
        )
        self.defense_state, dataset = devices.replicate((self.defense_state, dataset), self.mesh)
        jax.block_until_ready((self.defense_state, dataset))
        return time.perf_counter() - start, dataset


def cost_of(name: str) -> registry.Cost:
    """Returns what the registry knows of the cost of a defense.

    Raises:
      ValueError: if that is nothing.
    """
    cost = registry.DEFENSES[name].cost
    if cost is None:
        raise ValueError(f"{name} is not among what can be timed: {', '.join(DEFENSES)}")
    return cost


def events(settings: Common, name: str) -> tuple[int, ...]:
    """Returns the epochs before which a defense does more than before others."""
    return cost_of(name).events(settings)


def counted(settings: Common, name: str, num_train: int, num_trusted: int) -> float:
    """Returns the passes over the network of a whole training, over those of a plain one."""
    passes = cost_of(name).passes(settings, num_train, num_trusted)
    return 1 + passes / (3 * settings.recipe.epochs)


def summarize(
    settings: Common, name: str, rounds: list[Any], sizes: tuple[int, int]
) -> dict[str, Any]:
    """Returns the row of one defense, times in epochs of plain training in the same round."""

    def median(part):
        return statistics.median(of[name][part] / of["none"]["steps"] for of in rounds)

    event, ordinary, steps = map(median, ("event", "ordinary", "steps"))
    epochs, num_events = settings.recipe.epochs, len(events(settings, name))
    return {
        "defense": name,
        "paper_name": cost_of(name).paper,
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
