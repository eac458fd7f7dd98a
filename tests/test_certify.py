"""Deep partition aggregation: the radius against all changes of votes, and real poisons."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from networks import Strided, Tanh, classifier

from jaxpoison import evaluation, training
from jaxpoison.data import Dataset
from jaxpoison.evaluation.certify import count_votes, partition, train_partitions

KEY = jax.random.key(0)
MODEL = classifier(Strided(4), 3)
RECIPE = dataclasses.replace(
    training.MNIST_FAST, epochs=2, batch_size=8, max_shift=1.0, learning_rate=0.2
)


def striped_set(num_examples, seed=0):
    """Three classes by the direction of stripes: easy."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, num_examples, dtype=np.int32)
    down, across = np.indices((6, 6)) % 2
    planes = np.stack([down, across, (down + across) % 2])[labels][..., None]
    return Dataset((60 * planes + rng.integers(0, 190, planes.shape)).astype(np.uint8), labels)


TRAIN, TEST = striped_set(120), striped_set(40, seed=1)


@pytest.mark.parametrize(("num_voters", "num_classes"), [(5, 3), (6, 2), (4, 4)])
def test_the_radius_is_the_largest_that_no_change_of_votes_breaks(num_voters, num_classes):
    answers = np.array(list(itertools.product(range(num_classes), repeat=num_voters)))
    votes = count_votes(answers, num_classes)
    prediction, radius = map(np.asarray, evaluation.certified_radius(votes))
    np.testing.assert_array_equal(
        prediction, [np.bincount(row, minlength=num_classes).argmax() for row in answers]
    )
    distance = (answers[:, None] != answers[None]).sum(axis=-1)
    differs = prediction[:, None] != prediction[None]
    nearest = np.where(differs, distance, num_voters + 1).min(axis=1)
    np.testing.assert_array_equal(radius, nearest - 1)


def test_partitions_hold_every_image_once_and_know_nothing_of_others():
    members = partition(TRAIN, 7)
    np.testing.assert_array_equal(np.sort(np.concatenate(members)), np.arange(120))
    order = np.random.default_rng(0).permutation(120)
    shuffled = TRAIN.take(order)
    for rows, again in zip(members, partition(shuffled, 7), strict=True):
        np.testing.assert_array_equal(shuffled.images[again], TRAIN.images[rows])
        np.testing.assert_array_equal(order[again], rows)
    relabeled = TRAIN._replace(labels=(TRAIN.labels + 1) % 3)
    for rows, again in zip(members, partition(relabeled, 7), strict=True):
        np.testing.assert_array_equal(again, rows)


def test_a_poison_moves_the_network_of_its_own_partition_alone():
    members = partition(TRAIN, 4)
    home = next(number for number, rows in enumerate(members) if 50 in rows)

    def trained(dataset):
        return train_partitions(KEY, MODEL, RECIPE, dataset, partition(dataset, 4), 3)

    before = trained(TRAIN)
    relabeled = TRAIN._replace(
        labels=np.where(np.arange(120) == 50, 2 - TRAIN.labels, TRAIN.labels)
    )
    relabeled.labels[50] = (TRAIN.labels[50] + 1) % 3
    for dataset in (TRAIN.take(np.delete(np.arange(120), 50)), relabeled):
        after = trained(dataset)
        moved = np.zeros(4, bool)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            moved |= (np.asarray(old) != np.asarray(new)).reshape(4, -1).any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(moved), [home])
    alone = train_partitions(KEY, MODEL, RECIPE, TRAIN, [members[home]], 3)
    for one, all_ in zip(jax.tree.leaves(alone), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(one[0], all_[home], rtol=1e-4, atol=1e-5)


def test_certificates_hold_against_real_poisons():
    model = classifier(Tanh(16), 3)
    recipe = dataclasses.replace(RECIPE, epochs=6, max_shift=0.0, learning_rate=0.05)
    settings = {"num_partitions": 5, "steps_per_epoch": 6, "at_once": 5}
    clean = evaluation.certify(KEY, model, recipe, TRAIN, TEST, **settings)
    assert (clean.votes.sum(axis=1) == 5).all()
    assert clean.certified_accuracy() > 0.6  # guessing is 1 / 3
    assert clean.unchanged(0) == 1 and clean.unchanged(3) == 0
    assert clean.unchanged(1) > 0
    labels = TRAIN.labels.copy()
    labels[:1] = (labels[:1] + 1) % 3
    poisoned = evaluation.certify(
        KEY, model, recipe, TRAIN._replace(labels=labels), TEST, **settings
    )
    safe = clean.radius >= 1
    np.testing.assert_array_equal(poisoned.prediction[safe], clean.prediction[safe])
    # In groups of another size, filled up: the same votes but for rounding.
    grouped = evaluation.certify(KEY, model, recipe, TRAIN, TEST, **settings | {"at_once": 3})
    assert np.mean(grouped.votes == clean.votes) > 0.95


def test_empty_partitions_vote_for_class_0():
    few = TRAIN.take(np.arange(8))
    got = evaluation.certify(KEY, MODEL, RECIPE, few, TEST, num_partitions=40, steps_per_epoch=1)
    num_empty = sum(len(rows) == 0 for rows in partition(few, 40))
    assert num_empty >= 32 and (got.votes[:, 0] >= num_empty).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_partitions must be at least 1"):
        evaluation.certify(
            KEY, MODEL, RECIPE, TRAIN, TEST, num_partitions=0, steps_per_epoch=1
        )  # fmt: skip
    with pytest.raises(TypeError, match="expected a PRNG key"):
        evaluation.certify(0, MODEL, RECIPE, TRAIN, TEST, num_partitions=1, steps_per_epoch=1)
