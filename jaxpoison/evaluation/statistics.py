"""Intervals for rates and means."""

import math

import jax
import numpy as np


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the score interval of a rate, in [0, 1] (Wilson 1927).

    Args:
      successes: 0 to `trials`.
      trials: at least 1.
      z: half its width in standard deviations; 1.96 is 95%.

    Raises:
      ValueError: unless 0 <= successes <= trials and trials >= 1.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"{successes} successes in {trials} trials is no rate: expected "
            "0 <= successes <= trials and trials >= 1"
        )
    rate, share = successes / trials, z**2 / trials
    middle = (rate + share / 2) / (1 + share)
    half = math.sqrt(rate * (1 - rate) * share + share**2 / 4) / (1 + share)
    return max(0.0, middle - half), min(1.0, middle + half)


def crossed_mean(
    values: np.ndarray, level: float = 0.95, *, pooled: tuple[float, float] | None = None
) -> tuple[float, float, float]:
    """Returns the mean of a table and the ends of its interval, where rows and columns are samples.

    For instance the gains of S seeds on T images: other seeds, and other images, would have given
    another mean. Its variance is taken as that of the row means over S plus that of the column
    means over T, which counts what is neither twice and so errs to the wide side (the pigeonhole
    model, Owen 2007). The quantile is Student's, with Satterthwaite's degrees of freedom.

    Args:
      values: float [S, T], S and T at least 2; NaN where there is none, with one in each row and
        column at least.
      level: of the interval, in (0, 1).
      pooled: (variance of a row mean, its degrees of freedom), known from other tables of the same
        kind: a few rows alone tell little of it. The larger of this and the table's own is taken.

    Returns:
      (mean, low, high).

    Raises:
      ValueError: for another shape or level, or a row or column without a value.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(f"values have shape {values.shape}; expected [S, T], each at least 2")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    present = ~np.isnan(values)
    if not (present.any(axis=0).all() and present.any(axis=1).all()):
        raise ValueError("values: a row or column holds NaN alone; leave it out")
    rows, columns = np.nanmean(values, axis=1), np.nanmean(values, axis=0)
    of_rows, freedom = float(rows.var(ddof=1)), len(rows) - 1.0
    if pooled is not None:
        of_rows, freedom = max(of_rows, pooled[0]), pooled[1]
    by_rows, by_columns = of_rows / len(rows), float(columns.var(ddof=1)) / len(columns)
    mean, variance = float(np.nanmean(values)), by_rows + by_columns
    if variance == 0:
        return mean, mean, mean
    freedom = variance**2 / (by_rows**2 / freedom + by_columns**2 / (len(columns) - 1))
    half = student_quantile((1 + level) / 2, freedom) * math.sqrt(variance)
    return mean, mean - half, mean + half


def student_quantile(p: float, freedom: float) -> float:
    """Returns the quantile of Student's t distribution.

    Args:
      p: in [0.5, 1).
      freedom: degrees of freedom, above 0; need not be whole.

    Raises:
      ValueError: for values out of range.
    """
    if not (0.5 <= p < 1 and freedom > 0):
        raise ValueError(f"p = {p}, freedom = {freedom}; expected 0.5 <= p < 1 and freedom > 0")
    # P(|t| > q) = I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + q^2).
    low, high = 0.0, 1.0
    while _two_sided(high, freedom) > 2 * (1 - p):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if _two_sided(middle, freedom) > 2 * (1 - p):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _two_sided(quantile, freedom):
    """Returns how likely |t| is larger."""
    x = freedom / (freedom + quantile**2)
    return float(jax.scipy.special.betainc(freedom / 2, 0.5, x))
