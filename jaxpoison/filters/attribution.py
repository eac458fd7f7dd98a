"""A filter by what trusted examples explain, after functional attribution (arXiv 2604.18970).

A network says of an honest example what it says because of examples like trusted ones. Of a poison
it says so because of other poisons: of what it says, trusted examples explain nothing. For the last
layer, and squares in place of cross-entropy, what they explain has a closed form:

    a(x) = k(x, T) (K_TT + damping I)^-1 Y_T,    k(x, x') = f(x) . f(x') + 1

the sum over trusted examples of their influence on the output for x, one number for each class.
"""

from typing import Any

import numpy as np

from jaxpoison.core.checks import check_positive
from jaxpoison.filters.features import check_share, checked, verdict
from jaxpoison.filters.inputs import trusted_chunks, where
from jaxpoison.filters.result import FilterResult


def trusted_attribution(
    features: Any, y: Any, *, trusted: Any, false_alarms: float = 0.05, damping: float = 0.1
) -> FilterResult:
    """Flags examples whose label trusted examples do not explain.

    The idea of functional attribution (arXiv 2604.18970), by influence on the last layer alone.
    With k(x, x') = f(x) . f(x') + 1 and one-hot labels Y_T of the trusted examples T, they explain
    a(x) = k(x, T) (K_TT + damping I)^-1 Y_T. The score is 1 - a_y(x): about 0 for examples like
    trusted ones of that label. The threshold is the score that the given share of trusted examples
    exceeds, each explained by the others. `real_label` is the class that is explained best. Runs in
    float64 on the host.

    Args:
      features: float32 [N, d], of a network trained on the data under suspicion.
      y: labels [N], or one-hot [N, K].
      trusted: (features, labels) of clean examples of all classes, through the same network.
      false_alarms: share of examples like the trusted ones that are flagged, in [0, 1]; of M
        trusted ones no less than 1 / M can be aimed at.
      damping: of the solution, in mean diagonal entries of K_TT; above 0.

    Raises:
      TypeError: for trusted features without labels.
      ValueError: for bad features, labels or settings, or if trusted examples lack a class.
    """
    check_share("false_alarms", false_alarms)
    check_positive(damping=damping)
    features, labels, classes = checked(features, y)
    ((known_features, positions, known, _),) = trusted_chunks(trusted)
    reference, reference_labels, known = checked(
        known_features, known[positions], "trusted features"
    )
    if reference.shape[1] != features.shape[1]:
        raise ValueError(
            f"trusted features have {reference.shape[1]} columns, the others {features.shape[1]}: "
            "take both from the same layer"
        )
    if not np.isin(classes, known).all():
        raise ValueError(
            f"there are no trusted features of the labels {np.setdiff1d(classes, known)}: add some "
            "of every class"
        )
    labels = where(classes, known)[labels]
    targets = np.eye(len(known))[reference_labels]
    explained, left_out = attributions(features, reference, targets, float(damping))
    score = 1 - explained[np.arange(len(labels)), labels]
    own = 1 - left_out[np.arange(len(reference)), reference_labels]
    threshold = np.quantile(own, 1 - float(false_alarms), method="higher")
    settings = {
        "filter": "trusted_attribution", "false_alarms": false_alarms, "damping": damping,
        "threshold": threshold,
    }  # fmt: skip
    return verdict(
        y, score > threshold, score.astype(np.float32), labels, known, settings,
        explained.argmax(axis=1), (1 - explained).astype(np.float32),
    )  # fmt: skip


def attributions(
    features: np.ndarray, reference: np.ndarray, targets: np.ndarray, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the reference explains of each example, and of its own ones without them.

    Args:
      features: [N, d].
      reference: [M, d].
      targets: [M, K].
      damping: in mean diagonal entries of the kernel.

    Returns:
      float64 [N, K], and [M, K]: each row's explanation by the M - 1 others, in closed form.
    """
    features, reference = (np.asarray(x, np.float64) for x in (features, reference))
    kernel = reference @ reference.T + 1
    penalty = damping * np.mean(np.diag(kernel))
    inverse = np.linalg.inv(kernel + penalty * np.eye(len(kernel)))
    weights = inverse @ targets
    # Residuals of a fit without the row: weights over the diagonal of the inverse.
    left_out = targets - weights / np.diag(inverse)[:, None]
    return features @ (reference.T @ weights) + weights.sum(axis=0), left_out
