"""Filters by the predictions of models that were trained on other examples."""

from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from jaxpoison.core.extras import require
from jaxpoison.filters.features import checked, verdict
from jaxpoison.filters.result import FilterResult


def confident_learning(features: Any, y: Any, *, num_folds: int = 5, seed: int = 0) -> FilterResult:
    """Flags what cleanlab calls label issues, by out-of-fold predictions of a linear head.

    Northcutt et al. 2021 (arXiv 1911.00068): `cleanlab.filter.find_label_issues`. The score is the
    largest probability of another label minus that of its own. Poisons with clean labels are
    meant to fit, so little should be expected of this. Its logistic regression takes time in
    proportion to N K d.

    Args:
      features: float32 [N, d].
      y: labels [N], or one-hot [N, K].
      num_folds: of the cross-validation; every class needs as many examples.
      seed: of the folds.

    Raises:
      ImportError: without cleanlab and scikit-learn (`pip install "jaxpoison[experiments]"`).
      ValueError: for bad features or labels, or a class smaller than the number of folds.
    """
    cleanlab, linear_model, model_selection, pipeline, preprocessing = (
        require(module, extra="experiments")
        for module in (
            "cleanlab.filter", "sklearn.linear_model", "sklearn.model_selection",
            "sklearn.pipeline", "sklearn.preprocessing",
        )
    )  # fmt: skip
    features, labels, classes = checked(features, y)
    smallest = int(np.bincount(labels).min())
    if not 2 <= num_folds <= smallest or num_folds != int(num_folds):
        raise ValueError(
            f"num_folds must be between 2 and the size of the smallest class, {smallest}, "
            f"not {num_folds}"
        )
    num_folds, seed = int(num_folds), int(seed)
    head = pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=1000)
    )
    folds = model_selection.StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    # Products are too small for several threads, which wait for each other and spin.
    with threadpool_limits(1, user_api="blas"):
        probabilities = np.asarray(
            model_selection.cross_val_predict(
                head, features, labels, cv=folds, method="predict_proba"
            )
        )
    flagged = cleanlab.find_label_issues(labels, probabilities, n_jobs=1)
    places = np.arange(len(labels))
    others = probabilities.copy()
    others[places, labels] = -np.inf
    score = others.max(1) - probabilities[places, labels]
    settings = {"filter": "confident_learning", "num_folds": num_folds, "seed": seed}
    return verdict(
        y,
        flagged,
        score.astype(np.float32),
        labels,
        classes,
        settings,
        probabilities.argmax(1),
        (1 - probabilities).astype(np.float32),
    )
