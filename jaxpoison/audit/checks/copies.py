"""Exact and near copies within the set."""

import numpy as np

from jaxpoison.audit import similar
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, Scores


def _score(evidence: Evidence) -> Scores:
    groups = similar.groups_of(evidence)
    rows = np.arange(len(groups.keeper))
    flagged = groups.keeper != rows
    same = groups.exact == groups.exact[groups.keeper]

    def reason_for(row: int) -> str:
        others = len(similar.others_of(groups, row))
        if not flagged[row]:
            return f"It has {others} copies." if others else "It has no copy."
        what = "An exact copy of" if same[row] else "Nearly the same image as"
        return f"{what} {evidence.ids[groups.keeper[row]]} ({others + 1} images in this group)."

    score = np.where(flagged, np.where(same, 1.0, 0.9), 0.0).astype(np.float32)
    return Scores(
        score, reason_for, flagged=flagged, related=lambda row: similar.others_of(groups, row)
    )


CHECK = Check(
    name="copies",
    title="Copies",
    kind="copy",
    cannot_see="Copies that were mirrored, rotated, or cropped by more than a few percent.",
    score=_score,
)
