"""Shortcuts: can a linear classifier tell classes by fine detail, which should say little?"""

import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import linalg

from jaxpoison.audit import foreign, nearest
from jaxpoison.audit.checks import common
from jaxpoison.audit.checks.foreign import refusal
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores, Whole

_MOST = 3000  # images, half to learn from and half to test on
_LEAST = 8  # images a class, on average
_QUALITY = 10
_PENALTIES = (1e-3, 1e-2, 0.1, 1.0)  # in mean eigenvalues
_SAVED = 0.15
"""Share of the errors after JPEG that detail may save, see `excess`."""


class Figures(NamedTuple):
    """Accuracies on held-out images, in [0, 1], of linear and two-layer classifiers.

    Attributes:
      raw: of the pixels.
      gray: of gray pixels.
      jpeg: of the pixels after JPEG.
      detail: of the image less its 3x3 average; the better of both classifiers.
      detail_jpeg: the same after JPEG.
      alone: of the linear classifier of detail.
      trusted: the same on trusted images, or None.
      witness: of the foreign witness on the same held-out images, or None.
      tested: number of held-out images.
      chance: share of the most frequent class.
      weights: float32 [K, S, S, 3] of the linear classifier of detail.
    """

    raw: float
    gray: float
    jpeg: float
    detail: float
    detail_jpeg: float
    alone: float
    trusted: float | None
    witness: float | None
    tested: int
    chance: float
    weights: np.ndarray


def jpeg(images: np.ndarray) -> np.ndarray:
    """Returns uint8 [N, S, S, 3] written and read as JPEG of quality 10."""
    found = np.empty_like(images)
    for row, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=_QUALITY)
        found[row] = np.asarray(Image.open(file))
    return found


def detail(pixels: np.ndarray) -> np.ndarray:
    """Returns float32 images less the average of the 3x3 pixels around each."""
    size = pixels.shape[1]
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    parts = (padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3))
    return pixels - sum(parts) / np.float32(9)


def fit(inputs: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights [d, K] and offset [K] of ridge regression on the classes.

    The penalty has the least generalized cross-validation error.
    """
    mean = inputs.mean(axis=0)
    around = (inputs - mean).astype(np.float32)
    target = np.eye(num_classes)[labels]
    share = target.mean(axis=0)
    kernel = (around @ around.T).astype(float)
    average = max(float(np.trace(kernel)) / len(kernel), 1e-12)
    (invert,) = linalg.get_lapack_funcs(("trtri",), (kernel,))

    def solved(strength):
        """Returns (error, dual weights): by a Cholesky factor: eigenvalues cost more."""
        penalized = kernel + strength * average * np.eye(len(kernel))
        factor = linalg.cholesky(penalized, lower=True)
        dual = linalg.cho_solve((factor, True), target - share)
        triangle, _ = invert(factor, lower=1)
        trace = float(np.vdot(triangle, triangle))  # of the inverse, triangle^T triangle
        left = strength * average * trace / len(kernel)
        return float(((strength * average * dual) ** 2).sum()) / left**2, dual

    dual = min(map(solved, _PENALTIES), key=lambda pair: pair[0])[1]
    weights = around.T @ dual.astype(np.float32)
    return weights, share - mean @ weights


def measure(evidence: Evidence) -> Figures:
    """Returns the accuracies: learned on half of a sample, tested on the other half.

    Sample and halves go by content, and of exact copies only one takes part: no image is in both
    halves, and the order of rows does not matter.
    """
    # Groups are numbered by digest, which is as good as chance.
    rows = np.unique(nearest.copies_of(evidence), return_index=True)[1][:_MOST]
    images, labels = np.asarray(evidence.images[rows]), evidence.labels[rows]
    half, classes = len(rows) // 2, evidence.num_classes
    squeezed = jpeg(images) / np.float32(255)
    pixels = images / np.float32(255)

    def accuracy(inputs, model):
        return float((_scores(inputs, model).argmax(axis=1) == labels[half:]).mean())

    def linear(inputs):
        inputs = inputs.reshape(len(inputs), -1)
        return accuracy(inputs[half:], fit(inputs[:half], labels[:half], classes))

    fine, rough = (detail(x).reshape(len(rows), -1) for x in (pixels, squeezed))
    model = fit(fine[:half], labels[:half], classes)
    wide_fine, wide_rough = _hidden(fine, half), _hidden(rough, half)
    trusted = None
    if evidence.trusted is not None:
        theirs = detail(np.asarray(evidence.trusted.images) / np.float32(255))
        found = _scores(theirs.reshape(len(theirs), -1), model).argmax(axis=1)
        trusted = float((found == evidence.trusted.labels).mean())
    witness = None
    if refusal(evidence) is None:
        called = foreign.predictions(evidence).scores[rows[half:]].argmax(axis=1)
        witness = float((called == labels[half:]).mean())
    alone = accuracy(fine[half:], model)
    return Figures(
        raw=linear(pixels),
        gray=linear(pixels.mean(axis=-1)),
        jpeg=linear(squeezed),
        detail=max(alone, linear(wide_fine)),
        detail_jpeg=max(linear(rough), linear(wide_rough)),
        alone=alone,
        trusted=trusted,
        witness=witness,
        tested=len(labels) - half,
        chance=float(np.bincount(labels[half:]).max() / max(len(labels) - half, 1)),
        weights=model[0].T.reshape(classes, *images.shape[1:]),
    )


def _scores(inputs, model):
    weights, offset = model
    return inputs @ weights + offset


def _hidden(inputs, half):
    """Returns 1,000 fixed random features with ReLU: the first layer of a two-layer network."""
    around = inputs - inputs[:half].mean(axis=0)
    size = np.sqrt((around[:half] ** 2).sum(axis=1).mean())
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(inputs.shape[1], 1000)).astype(np.float32)
    return np.maximum(around @ kernel / max(float(size), 1e-6), 0)


def excess(found: Figures, num_trusted: int) -> dict[str, float]:
    """Returns by how much each of three rules is broken; above 0 is a shortcut.

    Twice the sampling error is granted to each.

    - "jpeg": detail (an image less its 3x3 average) and JPEG of quality 10 share little. What JPEG
      leaves of honest detail, such as strokes and edges, tells the classes as well as all of it, or
      better; a faint pattern for each class does not survive (2312.08898). The figure is the share
      of the errors after JPEG that all detail saves: at most 0 on clean MNIST and CIFAR-10, about
      0.4 with patterns of 8/255 on half of the images, 1 on all. Above 0.15 is too much.
    - "witness": a small classifier makes less than half of the foreign witness's errors.
    - "trusted": the linear classifier of detail is much better on the set than on trusted images,
      the only test for all shortcuts (2305.19254).
    """
    noise = math.sqrt(0.5 / found.tested)
    lost = max(1 - found.detail_jpeg, 2 * noise)
    broken = {
        "jpeg": (found.detail - found.detail_jpeg - 2 * noise) / lost / _SAVED - 1,
    }
    if found.witness is not None:
        errors = 1 - max(found.raw, found.detail) + noise
        broken["witness"] = 1 - 2 * errors / max(1 - found.witness, 1e-6)
    if found.trusted is not None:
        allowed = 0.1 + 2 * math.sqrt(0.25 / num_trusted)
        broken["trusted"] = (found.alone - found.trusted) / allowed - 1
    if found.detail < found.chance + 2 * noise and found.raw < found.chance + 2 * noise:
        return dict.fromkeys(broken, -1.0)
    return broken


def _score(evidence: Evidence) -> Scores | NotRun:
    """A verdict on the whole set, see `excess`."""
    if reason := common.one_class(evidence):
        return reason
    different = len(np.unique(nearest.copies_of(evidence)))
    if different < _LEAST * len(np.unique(evidence.labels)):
        return NotRun(f"There are fewer than {_LEAST} different images a class to learn from.")
    found = measure(evidence)
    trusted = 0 if evidence.trusted is None else len(evidence.trusted.labels)
    broken = excess(found, trusted)
    sentences = {
        "jpeg": (
            f"A small classifier that sees fine detail alone is right on {found.detail:.0%} of "
            f"held-out images, and on {found.detail_jpeg:.0%} after JPEG of quality 10."
        ),
        "witness": (
            f"A small classifier is right on {max(found.raw, found.detail):.0%} of held-out "
            f"images, a large network that never saw these data on {found.witness or 0:.0%}."
        ),
        "trusted": (
            f"A linear classifier of fine detail is right on {found.alone:.0%} of held-out images, "
            f"and on {found.trusted or 0:.0%} of the trusted ones."
        ),
    }
    flagged = [name for name in broken if broken[name] > 0]
    told = flagged or ["jpeg"]
    figures = (
        f"Linear, on all pixels: {found.raw:.0%}; gray: {found.gray:.0%}; JPEG: {found.jpeg:.0%}; "
        f"most frequent class: {found.chance:.0%}."
    )
    sentence = " ".join([*(sentences[name] for name in told), figures])
    whole = Whole(
        flagged=bool(flagged),
        score=float(common.bounded(np.asarray(max(broken.values())))),
        reason=sentence,
        picture=_picture(found.weights),
        caption="What the linear classifier of fine detail looks for, one picture a class",
    )
    return Scores(None, lambda row: sentence, whole=whole)


def _picture(weights):
    """Returns the weights of up to 20 classes in rows of five, uint8; gray is 0."""
    weights = weights[:20]
    num, size = weights.shape[:2]
    across = min(num, 5)
    down = -(-num // across)
    largest = np.quantile(np.abs(weights), 0.995, axis=(1, 2, 3), keepdims=True)
    tiles = np.full((down * across, size + 2, size + 2, 3), 255, np.uint8)
    shades = 128 + 127 * weights / np.maximum(largest, 1e-12)
    tiles[:num, 1:-1, 1:-1] = np.clip(shades, 0, 255).astype(np.uint8)
    tiles = tiles.reshape(down, across, size + 2, size + 2, 3).swapaxes(1, 2)
    return tiles.reshape(down * (size + 2), across * (size + 2), 3)


CHECK = Check(
    name="shortcuts",
    title="Shortcuts in the set",
    kind="shortcut",
    cannot_see=(
        "Patterns that survive JPEG, such as large patches or changes of color, in less than about "
        "a fifth of the images, or too few images to learn from."
    ),
    score=_score,
    threats=("classwise",),
)
