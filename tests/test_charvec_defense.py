"""The filter in training, alone and before HINT."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bn_networks import variables_of
from defended import begin
from networks import Normed, classifier, one_device

from jaxpoison import filters, network, training
from jaxpoison.data import Dataset
from jaxpoison.defenses import Defense, HintConfig, chain, characteristic_filter, hint, none
from jaxpoison.filters import ContaminationWarning
from jaxpoison.training import heads
from jaxpoison.training.hooks import Info, with_ids

ONE = one_device()
RECIPE = training.Recipe(
    epochs=2, batch_size=8, learning_rate=0.05, milestones=(), max_shift=0.0, flip=False
)


MODEL = classifier(Normed(4))


def colored(num_examples, seed):
    """Images in the color of their class."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(num_examples) % 3).astype(np.int32)
    images = 0.2 * rng.random((num_examples, 4, 4, 3)) + 0.6 * np.eye(3)[labels][:, None, None]
    return Dataset(images.astype(np.float32), labels)


CLEAN, TRUSTED = colored(40, 0), colored(15, 1)
WRONG = np.array([3, 9, 17, 30])
TRAIN = Dataset(CLEAN.images, np.where(np.isin(np.arange(40), WRONG), 2, CLEAN.labels))
WRONG = np.flatnonzero(TRAIN.labels != CLEAN.labels)
KEPT = np.flatnonzero(TRAIN.labels == CLEAN.labels)
LEFT = Dataset(TRAIN.images[KEPT], TRAIN.labels[KEPT])
EXTRACTOR = variables_of(MODEL, TRAIN.images[:2])


def the_filter(**settings):
    return characteristic_filter(MODEL, EXTRACTOR, TRUSTED, mesh=ONE, **settings)


def fit(defense, train=TRAIN, report=None):
    return training.fit(
        MODEL, RECIPE, train, key=jax.random.key(0), defense=defense, mesh=ONE, report=report
    )


def test_training_goes_on_without_what_the_filter_flags():
    epochs = []
    state = fit(the_filter(), report=lambda epoch, metrics: epochs.append(metrics))
    want = fit(None, train=LEFT)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, want.params
    )
    assert epochs[0]["flagged"] == len(WRONG)
    np.testing.assert_array_equal(np.flatnonzero(epochs[0]["chosen"]), WRONG)
    assert "chosen" not in epochs[1] and "flagged" not in epochs[1]


def test_hint_after_the_filter_sees_what_is_left():
    config = HintConfig(ratio=0.25, beta=0.1, gamma=0.5, schedule=(1,))
    assert len(LEFT.labels) * 0.25 != len(TRAIN.labels) * 0.25

    def run(defense, train):
        chosen = []

        def report(epoch, metrics):
            if epoch == 1:
                chosen.append(np.flatnonzero(metrics["chosen"]))

        return fit(defense, train, report), chosen[0]

    noise = hint(MODEL, TRUSTED, config, mesh=ONE)
    state, chosen = run(chain(the_filter(), noise), TRAIN)
    want, among_the_rest = run(noise, LEFT)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), state.params, want.params
    )
    np.testing.assert_array_equal(chosen, KEPT[among_the_rest])  # told of the set as collected


def test_a_chain_of_chains_drops_what_any_of_them_drops():
    def dropping(name):
        """Drops for good the first of what it is given, and singles out the second."""

        def on_epoch(state, epoch, train_state, dataset):
            size = len(dataset.labels)
            return state, dataset.take(slice(1, None)), Info({name: size}, dataset.ids[1:2], True)

        return Defense(on_epoch=on_epoch)

    defense = chain(dropping("a"), chain(none(), dropping("b")), dropping("c"))
    state, train = begin(defense, jax.random.key(0), TRAIN)
    _, dataset, info = defense.on_epoch(state, 0, None, train)
    np.testing.assert_array_equal(dataset.labels, TRAIN.labels[3:])
    assert info.chosen.tolist() == [3]  # of the last, among all 40
    assert info.metrics == {"a": 40, "b": 39, "c": 38}  # what each was given
    np.testing.assert_array_equal(dataset.ids, np.arange(3, 40))


def test_settings_reach_the_filter_and_the_warning_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ContaminationWarning)
        assert not np.all(the_filter().init(jax.random.key(0), with_ids(TRAIN), 1))
        tolerant = the_filter(margin=10.0, metric="l2").init(jax.random.key(0), with_ids(TRAIN), 1)
        assert np.all(tolerant)
    alone = characteristic_filter(MODEL, EXTRACTOR, mesh=ONE)
    with pytest.warns(ContaminationWarning, match="computed from the data that is filtered"):
        kept = alone.init(jax.random.key(0), with_ids(TRAIN), 1)
    with pytest.warns(ContaminationWarning):
        model = filters.CharacteristicVectorFilter(MODEL, EXTRACTOR, mesh=ONE)
        want = model.fit_filter(TRAIN.images, TRAIN.labels).keep_mask
    np.testing.assert_array_equal(kept, want)


def test_bad_sets():
    with pytest.raises(ValueError, match="trusted set: images have shape"):
        characteristic_filter(MODEL, EXTRACTOR, Dataset(TRUSTED.images[0], TRUSTED.labels))
    with pytest.raises(ValueError, match="training set: labels are int64"):
        the_filter().init(
            jax.random.key(0), TRAIN._replace(labels=TRAIN.labels.astype(np.int64)), 1
        )
    few = TRUSTED.take(TRUSTED.labels > 0)
    with pytest.raises(ValueError, match=r"no centroids for the labels \[0\]"):
        characteristic_filter(MODEL, EXTRACTOR, few, mesh=ONE).init(
            jax.random.key(0), with_ids(TRAIN), 1
        )


# A head on the frozen extractor, without augmentation

HEAD = training.HeadRecipe(epochs=3, batch_size=None, milestones=(2,))


def fit_head(train, defense=None, recipe=HEAD):
    """By `fit_defended_head`, or by `fit_head` without a defense."""
    key = jax.random.key(3)
    if defense is not None:
        return training.fit_defended_head(
            key, MODEL, EXTRACTOR, train, defense, recipe=recipe, mesh=ONE
        )
    features = network.features(MODEL, EXTRACTOR, train.images, mesh=ONE)
    return training.fit_head(key, features, jnp.asarray(train.labels), num_classes=3, recipe=recipe)


def assert_same_head(one, other):
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_a_head_with_no_defense_is_that_of_fit_head():
    recipe = dataclasses.replace(HEAD, batch_size=16)  # the last of three batches is not full
    assert_same_head(fit_head(TRAIN, none(), recipe), fit_head(TRAIN, recipe=recipe))


def test_a_head_behind_the_filter_is_that_of_what_is_left():
    # Of all examples at once, so that their order, which differs, does not matter.
    head = fit_head(TRAIN, the_filter())
    assert_same_head(head, fit_head(LEFT))
    assert np.abs(head["kernel"] - fit_head(TRAIN)["kernel"]).max() > 1e-3


def test_a_defense_sees_the_head_and_features_follow_what_it_does_to_images(monkeypatch):
    seen, passes, darker = [], [], TRAIN._replace(images=0.5 * TRAIN.images)
    real = heads.features

    def counted(model, variables, images, **options):
        passes.append(np.asarray(images))
        return real(model, variables, images, **options)

    def on_epoch(state, epoch, train_state, dataset):
        seen.append(train_state.params["head"])
        return state, (dataset if epoch == 0 else darker), Info(changed=epoch == 1)

    monkeypatch.setattr(heads, "features", counted)
    defense = Defense(on_epoch=on_epoch)
    fit_head(TRAIN, defense)
    assert len(passes) == 2  # once, and once more when the defense said that it changed something
    np.testing.assert_array_equal(passes[0], TRAIN.images)
    np.testing.assert_array_equal(passes[1], darker.images)
    first = fit_head(TRAIN, none(), dataclasses.replace(HEAD, epochs=1))
    assert_same_head(seen[1], first)


def test_hint_goes_behind_the_filter_on_a_frozen_extractor():
    config = HintConfig(ratio=0.25, beta=0.1, gamma=0.5, schedule=(1,))
    noise = hint(MODEL, TRUSTED, config, mesh=ONE)
    head = fit_head(TRAIN, chain(the_filter(), noise))
    assert_same_head(head, fit_head(LEFT, noise))
    assert np.abs(head["kernel"] - fit_head(LEFT)["kernel"]).max() > 1e-4


def test_bad_sets_of_a_defended_head():
    with pytest.raises(ValueError, match="labels out of range"):
        fit_head(TRAIN._replace(labels=TRAIN.labels + 1), none())
    for change in ({"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            fit_head(TRAIN, none(), dataclasses.replace(HEAD, **change))
