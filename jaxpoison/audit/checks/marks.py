"""Backdoors by a small mark: the same few pixels on images of one class, and on no others."""

from jaxpoison.audit import patterns
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores

_NAMES = ("top", "middle", "bottom"), ("left", "middle", "right")


def _score(evidence: Evidence) -> Scores | NotRun:
    found = patterns.small(evidence)
    windows = patterns.windows()

    def where(row: int) -> str:
        names = []
        for span, words in zip(windows[found.place[row]], _NAMES, strict=True):
            middle = (span.start + span.stop) / 2 / evidence.images.shape[1]
            names.append(words[min(int(3 * middle), 2)])
        return f"At the {names[0]} {names[1]}, ".replace("middle middle", "center")

    return common.of_patterns(evidence, found, where)


CHECK = Check(
    name="marks",
    title="A mark that a class shares",
    kind="poison",
    cannot_see=(
        "Marks that move from image to image, that are on several classes alike, or that are as "
        "faint as what is around them."
    ),
    score=_score,
    threats=("patch", "blend", "wave"),
)
