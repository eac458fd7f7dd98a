"""Verdicts of filters against the truth: rates, areas and curves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from jaxpoison import evaluation


def verdicts(num_trials=3, num_examples=40, levels=7, seed=0):
    """Scores with many ties, more often high where poisoned."""
    rng = np.random.default_rng(seed)
    is_poisoned = rng.random((num_trials, num_examples)) < 0.3
    score = rng.integers(0, levels, is_poisoned.shape) + 2 * is_poisoned
    return (score / 4).astype(np.float32), is_poisoned


def test_rates_by_hand():
    flagged = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    is_poisoned = np.array([1, 0, 1, 0, 0], bool)
    np.testing.assert_allclose(evaluation.true_positive_rate(flagged, is_poisoned), [1 / 2, 0])
    np.testing.assert_allclose(evaluation.false_positive_rate(flagged, is_poisoned), [2 / 3, 0])


def test_areas_by_hand():
    # Pairs of a poison and a clean example: 3 > 2, 3 > 1, 1 < 2, and 1 = 1 counts half.
    score, is_poisoned = np.array([3.0, 1.0, 2.0, 1.0]), np.array([1, 1, 0, 0], bool)
    assert float(evaluation.roc_auc(score, is_poisoned)) == 2.5 / 4
    # At the score 3 all that is flagged is poisoned, at 1 half of it.
    assert float(evaluation.average_precision(score, is_poisoned)) == (1 + 1 / 2) / 2
    # The curve goes (0, 0), (0, 1/2), (1/2, 1/2), (1, 1).
    np.testing.assert_allclose(
        evaluation.roc_curve(score, is_poisoned, [0, 0.25, 0.5, 0.75, 1]),
        [0.5, 0.5, 0.5, 0.75, 1],
    )


@pytest.mark.parametrize("levels", [1, 2, 7, 10_000])
def test_all_measures_equal_scikit_learns(levels):
    score, is_poisoned = verdicts(levels=levels)
    flagged = score > 1
    found = evaluation.detection(flagged, score, is_poisoned)
    grid = np.linspace(0, 1, 51)
    curves = evaluation.roc_curve(score, is_poisoned, grid)
    for trial in range(3):
        truth, mine = is_poisoned[trial], score[trial]
        np.testing.assert_allclose(
            found.roc_auc[trial], metrics.roc_auc_score(truth, mine), rtol=1e-6
        )
        np.testing.assert_allclose(
            found.average_precision[trial],
            metrics.average_precision_score(truth, mine),
            rtol=1e-6,
        )
        np.testing.assert_allclose(
            found.tpr[trial], metrics.recall_score(truth, flagged[trial]), rtol=1e-6
        )
        np.testing.assert_allclose(found.fpr[trial], np.mean(flagged[trial][~truth]), rtol=1e-6)
        fpr, tpr, _ = metrics.roc_curve(truth, mine)
        np.testing.assert_allclose(curves[trial], np.interp(grid, fpr, tpr), atol=1e-6)


def test_measures_do_not_depend_on_the_scale_of_scores_or_the_order_of_examples():
    score, is_poisoned = verdicts(1)
    order = np.random.default_rng(1).permutation(score.shape[1])
    for measure in (evaluation.roc_auc, evaluation.average_precision):
        want = measure(score, is_poisoned)
        np.testing.assert_allclose(measure(np.exp(score), is_poisoned), want, rtol=1e-6)
        np.testing.assert_allclose(measure(score[:, order], is_poisoned[:, order]), want, rtol=1e-6)
    np.testing.assert_allclose(
        evaluation.roc_auc(-score, is_poisoned),
        1 - evaluation.roc_auc(score, is_poisoned),
        rtol=1e-5,
    )


def test_under_jit_and_vmap_and_where_there_is_nothing_to_find():
    score, is_poisoned = verdicts()
    is_poisoned[1] = False  # a clean set
    is_poisoned[2] = True
    run = jax.jit(jax.vmap(evaluation.detection))
    found = run(score > 1, score, is_poisoned)
    alone = evaluation.detection(score > 1, score, is_poisoned)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert np.isnan(found.tpr).tolist() == [False, True, False]
    assert np.isnan(found.fpr).tolist() == [False, False, True]
    assert np.isnan(found.roc_auc).tolist() == [False, True, True]
    assert np.isnan(found.average_precision).tolist() == [False, True, False]
    # A NaN among the scores leaves no finite number; outside of jit it is an error.
    spoiled = jnp.asarray(score).at[0, 3].set(jnp.nan)
    measured = run(score > 1, spoiled, is_poisoned)
    assert np.isnan(measured.roc_auc[0]) and np.isnan(measured.average_precision[0])
    curves = jax.jit(evaluation.roc_curve)(spoiled, is_poisoned, jnp.linspace(0, 1, 3))
    assert np.isnan(curves[0]).all()
    with pytest.raises(ValueError, match=r"score: 1 scores are NaN, the first is that of \[0, 3\]"):
        evaluation.detection(score > 1, spoiled, is_poisoned)


@pytest.mark.parametrize(
    ("flagged", "truth", "message"),
    [
        (np.ones(3), np.ones(3, bool), r"flagged is float32 \(3,\); expected bool"),
        (np.ones(3, bool), np.ones(3, int), r"is_poisoned is int32 \(3,\); expected bool"),
        (np.ones(3, bool), np.ones(4, bool), "is_poisoned has 4 examples"),
        (np.ones((2, 0), bool), np.ones(0, bool), "expected bool"),
    ],
)
def test_verdicts_that_are_none(flagged, truth, message):
    with pytest.raises(ValueError, match=message):
        evaluation.true_positive_rate(flagged, truth)
