"""What a run has shown, for someone who sees it for the first time: a table, and sentences."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from common import tables

NEEDED = ("clean", "none", "hint", "recommended", "trusted")
_NAMES = {
    "clean": "clean images, no defense",
    "none": "poisoned, no defense",
    "hint": "poisoned, HINT",
    "hint_every": "poisoned, HINT at every epoch",
    "recommended": "poisoned, recommended",
    "trusted": "trusted images alone",
}


class Line(NamedTuple):
    """A row of the table.

    Attributes:
      defense: name of the defense, or `clean` or `trusted`.
      name: for people.
      accuracy: test accuracy in [0, 1], mean over seeds.
      meaning: what it says, in a few words.
    """

    defense: str
    name: str
    accuracy: float
    meaning: str


def summary(rows: Sequence[dict[str, Any]], num_test: int, num_trusted: int) -> list[Line]:
    """Returns a line for each network, or none where they do not tell the whole story.

    They do with one p above 0, if nothing failed and all of `NEEDED` were trained.

    Args:
      rows: results of a study.
      num_test: test images of each seed.
      num_trusted: trusted images of each seed.
    """
    if len({row["poison_ratio"] for row in rows if row["poison_ratio"]}) != 1:
        return []
    groups: dict[str, list[float]] = {}
    for row in rows:
        name = row["defense"]
        if row["poison_ratio"] == 0 and name != "trusted":
            if name != "none":
                continue
            name = "clean"
        if "error" in row:
            return []
        groups.setdefault(name, []).append(row["test_accuracy"])
    if any(name not in groups for name in NEEDED):
        return []
    accuracy = {name: statistics.mean(values) for name, values in groups.items()}
    judge = _Judge(accuracy, num_test * len(groups["none"]))
    known = list(_NAMES)
    others = known.index("recommended") - 0.5  # these come before it
    order = sorted(groups, key=lambda name: known.index(name) if name in known else others)
    return [
        Line(
            name,
            _NAMES.get(name) or f"poisoned, {tables.label(name)}",
            accuracy[name],
            judge.meaning(name, num_trusted),
        )
        for name in order
    ]


class _Judge(NamedTuple):
    """Accuracies by name, and on how many test images each was measured."""

    accuracy: dict[str, float]
    num_test: int

    def differ(self, one: str, other: str) -> bool:
        """Returns whether two accuracies differ by more than two standard errors."""
        shares = [self.accuracy[name] for name in (one, other)]
        error = math.sqrt(sum(share * (1 - share) for share in shares) / self.num_test)
        return abs(shares[0] - shares[1]) > 2 * error

    def points(self, one: str, other: str) -> int:
        """Returns by how many percentage points `one` is above `other`."""
        return round(100 * (self.accuracy[one] - self.accuracy[other]))

    def meaning(self, name: str, num_trusted: int) -> str:
        """Returns what the accuracy of a network says."""
        lost = self.points("clean", "none")
        hurt = lost > 0 and self.differ("clean", "none")
        if name == "clean":
            return "what these images are worth"
        if name == "none":
            return f"the attack costs {lost} points" if hurt else "the attack does no damage"
        if name == "trusted":
            where = "on a par with"
            if self.differ(name, "hint"):
                where = "ahead of" if self.points(name, "hint") > 0 else "behind"
            return f"{num_trusted} clean images: {where} HINT"
        if not hurt:
            return "nothing to recover"
        if not self.differ(name, "none"):
            return "recovers nothing that this test could show"
        gained = self.points(name, "none")
        if gained < 0:
            return f"{-gained} points worse than no defense"
        return f"recovers {min(gained, lost)} of the {lost} points"


def headline(lines: Sequence[Line]) -> str:
    """Returns the result in a sentence or two, without a full stop at the end."""
    accuracy = {line.defense: f"{100 * line.accuracy:.0f}%" for line in lines}
    # Not the better of the two, which the test images would choose.
    name = "hint_every" if "hint_every" in accuracy else "hint"
    return (
        f"Poisoned training images take accuracy from {accuracy['clean']} to {accuracy['none']}. "
        f"With {_NAMES[name].removeprefix('poisoned, ')} it is {accuracy[name]}, with trusted "
        f"images mixed in {accuracy['recommended']}"
    )


def table(lines: Sequence[Line], caption: str) -> tables.Table:
    """Returns the lines as a table."""
    cells = [[line.name, f"{100 * line.accuracy:.1f}", line.meaning] for line in lines]
    return tables.Table(caption, ["trained on", "right, %", "what it says"], cells)
