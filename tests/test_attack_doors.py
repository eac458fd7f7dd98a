"""What attacks, trials and archives refuse, in words, before any work."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpoison import attacks, data, evaluation
from jaxpoison.data import Dataset

KEY = jax.random.key(0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


VICTIM = attacks.Victim(Net(), Net().init(KEY, jnp.zeros((1, 4, 4, 1))))
TRAIN = Dataset(np.zeros((30, 4, 4, 1), np.float32), (np.arange(30) % 3).astype(np.int32))
DURP = attacks.durp(epsilon=0.1)
TARGETED = attacks.bullseye_polytope(epsilon=0.1)


def mix(ratio=1.0, list_of_attacks=(DURP,), clean=TRAIN, victim=VICTIM, key=KEY):
    return attacks.mixture(key, clean, ratio, list_of_attacks, victim)


def draw(train=TRAIN, candidates=TRAIN, **settings):
    settings = {"num_trials": 2, "num_poisons": 3, **settings}
    return attacks.draw_trials(KEY, train, candidates, **settings)


def planted(**changes):
    """A set with a target that no attack has made."""
    target = attacks.Target(np.zeros((1, 4, 4, 1), np.float32), 0, 1, 5)
    attack_id = np.array([0] * 29 + [1], np.int8)
    config = {"attacks": [{"name": "planted"}]}
    whole = attacks.PoisonedDataset(TRAIN.images, TRAIN.labels, attack_id, config, target)
    return whole._replace(**changes)


def test_a_ratio_that_leaves_an_attack_without_examples():
    with pytest.raises(ValueError, match=r"p = 0\.01 of 30 .* poisons 0.* 0\.0333333 or more"):
        mix(0.01)
    with pytest.raises(ValueError, match=r"poisons 2, which leaves 1 of 3 attacks without"):
        mix(0.07, [DURP] * 3)
    assert np.bincount(mix(0.1, [DURP] * 3).attack_id).tolist() == [27, 1, 1, 1]
    assert not mix(0.0).is_poisoned.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"list_of_attacks": DURP}, "attacks is a single Attack; give a list"),
        ({"list_of_attacks": [attacks.durp]}, r"attacks\[0\] is a function; call it first"),
        ({"list_of_attacks": [TARGETED]}, "it has targets: make its training sets with"),
        ({"list_of_attacks": ["durp"]}, r"attacks\[0\] is a str; expected an attacks.Attack"),
        ({"victim": Net()}, r"victim is a Net; expected attacks.Victim\(model, variables\)"),
        ({"key": 0}, "key is a int; expected a PRNG key"),
        ({"clean": TRAIN.images}, "labels are missing"),
    ],
)
def test_near_kinds_given_to_a_mixture(arguments, message):
    with pytest.raises(TypeError, match=message):
        mix(**arguments)


def test_sets_are_taken_in_many_forms():
    want = mix()
    pairs = [
        (TRAIN.images, TRAIN.labels),
        (jnp.asarray(TRAIN.images), TRAIN.labels.astype(np.int64)),
        ([image for image in TRAIN.images], TRAIN.labels.tolist()),
        planted(),
    ]
    for clean in pairs:
        np.testing.assert_array_equal(mix(clean=clean).images, want.images)
        assert draw(train=clean).rows.shape == (2, 3)
    with pytest.raises(ValueError) as error:
        mix(clean=([[0.5] * 99] * 500, [0] * 500))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base_class": 2, "num_poisons": 11},
            "class 2 has 10 examples, fewer than the 11 poisons",
        ),
        (
            {"base_class": 7},
            r"class 7 does not occur in the training set \(its labels are 0 to 2\)",
        ),
        ({"target_class": 7}, "target_class: class 7 does not occur in the candidates"),
        ({"base_class": np.int8(1), "target_class": 1}, "both 1: they must differ"),
        ({"train": TRAIN.take(np.arange(0, 30, 3)), "target_class": 0}, "holds class 0 only"),
    ],
)
def test_trials_that_cannot_be_drawn_name_class_and_counts(settings, message):
    with pytest.raises(ValueError, match=message):
        draw(**settings)


def test_near_kinds_given_to_trials():
    numbers = {"num_trials": np.int64(2), "num_poisons": jnp.int32(3), "base_class": np.int8(1)}
    assert draw(**numbers).rows.dtype == np.int32
    for name in ("num_trials", "num_poisons"):
        with pytest.raises(TypeError, match=rf"{name} must be a whole number, got 2\.5"):
            draw(**{name: 2.5})
    with pytest.raises(TypeError, match="target_class must be a class number"):
        draw(target_class="frog")
    trials = draw()
    for arguments, message in (
        ((TRAIN, trials, DURP, [VICTIM]), "it has no target: make its training set with"),
        ((TRAIN, trials, attacks.bullseye_polytope, [VICTIM]), "call it first"),
        ((TRAIN, trials, TARGETED, VICTIM), "substitutes are a Victim; expected a list"),
        ((TRAIN, trials, TARGETED, [Net()]), r"substitutes\[0\] is a Net"),
        ((TRAIN, TRAIN, TARGETED, [VICTIM]), "trials are a Dataset"),
    ):
        with pytest.raises(TypeError, match=message):
            attacks.poison(KEY, *arguments)
    with pytest.raises(ValueError, match=r"target_ids: .*label 4294967299"):
        large = trials._replace(target_ids=np.array([1, 2**32 + 3]))
        attacks.poison(KEY, TRAIN, large, TARGETED, [VICTIM])


def test_settings_may_be_scalars_of_numpy_and_jax_and_reach_json():
    given = attacks.pgd(epsilon=np.float32(0.25), step=jnp.float32(0.5), num_steps=np.int64(3))
    plain = {"norm": "linf", "step": 0.5, "num_steps": 3, "goal": "away", "start": "uniform"}
    plain |= {"max_shift": 0.0, "flip": False, "restarts": 1}
    assert json.loads(json.dumps([given.epsilon, given.settings])) == [0.25, plain]
    drawn = attacks.feature_collision(
        epsilon=0.5, num_steps=jnp.int32(2), draws=attacks.Draws(np.int8(2), np.float64(1))
    )
    assert json.loads(json.dumps(drawn.settings))["draws"]["number"] == 2
    with pytest.raises(TypeError, match=r"num_steps must be a whole number, got 2\.0"):
        attacks.pgd(epsilon=0.1, num_steps=2.0)
    for bad in ("0.1", None, True):
        with pytest.raises(ValueError, match="epsilon is in units of pixels"):
            attacks.dap(epsilon=bad)


@pytest.mark.parametrize("label", [3, -1])
def test_labels_that_the_network_does_not_have(label):
    labels = np.full(30, label, np.int32)
    for attack in (DURP, attacks.dap(epsilon=0.1)):
        with pytest.raises(ValueError, match=rf"label {label} of example 0"):
            attack.craft(KEY, VICTIM, TRAIN.images, labels)


# Archives


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": TRAIN.images + np.float32(1.01)}, r"lie in \[1.01, 1.01\]; expected \[0, 1\]"),
        ({"images": np.full_like(TRAIN.images, np.nan)}, "NaN"),
        ({"images": np.ma.masked_less(TRAIN.images, 1)}, "masked"),
        ({"labels": TRAIN.labels.astype(np.int64) + 2**32}, "label 4294967296"),
        ({"labels": TRAIN.labels + 0.5}, "not whole numbers"),
        ({"labels": TRAIN.labels[:3]}, "30 images but 3 labels"),
        ({"attack_id": np.full(30, 257)}, r"attack_id must be in 0\.\.1, found 257"),
        ({"attack_id": np.zeros(30)}, "expected one integer"),
        ({"config": {}}, "list of attacks"),
        ({"target": planted().target._replace(label=2**32 + 3)}, "whole numbers below"),
        ({"target": planted().target._replace(base_label=-1)}, "label -1"),
        ({"target": planted().target._replace(images=np.full((1, 4, 4, 1), 1.01))}, "1.01"),
        ({"target": planted().target._replace(images=np.zeros((1, 5, 4, 1), np.uint8))}, "the set"),
    ],
)
def test_save_refuses_what_load_would(tmp_path, changes, message):
    for as_uint8 in (False, True):
        with pytest.raises(ValueError, match=message):
            attacks.save(tmp_path / "a.npz", planted(**changes), as_uint8=as_uint8)
    assert not list(tmp_path.iterdir())


def test_save_takes_what_loses_nothing(tmp_path):
    config = {"attacks": [{"name": "one", "epsilon": np.float32(0.5), "steps": jnp.int32(3)}]}
    given = planted(config=config, labels=TRAIN.labels.tolist(), attack_id=[0] * 29 + [1])
    attacks.save(tmp_path / "a.npz", given)
    loaded = attacks.load(tmp_path / "a.npz", num_classes=3)
    assert loaded.config == {"attacks": [{"name": "one", "epsilon": 0.5, "steps": 3}]}
    assert loaded.target[1:] == (0, 1, 5)
    assert (loaded.labels.dtype, loaded.attack_id.dtype) == (np.int32, np.int8)
    with pytest.raises(TypeError, match="config holds a Net"):
        attacks.save(tmp_path / "b.npz", planted(config={**config, "net": Net()}))
    with pytest.raises(TypeError, match="not a Dataset"):
        attacks.save(tmp_path / "b.npz", TRAIN)


def test_files_that_are_no_archives(tmp_path):
    (tmp_path / "a.npz").write_text("poisons")
    with pytest.raises(ValueError, match=r"a\.npz cannot be read as an archive") as error:
        attacks.load(tmp_path / "a.npz")
    assert "pickle" not in str(error.value)
    with pytest.raises(IsADirectoryError, match="is a folder; expected an archive of poisons"):
        attacks.load(tmp_path)
    attacks.save(tmp_path / "b.npz", planted())
    with np.load(tmp_path / "b.npz") as archive:
        entries = dict(archive)
    entries["target"] = np.array([0, 2**32 + 1, 5])
    np.savez(tmp_path / "b.npz", **entries)
    with pytest.raises(ValueError, match=r"b\.npz: target: .*label 4294967297"):
        attacks.load(tmp_path / "b.npz")


# Judging


def test_near_kinds_given_to_judges():
    def judge(sets, victim=VICTIM, test=TRAIN):
        return evaluation.transfer_outcome(KEY, victim, sets, test)

    with pytest.raises(TypeError, match="poisoned is a single set; give a list"):
        judge(planted())
    with pytest.raises(TypeError, match=r"poisoned\[0\] is a Dataset"):
        judge([TRAIN])
    with pytest.raises(TypeError, match="victim is a Net"):
        judge([planted()], Net())
    with pytest.raises(ValueError, match="target of poisoned set 0: 1 labels out of range"):
        judge([planted(target=planted().target._replace(base_label=3))])
    with pytest.raises(ValueError, match="test set: 10 labels out of range"):
        judge([planted()], test=data.Dataset(TRAIN.images, TRAIN.labels + 1))
