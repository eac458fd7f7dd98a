"""Backdoors by two clusters in a class, in all layers of the trained network together."""

import numpy as np

from jaxpoison.audit.checks import common
from jaxpoison.audit.checks.clustering import scores
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores


def _score(evidence: Evidence) -> Scores | NotRun:
    """As FLARE (arXiv 2411.19479), on the channels' means and variances in place of extremes.

    Every layer has the same weight, however many channels it has.
    """
    if reason := common.without_layers(evidence):
        return reason
    trained = evidence.trained
    assert trained is not None
    vectors = np.asarray(trained.vectors, float)
    deviation = vectors.std(axis=0)
    vary = deviation > 1e-6 * np.abs(vectors).max(axis=0)
    vectors = (vectors - vectors.mean(axis=0)) / np.where(vary, deviation, np.inf)
    _, place, widths = np.unique(trained.layers, return_inverse=True, return_counts=True)
    return scores(evidence, vectors / np.sqrt(widths[place]), "all layers of the trained network")


CHECK = Check(
    name="layers",
    title="Small cluster in all layers",
    kind="poison",
    cannot_see=(
        "Triggers that change no layer's statistics, and poisons that are most of a class."
    ),
    score=_score,
    threats=("patch", "blend", "wave"),
)
