"""Poisons by two witnesses: the network trained on the data believes the label, the other not."""

import numpy as np

from jaxpoison.audit import foreign
from jaxpoison.audit.checks import common
from jaxpoison.audit.checks.foreign import refusal
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def _score(evidence: Evidence) -> Scores | NotRun:
    """The smaller of two: how much the foreign witness is against the label, and the other for it.

    A wrong label alone is against both; a trigger or a perturbed image is learned from the data,
    and means nothing to a network that never saw them.
    """
    if reason := common.untrained(evidence) or refusal(evidence):
        return reason
    trained = evidence.trained
    assert trained is not None
    found = foreign.predictions(evidence)
    against, suggested = common.margins(found.scores, evidence.labels)
    learned = np.asarray(trained.margins, float).mean(axis=0)
    score = np.minimum(common.scaled(-against), common.scaled(learned))
    certain = trained.probabilities[np.arange(len(score)), evidence.labels]

    def reason_for(row: int) -> str:
        own, other = evidence.labels[row], suggested[row]
        return (
            f"The network trained on these data gives the label {common.named(evidence, own)} "
            f"{certain[row]:.0%}, one that never saw them {found.probabilities[row, own]:.0%} "
            f"and {common.named(evidence, other)} {found.probabilities[row, other]:.0%}."
        )

    return Scores(common.bounded(score), reason_for, suggested=suggested)


CHECK = Check(
    name="witnesses",
    title="Only the data's own network believes it",
    kind="poison",
    cannot_see=(
        "Poisons that look like their label to every network, such as triggers on images of the "
        "right class."
    ),
    score=_score,
    threats=("patch", "blend", "collision"),
)
