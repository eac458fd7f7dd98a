"""Harm: what each image does to the loss on trusted images."""

import numpy as np

from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores

_PENALTY = 0.1  # in mean eigenvalues of the second moments of the features


def _score(evidence: Evidence) -> Scores | NotRun:
    """Influence on the trusted loss through the last layer of the trained network, by one solve.

    With features x and errors r = one-hot label - probabilities, the gradient of an example's
    cross-entropy is -x r'. The curvature is approximated by the second moments G of the features,
    the same for all classes; with S = G^-1 mean(x_t r_t') over trusted images the influence on
    their loss is -x' S r. Divided by |x| |r|, it ranks directions (renormalized, arXiv 2201.10055):
    large losses do not come first for being large.
    """
    if reason := common.untrained(evidence):
        return reason
    trusted = evidence.trusted
    if trusted is None or trusted.trained is None:
        return NotRun("No trusted images were given whose loss could be harmed.")
    features, theirs = _features(evidence, evidence), _features(trusted, evidence)
    moments = features.T @ features
    moments += _PENALTY * np.trace(moments) / len(moments) * np.eye(len(moments))
    counts = np.bincount(trusted.labels, minlength=evidence.num_classes)
    # Every class has the same say, however many trusted images it has.
    errors = _errors(trusted) / counts[trusted.labels][:, None]
    solved = np.linalg.solve(moments, theirs.T @ errors)
    errors = _errors(evidence)
    helps = np.einsum("nk,nk->n", features @ solved, errors)
    size = np.linalg.norm(features, axis=1) * np.linalg.norm(errors, axis=1)
    harm = common.scaled(-helps / np.maximum(size, 1e-12))
    rank = np.argsort(np.argsort(harm)) / max(len(harm) - 1, 1)

    def reason_for(row: int) -> str:
        what = "raises" if harm[row] > 0 else "lowers"
        return (
            f"Learning from it {what} the loss on the trusted images, more than "
            f"{rank[row]:.1%} of the images do."
            if harm[row] > 0
            else f"Learning from it {what} the loss on the trusted images."
        )

    return Scores(common.bounded(harm), reason_for)


def _errors(one: Evidence) -> np.ndarray:
    assert one.trained is not None
    errors = -np.asarray(one.trained.probabilities, float)
    errors[np.arange(len(errors)), one.labels] += 1
    return errors


def _features(one: Evidence, scale_of: Evidence) -> np.ndarray:
    assert one.trained is not None and scale_of.trained is not None
    around = np.asarray(scale_of.trained.features, float)
    mean, size = around.mean(axis=0), np.sqrt(np.mean(around.var(axis=0)))
    centered = (np.asarray(one.trained.features, float) - mean) / max(size, 1e-12)
    return np.concatenate([centered, np.ones((len(centered), 1))], axis=1)


CHECK = Check(
    name="harm",
    title="Harms the trusted images",
    kind="harm",
    cannot_see="Harm to images unlike the trusted ones, such as images with a trigger.",
    score=_score,
    threats=("flip",),
)
