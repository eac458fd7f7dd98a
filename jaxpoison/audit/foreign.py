"""What the foreign witness would call each image, from a linear map that never saw its label."""

from typing import NamedTuple

import numpy as np

from jaxpoison.audit import nearest
from jaxpoison.audit.evidence import Evidence

_CHUNK = 8192
WIDTH = 512
"""Principal components of the embedding that the classifier sees."""
_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the penalty, in mean eigenvalues
_SHARPNESS = np.geomspace(1, 40, 24)
MOST = 2**28
"""Largest N K for which predictions are made: they take as many numbers."""


class Predictions(NamedTuple):
    """Predictions of each row from all others.

    Attributes:
      scores: float32 [N, K], of ridge regression on the classes, each row's from a fit without it.
      probabilities: float32 [N, K], softmax of the scores times one number for all.
    """

    scores: np.ndarray
    probabilities: np.ndarray


@nearest.once
def predictions(evidence: Evidence) -> Predictions:
    """Returns leave-one-out predictions of a linear classifier on the embedding, in closed form.

    Ridge regression of one-hot labels; with leverage h and residual r, the residual of a fit
    without the row is r / (1 - h). The penalty has the least generalized cross-validation, the
    sharpness of the softmax the least loss of the given labels.
    """
    labels, classes = evidence.labels, evidence.num_classes
    num = len(labels)
    mean, values, basis = nearest.principal(evidence)
    values, basis = num * values[-WIDTH:], basis[:, -WIDTH:]
    share = np.bincount(labels, minlength=classes) / num
    rotated = np.empty((num, len(values)), np.float32)
    coefficients = np.zeros((len(values), classes))
    for start in range(0, num, _CHUNK):
        rows = slice(start, start + _CHUNK)
        rotated[rows] = (np.asarray(evidence.embedding[rows], np.float32) - mean) @ basis
        coefficients += rotated[rows].T @ _one_hot(labels[rows], share)
    inverse = _inverse(values, coefficients, float(num * (1 - (share**2).sum())), num)
    weights = (inverse[:, None] * coefficients).astype(np.float32)
    scores = np.empty((num, classes), np.float32)
    for start in range(0, num, _CHUNK):
        rows = slice(start, start + _CHUNK)
        leverage = 1 / num + rotated[rows] ** 2 @ inverse.astype(np.float32)
        leverage = np.minimum(leverage, 0.999)[:, None]
        target = _one_hot(labels[rows], share)
        # The mean of the targets is fitted as well, and left out with the row.
        scores[rows] = share + (rotated[rows] @ weights - leverage * target) / (1 - leverage)
    return Predictions(scores, _probabilities(scores, labels))


def _one_hot(labels, share):
    target = np.tile(-share.astype(np.float32), (len(labels), 1))
    target[np.arange(len(labels)), labels] += 1
    return target


def _inverse(values, coefficients, total, num):
    """Returns 1 / (values + penalty), of the penalty with the least cross-validation error."""
    energy = (coefficients**2).sum(axis=1)

    def error(strength):
        inverse = 1 / (values + strength * max(values.mean(), 1e-12))
        residual = total - (energy * (2 * inverse - values * inverse**2)).sum()
        return max(residual, 0) / (1 - ((values * inverse).sum() + 1) / num) ** 2, inverse

    return min((error(strength) for strength in _STRENGTHS), key=lambda pair: pair[0])[1]


def _probabilities(scores, labels):
    rows = np.arange(len(labels))
    around = scores - scores.max(axis=1, keepdims=True)

    def loss(sharpness):
        logits = sharpness * around
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[rows, labels])

    odds = np.exp(min(_SHARPNESS, key=loss) * around)
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
