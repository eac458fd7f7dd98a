"""The results of `transfer_filter.py` as text: what failed first, then all the numbers.

Rows come from its cells: one for each network, attack, budget and share of poisons p; numbers of
several networks are pooled.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.registry import TRANSFER
from common.tables import PAPER as HINT_PAPER

from jaxpoison import evaluation, runs
from transfer.verdicts import DATASET, LATE, TRUSTED

PAPER = json.loads(Path(__file__).with_name("paper_charvec.json").read_text())
Rows = list[dict[str, Any]]


def report(
    rows: Rows,
    hint_rows: Rows,
    *,
    source: str,
    networks: Iterable[str],
    min_success: float,
    trusted_per_class: int,
) -> str:
    """Returns the whole report, in Markdown."""
    judged = [row for row in rows if "filters" in row and row["share"]]
    lines = [
        f"Poisons in transfer learning. {source}; extractors: {', '.join(networks)}.",
        "",
        *_verdict(judged),
        "",
        "## Without a defense",
        "",
        f"An attack counts where at least {100 * min_success:g} % of its trials succeed: the "
        "target is classified as the base class. Brackets: 95 % intervals (Wilson).",
        "",
        runs.markdown(
            ["attack", "eps x 255", "p", "success", "counts"],
            map(_undefended, _groups(rows, "attack", "epsilon_255", "share")),
        ),
    ]
    if judged:
        lines += [
            "",
            "## With a filter, over all attacks that count",
            "",
            "Of the poisons, the share found; then the attacks that still succeed, of those that "
            f"did without a filter. Trusted: {trusted_per_class} images of each class. Oracle: is "
            "told the number of poisons.",
            "",
            _over_shares(judged),
            "",
            "## On clean data",
            "",
            runs.markdown(
                ["filter", "clean images flagged", "test accuracy after"],
                _on_clean([row for row in rows if not row["share"]]),
            ),
            "",
            "## Next to the paper",
            "",
            "Success after the filter, and test accuracy, in percent. The paper: four networks at "
            "full width, 14 % of the training set poisoned, more than half of the base class; the "
            "counterpart here is the largest budget at p = .5 or, for want of it, the nearest.",
            "",
            runs.markdown(["attack", "filter", "paper", "ours", "trials"], _beside_paper(judged)),
            "",
            "## All numbers",
            "",
            runs.markdown(
                [
                    *("attack", "eps x 255", "p", "filter", "TPR", "FPR", "AUROC"),
                    *("success after", "95 %", "accuracy (%)"),
                ],
                _all_numbers(judged),
            ),
        ]
    if hint_rows:
        first = hint_rows[0]
        lines += [
            "",
            "## HINT in transfer learning",
            "",
            f"All trials at {first['epsilon_255']:g}/255 and p = {first['share']:g}, successful or "
            "not. The paper of HINT (arXiv 2309.08549, Table III): five targets, the whole base "
            "class poisoned, full width.",
            "",
            runs.markdown(
                [
                    *("attack", "defense", "success", "95 %", "accuracy (%)"),
                    "paper: success, accuracy",
                ],
                _hint(hint_rows),
            ),
        ]
    return "\n".join(lines) + "\n"


def in_short(row: dict[str, Any]) -> str:
    """Returns one line on a cell."""
    text = f"{row['successes']} of {row['trials']} succeed"
    if "filters" in row and row["share"]:
        found = ", ".join(
            f"{name}: {row['filters'][key]['tpr']:.2f}"
            for name, key in (("dataset", DATASET), ("trusted", TRUSTED))
        )
        text += f"; poisons found with centroids {found}"
    return text


def _verdict(judged):
    """The first lines: what the filter fails at, or that nothing can be said."""
    if not judged:
        return ["No attack succeeds often enough to count, so no filter was put to the test."]
    most = max(row["share"] for row in judged)
    at_most = [row for row in judged if row["share"] == most]
    sentences = []
    for name, text in (
        (DATASET, "centroids of the data themselves"),
        (TRUSTED, "trusted images"),
        (LATE, "trusted images and the last three layers alone"),
    ):
        tpr, _, successes, trials = _pooled(at_most, name)
        each = [row["filters"][name] for row in at_most]
        fpr = sum(one["fpr"] * one["trials"] for one in each) / trials
        sentences.append(
            f"with {text} it finds {100 * tpr:.0f} % of the poisons, flags {100 * fpr:.0f} % of "
            f"the clean images, and {successes} of {trials} attacks still succeed"
        )
    tpr, _, successes, trials = _pooled(at_most, DATASET)
    failed = tpr < 0.5 or 2 * successes > trials
    opening = "The filter with the paper's centroids fails" if failed else "The filter"
    return [f"**{opening} at p = {most:g}: {'; '.join(sentences)}.**"]


def _groups(rows, *names):
    groups: dict[tuple, Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups.values()


def _undefended(group):
    first, counts = group[0], sum("filters" in row for row in group)
    trials = sum(row["trials"] for row in group)
    successes = sum(row["successes"] for row in group)
    said = f"{successes}/{trials} {_interval(successes, trials)}"
    if not first["share"]:
        return ["none", "-", "0", said, "-"]
    word = {0: "no", len(group): "yes"}.get(counts, f"on {counts} of {len(group)} networks")
    return [_label(first), f"{first['epsilon_255']:g}", f"{first['share']:g}", said, word]


def _label(row):
    return TRANSFER[row["attack"]].label


def _interval(successes, trials):
    low, high = evaluation.wilson(successes, trials)
    return f"[{100 * low:.0f}, {100 * high:.0f}] %"


def _pooled(rows, name):
    """Returns TPR and accuracy, means over trials, and successes of trials after a filter."""
    each = [row["filters"][name] for row in rows]
    trials = sum(one["trials"] for one in each)
    tpr, accuracy = (
        sum(one[key] * one["trials"] for one in each) / trials for key in ("tpr", "accuracy")
    )
    return tpr, accuracy, sum(one["successes"] for one in each), trials


def _over_shares(judged):
    shares = sorted({row["share"] for row in judged})
    lines = []
    for name in judged[0]["filters"]:
        texts = []
        for share in shares:
            tpr, _, successes, trials = _pooled([r for r in judged if r["share"] == share], name)
            texts.append(f"{100 * tpr:.0f} %; {successes}/{trials}")
        lines.append([name, *texts])
    return runs.markdown(["filter", *(f"p = {share:g}" for share in shares)], lines)


def _on_clean(rows):
    for name in rows[0]["filters"]:
        each = [row["filters"][name] for row in rows]
        fpr, accuracy = (100 * sum(one[key] for one in each) / len(each) for key in _CLEAN)
        yield name, f"{fpr:.1f} %", f"{accuracy:.1f} %"
    accuracy = 100 * sum(row["accuracy"] for row in rows) / len(rows)
    yield "none", "-", f"{accuracy:.1f} %"


_CLEAN = ("fpr", "accuracy")


def _beside_paper(judged):
    budget = max(row["epsilon_255"] for row in judged)
    for attack, paper in PAPER["cifar10_mean_of_four_networks"].items():
        rows = [row for row in judged if (row["attack"], row["epsilon_255"]) == (attack, budget)]
        nearest = min((row["share"] for row in rows), key=lambda p: abs(p - 0.5), default=None)
        rows = [row for row in rows if row["share"] == nearest]
        names = [*paper, TRUSTED, LATE] if rows else paper
        for name in names:
            theirs = (
                f"{paper[name]['asr']:.2f}, {paper[name]['accuracy']:.2f}" if name in paper else "-"
            )
            ours, count = "-", "-"
            if rows:
                _, accuracy, successes, count = _pooled(rows, name)
                ours = f"{100 * successes / count:.1f}, {100 * accuracy:.1f} (p = {nearest:g})"
            yield TRANSFER[attack].label, name, theirs, ours, str(count)


def _all_numbers(judged):
    for group in _groups(judged, "attack", "epsilon_255", "share"):
        first = group[0]
        trials = sum(row["trials"] for row in group)
        accuracy = 100 * sum(row["accuracy"] * row["trials"] for row in group) / trials
        place = _label(first), f"{first['epsilon_255']:g}", f"{first['share']:g}"
        yield *place, "none", "-", "-", "-", "all", "-", f"{accuracy:.1f}"
        for name in first["filters"]:
            tpr, accuracy, successes, trials = _pooled(group, name)
            fpr, auroc = (
                sum(row["filters"][name][key] * row["filters"][name]["trials"] for row in group)
                / trials
                for key in ("fpr", "auroc")
            )
            yield (
                *(*place, name, f"{tpr:.2f}", f"{fpr:.2f}", f"{auroc:.2f}"),
                *(f"{successes}/{trials}", _interval(successes, trials), f"{100 * accuracy:.1f}"),
            )


def _hint(rows):
    paper = HINT_PAPER["table_III_targeted_cifar10"]["results"]
    for group in _groups(rows, "attack", "defense"):
        attack, defense = group[0]["attack"], group[0]["defense"]
        successes, trials = (sum(row[key] for row in group) for key in ("successes", "trials"))
        accuracy = 100 * sum(row["accuracy"] for row in group) / len(group)
        theirs = paper.get({"hint": "HINT"}.get(defense, defense), {}).get(attack.upper())
        said = "-"
        if theirs:
            said = f"{theirs['asr_success']}/{theirs['asr_trials']}, {theirs['test_acc']['mean']}"
        yield (
            *(_label(group[0]), defense.replace("hint", "HINT"), f"{successes}/{trials}"),
            *(_interval(successes, trials), f"{accuracy:.1f}", said),
        )
