"""Targeted attacks on networks trained from scratch (Table III of arXiv 2309.08549).

  python experiments/targeted.py --preset gm-laptop             # embedded slice, narrow ResNet, CPU
  python experiments/targeted.py --preset gm-paper --data-dir DIR
  python experiments/targeted.py --preset mp-laptop --num-targets 4

For each target: poisons crafted against surrogates of the attacker's own, shipped in 8 bits, and
for each defence a victim from new weights. The undefended victims come first, and their rate of
success is printed before any defence is trained: an attack that fails without one says nothing
about defences. The same command in the same --run-dir continues: it does what is missing and what
had failed. More --num-targets or other --defenses in that folder add to what is there.

At the scale `laptop` an attacker has twice the paper's budget and means each target for the class
that comes second: in short tries with the paper's budget too few targets were taken to compare
defences. Its work, in passes forward and backward of one image, of which an idle machine
of 2 cores makes about 1,300 a second:

  a victim, 26 epochs of 1,250 images                                              32,500
  GM, a target: 150 steps x 62 poisons x 2.5                                       23,000
  MP, a target: 25 steps x 4 surrogates x 2 batches of 125 images x 7             175,000
  MP, once: (36 + 25 x 4) epochs of 1,250 images                                  170,000
  HINT, EPIC, FRIENDS and ATDA, a victim: 1.1, 1.3, 2.2 and up to 5 times a victim's

so 20 targets of GM take 6 minutes, and their 20 victims 8 minutes without a defence, 9 with HINT,
11 with EPIC, 18 with FRIENDS and 42 with ATDA; four targets of MP 11 minutes (what was run of it
took twice as long). Victims are trained one after another: under `vmap` each would have filters of
its own, for which XLA's CPU backend has no fast convolution.
"""

import dataclasses
import functools
import hashlib
import time
from pathlib import Path
from typing import Any, Literal

import figures
import jax
import numpy as np
import run
import study
import tables
import untargeted

from jaxpoison import attacks, evaluation, models, training
from jaxpoison.attacks import MetaPoisonConfig, PoisonedDataset, TargetedAttack, Trials, Victim
from jaxpoison.core import devices, hosts
from jaxpoison.data import Dataset, Splits
from jaxpoison.defenses import Defense, EpicConfig, FatConfig, FriendsConfig, HintConfig
from jaxpoison.training import CIFAR10, Checkpoints

GATE = 0.5  # the least rate of success without a defence for which defences are worth comparing


@dataclasses.dataclass(frozen=True)
class Matching:
    """Settings of gradient matching."""

    num_steps: int = 250
    """Steps of each start."""
    restarts: int = 8
    """Random starts, of which the best is kept."""
    batch_size: int = 512
    """Most poisons in one pass."""


@dataclasses.dataclass(frozen=True)
class Config(study.Common):
    """Settings of one run; the same settings in the same folder continue it."""

    attack: Literal["gm", "mp"] = "gm"
    """Gradient matching or MetaPoison."""
    num_targets: int = 20
    """Targets, each with a class it is to be taken for, poisons, and victims of its own."""
    num_poisons: int = 490
    """Poisons for each target, of that class."""
    intended: Literal["random", "runner_up"] = "random"
    """The class that a target is to be taken for: any other, or the one that a network trained on
    clean data finds likeliest after the true one."""
    surrogates: int = 1
    """Networks that the attacker trains on clean data. MetaPoison trains its own besides."""
    gm: Matching = Matching()
    """Settings of gradient matching."""
    mp: MetaPoisonConfig = dataclasses.field(default_factory=MetaPoisonConfig)
    """Settings of MetaPoison."""
    defenses: tuple[str, ...] = ("none", "hint", "friends", "atda", "epic")
    """Defences to compare, by their names in `study.DEFENSES`; none is always run, and first."""
    seed: int = 0
    """Of the split, the surrogates, the choice of targets and poisons, and the victims."""

    def key(self, use: int) -> jax.Array:
        """Returns the PRNG key of one use; nothing is drawn from the same one twice."""
        return jax.random.fold_in(jax.random.key(self.seed), use)


@dataclasses.dataclass(eq=False, kw_only=True)
class Work(run.Work):
    """A run at work, of which epochs are done, with the network that victims train and the data."""

    config: Config
    model: models.Classifier
    splits: Splits


SURROGATE, CHOICE, CRAFT, VICTIM = range(4)
SELECTION = ("defenses", "num_targets")  # other ones may continue a run: they only choose cells


def experiment(config: Config) -> None:
    """Crafts all poisons, trains all victims, prints the table.

    Raises:
      RuntimeError: at the end, if cells failed; their errors are in the results.
    """
    settings = dataclasses.asdict(config)
    lasting = {name: value for name, value in settings.items() if name not in SELECTION}
    output = run.Run(config.run_dir, lasting)
    model = study.build_model(config)
    splits = study.load(config, config.seed)
    check(config, model, splits)
    names = ("none", *(name for name in config.defenses if name != "none"))
    with run.Meter(len(names) * config.num_targets * config.recipe.epochs) as meter:
        work = Work(config=config, output=output, meter=meter, model=model, splits=splits)
        asked = unpoisoned(work)
        for name in names:
            # One defence for all its victims, so that what it compiles serves them all.
            defense = study.DEFENSES[name](config, model, splits)
            for target in range(config.num_targets):
                asked.append(cell(work, name, target, defense))
                work.done += config.recipe.epochs
            if name == "none":
                run.say("\n" + gate(asked) + "\n")
    # Those of earlier runs in this folder, too.
    rows = sorted(output.rows(), key=place)
    most = 255 * attack_of(config).epsilon
    result = {
        "kind": "targeted",
        "source": splits.source,
        "attack": f"{config.attack.upper()} within ±{most:.3g}/255, {config.num_poisons} poisons",
        "gate": gate(rows),
    }
    written = {"rows": rows, "config": output.config, "environment": run.environment(), **result}
    table = f"{gate(rows)}\n\n{tables.table_III(written).markdown()}"
    run.say(table)
    output.write_result(rows, table, **result)
    hosts.on_main(lambda: draw_targets(work, rows))
    run.require_no_errors({row["cell"]: row for row in asked})


def draw_targets(work: Work, rows: list[dict[str, Any]]) -> None:
    """Draws up to five targets and what all victims see in them, as the paper's Figure 3 does."""
    rows = [row for row in rows if run.succeeded(row)]
    defenses = list(dict.fromkeys(row["defense"] for row in rows))
    judged = {name: {r["target"]: r for r in rows if r["defense"] == name} for name in defenses}
    shown = sorted(set.intersection(*map(set, judged.values())))[:5] if judged else []
    if not shown:
        return
    of_first = [judged[defenses[0]][target] for target in shown]
    images = work.splits.test.images[[row["target_id"] for row in of_first]]

    def told(name, what):
        return np.array([judged[name][target][what] for target in shown])

    seen = {
        tables.label(name): (told(name, "prediction"), told(name, "confidence"))
        for name in defenses
    }
    path = work.output.folder / "predictions.png"
    figures.predictions(
        path,
        Dataset(images, np.array([row["target_label"] for row in of_first])),
        seen,
        class_names=work.splits.class_names,
        title="Targets, and what victims see; red: what the attack wanted",
        intended=np.array([row["base_label"] for row in of_first]),
    )
    run.say(f"picture: {path}")


def place(row: dict[str, Any]) -> tuple[bool, bool, str]:
    """Returns what rows are sorted by: those without poisons first, then without a defence."""
    return row["defense"] != "clean", row["defense"] != "none", row["cell"]


def gate(rows: list[dict[str, Any]]) -> str:
    """Returns what undefended victims say of the attack's strength."""
    undefended = [row for row in rows if row["defense"] == "none" and run.succeeded(row)]
    if not undefended:
        return "No undefended victim was trained: the attack's strength is unknown."
    hits = sum(row["success"] for row in undefended)
    verdict = "strong enough" if hits >= GATE * len(undefended) else "weak: it tests no defence"
    chance = tables.success([row for row in rows if row["defense"] == "clean"])
    return (
        f"Strength: of undefended victims from new weights, {tables.success(undefended)} take the "
        f"target for the intended class: {verdict}. Without poisons, a network from new weights "
        f"does so for {chance}."
    )


def start(work: Work, name: str, target: int) -> dict[str, Any]:
    """Returns what a row tells of its cell, whatever becomes of it."""
    attack = work.config.attack
    label = f"{attack}-target{target:03d}-{name}"
    return {
        "cell": label, "attack": attack, "defense": name, "seed": work.config.seed, "target": target
    }  # fmt: skip


def unpoisoned(work: Work) -> list[dict[str, Any]]:
    """Returns a row for each target: what a network sees in it that was trained without poisons."""
    starts = [start(work, "clean", target) for target in range(work.config.num_targets)]
    recorded = [work.output.finished(row["cell"]) for row in starts]
    rows = [row for row in recorded if run.succeeded(row)]
    if len(rows) < len(starts):
        made = run.attempt(lambda: {"seen": without_poisons(work)})
        found = made.get("seen", [made] * len(starts))
        rows = [first | more for first, more in zip(starts, found, strict=True)]
        for row in rows:
            work.output.finish(row["cell"], row)
    return rows


def without_poisons(work: Work) -> list[dict[str, Any]]:
    """Trains a network from new weights on clean data and returns what it makes of each target."""
    numbers = 0, work.config.surrogates  # the first draws the targets; no attacker has the last
    drawing, judging = (surrogate(work, number) for number in numbers)
    trials, test = draw(work, drawing), work.splits.test
    shares = study.probabilities(*judging, test.images)
    accuracy = float(np.mean(shares.argmax(axis=1) == test.labels))
    return [
        judged(shares[target], int(test.labels[target]), int(base_label), int(target))
        | {"test_accuracy": accuracy, "num_train": len(work.splits.train.labels)}
        for target, base_label in zip(trials.target_ids, trials.base_labels, strict=True)
    ]


def judged(shares: np.ndarray, label: int, base_label: int, target_id: int) -> dict[str, Any]:
    """Returns what a network that gives a target these `shares`, [K], makes of it."""
    return {
        "success": bool(shares.argmax() == base_label),
        "prediction": int(shares.argmax()),
        "confidence": float(shares.max()),
        "intended_confidence": float(shares[base_label]),
        "target_label": label,
        "base_label": base_label,
        "target_id": target_id,
    }


def cell(work: Work, name: str, target: int, defense: Defense) -> dict[str, Any]:
    """Returns the row of one victim: recorded, or trained now, or with the `error` that it had."""
    first = start(work, name, target)
    row = work.output.finished(first["cell"])
    if not run.succeeded(row):
        row = first | run.attempt(lambda: victim(work, first["cell"], target, defense))
        work.output.finish(first["cell"], row)
    return row


def victim(work: Work, label: str, target_number: int, defense: Defense) -> dict[str, Any]:
    """Trains a victim from new weights and returns what became of it."""
    poisoned, epochs = poisons(work, target_number), work.config.recipe.epochs

    def report(_, epoch, metrics):
        chosen = metrics.pop("chosen", None)
        if chosen is not None:
            metrics["poison_recall"] = float(np.mean(chosen[poisoned.is_poisoned]))
        work.output.log(label, epoch, metrics)
        work.tell(
            f"{label}: epoch {epoch + 1}/{epochs}, loss {metrics['loss']:.3f}", ahead=epoch + 1
        )

    started = time.perf_counter()
    outcome = evaluation.scratch_outcome(
        work.config.key(VICTIM), work.model, work.config.recipe, [poisoned], work.splits.test,
        defense=defense, report=report,
    )  # fmt: skip
    target = poisoned.target
    assert target is not None
    return {
        **judged(outcome.probabilities[0], target.label, target.base_label, target.target_id),
        "test_accuracy": float(outcome.accuracy[0]),
        "objective": list(poisoned.config["objective"]),
        "num_train": len(poisoned.labels),
        "seconds": time.perf_counter() - started,
        "archive_sha256": hashlib.sha256(archive(work, target_number).read_bytes()).hexdigest(),
    }


def poisons(work: Work, target: int) -> PoisonedDataset:
    """Returns the poisoned set of a target from its archive, crafted first if that is missing."""
    config, path = work.config, archive(work, target)
    if not hosts.on_main(path.exists):
        surrogates = [surrogate(work, number) for number in range(config.surrogates)]
        trials = draw(work, surrogates[0])
        # MetaPoison's own surrogates are trained for all trials at once.
        wanted = [target]
        if config.attack == "mp":
            wanted = [n for n in range(config.num_targets) if not archive(work, n).exists()]

        def progress(name, count, total):
            work.tell(f"crafting {name} for {path.stem}, {count}/{total} poisons")

        sets = attacks.poison(
            config.key(CRAFT),
            work.splits.train,
            Trials(*(leaf[np.array(wanted)] for leaf in trials)),
            attack_of(config),
            surrogates,
            progress=progress,
        )

        source = {
            "dataset": config.dataset, "source": work.splits.source, "seed": config.seed
        }  # fmt: skip

        def save():
            path.parent.mkdir(exist_ok=True)
            for number, one in zip(wanted, sets, strict=True):
                one = one._replace(config=one.config | source)
                attacks.save(archive(work, number), one, as_uint8=True)

        hosts.on_main(save)
    return hosts.on_all(lambda: attacks.load(path, num_classes=work.model.num_classes))


def archive(work: Work, target: int) -> Path:
    """Returns where the poisoned set of a target is."""
    return work.output.folder / "poisons" / f"target{target:03d}.npz"


def surrogate(work: Work, number: int) -> Victim:
    """Returns a network of the attacker's, trained on clean data or restored."""
    recipe = work.config.recipe
    checkpoints = Checkpoints(
        work.output.folder / "checkpoints" / f"surrogate{number}",
        every=work.config.checkpoint_every,
        identity=f"surrogate {number} {work.output.config}",
    )

    def report(epoch, metrics):
        work.tell(
            f"surrogate {number}: epoch {epoch + 1}/{recipe.epochs}, loss {metrics['loss']:.3f}"
        )

    try:
        key = jax.random.fold_in(work.config.key(SURROGATE), number)
        state = training.fit(
            work.model, recipe, work.splits.train, key=key, checkpoints=checkpoints, report=report
        )
    finally:
        checkpoints.close()
    return Victim(work.model, state.variables)


def draw(work: Work, known: Victim) -> Trials:
    """Returns the trials; targets are test images that a network trained on clean data gets right.

    The first so many of them are the same, however many are drawn.
    """
    config, true = work.config, work.splits.test.labels
    shares = study.probabilities(*known, work.splits.test.images)
    others = np.where(np.arange(shares.shape[1]) == true[:, None], -1, shares)
    return attacks.draw_trials(
        config.key(CHOICE),
        work.splits.train,
        work.splits.test,
        num_trials=config.num_targets,
        num_poisons=config.num_poisons,
        base_class=others.argmax(axis=1) if config.intended == "runner_up" else None,
        target_ids=np.flatnonzero(shares.argmax(axis=1) == true),
    )


@functools.lru_cache(maxsize=1)  # one attack for all targets, so that it is compiled once
def attack_of(config: Config) -> TargetedAttack:
    """Returns the attack as configured; the victims' augmentation is known to the attacker."""
    if config.attack == "mp":
        train = study.load(config, config.seed).train
        return attacks.metapoison(train, epsilon=config.epsilon, config=config.mp)
    return attacks.gradient_matching(
        epsilon=config.epsilon,
        max_shift=config.recipe.max_shift,
        flip=config.recipe.flip,
        **dataclasses.asdict(config.gm),
    )


def check(config: Config, model: models.Classifier, splits: Splits) -> None:
    """Raises ValueError for settings that would fail only after work was done."""
    for name in ("num_targets", "num_poisons", "surrogates"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    most = np.bincount(splits.train.labels).max()
    if config.num_poisons > most:
        raise ValueError(
            f"{config.num_poisons} poisons of one class: the largest has {most} training images"
        )
    if config.num_targets > len(splits.test.labels):
        raise ValueError(
            f"{config.num_targets} targets, but there are {len(splits.test.labels)} test images"
        )
    devices.check_divisible(config.recipe.batch_size, devices.data_mesh())
    attack_of(config)
    study.check_defenses(config, config.defenses, model, splits)


GM_PAPER = Config(
    dataset="cifar10",
    run_dir=Path("runs/targeted-gm-paper"),
    recipe=CIFAR10,
    hint=HintConfig(),
    # The paper's, in L2: nearly no change. --fat.norm linf --fat.epsilon 0.031 is a fairer row.
    fat=FatConfig(epsilon=0.062),
    epsilon=16 / 255,
    checkpoint_every=10,
)
MP_PAPER = dataclasses.replace(
    GM_PAPER,
    attack="mp",
    run_dir=Path("runs/targeted-mp-paper"),
    recipe=dataclasses.replace(CIFAR10, max_shift=0.0, flip=False),
    epsilon=8 / 255,
    num_targets=5,
    num_poisons=500,
    mp=MetaPoisonConfig(color=0.04),
)
# Network and defences of the other grid, half of its images; five times the paper's share of
# poisons, half a class.
SHARED = ("data", "width", "blocks", "hint", "friends", "epic", "checkpoint_every")
GM_LAPTOP = dataclasses.replace(
    GM_PAPER,
    **{name: getattr(untargeted.CIFAR10_LAPTOP, name) for name in SHARED},
    run_dir=Path("runs/targeted-gm-laptop"),
    train_examples=1_250,
    recipe=dataclasses.replace(untargeted.CIFAR10_LAPTOP.recipe, batch_size=64),
    fat=FatConfig(epsilon=0.062, num_steps=4, tau_epochs=(11, 20)),
    epsilon=32 / 255,
    num_poisons=62,
    intended="runner_up",
    gm=Matching(num_steps=150, restarts=1),
)
MP_LAPTOP = dataclasses.replace(
    GM_LAPTOP,
    attack="mp",
    run_dir=Path("runs/targeted-mp-laptop"),
    recipe=dataclasses.replace(GM_LAPTOP.recipe, max_shift=0.0, flip=False),
    epsilon=16 / 255,
    num_targets=4,
    mp=MetaPoisonConfig(num_steps=25, surrogates=4, poisons_per_batch=31),
)
# Everything once, in minutes; says nothing about the attack or the defences.
QUICK = dataclasses.replace(
    GM_LAPTOP,
    run_dir=Path("runs/targeted-quick"),
    num_targets=2,
    recipe=dataclasses.replace(CIFAR10, epochs=6, milestones=(4,)),
    hint=HintConfig(schedule=(1, 2)),
    friends=FriendsConfig(epoch=1, num_steps=5),
    fat=FatConfig(epsilon=0.062, num_steps=2, tau_epochs=(2, 4)),
    epic=EpicConfig(start=1, every=1, last=4),
    gm=Matching(num_steps=20, restarts=1),
)
PRESETS = {
    "gm-paper": GM_PAPER,
    "mp-paper": MP_PAPER,
    "gm-laptop": GM_LAPTOP,
    "mp-laptop": MP_LAPTOP,
    "quick": QUICK,
}

if __name__ == "__main__":
    study.main(PRESETS, __doc__, experiment)
