"""Backdoors by a faint picture: the same all over images of one class, and on no others."""

from jaxpoison.audit import patterns
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def _score(evidence: Evidence) -> Scores | NotRun:
    return common.of_patterns(evidence, patterns.large(evidence), lambda row: "As a whole, ")


CHECK = Check(
    name="overlays",
    title="A pattern that a class shares",
    kind="poison",
    cannot_see=(
        "Patterns that differ from image to image, such as warps, that are on several classes "
        "alike, or that are on very few images."
    ),
    score=_score,
    threats=("patch", "blend", "wave"),
)
