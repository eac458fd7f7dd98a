"""Thresholds from canaries: nulls, false discovery rates, combinations, power."""

import numpy as np
import pytest
from scipy import stats

from jaxpoison.audit import calibrate


def mixture(*, num=20_000, share=0.05, shift=4.0, seed=0):
    """Returns (scores, which are faulty, canaries): normal scores, the faulty ones shifted."""
    random = np.random.default_rng(seed)
    faulty = random.random(num) < share
    scores = random.standard_normal(num) + shift * faulty
    return scores, faulty, random.standard_normal(400) + shift


def test_without_canaries_the_tail_is_the_rank():
    null = calibrate.fit_null(np.arange(10.0), np.array([]))
    np.testing.assert_allclose(calibrate.p_values(null, np.arange(10.0)), np.arange(10, 0, -1) / 10)
    assert null.share == 0


def test_no_p_value_is_below_what_so_many_images_can_show():
    scores, _, canaries = mixture()
    null = calibrate.fit_null(scores, canaries)
    assert calibrate.p_values(null, [1e9]) == 1 / (len(scores) + 1)


def test_the_share_is_estimated():
    scores, faulty, canaries = mixture()
    share = calibrate.fit_null(scores, canaries).share
    assert share == pytest.approx(faulty.mean(), rel=0.15)


def test_a_set_without_the_fault_has_nearly_none():
    scores, _, canaries = mixture(share=0.0)
    assert calibrate.fit_null(scores, canaries).share < 0.001


def test_p_values_of_honest_images_are_those_of_their_own_distribution():
    """Though one image in twenty is faulty: 5% of honest images have p <= 5%, and 1% p <= 1%."""
    scores, faulty, canaries = mixture()
    p = calibrate.p_values(calibrate.fit_null(scores, canaries), scores)[~faulty]
    for level in (0.05, 0.01):
        assert np.mean(p <= level) <= level * 1.3
    assert np.mean(p <= 0.2) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("share", [0.002, 0.01, 0.05, 0.2])
def test_false_discoveries_stay_below_the_rate(share):
    scores, faulty, canaries = mixture(share=share)
    p = calibrate.p_values(calibrate.fit_null(scores, canaries), scores)
    found = calibrate.benjamini_hochberg(p) <= 0.1
    assert np.mean(~faulty[found]) <= 0.17
    assert np.mean(found[faulty]) > 0.3


def test_nothing_is_found_where_nothing_is():
    scores, _, canaries = mixture(share=0.0)
    p = calibrate.p_values(calibrate.fit_null(scores, canaries), scores)
    assert np.mean(calibrate.benjamini_hochberg(p) <= 0.1) < 0.001


def test_p_values_do_not_depend_on_the_scale_or_the_order():
    scores, _, canaries = mixture(num=500)
    p = calibrate.p_values(calibrate.fit_null(scores, canaries), scores)
    warped = calibrate.fit_null(4 * scores[::-1], 4 * canaries)
    np.testing.assert_allclose(p, calibrate.p_values(warped, 4 * scores))


def test_a_score_that_is_missing_has_no_p_value_and_does_not_count():
    scores = np.array([3.0, np.nan, 1.0, 2.0])
    null = calibrate.fit_null(scores, np.array([]))
    np.testing.assert_allclose(calibrate.p_values(null, scores), [1 / 3, np.nan, 1, 2 / 3])


def test_scores_that_are_all_missing_are_an_error():
    with pytest.raises(ValueError, match="no image has a score"):
        calibrate.fit_null(np.full(3, np.nan), np.array([]))


def test_q_values_are_those_of_scipy():
    p = np.random.default_rng(0).random(100) ** 3
    np.testing.assert_allclose(
        calibrate.benjamini_hochberg(p), stats.false_discovery_control(p, method="bh")
    )
    holes = np.insert(p, 7, np.nan)
    q = calibrate.benjamini_hochberg(holes)
    assert np.isnan(q[7])
    np.testing.assert_allclose(np.delete(q, 7), stats.false_discovery_control(p, method="bh"))


def test_the_combination_of_one_check_is_that_check():
    p = np.random.default_rng(0).random((1, 50))
    np.testing.assert_allclose(calibrate.combine(p, np.array([0.3])), 1 - p[0], atol=2e-6)


def test_the_combination_is_cauchys_of_scipy():
    p = np.random.default_rng(0).random((4, 50))
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    statistic = weights / 10 @ np.tan((0.5 - p) * np.pi)
    np.testing.assert_allclose(calibrate.combine(p, weights), stats.cauchy.cdf(statistic))


def test_a_check_without_weight_or_without_a_view_changes_nothing():
    p = np.random.default_rng(0).random((2, 50))
    both = calibrate.combine(np.stack([*p, np.full(50, np.nan)]), np.array([1.0, 0.0, 5.0]))
    np.testing.assert_allclose(both, calibrate.combine(p[:1], np.array([1.0])))
    assert np.isnan(calibrate.combine(np.full((1, 2), np.nan), np.array([1.0]))).all()


def test_recall_at_one_percent():
    scores = np.arange(1000.0)
    assert calibrate.recall(scores, np.array([988.0, 990.5, 2000.0, np.nan])) == 0.5
