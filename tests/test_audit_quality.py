"""The benchmark of the audit: what it plants, how it counts, and the committed figures."""

import json
import sys

import numpy as np
import pytest
from programs import ROOT, run_code

from jaxpoison.data import load_embedded

sys.path.insert(0, str(ROOT / "benchmarks"))
import audit_quality
import audit_threats


@pytest.fixture(scope="module")
def case():
    train = load_embedded("cifar10").train
    labels = np.asarray(train.labels, np.int32)
    people = {"aggregate": np.where(np.arange(len(labels)) % 10 == 0, (labels + 1) % 10, labels)}
    images = np.asarray(train.images)
    return audit_threats.Case("cifar10", images, labels, load_embedded("cifar10").test, people, 0)


@pytest.mark.parametrize("threat", ["flips", "aggregate", "patch", "patches", "blend", "sig"])
def test_a_fault_is_where_it_is_said_to_be(case, threat):
    images, labels, changed = audit_threats.plant(case, threat, 0.02)
    num = len(labels)
    assert changed.sum() == (num // 10 if threat == "aggregate" else round(0.02 * num))
    moved = (images != case.images).any(axis=(1, 2, 3))
    relabeled = labels != case.labels
    np.testing.assert_array_equal(moved | relabeled, changed)
    if threat in ("flips", "aggregate"):
        assert not moved.any()
    elif threat == "sig":
        assert not relabeled.any() and np.all(labels[changed] == audit_threats.TARGET)
        assert np.abs(images.astype(int) - case.images).max() == 20
    else:
        targets = {audit_threats.TARGET}
        if threat == "patches":
            targets.add(audit_threats.SECOND_TARGET)
        assert set(labels[changed]) == targets and relabeled[changed].all()


def test_the_same_seed_plants_the_same_and_leaves_the_images_alone(case):
    before = case.images.copy()
    first, second = (audit_threats.plant(case, "blend", 0.02) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(case.images, before)


@pytest.mark.parametrize("values", [1000, 7])  # hardly any ties, and many
def test_average_precision_is_that_of_scikit_learn(values):
    random = np.random.default_rng(values)
    score, positive = random.integers(0, values, 300).astype(float), random.random(300) < 0.2
    metrics = pytest.importorskip("sklearn.metrics")
    wanted = metrics.average_precision_score(positive, score)
    np.testing.assert_allclose(audit_quality.average_precision(score, positive), wanted)


def test_the_best_ranking_has_an_ap_of_one_and_the_lead_is_a_paired_interval():
    changed = np.arange(200) < 20
    best = audit_quality.quality(changed.astype(float), changed)
    assert best["ap"] == best["ap_low"] == 1 and best["recall_1"] == 1
    score = np.random.default_rng(0).random(200)
    assert audit_quality.lead(score, score, changed) == (0, 0)
    low, high = audit_quality.lead(changed + 0.0, score, changed)
    assert 0.5 < low < high < 1


def test_rivals_that_are_not_there_are_left_out(tmp_path):
    np.savez(
        tmp_path / "in.npz", labels=np.zeros(4, int), embedding=np.zeros((4, 2)),
        probabilities=np.zeros((4, 2)), features=np.zeros((4, 2)),
    )  # fmt: skip
    code = """
import sys
sys.modules["cleanlab"] = sys.modules["art"] = None
import audit_rivals
audit_rivals.main("in.npz", "out.npz")
"""
    done = run_code(code, cwd=tmp_path, PYTHONPATH=str(ROOT / "benchmarks"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out") == 2
    assert not np.load(tmp_path / "out.npz").files


def test_the_guide_shows_the_committed_figures():
    results = ROOT / "benchmarks" / "results" / "audit_quality.json"
    cells = json.loads(results.read_text())["cells"]
    guide = (ROOT / "docs" / "audit.md").read_text()
    for table in audit_quality.table(cells).split("\n\n"):
        assert table in guide
