"""Poisons by gradients: the noise that they leave, where photographs have next to none."""

import numpy as np

from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.verdict import Check, NotRun, Scores

_CHUNK = 4096
_LEAST_SPREAD = 0.02  # where most images are equally rough, such as flat ones


def roughness(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how rough each image is at the scale of a pixel, float32 [N], and which have color.

    The mean of log(1 + |d|) over second differences d, across, down and both, of the differences
    between color channels: photographs change their brightness from pixel to pixel, but hardly
    their color. Of gray images d is of the gray values.

    Args:
      images: uint8 [N, S, S, 3], S at least 3.
    """
    rough, colored = np.empty(len(images), np.float32), np.empty(len(images), bool)
    for start in range(0, len(images), _CHUNK):
        part = np.asarray(images[start : start + _CHUNK], np.int16)
        red, green, blue = np.moveaxis(part, -1, 0)
        planes = np.stack([red - green, blue - green])
        found = _of_planes(planes)
        has_color = planes.any(axis=(0, 2, 3))
        found[~has_color] = _of_planes(green[None, ~has_color])
        rough[start : start + _CHUNK], colored[start : start + _CHUNK] = found, has_color
    return rough, colored


def _of_planes(planes):
    """Returns float32 [N] of int16 [P, N, S, S]."""
    across, down = _second(planes, 3), _second(planes, 2)
    sizes = (
        np.log1p(np.abs(d).astype(np.float32)).mean(axis=(0, 2, 3))
        for d in (across, down, _second(across, 2))
    )
    return np.add.reduce(list(sizes)) / np.float32(3)


def _second(values, axis):
    """Returns the second differences along an axis."""
    return np.diff(values, n=2, axis=axis)


def _score(evidence: Evidence) -> Scores | NotRun:
    """Roughness in robust deviations from the median; of color and of gray images, each their own.

    The sign of a gradient differs from pixel to pixel and from channel to channel, so every attack
    that follows it within a few pixel values leaves noise.
    """
    rough, colored = roughness(evidence.images)
    apart, usual = np.full(len(rough), np.nan), np.ones(len(rough))
    for mine in (colored, ~colored):
        if np.count_nonzero(mine) >= common.LEAST:
            middle = np.median(rough[mine])
            spread = 1.4826 * np.median(np.abs(rough[mine] - middle))
            apart[mine] = (rough[mine] - middle) / max(spread, _LEAST_SPREAD)
            usual[mine] = max(float(np.expm1(middle)), 1e-3)
    if np.isnan(apart).all():
        return NotRun("There are too few images to know what noise is usual here.")

    def reason_for(row: int) -> str:
        times = np.expm1(float(rough[row])) / usual[row]
        what = "color changes" if colored[row] else "brightness changes"
        return (
            f"From pixel to pixel its {what} {times:.1f} times as much as is usual here; "
            "perturbations by gradients leave such noise, and so do dithering and bad cameras."
        )

    return Scores(common.bounded(apart), reason_for)


CHECK = Check(
    name="noise",
    title="Noise from pixel to pixel",
    kind="poison",
    cannot_see=(
        "Perturbations that are smooth, or made on images much larger than 32 pixels, and sets in "
        "which every image has the same noise."
    ),
    score=_score,
    threats=("collision",),
)
