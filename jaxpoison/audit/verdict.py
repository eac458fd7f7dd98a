"""The verdict of a check: a score for each image, and sometimes one conclusion on the whole set."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from jaxpoison.audit.evidence import Evidence

Kind = Literal["file", "copy", "label", "poison", "shortcut"]


class Whole(NamedTuple):
    """A conclusion on the whole set.

    Attributes:
      flagged: whether something is wrong with the set.
      score: in [0, 1], higher is worse.
      reason: a sentence with the figures that decide.
      picture: uint8 [H, W, 3] that shows why, or None.
      caption: what the picture shows.
    """

    flagged: bool
    score: float
    reason: str
    picture: np.ndarray | None = None
    caption: str = ""


class Scores(NamedTuple):
    """What a check found, before its threshold is known.

    Attributes:
      score: float32 [N] in [0, 1], higher is worse; NaN where the check cannot judge a row; None
        for a check of the whole set.
      reason: for a row, a sentence a person can check, such as "9 of its 10 nearest neighbors are
        'cat'".
      flagged: bool [N] for checks that decide by rule (copies, broken files); None for those
        whose threshold is calibrated by canaries.
      suggested: int32 [N], the label that the check believes, -1 for none; None if it has no view.
      related: {row: rows}: for each row, the rows that are evidence, nearest first (copies,
        neighbors); may be empty.
      whole: a conclusion on the whole set, or None.
    """

    score: np.ndarray | None
    reason: Callable[[int], str]
    flagged: np.ndarray | None = None
    suggested: np.ndarray | None = None
    related: Callable[[int], np.ndarray] | None = None
    whole: Whole | None = None


class NotRun(NamedTuple):
    """Why a check could not run; never the same as having passed."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Check:
    """One check, made of pure functions of the evidence."""

    name: str
    """Short, for columns: `neighbors`."""
    title: str
    """For people: "Neighbors disagree"."""
    kind: Kind
    """What it looks for."""
    cannot_see: str
    """A sentence: which faults of this kind leave no trace here."""
    score: Callable[[Evidence], Scores | NotRun]
    """The check itself."""
    threats: tuple[str, ...] = ()
    """Canaries that it should find (`plant.THREATS`); a threshold is calibrated by them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """One check with its threshold.

    `p_values` is float64 [N] in (0, 1] against the null of images without this fault, NaN where
    the check cannot judge; None for a check that decides by rule or did not run.
    """

    check: Check
    scores: Scores | NotRun
    p_values: np.ndarray | None = None
    threshold: float | None = None

    @property
    def ran(self) -> bool:
        """Whether there are scores."""
        return isinstance(self.scores, Scores)
