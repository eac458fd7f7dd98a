"""Poisons of a whole set: what is learned from it is of no use on trusted images."""

import math

import numpy as np

from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.trained import LEAST_TRUSTED
from jaxpoison.audit.verdict import Check, NotRun, Scores, Whole

_ALLOWED = 0.1


def _score(evidence: Evidence) -> Scores | NotRun:
    """Accuracy on held-out images of the set less that on trusted ones.

    Flagged above 10 points and twice the sampling error of the trusted images.
    """
    if reason := common.untrained(evidence):
        return reason
    found = evidence.held_out
    if found is None:
        return NotRun(
            f"It needs {LEAST_TRUSTED} trusted images or more, and a network that is trained here "
            "on half of the data."
        )
    allowed = _ALLOWED + 2 * math.sqrt(0.25 / found.num_trusted)
    broken = (found.accuracy - found.trusted) / allowed - 1
    sentence = (
        f"A network trained on half of the data is right on {found.accuracy:.0%} of "
        f"{found.tested:,} images of the other half, and on {found.trusted:.0%} of "
        f"{found.num_trusted:,} trusted images: what it learns here "
        f"{'is of little use' if broken > 0 else 'holds'} elsewhere."
    )
    score = float(common.bounded(np.asarray(broken)))
    return Scores(None, lambda row: sentence, whole=Whole(broken > 0, score, sentence))


CHECK = Check(
    name="held_out",
    title="Learned here, useless elsewhere",
    kind="shortcut",
    cannot_see=(
        "Poisons on a part of the set, or against larger networks; and it cannot tell poisons from "
        "trusted images that were taken elsewhere."
    ),
    score=_score,
)
