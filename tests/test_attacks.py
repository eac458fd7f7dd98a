import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import Tanh, classifier

from jaxpoison import attacks
from jaxpoison.data import Dataset

EPSILON = 0.06
LENGTH = 0.4
CRAFT = {
    "pgd": attacks.pgd(epsilon=EPSILON, num_steps=5),
    "dap": attacks.dap(epsilon=EPSILON, num_steps=10),
    "class_targeted": attacks.class_targeted(epsilon=EPSILON, num_steps=40, max_shift=1.0),
    "error_max": attacks.error_max(epsilon=EPSILON, num_steps=40, max_shift=1.0),
    "durp": attacks.durp(epsilon=EPSILON),
}
IN_L2 = {
    "pgd": attacks.pgd(epsilon=LENGTH, norm="l2", num_steps=5),
    "dap": attacks.dap(epsilon=LENGTH, norm="l2", num_steps=10),
    "durp": attacks.durp(epsilon=LENGTH, norm="l2"),
}


MODEL = classifier(Tanh(8), 4, std=(0.3,))
VICTIM = attacks.Victim(MODEL, MODEL.init(jax.random.key(0), jnp.zeros((1, 5, 5, 1))))


def random_set(num_examples=61, as_uint8=False):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_examples, 5, 5, 1), dtype=np.uint8)
    images[0], images[1] = 0, 255
    labels = rng.integers(0, 4, num_examples, dtype=np.int32)
    return Dataset(images if as_uint8 else (images / 255).astype(np.float32), labels)


CLEAN = random_set()


def craft(name, **settings):
    attack = getattr(attacks, name)(epsilon=EPSILON, **settings) if settings else CRAFT[name]
    key = jax.random.key(1)
    return np.asarray(attack.craft(key, VICTIM, jnp.asarray(CLEAN.images), CLEAN.labels))


def in_l2(name):
    key = jax.random.key(1)
    images = IN_L2[name].craft(key, VICTIM, jnp.asarray(CLEAN.images), CLEAN.labels)
    return np.asarray(images)


def losses(images, labels):
    logits = MODEL.apply(VICTIM.variables, jnp.asarray(images))
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@pytest.mark.parametrize("name", CRAFT)
def test_budget_and_range(name):
    images = craft(name)
    assert images.dtype == np.float32
    assert images.shape == CLEAN.images.shape
    change = np.abs(images - CLEAN.images)
    assert 0.9 * EPSILON < change.max() <= EPSILON + 1e-6
    assert images.min() >= 0
    assert images.max() <= 1
    assert (change.reshape(61, -1).max(1) > 0.01).all()


def test_pgd_raises_and_dap_lowers_its_objective_for_every_example():
    following = (CLEAN.labels + 1) % 4
    assert np.all(losses(craft("pgd"), CLEAN.labels) > losses(CLEAN.images, CLEAN.labels))
    assert np.all(losses(craft("dap"), following) < losses(CLEAN.images, following))
    assert np.all(losses(in_l2("pgd"), CLEAN.labels) > losses(CLEAN.images, CLEAN.labels))
    assert np.all(losses(in_l2("dap"), following) < losses(CLEAN.images, following))


def test_through_augmentation_the_objective_of_most_examples_moves():
    following = (CLEAN.labels + 1) % 4
    raised = losses(craft("error_max"), CLEAN.labels) > losses(CLEAN.images, CLEAN.labels)
    lowered = losses(craft("class_targeted"), following) < losses(CLEAN.images, following)
    assert raised.mean() > 0.8 and lowered.mean() > 0.8


@pytest.mark.parametrize("name", IN_L2)
def test_a_budget_in_l2_is_the_length_of_each_change(name):
    images = in_l2(name)
    change = np.linalg.norm((images - CLEAN.images).reshape(61, -1), axis=1)
    assert 0.9 * LENGTH < change.max() <= LENGTH + 1e-6 and change.min() > 0.1 * LENGTH
    assert images.min() >= 0 and images.max() <= 1
    assert IN_L2[name].settings["norm"] == "l2" and IN_L2[name].epsilon == LENGTH
    assert np.abs(images - CLEAN.images).max() > 1.5 * LENGTH / 5  # not the same in all 25 pixels


def gradient(images, labels):
    def loss(x):
        logits = MODEL.apply(VICTIM.variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    return np.asarray(jax.grad(loss)(jnp.asarray(images)))


def test_one_step_in_l2_by_hand():
    images = CLEAN.images[2:12]  # well inside of [0, 1] after the step, or clipped below
    slope = gradient(images, (CLEAN.labels[2:12] + 1) % 4)
    unit = slope / np.linalg.norm(slope.reshape(10, -1), axis=1)[:, None, None, None]
    for step, length in ((0.1, 0.1), (9.0, LENGTH)):  # the second is cut to the budget
        attack = attacks.dap(epsilon=LENGTH, norm="l2", num_steps=1, step=step)
        got = attack.craft(jax.random.key(0), VICTIM, jnp.asarray(images), CLEAN.labels[2:12])
        np.testing.assert_allclose(got, np.clip(images - length * unit, 0, 1), atol=1e-6)


def test_augmentation_is_drawn_at_every_step_and_none_is_plain_descent():
    settings = {"num_steps": 3, "max_shift": 0.0, "flip": False}
    plain = craft("class_targeted", **settings)
    begin = craft("class_targeted", num_steps=1, max_shift=0.0, flip=False)
    step = 0.05 * EPSILON
    for _ in range(2):
        move = begin - step * np.sign(gradient(begin, (CLEAN.labels + 1) % 4))
        begin = np.clip(np.clip(move, CLEAN.images - EPSILON, CLEAN.images + EPSILON), 0, 1)
    np.testing.assert_allclose(plain, begin, atol=1e-6)
    assert np.abs(craft("class_targeted", **settings | {"max_shift": 2.0}) - plain).max() > step


def test_of_several_starts_each_image_keeps_the_best():
    settings = {"num_steps": 4, "max_shift": 0.0, "flip": False}
    following = (CLEAN.labels + 1) % 4
    one, three = (craft("class_targeted", restarts=n, **settings) for n in (1, 3))
    changed = np.abs(three - one).max(axis=(1, 2, 3)) > 0
    assert 0.4 < changed.mean() < 0.95  # two of three, where starts are alike
    # The loss that is compared is that before the last step, so of the last images nearly all.
    assert np.mean(losses(three, following)[changed] < losses(one, following)[changed]) > 0.9
    np.testing.assert_array_equal(three[~changed], one[~changed])


def test_raw_keys_are_keys():
    attack = attacks.class_targeted(epsilon=EPSILON, num_steps=2)
    given = (VICTIM, jnp.asarray(CLEAN.images), CLEAN.labels)
    np.testing.assert_array_equal(
        attack.craft(jax.random.PRNGKey(3), *given), attack.craft(jax.random.key(3), *given)
    )


def test_one_step_of_each_by_hand():
    sign = np.sign(gradient(CLEAN.images, (CLEAN.labels + 1) % 4))
    want = np.clip(CLEAN.images - 0.01 * sign, 0, 1)
    np.testing.assert_allclose(craft("dap", num_steps=1, step=0.01), want, atol=1e-6)
    start = craft("pgd", num_steps=1, step=0.0)
    assert np.std(start - CLEAN.images) > 0.4 * EPSILON  # uniform: 0.58, less at the edges
    moved = start + 0.01 * np.sign(gradient(start, CLEAN.labels))
    want = np.clip(np.clip(moved, CLEAN.images - EPSILON, CLEAN.images + EPSILON), 0, 1)
    np.testing.assert_allclose(craft("pgd", num_steps=1, step=0.01), want, atol=1e-6)


def test_default_steps_can_cross_the_budget():
    assert attacks.pgd(epsilon=8 / 255).settings["step"] == 2 / 255

    def steps(attack):
        return attack.settings["step"], attack.settings["num_steps"]

    assert steps(attacks.pgd(epsilon=0.3)) == (0.075, 10)
    assert steps(attacks.pgd(epsilon=0.5, norm="l2")) == (0.125, 10)
    assert steps(attacks.dap(epsilon=0.3)) == (0.06, 100)
    assert steps(attacks.dap(epsilon=0.5, norm="l2")) == (0.1, 100)
    assert steps(attacks.class_targeted(epsilon=0.2)) == pytest.approx((0.01, 250))


def test_durp_adds_the_same_noise_to_a_class():
    attack = attacks.durp(epsilon=EPSILON)
    grey = jnp.full((40, 5, 5, 1), 0.5)
    labels = np.arange(40, dtype=np.int32) % 4
    noise = np.asarray(attack.craft(jax.random.key(0), VICTIM, grey, labels)) - 0.5
    for label in range(4):
        np.testing.assert_array_equal(noise[labels == label], noise[[label] * 10])
    assert np.std(noise[:4], axis=0).max() > 0.01
    np.testing.assert_allclose(np.std(noise[:4]), EPSILON / np.sqrt(3), rtol=0.2)


def test_batch_size_does_not_change_dap_and_progress_is_told():
    whole = craft("dap", num_steps=10)
    told = []
    attack = attacks.dap(epsilon=EPSILON, num_steps=10, batch_size=20)
    parts = attack.craft(
        jax.random.key(1), VICTIM, jnp.asarray(CLEAN.images), CLEAN.labels,
        lambda done, total: told.append((done, total)),
    )  # fmt: skip
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert told == [(16, 61), (32, 61), (48, 61), (61, 61)]  # equal batches, on 8 devices


@pytest.mark.parametrize("epsilon", [0.0, -0.1, 1.1, 8.0, float("nan")])
def test_epsilon_out_of_range(epsilon):
    for attack in (attacks.pgd, attacks.dap, attacks.durp):
        with pytest.raises(ValueError, match="epsilon is in units of pixels"):
            attack(epsilon=epsilon)


def test_a_length_may_be_above_one_and_is_finite():
    for attack in (attacks.pgd, attacks.dap, attacks.durp):
        assert attack(epsilon=2.0, norm="l2").epsilon == 2.0
        with pytest.raises(ValueError, match="epsilon is in units of pixels"):
            attack(epsilon=float("inf"), norm="l2")
        with pytest.raises(ValueError, match="norm must be 'linf' or 'l2', got 'l1'"):
            attack(epsilon=0.5, norm="l1")


def shift(name, amount):
    """An attack that costs nothing: moves every pixel towards the middle."""

    def craft(key, victim, images, labels, progress=None):
        return jnp.where(images > 0.5, images - amount, images + amount)

    return attacks.Attack(name, amount, craft, {"note": 1.0})


SHIFTS = [shift("one", 0.01), shift("two", 0.02), shift("three", 0.03)]


def mix(ratio, clean=CLEAN, seed=0, attack_list=SHIFTS):
    return attacks.mixture(jax.random.key(seed), clean, ratio, attack_list, VICTIM)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 2 / 3, 1.0])
@pytest.mark.parametrize("as_uint8", [False, True])
def test_mixture_has_exact_disjoint_stratified_parts(ratio, as_uint8):
    clean = random_set(301, as_uint8)
    pixels = clean.images.astype(np.float32) / (255 if as_uint8 else 1)
    poisoned = mix(ratio, clean)
    total = round(ratio * 301)
    counts = np.bincount(poisoned.attack_id, minlength=4)
    assert counts[0] == 301 - total
    assert set(counts[1:]) <= {total // 3, -(-total // 3)}
    for number in range(4):
        part = poisoned.attack_id == number
        np.testing.assert_allclose(
            np.abs(poisoned.images[part] - pixels[part]), 0.01 * number, atol=1e-6
        )
        for label in range(4):
            share = (clean.labels == label).sum() * counts[number] / 301
            assert abs((part & (clean.labels == label)).sum() - share) <= 2
    np.testing.assert_array_equal(poisoned.labels, clean.labels)
    np.testing.assert_array_equal(poisoned.is_poisoned, poisoned.attack_id > 0)
    assert poisoned.attack_names == ("one", "two", "three")
    assert poisoned.config["attacks"][1] == {"name": "two", "epsilon": 0.02, "note": 1.0}
    assert poisoned.dataset.images is poisoned.images


def test_mixture_follows_its_key_and_leaves_the_clean_set_alone():
    before = CLEAN.images.copy()
    first, again, other = mix(0.5), mix(0.5), mix(0.5, seed=1)
    np.testing.assert_array_equal(first.attack_id, again.attack_id)
    np.testing.assert_array_equal(first.images, again.images)
    assert np.any(first.attack_id != other.attack_id)
    np.testing.assert_array_equal(CLEAN.images, before)


def test_each_attack_of_a_mixture_has_a_key_of_its_own():
    keys = []

    def craft(key, victim, images, labels, progress=None):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return images

    names = ("one", "two", "three")
    mix(1.0, attack_list=[attacks.Attack(name, EPSILON, craft, {}) for name in names])
    assert len(set(keys)) == 3


def test_mixture_of_nothing_is_the_clean_set():
    for attack_list in (SHIFTS, []):
        poisoned = mix(0.0, attack_list=attack_list)
        np.testing.assert_array_equal(poisoned.images, CLEAN.images)
        assert not poisoned.is_poisoned.any()


def test_mixture_of_the_three_attacks():
    poisoned = mix(1.0, attack_list=[CRAFT[name] for name in ("pgd", "dap", "durp")])
    assert set(poisoned.attack_id) == {1, 2, 3}
    assert poisoned.attack_names == ("pgd", "dap", "durp")
    change = np.abs(poisoned.images - CLEAN.images)
    assert change.max() <= EPSILON + 1e-6
    dap = poisoned.attack_id == 2
    np.testing.assert_allclose(poisoned.images[dap], craft("dap")[dap], atol=1e-6)


def test_bad_mixtures_are_errors():
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            mix(ratio)
    with pytest.raises(ValueError, match="at least one attack"):
        mix(0.5, attack_list=[])
    with pytest.raises(ValueError, match="out of range"):
        mix(0.5, Dataset(CLEAN.images, CLEAN.labels + 1))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        mix(0.5, Dataset(CLEAN.images * 255, CLEAN.labels))


def test_archive_round_trip(tmp_path):
    poisoned = mix(0.5)
    attacks.save(tmp_path / "exact.npz", poisoned)
    attacks.save(tmp_path / "rounded.npz", poisoned, as_uint8=True)
    exact = attacks.load(tmp_path / "exact.npz", num_classes=4)
    rounded = attacks.load(str(tmp_path / "rounded.npz"))
    np.testing.assert_array_equal(exact.images, poisoned.images)
    assert exact.images.dtype == np.float32
    assert rounded.images.dtype == np.uint8
    np.testing.assert_array_equal(rounded.images, np.round(255 * poisoned.images))
    for loaded in (exact, rounded):
        np.testing.assert_array_equal(loaded.labels, poisoned.labels)
        np.testing.assert_array_equal(loaded.attack_id, poisoned.attack_id)
        assert (loaded.labels.dtype, loaded.attack_id.dtype) == (np.int32, np.int8)
        assert loaded.config == poisoned.config
    attacks.save(tmp_path / "again.npz", rounded, as_uint8=True)
    np.testing.assert_array_equal(attacks.load(tmp_path / "again.npz").images, rounded.images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.npz", "exact.npz", "rounded.npz"]


def entries(**change):
    """What an archive of four images holds, with a change; None leaves an entry out."""
    config = json.dumps({"attacks": [{"name": "one", "epsilon": 0.1}]})
    full = {
        "images": np.zeros((4, 2, 2, 1), np.float32),
        "labels": np.zeros(4, np.int32),
        "attack_id": np.array([0, 1, 1, 0], np.int8),
        "config": np.array(config),
    } | change
    return {name: value for name, value in full.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "lacks images"),
        ({"labels": None, "config": None}, "lacks labels, config"),
        ({"attack_id": np.array([0, 2, 1, 0], np.int8)}, r"attack_id must be in 0\.\.1"),
        ({"attack_id": np.array([0, -1, 1, 0], np.int8)}, r"attack_id must be in 0\.\.1"),
        ({"attack_id": np.zeros(3, np.int8)}, "expected one integer for each of 4"),
        ({"attack_id": np.zeros(4, np.float32)}, "expected one integer"),
        ({"labels": np.full(4, -1, np.int32)}, "out of range"),
        ({"labels": np.full(4, 4, np.int32)}, "out of range"),
        ({"labels": np.zeros(3, np.int32)}, "4 images but 3 labels"),
        ({"images": np.full((4, 2, 2, 1), np.nan, np.float32)}, "NaN"),
        ({"images": np.full((4, 2, 2, 1), 255, np.float32)}, r"\[0, 1\]"),
        ({"images": np.zeros((4, 2, 2, 1), object)}, "cannot be read as an archive of poisons"),
        ({"config": np.array({"attacks": []}, object)}, "cannot be read as an archive of poisons"),
        ({"config": np.array("{")}, "not JSON"),
        ({"config": np.array("[]")}, "list of attacks"),
        ({"config": np.array('{"attacks": 3}')}, "list of attacks"),
        ({"config": np.array('{"attacks": "x"}')}, "list of attacks"),
        ({"config": np.array('{"attacks": [{"epsilon": 1}]}')}, "list of attacks"),
    ],
)
def test_bad_archives_are_errors_that_name_the_file(tmp_path, change, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **entries())
    attacks.load(path, num_classes=4)
    np.savez(path, **entries(**change))
    with pytest.raises(ValueError, match=rf"bad\.npz.*{message}"):
        attacks.load(path, num_classes=4)


def test_damaged_archives(tmp_path):
    path = tmp_path / "bad.npz"
    attacks.save(path, mix(0.5))
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[200:1200] = b"\xff" * 1000
    one_array = tmp_path / "array.npy"
    np.save(one_array, np.zeros(3))
    for content in (b"", whole[:-1], whole[: len(whole) // 2], bytes(broken), b"not an archive",
                    one_array.read_bytes()):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz cannot be read as an archive of poisons"):
            attacks.load(path)
    with pytest.raises(FileNotFoundError):
        attacks.load(tmp_path / "nothing.npz")
