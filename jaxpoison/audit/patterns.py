"""Patterns that the images of one class share and no others have: triggers, by their pixels alone.

A trigger is the same on all images that have it, and these have one label. Natural images, made as
unpredictable as noise (whitened), have little in common; what a trigger adds is then a direction in
which its class varies more than chance. These are spectral signatures (Tran et al. 2018, arXiv
1811.00636) after whitening (SPECTRE, arXiv 2104.11315), but of pixels instead of a network's
features: no network has to have learned the trigger. How far out on a direction is unusual is told
by the images of other classes, which are as natural and do not have the pattern.
"""

from typing import NamedTuple

import numpy as np
from scipy import linalg

from jaxpoison.audit import nearest, similar
from jaxpoison.audit.evidence import SIZE, Evidence

WINDOW = 8
"""Side of the windows in which small patterns are looked for; neighbors overlap by half."""
LEAST = 10
"""Different images of a class, below which it has no directions."""
_DIRECTIONS = 6  # of each class
_MOST = 12_000  # images that directions are found on
_USUAL = 3_000  # of them, those that tell what is usual
_FLOOR = 1e-6  # of the strongest frequency
_CLIP = 4.0  # edges are many standard deviations out in any natural image
_RIDGE = 0.3  # of the whitening, in mean variances times dimensions a sample
_BLOCK, _ROUNDS = 12, 8  # of the subspace iteration
_CHUNK = 2048


class Shared(NamedTuple):
    """How much of the patterns of its class each image has.

    Attributes:
      apart: float64 [N], how far the image is from the median of other classes' images, in their
        standard deviations, on the direction and in the window where that is most; NaN for small
        classes.
      place: int32 [N], this window; they are counted row by row.
    """

    apart: np.ndarray
    place: np.ndarray


def windows() -> list[tuple[slice, slice]]:
    """Returns rows and columns of the windows of 8x8 pixels."""
    steps = [slice(at, at + WINDOW) for at in range(0, SIZE - WINDOW + 1, WINDOW // 2)]
    return [(down, across) for down in steps for across in steps]


@nearest.once
def small(evidence: Evidence) -> Shared:
    """Returns the patterns of a few pixels: patches, stickers, marks."""
    return _shared(evidence, windows())


@nearest.once
def large(evidence: Evidence) -> Shared:
    """Returns the patterns of whole images: pictures blended in, waves, noise that is the same."""
    return _shared(evidence, [(slice(None), slice(None))])


def _shared(evidence, places):
    labels, groups = evidence.labels, similar.groups_of(evidence)
    # Copies share everything: one of each group and class takes part, and speaks for the others.
    pairs = np.stack([groups.keeper, labels], axis=1)
    _, first, group = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    large_enough = np.bincount(labels[first], minlength=evidence.num_classes) >= LEAST
    apart = np.full(len(first), np.nan)
    place = np.zeros(len(first), np.int32)
    if large_enough.sum() > 1:
        by_content = np.argsort(groups.exact[first], kind="stable")  # as good as chance
        by_content = by_content[large_enough[labels[first[by_content]]]]
        sample = _sample(labels[first], by_content)
        spectrum = _Spectrum.of(evidence.images, first[sample])
        planes = spectrum.whiten(evidence.images, first[sample])
        fits = [_Model.fit(planes[(..., *window)], labels[first[sample]]) for window in places]
        apart[sample], place[sample] = _most([found for _, found in fits])
        rest = by_content[~np.isin(by_content, sample)]
        rest = rest[np.argsort(labels[first[rest]], kind="stable")]
        for start in range(0, len(rest), _CHUNK):
            some = rest[start : start + _CHUNK]
            planes = spectrum.whiten(evidence.images, first[some])
            apart[some], place[some] = _most([
                model.apart(planes[(..., *window)], labels[first[some]])
                for window, (model, _) in zip(places, fits, strict=True)
            ])  # fmt: skip
    return Shared(apart[group.reshape(-1)], place[group.reshape(-1)])


def _most(found):
    return np.max(found, axis=0), np.argmax(found, axis=0)


def _sample(labels, order):
    """Returns up to `_MOST` of the rows in `order`, as many of each class as of the others."""
    classes, counts = np.unique(labels[order], return_counts=True)
    each = LEAST
    while each < counts.max() and np.minimum(counts, 2 * each).sum() <= _MOST:
        each *= 2
    return np.concatenate([order[labels[order] == label][:each] for label in classes])


class _Spectrum(NamedTuple):
    """What whitens images: float32 power [3, S, S // 2 + 1] of each frequency in most of them.

    `mean` is float32 [3, S, S], of whitened images.
    """

    power: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, images, rows):
        some = rows[:: -(-len(rows) // _USUAL)]
        power = np.median(np.abs(np.fft.rfft2(_channels(images, some))) ** 2, axis=0)
        power += _FLOOR * power.max() + 1e-12
        raw = cls(power.astype(np.float32), np.zeros(1, np.float32))
        return raw._replace(mean=raw.whiten(images, some).mean(axis=0))

    def whiten(self, images, rows):
        """Returns float32 [B, 3, S, S]: all frequencies alike, each image's spread 1, clipped."""
        out = []
        for start in range(0, len(rows), _CHUNK):
            waves = np.fft.rfft2(_channels(images, rows[start : start + _CHUNK]))
            planes = np.fft.irfft2(waves / np.sqrt(self.power), s=images.shape[1:3])
            spread = 1.4826 * np.median(np.abs(planes), axis=(1, 2, 3), keepdims=True)
            planes = np.clip(planes / np.maximum(spread, 1e-6), -_CLIP, _CLIP)
            out.append(planes.astype(np.float32) - self.mean)
        return np.concatenate(out)


def _channels(images, rows):
    """Returns brightness and two differences of color, float32 [B, 3, S, S]."""
    red, green, blue = np.moveaxis(np.asarray(images[rows], np.float32) / 255, -1, 0)
    return np.stack([(red + green + blue) / 3, red - green, blue - (red + green) / 2], axis=1)


class _Class(NamedTuple):
    """The directions of a class in one window, and where other classes' images are on them.

    Attributes:
      directions: float32 [D, k], of unit length.
      strength: float32 [k], sum of squares of the class's images.
      middle, spread: float32 [k], median and standard deviation of other images.
    """

    directions: np.ndarray
    strength: np.ndarray
    middle: np.ndarray
    spread: np.ndarray

    def apart(self, pixels, *, without_own):
        """Returns float32 [B], in standard deviations, on the direction where that is most."""
        along = pixels @ self.directions
        if without_own:  # what an image has itself contributed to a direction
            part = (pixels**2).sum(axis=1, keepdims=True) / self.strength
            along *= np.maximum(1 - part, 0)
        return (np.abs(along - self.middle) / self.spread).max(axis=1)


class _Model(NamedTuple):
    """All classes in one window.

    Attributes:
      size: usual length of a window's pixels.
      lower: float32 [D, D], Cholesky factor of their second moments.
      white_size: usual length after whitening.
      classes: {label: directions}.
    """

    size: np.float32
    lower: np.ndarray
    white_size: np.float32
    classes: dict[int, _Class]

    @classmethod
    def fit(cls, planes, labels):
        """Returns (model, how far apart the images themselves are, float32 [B])."""
        pixels = planes.reshape(len(planes), -1)
        size = _usual_length(pixels)
        pixels = _shorter(pixels, size)
        moments = pixels.T @ pixels / np.float32(len(pixels))
        width = len(moments)
        ridge = max(_RIDGE * width / len(pixels), 1e-3) * np.trace(moments) / width
        moments[np.diag_indices(width)] += ridge + np.float32(1e-9)
        lower = linalg.cholesky(moments, lower=True, overwrite_a=True)
        pixels = _whiten(lower, pixels)
        white_size = _usual_length(pixels)
        pixels = _shorter(pixels, white_size)
        usual = np.zeros(len(labels), bool)
        usual[:: -(-len(labels) // _USUAL)] = True
        classes, apart = {}, np.empty(len(pixels), np.float32)
        for label in np.unique(labels):
            directions, strength = _main_directions(pixels[labels == label])
            others = pixels[usual & (labels != label)] @ directions
            middle = np.median(others, axis=0)
            spread = 1.4826 * np.median(np.abs(others - middle), axis=0)
            # Of images that are mostly empty, the median deviation may be 0.
            spread = np.maximum(np.maximum(spread, others.std(axis=0)), 1e-6)
            classes[label] = _Class(directions, strength, middle, spread)
            apart[labels == label] = classes[label].apart(pixels[labels == label], without_own=True)
        return cls(size, lower, white_size, classes), apart

    def apart(self, planes, labels):
        """Returns float32 [B], of images that the model was not fitted to."""
        pixels = _shorter(planes.reshape(len(planes), -1), self.size)
        pixels = _shorter(_whiten(self.lower, pixels), self.white_size)
        out = np.empty(len(pixels), np.float32)
        for label in np.unique(labels):
            mine = labels == label
            out[mine] = self.classes[label].apart(pixels[mine], without_own=False)
        return out


def _whiten(lower, pixels):
    return linalg.solve_triangular(lower, pixels.T, lower=True, check_finite=False).T


def _usual_length(pixels):
    return np.maximum(np.median(np.linalg.norm(pixels, axis=1)), np.float32(1e-3))


def _shorter(pixels, size):
    """Returns vectors of length below 1, in their directions: no image counts for many."""
    return pixels / (np.linalg.norm(pixels, axis=1, keepdims=True) + size)


def _main_directions(pixels):
    """Returns (unit vectors [D, k], sums of squares [k]) of the largest second moments.

    By subspace iteration: of a direction that stands out it is exact, others do not matter.
    """
    random = np.random.default_rng(0)
    basis = random.normal(size=(pixels.shape[1], _BLOCK)).astype(np.float32)
    for _ in range(_ROUNDS):
        basis = np.linalg.qr(pixels.T @ (pixels @ basis))[0]
    along = pixels @ basis
    values, vectors = np.linalg.eigh(along.T @ along)
    return basis @ vectors[:, -_DIRECTIONS:], np.maximum(values[-_DIRECTIONS:], 1e-9)
