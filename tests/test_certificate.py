"""The audit's certificate: its classifiers by NumPy, its promise against every single change."""

import dataclasses

import audited
import numpy as np
import pytest

from jaxpoison.audit import _audit, certificate, findings
from jaxpoison.audit.certificate import PENALTY, ridge, vote
from jaxpoison.audit.evidence import Evidence
from jaxpoison.data import Dataset
from jaxpoison.evaluation.certify import certified_radius, partition


def evidence(count, seed=0, classes=3):
    """Random images whose embedding is near the axis of their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count, dtype=np.int32)
    embedding = np.eye(8, dtype=np.float32)[labels] + rng.normal(0, 0.4, (count, 8))
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    images = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return Evidence(
        ids=np.array([str(row) for row in range(count)]),
        labels=labels,
        class_names=tuple("abc"[:classes]),
        images=images,
        digests=np.stack([np.resize(image.reshape(-1), 32) for image in images]),
        hashes=np.zeros((count, 2), np.uint64),
        sizes=np.full((count, 2), 4, np.int32),
        embedding=embedding.astype(np.float32),
    )


def rows_of(whole, rows):
    arrays = ("ids", "labels", "images", "digests", "hashes", "sizes", "embedding")
    return dataclasses.replace(whole, **{name: getattr(whole, name)[rows] for name in arrays})


DATA, TRUSTED = evidence(60), evidence(40, seed=1)


def test_ridge_is_the_least_squares_of_a_stacked_system():
    rng = np.random.default_rng(0)
    for count in (5, 12):  # fewer and more rows than columns
        inputs, targets = rng.normal(size=(count, 8)), rng.normal(size=(count, 3))
        stacked = np.concatenate([inputs, np.sqrt(PENALTY) * np.eye(8)])
        want = np.linalg.lstsq(stacked, np.concatenate([targets, np.zeros((8, 3))]), rcond=None)
        np.testing.assert_allclose(ridge(inputs, targets), want[0], rtol=1e-6, atol=1e-8)


def test_each_part_has_one_vote():
    votes, labels = vote(DATA, TRUSTED, 5)
    np.testing.assert_array_equal(labels, TRUSTED.labels)
    want = np.zeros((40, 3), int)
    for rows in partition(Dataset(DATA.images, DATA.labels), 5):
        inputs, asked = (np.c_[x, np.ones(len(x))].astype(float) for x in
                         (DATA.embedding[rows], TRUSTED.embedding))  # fmt: skip
        weights = ridge(inputs, np.eye(3)[DATA.labels[rows]])
        want[np.arange(40), (asked @ weights).argmax(1)] += 1
    np.testing.assert_array_equal(votes, want)


def changed_sets():
    """Removals, other labels, and insertions of lies, each with one image."""
    everything = np.arange(60)
    for row in range(0, 60, 5):
        yield rows_of(DATA, np.delete(everything, row))
        for shift in (1, 2):
            labels = DATA.labels.copy()
            labels[row] = (labels[row] + shift) % 3
            yield dataclasses.replace(DATA, labels=labels)
    lies = evidence(12, seed=2)
    for row in range(12):
        lie = rows_of(lies, [row])
        lie = dataclasses.replace(lie, labels=(lie.labels + 1) % 3)
        arrays = {
            name: np.concatenate([getattr(DATA, name), getattr(lie, name)])
            for name in ("ids", "labels", "images", "digests", "hashes", "sizes", "embedding")
        }
        yield dataclasses.replace(DATA, **arrays)


def test_no_change_of_one_image_breaks_what_is_promised():
    prediction, radius = map(np.asarray, certified_radius(vote(DATA, TRUSTED, 9).votes))
    assert 0.2 < np.mean(radius >= 1) < 1  # it promises something, and not everything
    moved = np.zeros(40, bool)
    for changed in changed_sets():
        moved |= np.asarray(certified_radius(vote(changed, TRUSTED, 9).votes)[0]) != prediction
    assert not (moved & (radius >= 1)).any() and moved.any()


def test_what_is_measured_on_is_not_trained_on_and_does_not_depend_on_other_images():
    def held_out(rows):
        return set(vote(rows_of(DATA, rows), None, 3).labels.tolist())

    def images_of(rows):
        kept = rows_of(DATA, rows)
        aside = np.array([certificate._hash(x) % certificate.HELD_OUT == 0 for x in kept.images])
        return {x.tobytes() for x in kept.images[aside]}

    assert images_of(np.arange(60)) >= images_of(np.arange(30)) and held_out(np.arange(60))
    # A trusted image that is among the data has no vote.
    everything = vote(DATA, TRUSTED, 3).votes
    twin = rows_of(TRUSTED, [0])
    arrays = {name: np.concatenate([getattr(DATA, name), getattr(twin, name)])
              for name in ("ids", "labels", "images", "digests", "hashes", "sizes",
                           "embedding")}  # fmt: skip
    np.testing.assert_array_equal(
        vote(dataclasses.replace(DATA, **arrays), TRUSTED, 3).votes, everything
    )
    with pytest.raises(ValueError, match="of 60 60 are measured on"):
        vote(DATA, DATA, 3)


def test_the_record_counts_votes_and_says_so():
    found = certificate.certificate(DATA, TRUSTED, 9)
    prediction, radius = map(np.asarray, certified_radius(vote(DATA, TRUSTED, 9).votes))
    right = prediction == TRUSTED.labels
    assert (found.num_parts, found.num_images) == (9, 40)
    assert found.accuracy == right.mean()
    assert [row.num_changes for row in found.rows] == [1, 2]
    for row in found.rows:
        assert row.unchanged == np.mean(radius >= row.num_changes)
        assert row.right == np.mean(right & (radius >= row.num_changes))
    share = f"{100 * found.rows[0].unchanged:.0f}%"
    assert f"{share} of these predictions stay the same whatever one image is" in found.reason
    assert "40 trusted images" in found.reason
    alone = certificate.certificate(evidence(400), None, 30)
    assert "held-out images" in alone.reason and alone.rows[-1].num_changes == 10


@pytest.mark.parametrize("parts", [2, 0, -1])
def test_too_few_parts_are_refused(parts):
    with pytest.raises(ValueError, match="certify must be at least 3"):
        _audit.Settings(certify=parts)


def test_the_page_shows_it(tmp_path):
    page = audited.page(audited.sample(4), tmp_path)
    assert 'href="#certificate"' in page and "93%" in page and "72%" in page
    without = dataclasses.replace(audited.sample(4), certificate=None)
    assert 'id="certificate"' not in audited.page(without, tmp_path)
    assert findings.read(tmp_path) == without
