import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxpoison.core import devices, hosts


def test_a_mesh_has_one_axis_over_all_devices_or_those_given():
    assert devices.data_mesh().size == jax.device_count()
    mesh = devices.data_mesh(jax.devices()[1:3])
    assert mesh.axis_names == ("data",)
    assert list(mesh.devices) == jax.devices()[1:3]
    assert mesh.axis_types == (AxisType.Auto,)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_replicated_and_sharded_values(num_devices):
    mesh = devices.data_mesh(jax.devices()[:num_devices])
    tree = {"a": np.arange(16.0, dtype=np.float32).reshape(8, 2), "b": np.arange(8)}
    copies, shards = devices.replicate(tree, mesh), devices.shard_examples(tree, mesh)
    for name, array in tree.items():
        for placed, rows in ((copies[name], 8), (shards[name], 8 // num_devices)):
            np.testing.assert_array_equal(placed, array)
            assert [s.data.shape[0] for s in placed.addressable_shards] == [rows] * num_devices

    @jax.jit
    def mean(tree):
        tree = devices.constrain_examples(tree, mesh)
        return jnp.mean(tree["a"]), tree

    value, constrained = mean(copies)
    assert value == 7.5
    assert constrained["a"].addressable_shards[0].data.shape == (8 // num_devices, 2)


def test_alone_nothing_is_waited_for(tmp_path):
    assert hosts.is_main() and hosts.process_count() == 1
    assert hosts.on_main(lambda: 3) == hosts.on_all(lambda: 3) == 3
    hosts.check_shared(tmp_path / "nowhere")
    mesh, rows = devices.data_mesh(), np.arange(16)
    joined, sharded = devices.join_examples(rows, mesh), devices.shard_examples(rows, mesh)
    assert joined.sharding == sharded.sharding
    for array in (joined, sharded, rows):
        np.testing.assert_array_equal(devices.to_host(array), rows)


def test_who_the_others_are_must_be_known(monkeypatch):
    def initialize(*arguments):
        raise ValueError(f"no coordinator in {arguments}")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with (
        pytest.raises(ValueError, match=r"cannot join .*no coordinator in .*None, 2, None"),
        hosts.processes(num_processes=2),
    ):
        pass


def test_what_does_not_divide_is_an_error():
    mesh = devices.data_mesh(jax.devices()[:4])
    devices.check_divisible(8, mesh)
    for check in (
        lambda: devices.check_divisible(10, mesh),
        lambda: devices.shard_examples({"a": np.zeros((8, 2)), "b": np.zeros(10)}, mesh),
    ):
        with pytest.raises(ValueError, match="10 examples does not divide by 4 devices"):
            check()
