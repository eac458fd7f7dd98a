"""Confident learning, by cleanlab's own package, on predictions of the foreign witness."""

import importlib

import numpy as np

from jaxpoison.audit import foreign
from jaxpoison.audit.checks import common
from jaxpoison.audit.checks.foreign import refusal
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def _score(evidence: Evidence) -> Scores | NotRun:
    """Label quality by normalized margin (arXiv 1911.00068)."""
    if reason := refusal(evidence):
        return reason
    try:
        rank = importlib.import_module("cleanlab.rank")
    except ImportError:
        return NotRun("cleanlab is not installed (pip install cleanlab).")
    probabilities = foreign.predictions(evidence).probabilities
    # cleanlab wants every class to have examples.
    present, labels = np.unique(evidence.labels, return_inverse=True)
    predicted = probabilities[:, present].astype(float)
    predicted /= predicted.sum(axis=1, keepdims=True)
    quality = rank.get_label_quality_scores(labels, predicted, method="normalized_margin")
    _, suggested = common.margins(probabilities, evidence.labels)

    def reason_for(row: int) -> str:
        return (
            f"cleanlab's label quality is {quality[row]:.2f} of 1; the foreign witness leans to "
            f"{common.named(evidence, suggested[row])}."
        )

    return Scores((1 - np.asarray(quality)).astype(np.float32), reason_for, suggested=suggested)


CHECK = Check(
    name="confident",
    title="Confident learning",
    kind="label",
    cannot_see="What the foreign witness cannot see, on whose predictions it is built.",
    score=_score,
    threats=("flip", "mistake"),
)
