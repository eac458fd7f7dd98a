"""How many poisons a filter with centroids from poisoned data can stand."""

import warnings

from jaxpoison.filters.result import ContaminationWarning


def detectable_shift(poison_share: float) -> float:
    """Returns 1 / (2 - p): poisons moved further than this share of the way are flagged.

    Derived for mean centroids, Euclidean distance and poisons that all moved a share s of the way
    from the centroid of their class to that of the target's. With a share p of the class poisoned,
    its centroid has moved s p of the way, so the poisons are s (1 - p) away from it and 1 - s away
    from the target's: they are nearer to the latter iff s > 1 / (2 - p). At p = 0.1, 0.5 and 0.8
    that is 0.53, 0.67 and 0.83; at p = 1 nothing is flagged. With trusted examples p is 0.

    Args:
      poison_share: p, share of poisons among the examples labeled as their class, in [0, 1].
    """
    if not 0 <= poison_share <= 1:
        raise ValueError(f"the share of poisons p must be in [0, 1], not {poison_share}")
    return 1 / (2 - poison_share)


def p_max(shift: float) -> float:
    """Returns 2 - 1 / s, at least 0: the share of poisons up to which they are flagged.

    The inverse of `detectable_shift`. Below s = 1/2 poisons are nearer to their own class even
    without any contamination, and the answer is 0.

    Args:
      shift: s in (0, 1], the share of the way to the target's centroid that poisons moved.
    """
    if not 0 < shift <= 1:
        raise ValueError(f"the shift s must be in (0, 1], not {shift}")
    return max(0.0, 2 - 1 / shift)


def warn_of_contamination(stacklevel: int) -> None:
    """Warns that centroids come from the very data that is filtered."""
    warnings.warn(
        "the centroids are computed from the data that is filtered, poisons included (the paper's "
        "rule): poisons that moved a share s of the way to the target class are found only if "
        "s > 1 / (2 - p), where p is their share of the class: .53 at p = .1, .67 at .5, .83 at "
        ".8. Trusted examples, five or more of each class, remove the limit: "
        'centroids="trusted" and fit(X, y, trusted=(X_trusted, y_trusted))',
        ContaminationWarning,
        stacklevel=stacklevel + 1,
    )
