"""How many changed images a prediction survives: deep partition aggregation on the audited data.

Linear classifiers are trained on parts of the data that a hash of each image decides, and vote
(`evaluation.certify`, arXiv 2006.14768). They see the foreign embedding, which these data cannot
have poisoned, so an image that somebody inserts, removes or labels otherwise touches one part and
one vote. Nothing here depends on other images than those of a part: not the embedding, which is not
whitened, nor the penalty, nor which images are measured on. What is said holds for the vote, not
for a network that is trained on all images.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.records import Certificate, CertificateRow
from jaxpoison.core.checks import check_count
from jaxpoison.data import Dataset
from jaxpoison.evaluation.certify import certified_radius, count_votes, partition

PENALTY = 0.003
"""Of the ridge, for embeddings of unit length."""
HELD_OUT = 10
"""One image in so many is measured on, where there are no trusted ones."""
_TESTED = 4096
_SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Votes(NamedTuple):
    """What the classifiers say of T images.

    Attributes:
      votes: int32 [T, K], classifiers for each class; a row sums to their number.
      labels: int32 [T], labels of these images.
    """

    votes: np.ndarray
    labels: np.ndarray


def certificate(evidence: Evidence, trusted: Evidence | None, num_parts: int) -> Certificate:
    """Returns which share of predictions no k changed images can change, for several k.

    Args:
      evidence: of the data; the embedding as it is, not whitened.
      trusted: the same of trusted images, which are measured on; None for a tenth of the data.
      num_parts: P, at least 3; no k above P / 2 can be promised.

    Raises:
      ValueError: if no image is left to train on or to measure on.
    """
    check_count(num_parts=num_parts)
    votes, labels = vote(evidence, trusted, num_parts)
    prediction, radius = map(np.asarray, certified_radius(votes))
    right = prediction == labels
    rows = tuple(
        CertificateRow(
            num_changes=k,
            unchanged=float(np.mean(radius >= k)),
            right=float(np.mean(right & (radius >= k))),
        )
        for k in _SHOWN
        if k == 1 or 2 * k <= num_parts
    )
    return Certificate(
        num_parts=num_parts,
        num_images=len(labels),
        accuracy=float(np.mean(right)),
        rows=rows,
        reason=_sentence(num_parts, rows, float(np.mean(right)), len(labels), trusted is not None),
    )


def vote(evidence: Evidence, trusted: Evidence | None, num_parts: int) -> Votes:
    """Trains a linear classifier on each part of the data; returns what they say of other images.

    Without trusted images, a hash decides which tenth of the data is measured on. With them, what
    equals one of them is not trained on.

    Raises:
      ValueError: if no image is left to train on or to measure on.
    """
    images = np.asarray(evidence.images)
    if trusted is None:
        aside = np.array([_hash(image) % HELD_OUT == 0 for image in images], bool)
        features, labels = evidence.embedding[aside], evidence.labels[aside]
    else:
        known = {digest.tobytes() for digest in trusted.digests}
        aside = np.array([digest.tobytes() in known for digest in evidence.digests], bool)
        features, labels = trusted.embedding, trusted.labels
    if aside.all() or not len(labels):
        raise ValueError(
            f"a certificate needs images to train on and others to measure on; of {len(aside):,} "
            f"{aside.sum():,} are measured on: give other trusted images, or leave out certify"
        )
    rows = np.flatnonzero(~aside)
    parts = partition(Dataset(images[rows], evidence.labels[rows]), num_parts)
    answers = np.zeros((len(labels), num_parts), np.int32)  # an empty part votes for class 0
    for number, part in enumerate(parts):
        if len(part):
            own = rows[part]
            answers[:, number] = _answers(
                evidence.embedding[own], evidence.labels[own], features, evidence.num_classes
            )
    return Votes(np.asarray(count_votes(answers, evidence.num_classes)), np.asarray(labels))


def _answers(features, labels, asked, num_classes):
    """Returns the class of each asked row, int [T], by ridge regression with a penalized bias."""
    weights = ridge(_with_bias(features), np.eye(num_classes)[labels])
    return np.concatenate(
        [
            (_with_bias(asked[start : start + _TESTED]) @ weights).argmax(axis=1)
            for start in range(0, len(asked), _TESTED)
        ]
    )


def ridge(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the weights [D, K] of least |inputs W - targets|^2 + PENALTY |W|^2.

    By the smaller of the two systems of equations, in float64.
    """
    count, width = inputs.shape
    if count <= width:
        kernel = inputs @ inputs.T + PENALTY * np.eye(count)
        return inputs.T @ np.linalg.solve(kernel, targets)
    return np.linalg.solve(inputs.T @ inputs + PENALTY * np.eye(width), inputs.T @ targets)


def _with_bias(features):
    features = np.asarray(features, np.float64)
    return np.concatenate([features, np.ones((len(features), 1))], axis=1)


def _hash(image):
    """Returns a whole number by which an image is set aside, unrelated to its part."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little")


def _sentence(num_parts, rows, accuracy, count, trusted):
    """Returns what can be promised: for one change, and for the most of which half is safe."""
    half = [row for row in rows[1:] if row.unchanged >= 0.5]
    kind = "trusted" if trusted else "held-out"
    text = (
        f"Of {num_parts} linear classifiers, each trained on its own part of the data, the "
        f"majority is right on {100 * accuracy:.0f}% of {count:,} {kind} images. "
        f"{100 * rows[0].unchanged:.0f}% of these predictions stay the same whatever one image is "
        "inserted, removed or relabeled"
    )
    if half:
        text += f", and {100 * half[-1].unchanged:.0f}% whatever {half[-1].num_changes} are"
    return text + "."
