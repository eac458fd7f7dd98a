"""Mislabeled images by a linear classifier on the foreign embedding."""

from jaxpoison.audit import foreign
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def refusal(evidence: Evidence) -> NotRun | None:
    """Returns why the foreign witness makes no predictions, or None."""
    if reason := common.one_class(evidence):
        return reason
    if len(evidence.labels) <= 2 * len(set(evidence.labels.tolist())):
        return NotRun("There are two images a class or fewer, too few to learn the classes from.")
    if len(evidence.labels) * evidence.num_classes > foreign.MOST:
        return NotRun(
            f"Predictions for {len(evidence.labels):,} images and {evidence.num_classes:,} classes "
            "do not fit in memory."
        )
    return None


def _score(evidence: Evidence) -> Scores | NotRun:
    if reason := refusal(evidence):
        return reason
    found = foreign.predictions(evidence)
    margin, suggested = common.margins(found.scores, evidence.labels)

    def reason_for(row: int) -> str:
        own, other = evidence.labels[row], suggested[row]
        mine, theirs = (f"{found.probabilities[row, k]:.0%}" for k in (own, other))
        return (
            "A network that never saw these data, with a classifier learned from the other images, "
            f"gives {common.named(evidence, own)} {mine} and {common.named(evidence, other)} "
            f"{theirs}."
        )

    return Scores(common.bounded(-2 * margin), reason_for, suggested=suggested)


CHECK = Check(
    name="foreign",
    title="Foreign witness disagrees",
    kind="label",
    cannot_see=(
        "Wrong labels between classes that a network trained on other photos cannot tell apart, "
        "and errors made for a whole kind of image."
    ),
    score=_score,
    threats=("flip", "mistake"),
)
