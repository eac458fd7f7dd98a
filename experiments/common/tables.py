"""The paper's tables II to V with our numbers next to the paper's, as Markdown and as LaTeX.

A table holds the rows of one results file, hence of one scale. Numbers are mean ± standard
deviation over seeds; what did not run is marked.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.registry import BACKDOORS, DEFENSES, ROWS
from jaxpoison import evaluation, runs

PAPER = json.loads(Path(__file__).with_name("paper_tables.json").read_text())
PAPER_NAMES = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
PAPER_DEFENSES = {name: entry.paper for name, entry in DEFENSES.items() if entry.paper}
SENSITIVITY_RATIO = 0.6  # the p of the paper's Table IV
NOT_RUN, FAILED = "not run", "failed"

Rows = Sequence[dict[str, Any]]


class Table(NamedTuple):
    """A table as text.

    Attributes:
      caption: what it shows, one paragraph.
      header: names of the columns.
      rows: cells, as many in each row as there are columns.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Returns it as Markdown, the caption first."""
        return "\n".join([self.caption, "", runs.markdown(self.header, self.rows), ""])

    def latex(self) -> str:
        """Returns it as LaTeX, for the package booktabs."""
        header, *body = (
            " & ".join(map(_escape, line)) + r" \\" for line in (self.header, *self.rows)
        )
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_escape(self.caption)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
                r"\toprule",
                header,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def comparison(rows: Rows, dataset: str, data: str, attack: str, source: str) -> str:
    """Returns all cells of a study as one Markdown table, line by line."""
    lines = []
    for (trusted, ratio, defense), group in sorted(_groups(rows).items(), key=_order):
        ran = trained(group)
        seconds = f"{statistics.mean(row['train_seconds'] for row in ran):.0f}" if ran else "-"
        lines.append(
            [
                "-" if trusted else f"{ratio:g}",
                label(defense),
                accuracy(group),
                str(len(ran)),
                f"{ran[0]['num_train']:,}" if ran else "-",
                seconds,
                _paper_II(dataset, ratio, defense),
            ]
        )
    header = ["p", "defense", "ours", "seeds", "training images", "seconds", "paper"]
    caption = f"Test accuracy (%) after the last epoch. {source}; attack: {attack}."
    note = "The paper's figures: the full set, PGD + DAP + DURP + DeepConfuse, 5 trials"
    ending = "." if data == "full" else "; this run: a small slice, so only the order compares."
    return "\n".join([Table(caption, header, lines).markdown(), note + ending, ""])


def table_II(result: dict[str, Any]) -> Table | None:
    """Returns accuracy under untargeted poisons: a line of ours and of the paper's for each p."""
    config, rows = result["config"], result["rows"]
    ratios = sorted({row["poison_ratio"] for row in rows if row["defense"] != "trusted"})
    present = {row["defense"] for row in rows}
    if not present & (PAPER_DEFENSES.keys() - {"none"}):
        return None
    lines = []
    for ratio in ratios:
        ours = [_cell(rows, ratio, name) for name in PAPER_DEFENSES]
        paper = [_paper_II(config["dataset"], ratio, name) for name in PAPER_DEFENSES]
        lines += [[f"{ratio:g}", "ours", *ours], ["", "paper", *paper]]
    return Table(
        f"Table II: test accuracy (%) under untargeted poisons. {_setting(result)}",
        ["p", "", *PAPER_DEFENSES.values()],
        lines,
    )


def controls(result: dict[str, Any]) -> Table | None:
    """Returns what the paper lacks: each control beside no defense, HINT and the trusted set."""
    rows = result["rows"]
    names = [
        name
        for name, entry in DEFENSES.items()
        if entry.paper is None and entry.group != "table IV"
    ]
    present = {row["defense"] for row in rows} & {*names}
    alone = [row for row in rows if row["defense"] == "trusted"]
    if not present and not alone:
        return None
    ratios = sorted({row["poison_ratio"] for row in rows if row["defense"] != "trusted"})
    shown = ["none", "hint", *(name for name in names if name in present)]
    lines = [[label(name), *(_cell(rows, p, name) for p in ratios)] for name in shown]
    lines.append([label("trusted"), *[accuracy(alone)] * len(ratios)])
    return Table(
        f"Controls: test accuracy (%). {_setting(result)}",
        ["", *(f"p = {ratio:g}" for ratio in ratios)],
        lines,
    )


def table_III(result: dict[str, Any]) -> Table:
    """Returns success of targeted attacks, with 95 % intervals (Wilson), and test accuracy.

    Its rows have `attack`, `defense`, `seed`, `success`, `test_accuracy` and `num_train`, one for
    each target.
    """
    rows = result["rows"]
    paper = PAPER["table_III_targeted_cifar10"]["results"]
    lines = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        for name in ROWS:
            group = [row for row in rows if (row["attack"], row["defense"]) == (attack, name)]
            theirs = paper.get(PAPER_DEFENSES.get(name, ""), {}).get(attack.upper())
            if not group and theirs is None:
                continue
            published = ["-", "-"]
            if theirs is not None:
                count = f"{theirs['asr_success']} of {theirs['asr_trials']}"
                published = [count, _mean_sd(theirs["test_acc"])]
            networks = group[:1] if name == "clean" else group  # one that sees all targets
            lines.append(
                [attack.upper(), label(name), success(group), published[0], accuracy(networks),
                 published[1]]
            )  # fmt: skip
    return Table(
        "Table III: targets that are taken for the intended class, with 95 % intervals (Wilson), "
        f"and test accuracy (%). {_setting(result)}",
        ["attack", "defense", "success", "paper", "accuracy", "paper"],
        lines,
    )


def table_IV(result: dict[str, Any]) -> Table | None:
    """Returns the accuracy of HINT over its two settings, r and beta."""
    config, rows = result["config"], result["rows"]
    paper = PAPER["table_IV_sensitivity"]
    lines = []
    present = {row["defense"] for row in rows}
    for name, entry in DEFENSES.items():
        if name not in present or entry.setting is None:
            continue
        symbol, value = entry.setting
        published = paper[{"β": "beta"}.get(symbol, symbol)][PAPER_NAMES[config["dataset"]]]
        theirs = {float(key): one for key, one in published.items()}.get(value)
        lines.append(
            [
                f"{symbol} = {value:g}",
                _cell(rows, SENSITIVITY_RATIO, name),
                "-" if theirs is None else _mean_sd(theirs),
            ]
        )
    if not lines:
        return None
    return Table(
        f"Table IV: test accuracy (%) of HINT at p = {SENSITIVITY_RATIO:g} over r (at "
        f"β = {config['hint']['beta']:g}) and over β (at r = {config['hint']['ratio']:g}). "
        f"{_setting(result)}",
        ["", "ours", "paper"],
        lines,
    )


def table_V(result: dict[str, Any]) -> Table:
    """Returns the time of each defense over plain training, as `cost.py` measures it."""
    paper = PAPER["table_V_time_cifar10_s"]
    lines = []
    for row in result["rows"]:
        seconds = paper.get(row["paper_name"])
        lines.append(
            [
                row["paper_name"],
                f"{row['ratio']:.3f}",
                f"{row['counted']:.3f}",
                f"{row['step_ratio']:.3f}",
                f"{row['event_epochs']:.3f} x {row['num_events']}",
                f"{row['ordinary_epochs']:.3f}",
                "-" if seconds is None else f"{seconds / paper['none']:.2f}",
            ]
        )
    return Table(
        f"Table V: training time over plain training. {result['source']} "
        f"Medians of {result['num_rounds']} interleaved rounds; {_device(result)}. "
        "`counted`: what the passes over the network alone would cost. Then where time goes, in "
        "plain epochs: the steps of an epoch, its updates or selections, and what else is done "
        "before each epoch.",
        ["defense", "ours", "counted", "steps", "updates", "every epoch", "paper"],
        lines,
    )


def backdoors(result: dict[str, Any]) -> Table:
    """Returns success and accuracy of each backdoor under each defense, in percent."""
    config, rows = result["config"], trained(result["rows"])
    names = [name for name in ROWS if any(row["defense"] == name for row in rows)]
    clean = [row for row in rows if row["attack"] == "clean"]
    lines = []
    for attack, share in dict.fromkeys((row["attack"], row["share"]) for row in rows):
        own = [row for row in rows if (row["attack"], row["share"]) == (attack, share)]
        undefended = [row for row in own if row["defense"] == "none"]
        if attack == "clean" or not undefended:
            continue
        chance = statistics.mean(100 * row["by_chance"] for row in undefended)
        cells = [backdoor_cell([row for row in own if row["defense"] == name]) for name in names]
        lines.append([BACKDOORS[attack].label, f"{100 * share:g}", f"{chance:.1f}", *cells])
    return Table(
        f"Backdoors to class {config['target_class']}: share of triggered test images of other "
        "classes that are taken for it, / accuracy on clean test images, in %; mean over seeds. Of "
        "filters, in brackets: poisons found, honest images flagged. By chance: success with the "
        f"network trained on clean data, whose accuracy is {accuracy(clean)}. {_setting(result)}",
        ["attack", "poisons, %", "by chance", *map(label, names)],
        lines,
    )


def backdoor_cell(group: Rows) -> str:
    """Returns success / accuracy in percent and, of a filter, what it found and flagged."""
    if not group:
        return NOT_RUN
    success = statistics.mean(100 * row["successes"] / row["num_triggered"] for row in group)
    right = statistics.mean(100 * row["test_accuracy"] for row in group)
    text = f"{success:.1f} / {right:.1f}"
    if "poison_recall" in group[0]:
        found, alarms = (
            statistics.mean(100 * row[name] for row in group)
            for name in ("poison_recall", "false_alarms")
        )
        text += f" ({found:.0f}, {alarms:.0f})"
    return text


def backdoor_place(row: dict[str, Any]) -> tuple:
    """Returns a key by which rows of backdoors are in order: attack, share, defense, seed."""
    names, kinds = list(ROWS), ["clean", *BACKDOORS]
    return (
        kinds.index(row["attack"]), row["share"], names.index(row["defense"]), row["seed"]
    )  # fmt: skip


def trusted(result: dict[str, Any]) -> Table:
    """Returns accuracy over the number of trusted images, and over the share of wrong labels."""
    rows = result["rows"]
    names = [name for name in ROWS if any(row["defense"] == name for row in rows)]
    names.remove("none")
    clean, poisoned = (
        accuracy([row for row in rows if not row["num_trusted"] and bool(row["poison_ratio"]) == p])
        for p in (False, True)
    )
    lines = []
    for size, wrong in dict.fromkeys((row["num_trusted"], row["wrong_share"]) for row in rows):
        own = [row for row in rows if (row["num_trusted"], row["wrong_share"]) == (size, wrong)]
        if size:
            cells = [accuracy([row for row in own if row["defense"] == name]) for name in names]
            lines.append([f"{size:,}", f"{100 * wrong:g}", *cells])
    return Table(
        "Test accuracy (%) where every training image is poisoned, by what is trusted. Without "
        f"trusted images {poisoned}; clean data {clean}. {_setting(result)}",
        ["trusted images", "wrong labels, %", *map(label, names)],
        lines,
    )


def trusted_place(row: dict[str, Any]) -> tuple:
    """Returns a key by which rows of trusted sets are in order: set, defense, seed."""
    return (
        *(row["wrong_share"], row["num_trusted"], row["poison_ratio"]),
        *(list(ROWS).index(row["defense"]), row["seed"]),
    )


def mixed(result: dict[str, Any]) -> Table:
    """Returns what each threat alone, and all at once, do to networks under each defense."""
    rows, config = trained(result["rows"]), result["config"]
    lines = []
    for drops, defense in dict.fromkeys((row["drops"], row["defense"]) for row in rows):
        own = [row for row in rows if (row["drops"], row["defense"]) == (drops, defense)]
        cells = [
            mixed_cell([row for row in own if row["threats"] == name], name)
            for name in ("clean", *MIXED_THREATS, "all")
        ]
        lines.append([mixed_label(drops, defense), *cells])
    return Table(
        "Accuracy (%) of networks trained on clean data, and with each threat. Backdoor: triggered "
        "test images that are taken for its class, / accuracy. Targeted: targets that are taken "
        "for the class they were meant for, / accuracy. All at once: accuracy; triggers; targets. "
        "By chance, on clean data without a defense: "
        f"{_chance(rows)}. {BACKDOORS[config['backdoor']].label} on "
        f"{100 * config['backdoor_share']:g}% of the images, {100 * config['flip_share']:g}% "
        f"flipped labels, {config['num_poisons']} poisons for each of {config['num_targets']} "
        "targets; untargeted poisons are on all images or, where all threats meet, on all that "
        f"carry no trigger and no target's poison. {_setting(result)}",
        ["defense", "clean", *MIXED_THREATS, "all at once"],
        lines,
    )


MIXED_THREATS = ("untargeted", "flips", "backdoor", "targeted")


def mixed_label(drops: str, defense: str) -> str:
    """Returns what a filter, a defense or both are called."""
    if not drops:
        return label(defense)
    return label(drops) if defense == "none" else f"{label(drops)}, then {label(defense)}"


def mixed_cell(group: Rows, threats: str) -> str:
    """Returns what networks trained on one set do, in percent."""
    if not group:
        return NOT_RUN
    right, triggers, targets = accuracy(group), _triggers(group), _targets(group)
    return {
        "backdoor": f"{triggers} / {right}",
        "targeted": f"{targets} / {right}",
        "all": f"{right}; {triggers}; {targets}",
    }.get(threats, right)


def _chance(rows):
    own = [r for r in rows if (r["threats"], r["drops"], r["defense"]) == ("clean", "", "none")]
    return f"{_triggers(own)}% of triggers and {_targets(own)} targets" if own else NOT_RUN


def _triggers(group):
    return f"{statistics.mean(100 * row['successes'] / row['num_triggered'] for row in group):.1f}"


def _targets(group):
    taken, of = (sum(row[name] for row in group) for name in ("taken", "num_targets"))
    return f"{taken} of {of}"


def mixed_place(row: dict[str, Any]) -> tuple:
    """Returns a key by which rows of mixed threats are in order: defense, set, seed."""
    names, kinds = list(ROWS), ["clean", *MIXED_THREATS, "all"]
    drops = names.index(row["drops"]) if row["drops"] else -1
    return (drops, names.index(row["defense"]), kinds.index(row["threats"]), row["seed"])


# The kinds of `transfer_filter.py` and `pretrain.py`, which write their own tables.
TRANSFER, PRETRAINING, BACKDOOR, TRUSTED = "transfer", "pretraining", "backdoor", "trusted"
MIXED = "mixed"
TABLES = {
    "untargeted": (table_II, controls, table_IV),
    "targeted": (table_III,),
    "cost": (table_V,),
    BACKDOOR: (backdoors,),
    TRUSTED: (trusted,),
    MIXED: (mixed,),
}
"""The tables to make of a results file, by its `kind`."""


def curves(rows: Rows, dataset: str) -> dict[str, list[tuple[float, float, float, float | None]]]:
    """Returns (p, mean, sd, paper's mean) in percent for each defense, in order of p."""
    lines: dict[str, list] = {}
    for (trusted, ratio, defense), group in sorted(_groups(trained(rows)).items(), key=_order):
        if not trusted:
            values = [100 * row["test_accuracy"] for row in group]
            entry = _paper_entry(dataset, ratio, defense)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            published = None if entry is None else entry["mean"]
            lines.setdefault(label(defense), []).append(
                (ratio, statistics.mean(values), spread, published)
            )
    return lines


def trained(rows: Rows) -> list[dict[str, Any]]:
    """Returns the rows of cells that did not fail."""
    return [row for row in rows if "error" not in row]


def place(row: dict[str, Any]) -> tuple:
    """Returns a key by which rows of a study are in order: by seed, p, and defense."""
    trusted, defense = row["defense"] == "trusted", row["defense"]
    return row["seed"], *_order(((trusted, row["poison_ratio"], defense), ()))


def label(defense: str) -> str:
    """Returns the name of a defense for people."""
    return ROWS[defense].label


def accuracy(group: Rows) -> str:
    """Returns mean ± sd of test accuracy in percent, over the rows that did not fail."""
    values = [100 * row["test_accuracy"] for row in trained(group)]
    if not values:
        return FAILED if group else NOT_RUN
    mean = f"{statistics.mean(values):.2f}"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    missing = f" ({len(group) - len(values)} failed)" if len(values) < len(group) else ""
    return mean + spread + missing


def success(group: Rows) -> str:
    """Returns how many targets were hit, of how many, and the interval in percent."""
    ran = trained(group)
    if not ran:
        return FAILED if group else NOT_RUN
    hits = sum(bool(row["success"]) for row in ran)
    low, high = evaluation.wilson(hits, len(ran))
    missing = f" ({len(group) - len(ran)} failed)" if len(ran) < len(group) else ""
    return f"{hits} of {len(ran)} [{100 * low:.0f}, {100 * high:.0f}] %{missing}"


def tables_of(result: dict[str, Any]) -> list[Table]:
    """Returns the tables that a results file has something for; none if it is of another kind."""
    made = (make(result) for make in TABLES.get(kind(result), ()))
    return [table for table in made if table is not None]


def kind(result: dict[str, Any]) -> str:
    """Returns what experiment a results file comes from; empty if from none of these."""
    if "kind" in result:
        return result["kind"]
    # Before results files said so:
    if all("poison_ratio" in row for row in result.get("rows", [{}])):
        return "untargeted"
    return TRANSFER if "clean_accuracy" in result else ""


def _setting(result):
    """Returns a sentence on data, network, epochs, attack and seeds."""
    config, rows = result["config"], trained(result["rows"])
    seeds = len({row["seed"] for row in rows})
    largest = max(rows, key=lambda row: row["num_train"], default={"num_train": 0})
    network = ""
    if config["dataset"] == "cifar10":
        if config.get("network") == "fast":  # older results do not say
            network = f", fast network of width {config['width']}"
        else:
            blocks = "-".join(map(str, config["blocks"]))
            network = f", ResNet of width {config['width']} and blocks {blocks}"
    budget = f"±{255 * config['epsilon']:.3g}/255"
    attack = result.get("attack") or f"{' + '.join(config['attacks']).upper()} within {budget}"
    source = result["source"][0].upper() + result["source"][1:]
    return (
        f"{source}, up to {largest['num_train']:,} training images{network}, "
        f"{config['recipe']['epochs']} epochs; {attack}; {seeds} seed{'s' * (seeds != 1)}; "
        f"{_device(result)}."
    )


def _device(result):
    environment = result["environment"]
    return f"{environment['device']}, commit {environment['commit']}"


def _groups(rows):
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        trusted = row["defense"] == "trusted"
        key = (trusted, None if trusted else row["poison_ratio"], row["defense"])
        groups.setdefault(key, []).append(row)
    return groups


def _order(item):
    (trusted, ratio, defense), _ = item
    names = list(ROWS)
    return trusted, ratio or 0.0, names.index(defense) if defense in names else len(names), defense


def _cell(rows, ratio, defense):
    return accuracy(
        [row for row in rows if (row["poison_ratio"], row["defense"]) == (ratio, defense)]
    )


def _paper_entry(dataset, ratio, defense):
    """Returns the paper's mean and std, None where it has no such number."""
    table = PAPER["table_II_untargeted"]["results"][PAPER_NAMES[dataset]]
    if ratio is None or defense not in PAPER_DEFENSES:
        return None
    return table.get(f"{float(ratio):.1f}", {}).get(PAPER_DEFENSES[defense])


def _paper_II(dataset, ratio, defense):
    entry = _paper_entry(dataset, ratio, defense)
    return "-" if entry is None else _mean_sd(entry)


def _mean_sd(entry):
    return f"{entry['mean']:.2f} ± {entry['std']:.2f}"


def _escape(text):
    for plain, escaped in (
        ("%", r"\%"), ("_", r"\_"), ("&", r"\&"), ("±", r"$\pm$"), ("β", r"$\beta$"),
        ("H⁻¹", "$H^{-1}$"), ("`", ""), ("#", r"\#"),
    ):  # fmt: skip
        text = text.replace(plain, escaped)
    return text
