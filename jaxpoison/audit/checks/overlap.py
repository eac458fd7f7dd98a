"""Images of the set that are trusted images as well."""

import numpy as np

from jaxpoison.audit import nearest, similar
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def _score(evidence: Evidence) -> Scores | NotRun:
    trusted = evidence.trusted
    if trusted is None:
        return NotRun("No trusted images were given.")
    words = np.ascontiguousarray(evidence.digests).view(np.uint64)
    known = np.ascontiguousarray(trusted.digests).view(np.uint64)
    _, group = np.unique(np.concatenate([known, words]), axis=0, return_inverse=True)
    group = group.reshape(-1)
    twin = np.full(group.max() + 1, -1)
    twin[group[: len(known)]] = np.arange(len(known))
    other = twin[group[len(known) :]]
    exact = other >= 0
    found = nearest.nearest(
        np.asarray(trusted.embedding, np.float32),
        np.asarray(evidence.embedding, np.float32),
        nearest.COUNT,
    )
    pairs = similar.compare(evidence, trusted, found)
    order = np.argsort(-pairs.difference, kind="stable")
    other[pairs.rows[order, 0]] = np.where(
        exact[pairs.rows[order, 0]], other[pairs.rows[order, 0]], pairs.rows[order, 1]
    )
    flagged = other >= 0
    right = np.where(flagged, trusted.labels[other], -1).astype(np.int32)
    differs = flagged & (right != evidence.labels)

    def reason_for(row: int) -> str:
        if not flagged[row]:
            return "It is not among the trusted images."
        what = "The same image as" if exact[row] else "Nearly the same image as"
        end = f", which is labeled {common.named(evidence, right[row])}" if differs[row] else ""
        return f"{what} the trusted {trusted.ids[other[row]]}{end}."

    score = np.where(exact, 1.0, np.where(flagged, 0.9, 0.0)).astype(np.float32)
    suggested = np.where(differs, right, -1).astype(np.int32)
    return Scores(score, reason_for, flagged=flagged, suggested=suggested)


CHECK = Check(
    name="overlap",
    title="Also a trusted image",
    kind="copy",
    cannot_see="Copies that were mirrored, rotated, or cropped by more than a few percent.",
    score=_score,
)
