"""Thresholds from canaries: nulls, false discovery rates, several checks, power."""

import types

import numpy as np
import pytest
from scipy import stats

from jaxpoison.audit import calibrate


def mixture(*, num=6_000, share=0.05, shift=4.0, checks=1, canaries=200, seed=0):
    """Returns (scores [J, N], which are faulty, canaries [J, C]): the faulty ones are shifted."""
    random = np.random.default_rng(seed)
    faulty = random.random(num) < share
    scores = random.standard_normal((checks, num)) + shift * faulty
    return scores, faulty, random.standard_normal((checks, canaries)) + shift


def found(scores, canaries, rate=0.2):
    p = calibrate.p_values(calibrate.fit(scores, [canaries]), scores)
    return calibrate.benjamini_hochberg(p) <= rate


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_the_share_is_estimated(share):
    scores, faulty, canaries = mixture(share=share)
    assert calibrate.fit(scores, [canaries]).shares[0] == pytest.approx(faulty.mean(), rel=0.25)


def test_p_values_of_honest_images_are_those_of_their_own_distribution():
    """Though one in twenty is faulty, 5% of honest images have p <= 5%: rather fewer than more."""
    scores, faulty, canaries = mixture()
    p = calibrate.p_values(calibrate.fit(scores, [canaries]), scores)[~faulty]
    for level in (0.01, 0.05, 0.2):
        assert 0.5 * level <= np.mean(p <= level) <= 1.2 * level


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("shift", [3.0, 4.0, 6.0])
def test_false_discoveries_stay_near_the_rate(share, shift):
    scores, faulty, canaries = mixture(share=share, shift=shift)
    flagged = found(scores, canaries)
    assert np.mean(~faulty[flagged]) <= 0.27
    assert shift == 3 or np.mean(flagged[faulty]) > 0.7


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 4.0, 6.0])
def test_nothing_is_found_where_nothing_is(shift):
    scores, _, canaries = mixture(share=0.0, shift=shift)
    assert np.mean(found(scores, canaries)) < 0.001


def test_no_fault_is_there_in_any_of_a_hundred_honest_sets():
    for seed in range(100):
        scores, _, canaries = mixture(num=1_000, share=0.0, shift=1.5, canaries=40, seed=seed)
        assert not calibrate.fit(scores, [canaries]).there[0]


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_whether_a_fault_is_there_may_be_said(share):
    scores, _, canaries = mixture(share=share)
    for there in (True, False):
        model = calibrate.fit(scores, [canaries], there=np.array([there]))
        assert model.there.tolist() == [there]
        assert (model.shares[0] > 0.02) == (there and share > 0)


def test_several_weak_checks_find_more_than_one():
    scores, faulty, canaries = mixture(shift=2.0, checks=4)
    alone, together = (found(scores[:n], canaries[:n]) for n in (1, 4))
    assert together[faulty].mean() > alone[faulty].mean() + 0.4
    assert np.mean(~faulty[together]) <= 0.27


def of_two_kinds(shares, *, num=6_000, seed=0):
    """Returns (scores [2, N], kind of each, canaries of each kind): far up, and ambiguous.

    Honest images are ambiguous as well, which the second check tells, and few of them are.
    """
    random = np.random.default_rng(seed)
    means = np.array([[0.0, 0.0], [4.0, 4.0], [3.0, 1.0]])
    kind = random.choice(3, num, p=[1 - sum(shares), *shares])
    scores = random.standard_normal((2, num)) + means[kind].T
    return scores, kind, [random.standard_normal((2, 40)) + means[k][:, None] for k in (1, 2)]


@pytest.mark.parametrize("shares", [(0.05, 0.0), (0.0, 0.1), (0.04, 0.08), (0.0, 0.0)])
def test_two_faults_have_shares_of_their_own(shares):
    scores, kind, canaries = of_two_kinds(shares)
    model = calibrate.fit(scores, canaries)
    assert list(model.there) == [share > 0 for share in shares]
    np.testing.assert_allclose(model.shares, shares, rtol=0.3, atol=2e-3)
    p = calibrate.p_values(model, scores)
    flagged = calibrate.q_values(model, p) <= 0.2
    assert np.mean(kind[flagged] == 0) <= 0.27 if any(shares) else not flagged.any()
    assert all(np.mean(flagged[kind == k + 1]) > 0.5 for k in (0, 1) if shares[k])


def test_one_share_for_both_faults_would_flag_honest_images():
    """Why they are fitted together and not as one: a fault that is missing hides the other."""
    scores, kind, canaries = of_two_kinds((0.0, 0.1))
    found = []
    for samples in (canaries, [np.concatenate(canaries, axis=1)]):
        model = calibrate.fit(scores, samples)
        q = calibrate.q_values(model, calibrate.p_values(model, scores))
        found.append(np.mean(q[kind == 2] <= 0.2))
    assert found[0] > found[1] + 0.05


def test_the_gradient_of_the_likelihood_is_right(monkeypatch):
    """`minimize` is given a function and its slope: against central differences."""
    seen = []

    def watch(fn, start, *, jac, bounds, method):
        point = np.array(start) + 0.1 * np.arange(len(start)) / len(start)
        value, slope = fn(point)
        steps = 1e-5 * np.eye(len(point))
        numeric = [(fn(point + d)[0] - fn(point - d)[0]) / 2e-5 for d in steps]
        seen.append(np.abs(slope - numeric).max() / np.abs(slope).max())
        return types.SimpleNamespace(fun=value, x=point)

    monkeypatch.setattr(calibrate, "minimize", watch)
    scores, _, canaries = of_two_kinds((0.05, 0.1), num=400)
    known = np.full(400, np.nan)
    known[:9] = [0, 1, 1] * 3
    calibrate.fit(scores, canaries, known=known)
    assert len(seen) > 3 and max(seen) < 1e-6


def test_weights_and_offset_are_those_of_the_densities():
    """Of unit normals at 0 and at m, log(f1 / f0) is m z - m^2 / 2."""
    random = np.random.default_rng(0)
    shift = np.array([[2.0], [1.0]])
    scores, canaries = (
        random.standard_normal((2, 40_000)),
        random.standard_normal((2, 2_000)) + shift,
    )
    model = calibrate.fit(scores, [canaries])
    np.testing.assert_allclose(model.weights, [[2, 1]], rtol=0.05)
    assert model.offsets[0] == pytest.approx(-2.5, rel=0.05)
    assert model.shares[0] < 0.001 and not model.there[0]


def test_a_check_that_tells_nothing_or_the_opposite_has_no_weight():
    random = np.random.default_rng(0)
    scores = random.standard_normal((3, 5_000))
    canaries = random.standard_normal((3, 200)) + np.array([[3], [0], [-2]])
    good, nothing, opposite = calibrate.fit(scores, [canaries]).weights[0]
    assert good > 2.5 and nothing < 0.2 and opposite == 0


def test_only_the_order_of_scores_counts():
    scores, _, canaries = mixture(num=500)
    p = calibrate.p_values(calibrate.fit(scores, [canaries]), scores)
    backwards = calibrate.fit(4 * scores[:, ::-1] - 3, [4 * canaries - 3])
    np.testing.assert_allclose(calibrate.p_values(backwards, 4 * scores - 3), p, rtol=1e-3)


def test_no_p_value_is_below_what_so_many_images_can_show():
    scores, _, canaries = mixture(share=0.0)
    p = calibrate.p_values(calibrate.fit(scores, [canaries]), np.array([[1e9, -1e9]]))
    assert p[0] == pytest.approx(1 / scores.size, rel=1e-3) and p[1] == 1


def test_a_score_that_is_missing_counts_as_neither():
    reference = np.array([[1.0, 2.0, 3.0, 4.0, np.nan]])
    got = calibrate.normal_scores(reference, np.array([[3.5, 0.0, 9.0, 2.0, np.nan]]))
    ranks = np.array([3.5, 0.5, 4.5, 2.0]) / 5
    np.testing.assert_allclose(got[0], [*stats.norm.ppf(ranks), 0])


def test_what_cannot_be_calibrated_is_an_error():
    with pytest.raises(ValueError, match="no image has a score"):
        calibrate.fit(np.full((1, 3), np.nan), [np.ones((1, 9))])
    with pytest.raises(ValueError, match="7 canaries"):
        calibrate.fit(np.ones((1, 3)), [np.ones((1, 9)), np.ones((1, 7))])


def test_q_values_are_those_of_scipy():
    p = np.random.default_rng(0).random(100) ** 3
    np.testing.assert_allclose(
        calibrate.benjamini_hochberg(p), stats.false_discovery_control(p, method="bh")
    )


def test_recall_at_one_percent():
    scores = np.arange(1000.0)
    assert calibrate.recall(scores, np.array([988.0, 990.5, 2000.0, np.nan])) == 0.5


def test_superiority_is_the_area_under_the_curve():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    canaries, others = random.integers(0, 9, 30) + 2.0, random.integers(0, 9, 200) + 0.0
    truth = np.repeat([1, 0], [30, 200])
    wanted = metrics.roc_auc_score(truth, np.concatenate([canaries, others]))
    assert calibrate.superiority(canaries, others) == pytest.approx(wanted)
    assert calibrate.superiority(np.array([np.nan]), others) == 0.5


def test_images_like_those_of_other_classes_are_no_evidence():
    """Uniform p-values, also where the classes have other middles."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 5_000)
    values = rng.normal(size=5_000) + np.array([0.0, 3.0, 9.0])[labels]
    p = calibrate.beyond_other_classes(values, labels)
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert p.min() > 0 and p.max() <= 1


def test_the_null_of_an_image_is_the_other_classes():
    """Counted one by one, with ties, missing values and a known fault."""
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [12, 15, 13])
    values = rng.integers(0, 6, 40).astype(float)
    values[[3, 20]] = np.nan
    faults = np.arange(40) == 14
    middles = [np.nanmedian(values[labels == label]) for label in range(3)]
    p = calibrate.beyond_other_classes(values, labels, faults)
    for i in range(40):
        others = [
            values[j] - middles[labels[j]]
            for j in range(40)
            if labels[j] != labels[i] and not np.isnan(values[j]) and j != 14
        ]
        above = sum(other >= values[i] - middles[labels[i]] for other in others)
        wanted = 1.0 if np.isnan(values[i]) else (1 + above) / (1 + len(others))
        assert p[i] == pytest.approx(wanted), i


def test_one_class_alone_has_no_null():
    p = calibrate.beyond_other_classes(np.arange(9.0), np.zeros(9, int))
    np.testing.assert_array_equal(p, 1)
