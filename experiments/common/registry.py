"""Every defense and every attack, once: the grids, the tables, the cost and --help read this.

Names are those under which results are recorded; they stay. Labels are for people.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from common.settings import Common, Config
from jaxpoison import attacks, defenses, models
from jaxpoison.attacks import Attack, BackdoorAttack, TargetedAttack
from jaxpoison.data import Dataset, Splits
from jaxpoison.defenses import Defense

Make = Callable[[Common, models.Classifier, Splits], Defense]
RATIOS, BETAS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0), (0.031, 0.062, 0.125, 0.25)
# The smallest r that holds 90 % of all influence.
BY_MASS: dict[str, Any] = {"ratio": 1.0, "mass": 0.9}


def no_events(config: Common) -> tuple[int, ...]:
    return ()


@dataclasses.dataclass(frozen=True)
class Cost:
    """What Table V knows of a defense.

    Attributes:
      paper: its name there.
      passes: passes over the network of a whole training beyond those of a plain one, in passes
        over the training set: 1 for forward, 2 for forward and backward to the pixels, 3 for a
        training step. A function of the settings, and of how many training and trusted images
        there are.
      events: the epochs before which it does more than before others.
    """

    paper: str
    passes: Callable[[Common, int, int], float]
    events: Callable[[Common], tuple[int, ...]] = no_events


@dataclasses.dataclass(frozen=True)
class DefenseEntry:
    """A defense, or a control of one.

    Attributes:
      name: in results, and on the command line.
      label: in tables.
      group: what it is there for.
      make: makes it from settings, network and data; of the data it uses the trusted part, and how
        many others there are. None for rows that are no cells of a grid.
      paper: its name in the paper's tables II and III; None if it is not in them.
      setting: for Table IV, the symbol of the setting that it varies, and the value.
      cost: for Table V.
    """

    name: str
    label: str
    group: Literal["defense", "control", "filter", "table IV", "reference"]
    make: Make | None
    paper: str | None = None
    setting: tuple[str, float] | None = None
    cost: Cost | None = None


@dataclasses.dataclass(frozen=True)
class AttackEntry:
    """An attack.

    Attributes:
      name: in results, and on the command line.
      label: in text.
      make: makes it from settings; see `UNTARGETED`, `TARGETED`, `TRANSFER` and `BACKDOORS`.
      note: for --help, what it does.
      clean_label: of a backdoor, whether its poisons are examples of the target class.
    """

    name: str
    label: str
    make: Callable[..., Any]
    note: str = ""
    clean_label: bool = False


def _hint(change: Callable[[Common], dict[str, Any]] | None = None, **changes: Any) -> Make:
    """Returns HINT as configured, but for `changes` and what `change` returns of the settings."""

    def make(config: Common, model: models.Classifier, splits: Splits) -> Defense:
        all_changes = changes if change is None else changes | change(config)
        settings = dataclasses.replace(config.hint, **all_changes)
        return defenses.hint(model, splits.validation, settings)

    return make


def _identity(config: Common) -> dict[str, Any]:
    # Where curvature is small, (H + damping I)^-1 v is v / damping: steps of that length.
    return {"solver": "identity", "gamma": config.hint.gamma / config.hint.damping}


def _quarters(config: Common) -> dict[str, Any]:
    return {"gamma": config.hint.beta / 4}  # four steps to the bound


EVERY: dict[str, Any] = {"schedule": (1,), "every": 1}


def _hint_released(config: Common, model: models.Classifier, splits: Splits) -> Defense:
    # As often and on as many images as HINT next to it; their steps shrink from the last update on.
    released = dataclasses.replace(
        defenses.RELEASED_CODE,
        ratio=config.hint.ratio,
        schedule=config.hint.schedule,
        every=config.hint.every,
        late_epoch=config.hint.updates(config.recipe.epochs)[-1],
    )
    return defenses.hint(model, splits.validation, released)


def _then_recommended(first: Make) -> Make:
    """Returns the defense `first`, and the recommended one after it."""

    def make(config: Common, model: models.Classifier, splits: Splits) -> Defense:
        then = defenses.recommended(splits.validation)
        return defenses.chain(first(config, model, splits), then)

    return make


def _friends(kind: Literal["bernoulli", "uniform", "gaussian"]) -> Make:
    return lambda config, model, splits: defenses.friends(
        model, dataclasses.replace(config.friends, random=kind)
    )


def _always(make: Callable[[], Defense]) -> Make:
    """Returns a defense that needs no settings, network or data."""
    return lambda config, model, splits: make()


def _epic_events(config: Common) -> tuple[int, ...]:
    last = min(config.epic.last, config.recipe.epochs - 1)
    epochs = range(config.epic.start, last + 1)
    return tuple(epoch for epoch in epochs if epoch % config.epic.every == 0)


def _hint_events(config: Common) -> tuple[int, ...]:
    return config.hint.updates(config.recipe.epochs)


def _hint_cost(ratio: float) -> Cost:
    return Cost(
        f"HINT r={ratio!r}",
        lambda config, *_: len(_hint_events(config)) * (1 + 2 * ratio),
        _hint_events,
    )


def _passes_of_trusted(config: Common, num_train: int, num_trusted: int) -> float:
    repeats = round(num_train / num_trusted)
    return 3 * config.recipe.epochs * repeats * num_trusted / num_train


def _ratio_entry(ratio: float) -> DefenseEntry:
    return DefenseEntry(
        f"hint_r{ratio:g}", f"HINT, r = {ratio:g}", "table IV", _hint(ratio=ratio),
        setting=("r", ratio), cost=_hint_cost(ratio) if ratio >= 0.25 else None,
    )  # fmt: skip


_ENTRIES = (
    DefenseEntry("clean", "none, no poisons", "reference", None),
    DefenseEntry(
        "none", "none", "defense", _always(defenses.none), "none",
        cost=Cost("none", lambda *_: 0.0),
    ),
    DefenseEntry("hint", "HINT", "defense", _hint(), "HINT"),
    DefenseEntry(
        "atda", "ATDA", "defense",
        lambda config, model, splits: defenses.adversarial_training(model, config.fat), "ATDA",
        cost=Cost("ATDA", lambda config, *_: 2 * config.fat.num_steps * config.recipe.epochs),
    ),
    DefenseEntry(
        "friends", "FRIENDS", "defense", _friends("bernoulli"), "FRIENDS",
        # The clean prediction, the steps, the last prediction.
        cost=Cost(
            "FRIENDS",
            lambda config, *_: 2 + 2 * config.friends.num_steps,
            lambda config: (config.friends.epoch,),
        ),
    ),
    DefenseEntry(
        "epic", "EPIC", "defense",
        lambda config, model, splits: defenses.epic(model, config.epic), "EPIC",
        cost=Cost("EPIC", lambda config, *_: len(_epic_events(config)), _epic_events),
    ),
    DefenseEntry(
        "recommended", "recommended", "defense",
        lambda config, model, splits: defenses.recommended(splits.validation),
        cost=Cost("recommended", _passes_of_trusted),
    ),
    DefenseEntry(
        "trusted_added", "trusted set added", "control",
        lambda config, model, splits: defenses.add_trusted(splits.validation),
    ),
    DefenseEntry(
        "head_refit", "head refit on the trusted set", "control",
        lambda config, model, splits: defenses.refit_head(model, splits.validation),
    ),
    DefenseEntry(
        "random_noise", "random noise of HINT's size", "control",
        lambda config, model, splits: defenses.fixed_noise(config.hint.beta, config.hint.ratio),
    ),
    DefenseEntry(
        "hint_random", "HINT, random selection", "control", _hint(selection="random")
    ),
    DefenseEntry("hint_identity", "HINT, identity for H⁻¹", "control", _hint(_identity)),
    DefenseEntry("hint_every", "HINT, at every epoch", "control", _hint(**EVERY)),
    DefenseEntry(
        "hint_every_all", "HINT, at every epoch, r = 1", "control", _hint(**EVERY, ratio=1.0)
    ),
    DefenseEntry(
        "hint_every_random", "HINT, at every epoch, random selection", "control",
        _hint(**EVERY, selection="random"),
    ),
    DefenseEntry(
        "hint_every_identity", "HINT, at every epoch, identity for H⁻¹", "control",
        _hint(_identity, **EVERY),
    ),
    DefenseEntry(
        "hint_every_sign", "HINT, at every epoch, sign of the map", "control",
        _hint(_quarters, **EVERY, step="sign"),
    ),
    DefenseEntry(
        "hint_every_recommended", "HINT, at every epoch, + recommended", "control",
        _then_recommended(_hint(**EVERY)),
    ),
    DefenseEntry("hint_sign", "HINT, sign of the map", "control", _hint(step="sign")),
    DefenseEntry("hint_mass", "HINT, r by 90 % of influence", "control", _hint(**BY_MASS)),
    DefenseEntry(
        "hint_released", "HINT, settings of the authors' code", "control", _hint_released
    ),
    DefenseEntry(
        "hint_recommended", "HINT, r by 90 % of influence, + recommended", "control",
        _then_recommended(_hint(**BY_MASS)),
    ),
    DefenseEntry("friends_uniform", "FRIENDS, uniform noise", "control", _friends("uniform")),
    DefenseEntry("friends_gaussian", "FRIENDS, Gaussian noise", "control", _friends("gaussian")),
    DefenseEntry("jpeg", "JPEG, quality 10", "control", _always(defenses.jpeg)),
    DefenseEntry(
        "jpeg75", "JPEG, quality 75", "control", _always(functools.partial(defenses.jpeg, 75))
    ),
    DefenseEntry(
        "jpeg_recommended", "JPEG, quality 10, + recommended", "control",
        _then_recommended(_always(defenses.jpeg)),
    ),
    DefenseEntry("grey", "gray-scale", "control", _always(defenses.gray)),
    DefenseEntry("bit_depth", "two bits a channel", "control", _always(defenses.bit_depth)),
    DefenseEntry(
        "ueraser", "UEraser-Max", "control",
        lambda config, model, splits: defenses.ueraser(model),
    ),
    DefenseEntry(
        "projection", "orthogonal projection", "control",
        _always(defenses.orthogonal_projection),
    ),
    DefenseEntry(
        "abl", "anti-backdoor learning", "control",
        lambda config, model, splits: defenses.anti_backdoor(model, config.abl),
    ),
    DefenseEntry("spectral", "spectral signatures", "filter", None),
    DefenseEntry("spectre", "SPECTRE", "filter", None),
    DefenseEntry("activation", "activation clustering", "filter", None),
    DefenseEntry("layers", "clusters over all layers", "filter", None),
    DefenseEntry("attribution", "trusted attribution", "filter", None),
    DefenseEntry(
        "mixup", "MixUp", "control",
        lambda config, model, splits: defenses.mixup(model.num_classes),
    ),
    DefenseEntry(
        "cutmix", "CutMix", "control",
        lambda config, model, splits: defenses.cutmix(model.num_classes),
    ),
    DefenseEntry("trusted", "trusted images alone", "reference", None),
    *(_ratio_entry(ratio) for ratio in RATIOS),
    *(
        DefenseEntry(
            f"hint_beta{beta:g}", f"HINT, β = {beta:g}", "table IV", _hint(beta=beta),
            setting=("β", beta),
        )
        for beta in BETAS
    ),
)  # fmt: skip
ROWS = {entry.name: entry for entry in _ENTRIES}
"""All rows that a table may have, in their order."""
DEFENSES = {name: entry for name, entry in ROWS.items() if entry.make is not None}
"""Those that can be trained."""
FILTERS = {name: entry for name, entry in ROWS.items() if entry.group == "filter"}
"""Those that drop examples before training; of `backdoor.py` alone."""

UNTARGETED = {
    entry.name: entry
    for entry in (
        AttackEntry(
            "pgd", "PGD", lambda config: attacks.pgd(epsilon=config.epsilon),
            "adversarial examples away from the label",
        ),
        AttackEntry(
            "dap", "DAP", lambda config: attacks.dap(
                epsilon=config.epsilon, num_steps=config.dap_steps
            ),
            "adversarial examples of the next class",
        ),
        AttackEntry(
            "dap_l2", "P1", lambda config: attacks.dap(
                epsilon=config.epsilon_l2, norm="l2", num_steps=config.dap_steps
            ),
            "DAP as Tao et al. have it, within --epsilon-l2",
        ),
        AttackEntry(
            "tap", "TAP", lambda config: attacks.class_targeted(
                epsilon=config.epsilon, num_steps=config.fowl_steps
            ),
            "DAP through random augmentation, in many small steps",
        ),
        AttackEntry(
            "error_max", "error-maximizing", lambda config: attacks.error_max(
                epsilon=config.epsilon, num_steps=config.fowl_steps
            ),
            "PGD through random augmentation, in many small steps",
        ),
        AttackEntry(
            "durp_l2", "P5",
            lambda config: attacks.durp(epsilon=config.epsilon_l2, norm="l2"),
            "DURP as Tao et al. have it, within --epsilon-l2",
        ),
        AttackEntry(
            "durp", "DURP", lambda config: attacks.durp(epsilon=config.epsilon),
            "random noise, the same for all images of a class",
        ),
        AttackEntry(
            "dc",
            "DC",
            lambda config: attacks.deep_confuse(epsilon=config.epsilon, config=config.dc),
            "DeepConfuse, a generator trained to confuse; slow",
        ),
    )
}  # fmt: skip
"""`make(config)` returns an Attack on networks trained from scratch."""


def _gradient_matching(config: Any, train: Dataset) -> TargetedAttack:
    # The victims' augmentation is known to the attacker.
    return attacks.gradient_matching(
        epsilon=config.epsilon,
        max_shift=config.recipe.max_shift,
        flip=config.recipe.flip,
        **dataclasses.asdict(config.gm),
    )


def _metapoison(config: Any, train: Dataset) -> TargetedAttack:
    return attacks.metapoison(train, epsilon=config.epsilon, config=config.mp)


TARGETED = {
    "gm": AttackEntry("gm", "GM", _gradient_matching),
    "mp": AttackEntry("mp", "MP", _metapoison),
}
"""`make(config, train)` returns a TargetedAttack on networks trained from scratch."""


def _head_gradient_matching(epsilon: float, crafting: Any) -> TargetedAttack:
    return attacks.head_gradient_matching(
        epsilon=epsilon,
        num_steps=crafting.gm_steps,
        restarts=crafting.gm_restarts,
        draws=attacks.Draws(),
    )


TRANSFER = {
    entry.name: entry
    for entry in (
        AttackEntry(
            "fc", "feature collision",
            lambda epsilon, crafting: attacks.feature_collision(
                epsilon=epsilon, num_steps=crafting.fc_steps
            ),
        ),
        AttackEntry(
            "cp", "convex polytope",
            lambda epsilon, crafting: attacks.convex_polytope(
                epsilon=epsilon, num_steps=crafting.cp_steps
            ),
        ),
        AttackEntry(
            "bp", "bullseye polytope",
            lambda epsilon, crafting: attacks.bullseye_polytope(
                epsilon=epsilon, num_steps=crafting.bp_steps
            ),
        ),
        AttackEntry("gm", "gradient matching", _head_gradient_matching),
    )
}  # fmt: skip
"""`make(epsilon, crafting)` returns a TargetedAttack on heads of a frozen extractor."""


def _sleeper_agent(config: Any, victim: attacks.Victim) -> BackdoorAttack:
    recipe = config.recipe
    return attacks.sleeper_agent(
        [victim], epsilon=config.epsilon, size=config.patch, max_shift=recipe.max_shift,
        flip=recipe.flip,
    )  # fmt: skip


BACKDOORS = {
    entry.name: entry
    for entry in (
        AttackEntry(
            "badnets", "BadNets", lambda config, victim: attacks.badnets(),
            "a white square in a corner",
        ),
        AttackEntry(
            "blended", "Blended", lambda config, victim: attacks.blended(),
            "a faint random pattern",
        ),
        AttackEntry(
            "sig", "SIG", lambda config, victim: attacks.sig(delta=config.epsilon),
            "a wave of --epsilon, labels kept", clean_label=True,
        ),
        AttackEntry("wanet", "WaNet", lambda config, victim: attacks.wanet(), "a smooth warp"),
        AttackEntry(
            "label_consistent", "label-consistent",
            lambda config, victim: attacks.label_consistent(victim, epsilon=config.epsilon),
            "corner patterns on adversarial images within --epsilon, labels kept",
            clean_label=True,
        ),
        AttackEntry(
            "sleeper", "Sleeper Agent", _sleeper_agent,
            "a patch that no poison shows, within --epsilon, labels kept", clean_label=True,
        ),
    )
}  # fmt: skip
"""`make(config, victim)` returns a BackdoorAttack; the victim was trained on clean data."""


def make_attack(config: Config, name: str) -> Attack:
    """Returns an untargeted attack by its name."""
    return UNTARGETED[name].make(config)


def budget(config: Config) -> str:
    """Returns how far the attacks of a run may change an image, in words."""
    in_l2 = [name.endswith("_l2") for name in config.attacks]
    pixels = f"within ±{255 * config.epsilon:.3g}/255"
    length = f"within {config.epsilon_l2:g} in L2"
    return pixels if not any(in_l2) else length if all(in_l2) else f"{pixels} or {length}"


def make_defense(name: str, config: Common, model: models.Classifier, splits: Splits) -> Defense:
    """Returns a defense by its name."""
    make = DEFENSES[name].make
    assert make is not None
    return make(config, model, splits)


def check_names(kind: str, names: Sequence[str], there: dict[str, Any]) -> None:
    """Raises ValueError for a name that is not there."""
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ValueError(f"unknown {kind}: {', '.join(unknown)}; there are {', '.join(there)}")


def listing(there: dict[str, Any]) -> str:
    """Returns what is there for --help, a line for each name, by group where there are groups."""
    titles = {
        "defense": "Defenses:", "control": "Controls:", "filter": "Filters:",
        "table IV": "HINT over its settings:",
    }  # fmt: skip
    width = 1 + max(map(len, there))
    lines, group = [], None
    for name, entry in there.items():
        if getattr(entry, "group", None) != group:
            group = entry.group
            lines += ["", titles[group]]
        note = getattr(entry, "note", "")
        lines.append(f"  {name:{width}}{entry.label}{': ' * bool(note)}{note}")
    return "\n".join(lines)
