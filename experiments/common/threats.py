"""The page of threats: which defense holds against which attack, and what to do, for a decision.

Every figure is looked up in the committed results; a defense that never met a threat has "-".
"""

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import tables
from common.registry import BACKDOORS, ROWS, TRANSFER
from jaxpoison import evaluation, runs

NEVER = "-"
SCHEDULE, GRID = "untargeted-mnist-schedule", "untargeted-mnist-laptop"
CONFUSE, PHOTOGRAPHS = "untargeted-mnist-laptop-dc", "untargeted-cifar10-laptop"
MATCHING, META = "targeted-cifar10-laptop-gm", "targeted-cifar10-laptop-mp"
DIGITS, TRANSFERRED = "backdoor-mnist-laptop", "transfer-cifar10-laptop"
TRUSTED, STRONG = "trusted-mnist-laptop", "transfer-cifar10-strong"
MIXED, BOTH = "mixed-mnist-laptop", ("activation", "recommended")
_SHARES = (0.1, 0.24, 0.5)
LATE = "characteristic vectors of the last three layers, trusted"
FEATURES = "nearest feature centroid, trusted"


class Results:
    """The results files of a folder, read once each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, dict[str, Any]] = {}

    def file(self, name: str) -> dict[str, Any]:
        """Returns a file of results by its path in the folder."""
        if name not in self._read:
            self._read[name] = runs.read_json(self.folder / name)
        return self._read[name]

    def rows(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        """Returns the rows of an experiment that did not fail and have these values."""
        rows = tables.trained(self.file(f"{name}/result.json")["rows"])
        return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


class Threat(NamedTuple):
    """A column of the table of training from scratch.

    Attributes:
      name: for people.
      results: names of experiments of one setting; the first that has a defense counts.
      cell: (results, names of experiments, defense) -> text, None if it was not run.
    """

    name: str
    results: tuple[str, ...]
    cell: Callable[[Results, tuple[str, ...], str], str | None]


def page(folder: Path, where: Path) -> str:
    """Returns the page of threats, to stand in `where`."""
    found = Results(folder)
    link = Path(os.path.relpath(folder, where)).as_posix()
    return "\n".join(
        [
            "# Threats",
            "",
            f"Made by `python experiments/tables.py` from the files in [{folder.name}]({link}); do "
            "not edit. Which defense holds against which attack, what to do, and what nobody has "
            "measured here. All of it comes from small networks on slices of MNIST and CIFAR-10 "
            "and from one to three seeds: trust the order of the rows more than the figures.",
            "",
            "## What to do",
            "",
            *_recommendations(found),
            "## Training from scratch",
            "",
            *_scratch(found),
            "## Transfer learning",
            "",
            *_transfer(found),
            "## The trusted set",
            "",
            *_trusted(found),
            "## Several threats at once",
            "",
            *_mixed(found),
            "## Attackers who know the defense",
            "",
            *_adaptive(found),
            "## Never measured",
            "",
            *_unmeasured(),
        ]
    )


def _recommendations(found):
    grid, photos = _mean(found, SCHEDULE), _mean(found, PHOTOGRAPHS)
    epic, none, trusted = (_hits(found, MATCHING, name) for name in ("epic", "none", "recommended"))
    clustered = [_closed(found, name, "activation") for name in ("badnets", "blended")]
    knn = [_survivors(found, "deep k-NN", share) for share in (0.1, 0.8)]
    return [
        "### No trusted images",
        "",
        "- **From scratch:** run `jaxpoison audit`. Train with `ueraser` on simple images (MNIST "
        f"{grid('none')} to {grid('ueraser')}%) and with `jpeg` on photographs (CIFAR-10 "
        f"{photos('none')} to {photos('jpeg')}%; clean {photos('none', 0.0)}%). If a backdoor is "
        "likely, look at what `filters.activation_clustering` flags. It ends both backdoors that "
        f"work here, and drops many honest images ({clustered[0]}; {clustered[1]}). Nothing that "
        f"we measured stops gradient matching (no defense: {none}; EPIC: {epic}).",
        f"- **Transfer learning:** `filters.deep_knn`. It leaves {knn[0]} attacks where a tenth of "
        f"a class are poisons, and {knn[1]} where 80% of it are; there, every filter without "
        "trusted images fails. Better: check five images of each class yourself.",
        "",
        "### Five trusted images a class",
        "",
        "- **From scratch:** `jaxpoison audit --trusted`, which then also sees a set in which "
        "every image is poisoned ([measured](audit.md#how-good-is-it)). Where it is, train with "
        "`defenses.recommended(trusted)`: with a single image of each class it takes MNIST from "
        f"{_with(found, 'none', 0)} to {_with(found, 'recommended', 10)}%, with thirty to "
        f"{_with(found, 'recommended', 300)}%.",
        "- **Transfer learning:** `filters.feature_centroid(features, y, trusted=...)`, or the "
        'characteristic-vector filter with `gamma="last_3"`: '
        f"{_survivors(found, FEATURES)} and {_survivors(found, LATE)} attacks are left.",
        "",
        "### A hundred trusted images a class",
        "",
        f"- **From scratch:** `defenses.recommended(trusted)`: MNIST {grid('none')} to "
        f"{grid('recommended')}%, CIFAR-10 {photos('none')} to {photos('recommended')}%, and "
        f"{trusted} of gradient matching are lost (all measured with fifty a class). It does "
        "nothing against backdoors: audit and filter first ([both](#several-threats-at-once)).",
        "- **Transfer learning:** the filters of five a class. More trusted images for them were "
        f"not measured. HINT on the head is no substitute: {_hinted(found)} are left.",
        "",
    ]


def _scratch(found):
    threats = (
        Threat("PGD + DAP, digits", (SCHEDULE, GRID), _accuracies(GRID)),
        Threat("DeepConfuse, digits", (CONFUSE,), _accuracies(GRID)),
        Threat("PGD + DAP, photographs", (PHOTOGRAPHS,), _accuracies(PHOTOGRAPHS)),
        Threat("gradient matching, photographs", (MATCHING,), _targets),
        Threat("MetaPoison, photographs", (META,), _targets),
        *(
            Threat(f"{BACKDOORS[name].label} 5%, digits", (DIGITS,), _triggers(name))
            for name in ("badnets", "blended")
        ),
    )
    lines = []
    for name, entry in ROWS.items():
        cells = [threat.cell(found, threat.results, name) for threat in threats]
        shown = entry.group in ("defense", "filter") or name in _OTHERS
        if shown and any(cells):
            lines.append([entry.label, *(cell or NEVER for cell in cells)])
    names = dict.fromkeys(threat.results[0] for threat in threats)
    links = ", ".join(f"[{name}](results.md#{name})" for name in names)
    return [
        "In percent. PGD + DAP and DeepConfuse perturb every training image: accuracy, / that of "
        "the same defense on clean data. Gradient matching and MetaPoison: targets misclassified "
        "as the adversary's class, with 95% intervals (Wilson); accuracy. Backdoors: triggers that "
        "work, / accuracy; of filters, in brackets, poisons found and honest images flagged. Three "
        "seeds or two where a spread is given for PGD + DAP, one elsewhere. SIG and WaNet are left "
        f"out: at 5% they do not work without a defense either. From {links}.",
        "",
        runs.markdown(["defense", *(threat.name for threat in threats)], lines),
        "",
    ]


_OTHERS = (
    *("hint_every", "hint_every_recommended", "head_refit", "random_noise", "jpeg", "bit_depth"),
    *("ueraser", "projection", "abl", "mixup", "cutmix", "trusted"),
)
"""Controls that somebody may want to use, or must know."""


def _accuracies(clean):
    """Accuracy where every image is poisoned, and on the clean data of another experiment."""

    def cell(found, experiments, defense):
        if defense == "trusted":  # sees neither poisons nor the clean set
            return tables.accuracy(found.rows(experiments[0], defense=defense))
        wanted = [(name, 1.0) for name in experiments], [(clean, 0.0)]
        poisoned, unharmed = (
            next((own for own in (_at(found, *one, defense) for one in each) if own), None)
            for each in wanted
        )
        if poisoned is None:
            return None
        return f"{tables.accuracy(poisoned)} / {tables.accuracy(unharmed) if unharmed else NEVER}"

    return cell


def _at(found, experiment, ratio, defense):
    return found.rows(experiment, poison_ratio=ratio, defense=defense)


def _targets(found, experiments, defense):
    own = found.rows(experiments[0], defense=defense)
    return f"{tables.success(own)}; {tables.accuracy(own)}" if own else None


def _triggers(attack):
    def cell(found, experiments, defense):
        own = found.rows(experiments[0], attack=attack, share=0.05, defense=defense)
        return tables.backdoor_cell(own) if own else None

    return cell


def _transfer(found):
    result = found.file(f"{TRANSFERRED}/result.json")
    rows = [row for row in result["rows"] if "filters" in row]
    clean, judged = ([row for row in rows if bool(row["share"]) == poisoned] for poisoned in (0, 1))
    lines = []
    for name in judged[0]["filters"]:
        cells = [
            _left([row for row in judged if row["attack"] == kind], name)
            for kind in dict.fromkeys(row["attack"] for row in judged)
        ]
        most = max(row["share"] for row in judged)
        cells.append(_left([row for row in judged if row["share"] == most], name))
        accuracy = statistics.mean(100 * row["filters"][name]["accuracy"] for row in clean)
        lines.append([name, *cells, f"{accuracy:.1f}"])
    kinds = [TRANSFER[kind].label for kind in dict.fromkeys(row["attack"] for row in judged)]
    none = statistics.mean(100 * row["accuracy"] for row in clean)
    return [
        f"Attacks on a head over a frozen extractor that are left, of those that succeed without a "
        f"filter ([results](results.md#{TRANSFERRED})), over all budgets and shares of poisons; "
        "then those where poisons are 80% of their class, whatever their kind; then test accuracy "
        f"(%) after the filter on clean data ({none:.1f} without one). Trusted: five images of "
        "each class. Oracle: is told the number of poisons.",
        "",
        runs.markdown(["filter", *kinds, "p = 0.8", "accuracy"], lines),
        "",
        f"HINT on the head, with 1,000 trusted images: {_hinted(found)} are left.",
        "",
        *_strong(found),
    ]


def _strong(found):
    """What differs where the extractor is strong: without trusted images, how many are poisons."""
    rows = [row for row in found.rows(STRONG) if "filters" in row]
    (clean,) = (row for row in rows if not row["share"])
    names = ("characteristic vectors", "characteristic vectors, trusted", LATE, FEATURES)
    lines = [
        [
            name,
            *(_left([row for row in rows if row["share"] == share], name) for share in _SHARES),
            f"{100 * clean['filters'][name]['fpr']:.0f}",
            f"{100 * clean['filters'][name]['accuracy']:.1f}",
        ]
        for name in (*names, "deep k-NN", "spectral signatures")
    ]
    shares = (f"p = {share:g}" for share in _SHARES)
    return [
        "The same on a strong extractor, whose clean heads are right on "
        f"{100 * clean['accuracy']:.1f}% ([results](results.md#{STRONG}); budget 16/255): attacks "
        "that are left, by the share p of poisons in their class; clean images flagged and "
        "accuracy after the filter on clean data (%). The published filter, without trusted "
        "images, works here while poisons are a minority.",
        "",
        runs.markdown(["filter", *shares, "flagged", "accuracy"], lines),
        "",
    ]


def _trusted(found):
    table = tables.trusted(found.file(f"{TRUSTED}/result.json"))
    return [table.markdown()]


def _mixed(found):
    before, after = (_all_at_once(found, *one) for one in (("", "none"), BOTH))
    return [
        "No defense that was run holds against all threats by itself; activation clustering and "
        f"then `recommended` do ([results](results.md#{MIXED})). Without a defense: {before}. With "
        f"both: {after}. Gradient matching is too weak here to test any.",
        "",
        tables.mixed(found.file(f"{MIXED}/result.json")).markdown(),
    ]


def _all_at_once(found, drops, defense):
    (row,) = found.rows(MIXED, threats="all", drops=drops, defense=defense)
    opened = 100 * row["successes"] / row["num_triggered"]
    return f"{100 * row['test_accuracy']:.1f}% accuracy, {opened:.0f}% of the triggers work"


def _adaptive(found):
    rows = found.file(f"{TRANSFERRED}/adaptive-last_3.json")["rows"]
    lines = []
    for kind, name in (("dataset", "of the data"), ("trusted", "of five trusted a class")):
        unaware = sum(rows[0]["taken"][kind])
        hits = [any(one) for one in zip(*(row["taken"][kind] for row in rows), strict=True)]
        lines.append(
            [
                f"characteristic vectors of the last three layers, centroids {name}",
                "a price on every poison that would be flagged, the best of several prices",
                f"{unaware} of {len(hits)}",
                _counted(sum(hits), len(hits)),
            ]
        )
    return [
        "The attack succeeds on so many targets, with an attacker who does not know the defense "
        "and with one who does ([the attack](filters.md#an-attacker-who-knows-it)):",
        "",
        runs.markdown(["defense", "what the attacker does", "unaware", "adaptive"], lines),
        "",
        "An attacker who reaches the trusted set: with a tenth of 300 trusted labels moved to the "
        "next class, accuracy under HINT at every epoch falls from "
        f"{_with(found, 'hint_every', 300)} to {_with(found, 'hint_every', 300, 0.1)}%, under "
        f"`recommended` from {_with(found, 'recommended', 300)} to "
        f"{_with(found, 'recommended', 300, 0.1)}%. No defense has "
        f"{_with(found, 'none', 0)}%.",
        "",
    ]


def _unmeasured() -> list[str]:
    return [
        "- Defenses on all of CIFAR-10 with a network of over 90%, but for one untargeted attack "
        "on one of 88% ([results](results.md#untargeted-cifar10-short)) and poisons in transfer "
        "learning on one of 91% ([results](results.md#transfer-cifar10-strong)); on larger images, "
        "on other kinds of data, or with the papers' budgets of poisons at their scale.",
        "- Attacks crafted through HINT's own noise, or by an attacker who keeps poisons out of "
        "what HINT selects; through JPEG; against `recommended`, but for wrong labels in its "
        "trusted set; against a filter on several extractors at once; poisons among the trusted "
        "images.",
        "- Sleeper Agent, label-consistent backdoors and Narcissus under any defense; SIG and "
        "WaNet where they work; backdoors in transfer learning; defenses against backdoors in "
        "photographs, where BadNets and Blended work "
        "([strength](results.md#backdoor-cifar10-short)).",
        "- Filters of the second table against training from scratch, and most defenses of the "
        "first in transfer learning.",
        "- `filters.feature_centroid` against an attacker who knows it.",
        "- Combinations of a filter with `recommended` and several threats in one set, but on "
        f"digits ([results](results.md#{MIXED})).",
        "- `filters.layer_clustering` and `filters.trusted_attribution` on networks that have "
        "learned a backdoor.",
        "- Certificates ([`audit --certify`](audit.md#read-the-report), "
        "[`evaluation.certify`](api/evaluation.md)) on poisoned sets: what they promise needs no "
        "attack, and holds for changes of few images alone.",
        "",
    ]


def _mean(found, experiment) -> Callable[..., str]:
    """Returns a function of (defense, p): the mean accuracy in percent."""

    def value(defense, ratio=1.0):
        own = found.rows(experiment, defense=defense, poison_ratio=ratio)
        return f"{statistics.mean(100 * row['test_accuracy'] for row in own):.1f}"

    return value


def _with(found, defense, size, wrong=0.0):
    """Returns accuracy in percent where all digits are poisoned, by what is trusted."""
    (row,) = found.rows(
        TRUSTED, defense=defense, num_trusted=size, wrong_share=wrong, poison_ratio=1.0
    )
    return f"{100 * row['test_accuracy']:.1f}"


def _hits(found, experiment, defense):
    own = found.rows(experiment, defense=defense)
    return f"{sum(row['success'] for row in own)} of {len(own)} targets"


def _closed(found, attack, defense):
    (row,) = found.rows(DIGITS, attack=attack, share=0.05, defense=defense)
    (none,) = found.rows(DIGITS, attack=attack, share=0.05, defense="none")
    before, after = (100 * one["successes"] / one["num_triggered"] for one in (none, row))
    lost = 100 * (none["test_accuracy"] - row["test_accuracy"])
    return (
        f"{BACKDOORS[attack].label}: {before:.0f} to {after:.1f}% of the triggers work, for "
        f"{lost:.0f} points of accuracy"
    )


def _survivors(found, name, share=None):
    rows = [row for row in found.rows(TRANSFERRED) if "filters" in row and row["share"]]
    return _left([row for row in rows if share is None or row["share"] == share], name)


def _left(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Returns how many attacks a filter leaves, of how many."""
    each = [row["filters"][name] for row in rows]
    left, trials = (sum(one[key] for one in each) for key in ("successes", "trials"))
    return f"{left} of {trials}"


def _hinted(found):
    rows = found.file(f"{TRANSFERRED}/result.json")["hint"]
    return " and ".join(
        f"{row['successes']} of {row['trials']} of {TRANSFER[row['attack']].label}"
        for row in rows
        if row["defense"] == "hint"
    )


def _counted(hits: int, trials: int) -> str:
    low, high = evaluation.wilson(hits, trials)
    return f"{hits} of {trials} [{100 * low:.0f}, {100 * high:.0f}] %"
