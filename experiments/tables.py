"""Results as text: accuracy by poison ratio and defence, the paper's number beside ours."""

import json
import statistics
from pathlib import Path
from typing import Any

PAPER = json.loads(Path(__file__).with_name("paper_tables.json").read_text())
PAPER_NAMES = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
LABELS = {"none": "none", "hint": "HINT", "trusted": "trusted images alone"}


def comparison(
    rows: list[dict[str, Any]], dataset: str, data: str, attack: str, source: str
) -> str:
    """Returns a Markdown table of final test accuracies, mean ± sd over seeds."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        trusted = row["defense"] == "trusted"
        key = (trusted, None if trusted else row["poison_ratio"], row["defense"])
        groups.setdefault(key, []).append(row)
    lines = [
        f"Test accuracy (%) after the last epoch. {source}; attack: {attack}.",
        "",
        "| p | defence | ours | seeds | training images | seconds | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for (trusted, ratio, defense), group in sorted(groups.items(), key=_order):
        accuracy = _mean_sd([100 * row["test_accuracy"] for row in group])
        seconds = statistics.mean(row["train_seconds"] for row in group)
        lines.append(
            f"| {'-' if trusted else f'{ratio:g}'} | {LABELS[defense]} | {accuracy} | {len(group)} "
            f"| {group[0]['num_train']:,} | {seconds:.0f} | {_paper(dataset, ratio, defense)} |"
        )
    lines += [
        "",
        "The paper's figures: the full set, a fourth attack (DeepConfuse) in the mixture, 5 trials"
        + ("." if data == "full" else "; this run: a small slice, so only the order compares."),
        "",
    ]
    return "\n".join(lines)


def _order(item):
    (trusted, ratio, defense), _ = item
    return trusted, ratio or 0.0, list(LABELS).index(defense)


def _mean_sd(values):
    mean = f"{statistics.mean(values):.2f}"
    return mean + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _paper(dataset, ratio, defense):
    table = PAPER["table_II_untargeted"]["results"][PAPER_NAMES[dataset]]
    try:
        entry = table[f"{float(ratio):.1f}"][{"hint": "HINT"}.get(defense, defense)]
    except (KeyError, TypeError):
        return "-"
    return f"{entry['mean']:.2f} ± {entry['std']:.2f}"
