import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpoison import models
from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset
from jaxpoison.training import Recipe, init_state
from jaxpoison.training._fit import epoch_order, train_step
from jaxpoison.training.recipe import optimizer


@pytest.fixture(params=["host", "scan"])
def form(request, monkeypatch):
    monkeypatch.setattr(loops, "steps_from_host", lambda: request.param == "host")
    return request.param


def test_inner_scan_is_the_fold_and_leaves_no_loop_on_cpu(form):
    def step(carry, x):
        return carry * 0.5 + x["a"], (carry, ())

    a = np.arange(4, dtype=np.float32)
    run = jax.jit(lambda carry, xs: loops.inner_scan(step, carry, xs))
    for length in (1, 4):
        xs = {"a": a[:length]}
        got, want = run(3.0, xs), jax.lax.scan(step, jnp.float32(3), xs)
        jax.tree.map(np.testing.assert_allclose, got, want)
        # A convolution in a loop, be it one of a single turn, takes CPUs many times as long.
        assert ("while" in run.lower(3.0, xs).as_text()) == (form == "scan")


def test_scan_is_the_fold(form):
    calls = []

    def step(constants, carry, x):
        calls.append(form)
        total = carry["total"] * constants + x["a"]
        return {"total": total}, (total, x["b"] ** 2)

    a, b = np.arange(5, dtype=np.float32), np.arange(10, dtype=np.float32).reshape(5, 2)
    run = loops.scan(step)
    carry, (totals, squares) = run(jnp.float32(0.5), {"total": jnp.float32(3)}, {"a": a, "b": b})
    want, total = [], 3.0
    for x in a:
        want.append(total := 0.5 * total + x)
    np.testing.assert_array_equal(totals, np.array(want, np.float32))
    assert carry["total"] == totals[-1]
    np.testing.assert_array_equal(squares, b**2)
    traces = len(calls)
    run(jnp.float32(0.5), {"total": jnp.float32(3)}, {"a": a + 1, "b": b})
    assert len(calls) == traces == 1  # compiled once, however many steps and calls


def test_scan_without_outputs_or_without_steps(form):
    run = loops.scan(lambda constants, carry, x: (carry + x, ()))
    carry, ys = run((), jnp.float32(0), jnp.arange(4.0))
    assert carry == 6
    assert ys == ()
    run = loops.scan(lambda constants, carry, x: (carry + x, 2 * x))
    carry, ys = run((), jnp.float32(1), jnp.zeros((0,)))
    assert carry == 1
    assert ys.shape == (0,)


def test_training_steps_are_the_same_in_both_forms(monkeypatch):
    model, mesh = models.resnet18(width=4, blocks=(1,), num_classes=3), devices.data_mesh()
    recipe = Recipe(batch_size=8, max_shift=1.0)
    rule = optimizer(recipe)
    rng = np.random.default_rng(0)
    train = Dataset(
        rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 24, dtype=np.int32)
    )
    order = epoch_order(jax.random.key(1), 0, 24, 8)

    def run(from_host):
        monkeypatch.setattr(loops, "steps_from_host", lambda: from_host)
        run_epoch = loops.scan(train_step(model, recipe, rule, mesh))
        state = init_state(model, rule, jax.random.key(0), (8, 8, 3))
        constants = devices.replicate(train, mesh), (), jax.random.key(2)
        return run_epoch(constants, devices.replicate(state, mesh), order)

    host, scanned = run(True), run(False)
    assert int(host[0].step) == int(scanned[0].step) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), host, scanned)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize(("num_examples", "batch_size"), [(13, 1), (13, 5), (13, 100), (16, 8)])
def test_map_batches_does_not_depend_on_the_batches(form, num_devices, num_examples, batch_size):
    mesh = devices.data_mesh(jax.devices()[:num_devices])
    x = np.arange(3 * num_examples, dtype=np.float32).reshape(num_examples, 3)
    y = np.arange(num_examples, dtype=np.int32)
    batches = []

    def fn(constants, batch):
        batches.append(batch[0].shape[0])
        return {"sum": jnp.sum(batch[0], axis=1) * constants, "pair": (batch[1] + 1, batch[0])}

    run = loops.map_batches(fn, batch_size=batch_size, mesh=mesh)
    got = run(devices.replicate(jnp.float32(2), mesh), devices.replicate((x, y), mesh))
    np.testing.assert_array_equal(got["sum"], 2 * x.sum(1))
    np.testing.assert_array_equal(got["pair"][0], y + 1)
    np.testing.assert_array_equal(got["pair"][1], x)
    wanted = -(-min(batch_size, num_examples) // num_devices) * num_devices
    assert set(batches) == {wanted}


@pytest.mark.parametrize("num_examples", [1, 7, 512, 513, 1250, 59_000])
@pytest.mark.parametrize("batch_size", [1, 20, 512])
@pytest.mark.parametrize("num_devices", [1, 8])
def test_even_batches_cover_all_and_waste_less_than_a_row_of_devices(
    num_examples, batch_size, num_devices
):
    mesh = devices.data_mesh(jax.devices()[:num_devices])
    size, num_batches = loops.even_batches(num_examples, batch_size, mesh)
    assert size % num_devices == 0
    assert size < batch_size + num_devices
    assert (num_batches - 1) * size < num_examples <= num_batches * size
    assert num_batches * size - num_examples < num_batches * num_devices or num_devices > 1
