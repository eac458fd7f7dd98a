"""The same image under two labels: one of them is wrong."""

import numpy as np

from jaxpoison.audit import nearest, similar
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores

_VERY_NEAR = 0.01  # as `_DIFFERENCE`, for the same image under two labels


def _score(evidence: Evidence) -> Scores | NotRun:
    """Groups of exact copies and very near ones, with more than one label."""
    if reason := common.one_class(evidence):
        return reason
    exact, labels = nearest.copies_of(evidence), evidence.labels
    pairs = similar.near_pairs(evidence)
    pairs = pairs.rows[pairs.difference <= _VERY_NEAR]
    joined = np.unique(exact[pairs].reshape(-1, 2), axis=0)
    group = similar.stars(exact.max() + 1, joined, np.arange(exact.max() + 1))[exact]
    # How often each label occurs in each group: `pair` numbers what occurs.
    kinds, pair, counts = np.unique(
        group.astype(np.int64) * evidence.num_classes + labels,
        return_inverse=True,
        return_counts=True,
    )
    groups, label_of = np.divmod(kinds, evidence.num_classes)
    most = np.zeros(exact.max() + 1, np.int64)
    np.maximum.at(most, groups, counts)
    winners = np.bincount(groups[counts == most[groups]], minlength=len(most))
    winner = np.full(len(most), -1, np.int32)
    top = (counts == most[groups]) & (winners[groups] == 1)
    winner[groups[top]] = label_of[top]
    divided = np.bincount(groups, minlength=len(most)) > 1
    flagged = divided[group] & (winner[group] != labels)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(most) + 1))

    def related(row: int) -> np.ndarray:
        members = order[starts[group[row]] : starts[group[row] + 1]]
        return members[labels[members] != labels[row]]

    def reason_for(row: int) -> str:
        others = related(row)
        if not len(others):
            return "No copy of it has another label."
        name = common.named(evidence, int(labels[others[0]]))
        return f"The same image, {evidence.ids[others[0]]}, is labeled {name}."

    share = counts[pair.reshape(-1)] / np.bincount(group)[group]
    return Scores(
        np.where(flagged, 1 - 0.5 * share, 0.0).astype(np.float32),
        reason_for,
        flagged=flagged,
        suggested=np.where(flagged, winner[group], -1).astype(np.int32),
        related=related,
    )


CHECK = Check(
    name="crosslabel",
    title="Same image, two labels",
    kind="label",
    cannot_see="Wrong labels of images that are in the set only once.",
    score=_score,
    threats=("copy",),
)
