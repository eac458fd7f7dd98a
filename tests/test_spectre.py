"""SPECTRE against its definition with dense matrices, and poisons that plain components miss."""

import numpy as np
import pytest
from scipy import linalg

from jaxpoison import filters
from jaxpoison.filters.spectre import entropy_scores, robust_members


def hidden_poisons(seed=0, num_poisons=30):
    """A class of 400 whose widest directions are clean; poisons are apart in a narrow one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((600, 8)) * np.geomspace(30, 1, 8)
    y = np.repeat([0, 1], (400, 200))
    x[:num_poisons, 7] += 12
    x[400:, 0] += 100
    is_poison = np.arange(600) < num_poisons
    return x.astype(np.float32), y, is_poison


def dense_members(samples, share):
    """The filter with the k^2 x k^2 matrix of fourth moments and its eigenvectors."""
    rows, limit, k = np.arange(len(samples)), round(2 * share * len(samples)), samples.shape[1]
    while limit > 0:
        left = samples[rows]
        white = left @ linalg.inv(linalg.sqrtm(left.T @ left / len(left)).real)
        z = np.stack([np.kron(row, row) for row in white])
        one = np.eye(k).reshape(-1)
        values, vectors = np.linalg.eigh(z.T @ z / len(z) - np.outer(one, one))
        if values[-1] <= 1 + 10 * share * np.log(1 / share) ** 2:
            break
        p = (z @ vectors[:, -1] - one @ vectors[:, -1]) / np.sqrt(2)
        p = np.abs(p - np.median(p))
        for number, diff in enumerate(np.sort(p), start=1):
            far = diff - 3
            usual = far <= 10 * np.log(1 / share)
            if far > 0 and number / len(p) >= (
                1 if usual else 3 * share / (far * np.log(far)) ** 2
            ):
                break
        else:
            break
        drop = [i for i in np.argsort(-p)[:limit] if p[i] > far]
        limit -= len(drop)
        rows = np.delete(rows, drop)
    return np.isin(np.arange(len(samples)), rows)


def heavy_samples():
    rng = np.random.default_rng(1)
    samples = rng.standard_normal((300, 4)) * [5, 3, 2, 1]
    samples[:6, 3] += 9.0
    samples[:6, 2] -= 9.0
    return samples - samples.mean(axis=0)


def test_the_robust_filter_is_that_of_dense_fourth_moments():
    samples = heavy_samples()
    members = robust_members(samples, 0.05)
    np.testing.assert_array_equal(members, dense_members(samples, 0.05))
    assert (~members).sum() >= 4 and not members[:4].any()
    gaussian = np.random.default_rng(2).standard_normal((500, 4))
    assert robust_members(gaussian - gaussian.mean(axis=0), 0.1).all()


def test_scores_are_the_quantum_entropy_of_white_samples():
    samples = heavy_samples()
    kept = samples[dense_members(samples, 0.05)]
    white = samples @ linalg.inv(linalg.sqrtm(np.cov(kept.T, ddof=0)).real)
    excess = np.cov(white.T, ddof=0) - np.eye(4)
    norm = np.linalg.norm(np.cov(white.T, ddof=0), 2) - 1
    weight = linalg.expm(4 * excess / norm)
    want = [row @ (weight / np.trace(weight)) @ row for row in white]
    np.testing.assert_allclose(entropy_scores(samples, 0.05, 4.0), want, rtol=1e-6)


def test_whitening_finds_what_the_main_direction_misses():
    x, y, is_poison = hidden_poisons()
    plain = filters.spectral_signatures(x, y, poison_share=0.075)
    assert plain.is_poison[is_poison].mean() < 0.3
    for settings in ({"num_components": 8}, {}):
        result = filters.spectre(x, y, poison_share=0.075, **settings)
        assert result.is_poison[is_poison].mean() > 0.95
        assert result.per_class["flagged"].tolist() == [45, 22]
        assert result.config["filter"] == "spectre"


def test_scores_do_not_depend_on_the_basis_or_on_other_classes():
    x, y, _ = hidden_poisons()
    result = filters.spectre(x, y, num_components=8)
    turned = np.linalg.qr(np.random.default_rng(3).standard_normal((8, 8)))[0]
    again = filters.spectre(7 * x @ turned.astype(np.float32), y, num_components=8)
    np.testing.assert_allclose(again.score, result.score, rtol=1e-2, atol=1e-3)
    other = x.copy()
    other[y == 1] *= 3
    np.testing.assert_array_equal(
        filters.spectre(other, y, num_components=8).score[y == 0], result.score[y == 0]
    )


def test_degenerate_features_and_bad_arguments():
    x, y, _ = hidden_poisons()
    assert not filters.spectre(0 * x + 1, y).score.any()
    assert np.isfinite(filters.spectre(np.concatenate([x, x], axis=1), y).score).all()
    for settings, message in (
        ({"poison_share": 0.5}, "poison_share is 0.5"),
        ({"poison_share": 0.0}, r"in \(0, 1/3\]"),
        ({"alpha": 0}, "alpha must be positive"),
        ({"num_components": 0}, "num_components must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            filters.spectre(x, y, **settings)
