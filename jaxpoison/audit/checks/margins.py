"""Mislabeled images by how the network that was trained on them learns their labels."""

import numpy as np

from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def _score(evidence: Evidence) -> Scores | NotRun:
    """The logit margin of the label, averaged over epochs (arXiv 2510.16211), with its sign turned.

    Wrong labels are learned late or not at all, so their margins are low for most of training. The
    mean is over the second half: before, right labels are not learned either (on the human label
    errors of CIFAR-10N it has the higher average precision).
    """
    if reason := common.untrained(evidence):
        return reason
    trained = evidence.trained
    assert trained is not None
    margin = np.asarray(trained.margins, np.float64)[len(trained.margins) // 2 :].mean(axis=0)
    against = (np.asarray(trained.margins) < 0).mean(axis=0)
    epochs = len(trained.margins)
    _, suggested = common.margins(trained.probabilities, evidence.labels)

    def reason_for(row: int) -> str:
        times = round(against[row] * epochs)
        return (
            f"The network trained on this data disagreed with the label after {times} of {epochs} "
            f"epochs; it leans toward {common.named(evidence, int(suggested[row]))}."
        )

    return Scores(common.bounded(-common.scaled(margin)), reason_for, suggested=suggested)


CHECK = Check(
    name="margins",
    title="Learned late or never",
    kind="label",
    cannot_see=(
        "Wrong labels that a network learns as easily as right ones: systematic confusions, and "
        "poisons with a trigger."
    ),
    score=_score,
    threats=("flip", "mistake"),
)
