"""Intervals for rates and means."""

import math


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
