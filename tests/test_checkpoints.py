import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import Strided, classifier, one_device
from programs import run_code

from jaxpoison import training
from jaxpoison.core import devices
from jaxpoison.data import Dataset
from jaxpoison.defenses import HintConfig, hint

RECIPE = training.Recipe(epochs=5, batch_size=8, learning_rate=0.05, milestones=(3,), max_shift=1.0)


def random_set(num_examples, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_examples, 6, 6, 3), dtype=np.uint8)
    return Dataset(images, (np.arange(num_examples) % 3).astype(np.int32))


def train(folder=None, report=None):
    """Trains under HINT, from and to `folder`; the chosen set and the noise must survive in it."""
    model = classifier(Strided(4), std=(0.25,))
    # LiSSA draws batches, so that its key must survive as well.
    config = HintConfig(ratio=0.4, gamma=3.0, schedule=(1, 3), solver="lissa")
    checkpoints = None
    if folder is not None:
        checkpoints = training.Checkpoints(folder, every=1, identity="test")
    mesh = one_device()
    return training.fit(
        model, RECIPE, random_set(20, 0), key=jax.random.key(3), mesh=mesh, report=report,
        defense=hint(model, random_set(9, 1), config, mesh=mesh), checkpoints=checkpoints,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted():
    log = []
    return train(report=lambda epoch, metrics: log.append(metrics)), log


def assert_same_bits(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, uninterrupted):
    def stop(epoch, metrics):
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, report=stop)
    log = {}
    state = train(tmp_path, report=log.__setitem__)
    assert list(log) == [3, 4]  # the epoch that was not saved is done again
    assert_same_bits(state, uninterrupted[0])
    # What the second update found depends on the chosen set, the noise and the key.
    for name in ("share_at_beta", "step_255_q50", "residual", "chosen"):
        np.testing.assert_array_equal(log[3][name], uninterrupted[1][3][name])
    assert uninterrupted[1][3]["step_255_q50"] > 0.01
    assert uninterrupted[1][3]["share_at_beta"] < 1

    log.clear()
    assert_same_bits(train(tmp_path, report=log.__setitem__), state)
    assert not log  # a finished run is only read


def test_a_run_killed_by_the_system_goes_on(tmp_path, uninterrupted):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_checkpoints as t; t.child()"
    here, num_devices = Path(__file__).parent, str(jax.device_count())
    done = run_code(code, here, tmp_path, JAX_NUM_CPU_DEVICES=num_devices, JAX_PLATFORMS="cpu")
    assert done.returncode == -signal.SIGKILL, done.stderr
    log = []
    state = train(tmp_path, report=lambda epoch, metrics: log.append(epoch))
    assert log == [2, 3, 4]
    assert_same_bits(state, uninterrupted[0])


def child():
    """Trains until the third epoch is over but not saved, then dies as if out of memory."""

    def die(epoch, metrics):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    train(sys.argv[2], report=die)


def save(folder, tree, epoch=3, identity="a"):
    checkpoints = training.Checkpoints(folder, every=1, identity=identity)
    checkpoints.save(epoch, tree)
    checkpoints.close()


def restore(folder, like, identity="a"):
    return training.Checkpoints(folder, every=1, identity=identity).restore(like)


def test_weights_that_a_disk_has_changed_are_not_continued_from(tmp_path):
    save(tmp_path / "run", TREE)
    save(tmp_path / "other", {**TREE, "w": TREE["w"].at[3, 2].add(1e-3)})
    shutil.rmtree(tmp_path / "run" / "3" / "state")
    shutil.copytree(tmp_path / "other" / "3" / "state", tmp_path / "run" / "3" / "state")
    with pytest.raises(ValueError, match=r"run/3 is damaged.*checksum.*delete"):
        restore(tmp_path / "run", TREE)


def test_home_stands_for_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save("~/runs", TREE)
    assert (tmp_path / "runs" / "3").is_dir()


TREE = {"w": jnp.arange(40.0).reshape(8, 5), "n": jnp.int32(7), "key": jax.random.key(11)}


def blank():
    return {"w": jnp.zeros((8, 5)), "n": jnp.int32(0), "key": jax.random.key(0)}


def test_round_trip_and_only_the_newest_is_kept(tmp_path):
    assert restore(tmp_path, TREE)[0] == 0
    save(tmp_path, blank(), epoch=2)
    save(tmp_path, TREE, epoch=3)
    epoch, tree = restore(tmp_path, blank())
    assert epoch == 3
    np.testing.assert_array_equal(tree["w"], TREE["w"])
    assert tree["n"].dtype == jnp.int32
    assert jax.random.bits(tree["key"]) == jax.random.bits(TREE["key"])
    assert [path.name for path in tmp_path.iterdir() if path.name.isdigit()] == ["3"]


def test_a_run_is_never_continued_from_another(tmp_path):
    save(tmp_path, TREE, identity="beta 0.1")
    with pytest.raises(ValueError, match=r"another run(.|\n)*beta 0.1(.|\n)*beta 0.2"):
        restore(tmp_path, blank(), identity="beta 0.2")
    # Not even when its weights have another shape, which would be the confusing error.
    with pytest.raises(ValueError, match="another run"):
        restore(tmp_path, {"v": jnp.zeros(3)}, identity="beta 0.2")


def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path):
    save(tmp_path, TREE)
    with pytest.raises(ValueError, match=str(tmp_path)):
        restore(tmp_path, {"v": jnp.zeros(3)})
    with pytest.raises(ValueError, match=str(tmp_path)):
        restore(tmp_path, blank() | {"w": jnp.zeros((8, 6))})


def truncate_all(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_state(folder):
    shutil.rmtree(folder / "3" / "state")


def remove_identity(folder):
    shutil.rmtree(folder / "3" / "identity")


def remove_files(folder):
    for path in (folder / "3").rglob("*"):
        if path.is_file():
            path.unlink()


def truncate_arrays(folder):
    for path in (folder / "3" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size and "d" in path.parts:
            path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [truncate_all, remove_state, remove_identity, remove_files, truncate_arrays]
)
def test_a_damaged_checkpoint_is_an_error_that_names_the_folder(tmp_path, damage):
    save(tmp_path, TREE)
    damage(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        restore(tmp_path, blank())


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(PermissionError, match=f"cannot write to {folder}.*another folder"):
            training.Checkpoints(folder, every=1, identity="a")
    with pytest.raises(ValueError, match="at least one epoch"):
        training.Checkpoints(tmp_path, every=0, identity="a")


def test_saved_on_four_devices_and_restored_on_two(tmp_path):
    def place(tree, num_devices):
        mesh = devices.data_mesh(jax.devices()[:num_devices])
        return {
            "w": devices.shard_examples(tree["w"], mesh),
            **devices.replicate({"n": tree["n"], "key": tree["key"]}, mesh),
        }

    save(tmp_path, place(TREE, 4))
    _, tree = restore(tmp_path, place(blank(), 2))
    np.testing.assert_array_equal(tree["w"], TREE["w"])
    for leaf in tree.values():
        assert leaf.sharding.device_set == set(jax.devices()[:2])
    assert tree["w"].addressable_shards[0].data.shape == (4, 5)


def test_saves_every_few_epochs_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training.Checkpoints, "save", lambda self, epoch, tree: saved.append(epoch))
    model = classifier(Strided(4))
    training.fit(
        model, RECIPE, random_set(8, 0), key=jax.random.key(0),
        mesh=one_device(),
        checkpoints=training.Checkpoints(tmp_path, every=2, identity="a"),
    )  # fmt: skip
    assert saved == [2, 4, 5]
