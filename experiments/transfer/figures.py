"""Pictures of `transfer_filter.py`."""

from pathlib import Path
from typing import Any

import numpy as np
from common.registry import TRANSFER
from sklearn.decomposition import PCA

from jaxpoison import filters
from jaxpoison.runs import pictures
from transfer.verdicts import DATASET, LATE, ROC_GRID, TRUSTED, View, directions

plt = pictures.pyplot()

Rows = list[dict[str, Any]]


def roc(path: Path, rows: Rows) -> None:
    """Draws ROC curves, means over trials: a panel for each attack (down) and share p (across).

    Args:
      path: PNG to write.
      rows: judged cells of one network and budget.
    """
    attacks, shares = (sorted({row[name] for row in rows}) for name in ("attack", "share"))
    figure, axes = plt.subplots(
        len(attacks), len(shares), squeeze=False, sharex=True, sharey=True, layout="constrained",
        figsize=(1.5 + 2.6 * len(shares), 0.8 + 2.6 * len(attacks)),
    )  # fmt: skip
    names = list(rows[0]["roc"])
    for row in rows:
        axis = axes[attacks.index(row["attack"]), shares.index(row["share"])]
        axis.set_title(f"{TRANSFER[row['attack']].label}, p = {row['share']:g}", fontsize=8)
        for number, name in enumerate(names):
            ours = name in (DATASET, TRUSTED, LATE)
            axis.plot(
                ROC_GRID, row["roc"][name], color=f"C{number % 10}", label=name,
                linewidth=2 if ours else 0.9, linestyle="-" if number < 10 else "--",
            )  # fmt: skip
    for line in axes:
        filled = [axis for axis in line if axis.has_data()]
        filled[0].tick_params(labelleft=True)  # also where the cell before it does not count
        for axis in line:
            axis.set_visible(axis in filled)
    filled = next(axis for axis in axes.flat if axis.has_data())
    handles, labels = filled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7)
    figure.supxlabel("share of clean images flagged", fontsize=9)
    figure.supylabel("share of poisons flagged", fontsize=9)
    _write(figure, path)


def found_over_share(path: Path, rows: Rows) -> None:
    """Draws the share of poisons found over their share p, beside what the limit predicts.

    Args:
      path: PNG to write.
      rows: judged cells of one network and budget.
    """
    attacks = sorted({row["attack"] for row in rows})
    figure, axes = plt.subplots(
        1, 1 + len(attacks), figsize=(3.2 * (1 + len(attacks)), 3.4), layout="constrained"
    )
    for axis, attack in zip(axes, attacks, strict=False):
        mine = sorted((row for row in rows if row["attack"] == attack), key=lambda r: r["share"])
        shares = [row["share"] for row in mine]
        for color, name, predicted in (
            ("C0", DATASET, "share_beyond_limit"),
            ("C1", TRUSTED, "share_beyond_half"),
        ):
            found = [row["filters"][name]["tpr"] for row in mine]
            axis.plot(shares, found, "o-", color=color, label=name)
            axis.plot(
                shares, [row[predicted] for row in mine], "x:", color=color,
                label="poisons beyond the limit" + (" at p = 0" if name == TRUSTED else ""),
            )  # fmt: skip
        axis.set_title(TRANSFER[attack].label, fontsize=9)
        axis.set_xlabel("p, share of the base class")
        axis.set_xlim(0, 1)
        axis.set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("share of poisons found")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )
    grid = np.linspace(0, 1, 101)
    axes[-1].plot(
        grid, [filters.detectable_shift(p) for p in grid], color="black", label="1 / (2 - p)"
    )
    for number, attack in enumerate(attacks):
        mine = [row for row in rows if row["attack"] == attack]
        axes[-1].plot(
            [row["share"] for row in mine], [row["shift"] for row in mine], "o",
            color=f"C{number + 2}", label=TRANSFER[attack].label,
        )  # fmt: skip
    axes[-1].set_title("poisons above the line are found", fontsize=9)
    axes[-1].set_xlabel("p, share of the base class")
    axes[-1].set_ylabel("s, share of the way to the target's class")
    axes[-1].legend(fontsize=7)
    _write(figure, path)


def vectors(path: Path, view: View, title: str) -> None:
    """Draws characteristic vectors of one trial, two principal components, poisons marked.

    Args:
      path: PNG to write.
      view: one trial.
      title: what is shown.
    """
    base, target = int(view.base_labels[0]), int(view.target_labels[0])
    mine = np.isin(view.labels, (base, target))
    points = PCA(2).fit_transform(directions(view.charvec)[view.places[0, mine]])
    labels, poisoned = view.labels[mine], view.is_poisoned[0, mine]
    figure, axis = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    for color, marker, name, members in (
        ("C0", "o", "base class, clean", (labels == base) & ~poisoned),
        ("C2", "o", "target's class", labels == target),
        ("C3", "X", "poisons, labeled as base class", poisoned),
    ):
        axis.scatter(*points[members].T, c=color, marker=marker, s=22, alpha=0.8, label=name)
    axis.set_title(f"characteristic vectors, {title}", fontsize=9)
    axis.set_xlabel("first principal component")
    axis.set_ylabel("second principal component")
    axis.legend(fontsize=8)
    _write(figure, path)


def _write(figure, path):
    pictures.save(figure, path, dpi=120)
