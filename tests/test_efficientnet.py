"""EfficientNet-Lite0: the weights inside the package, their reader, and the fused layers."""

import hashlib
import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import convert_efficientnet
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_efficientnet import MAGIC, PROTOCOL, read_tensors
from jax.experimental.compilation_cache import compilation_cache

from jaxpoison import models
from jaxpoison.core import loops
from jaxpoison.models import convolution, fused

WEIGHTS = Path(models.__file__).with_name("weights")


@pytest.fixture(scope="module")
def pretrained():
    return models.load_efficientnet_lite0()


@pytest.fixture
def library(monkeypatch):
    """oneDNN in place, which the tests' cache of compiled programs keeps out otherwise."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setattr(loops, "steps_from_host", lambda: True)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    jax.clear_caches()
    there = convolution._library_is_there()
    if there:
        yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
    jax.clear_caches()
    if not there:
        pytest.skip("this jaxlib does not reach oneDNN, or was not tested with it")


def gradient_image(size):
    """Returns a fixed image [size, size, 3] in [0, 1]: smooth, in all colors."""
    rows, columns = np.mgrid[:size, :size] / (size - 1)
    image = [rows, columns, np.sin(9 * rows * columns) ** 2]
    return np.stack(image, axis=-1).astype(np.float32)


def features(pretrained, images):
    model, variables = pretrained
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, method="features"))(variables, images))


# The weights.

# Of the fixed image of 64x64 pixels: some features and their values.
GOLDEN = {
    2: 0.8762,
    138: 2.2611,
    269: 2.3204,
    392: 2.4999,
    522: 5.4937,
    674: 0.9780,
    842: 1.9404,
    969: 1.6098,
    1115: 2.1589,
    1260: 0.4345,
}  # fmt: skip


def test_the_file_is_the_stated_one():
    readme = (WEIGHTS / "README.md").read_text()
    row = re.search(r"\| `efficientnet-lite0.npz` \|.*\| ([\d,]+) \| `(\w{64})` \|", readme)
    assert row is not None
    content = (WEIGHTS / "efficientnet-lite0.npz").read_bytes()
    assert len(content) == int(row[1].replace(",", ""))
    assert hashlib.sha256(content).hexdigest() == row[2]


def test_shapes_are_those_of_the_network(pretrained):
    model, variables = pretrained
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    of = jax.tree.map(lambda x: (x.shape, x.dtype), made["params"]["body"])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables["params"]["body"]) == of
    assert sum(x.size for x in jax.tree.leaves(variables)) == 3_350_000
    for side in (32, 64, 75):  # odd maps on the way
        shape = jax.eval_shape(
            lambda v, x: model.apply(v, x, method="features"),
            variables,
            jnp.zeros((2, side, side, 3)),
        )
        assert (shape.shape, shape.dtype) == ((2, 1280), jnp.float32)


def test_features_of_a_fixed_image(pretrained):
    found = features(pretrained, gradient_image(64)[None])[0]
    assert found.min() == 0 and found.max() <= 6
    np.testing.assert_allclose(found[list(GOLDEN)], list(GOLDEN.values()), atol=1e-3)


def test_features_do_not_depend_on_the_batch(pretrained):
    images = np.stack([gradient_image(48), gradient_image(48)[::-1], gradient_image(48) ** 2])
    together = features(pretrained, images)
    padded = features(pretrained, np.concatenate([images, np.zeros((2, 48, 48, 3), np.float32)]))
    alone = features(pretrained, images[1:2])
    scale = np.abs(together).max()
    np.testing.assert_allclose(padded[:3], together, atol=1e-5 * scale)
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5 * scale)


def test_the_library_gives_the_same_features(pretrained, library):
    images = gradient_image(64)[None]
    found = features(pretrained, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "_library_is_there", lambda: False)
        jax.clear_caches()
        plain = features(pretrained, images)
    np.testing.assert_allclose(found, plain, atol=1e-4 * np.abs(plain).max())


# The layers.

SHAPES = {  # image [B,H,W,C], kernel [h,w,C,F], stride, ReLU6, shortcut
    "depthwise": ((2, 6, 5, 4), (3, 3, 1, 4), 1, True, False),
    "depthwise of stride 2": ((2, 7, 6, 4), (5, 5, 1, 4), 2, True, False),
    "pointwise": ((2, 4, 4, 3), (1, 1, 3, 8), 1, True, False),
    "with a shortcut": ((2, 4, 4, 8), (1, 1, 8, 8), 1, False, True),
    "stem": ((2, 8, 8, 3), (3, 3, 3, 8), 2, True, False),
}


def operands_of(case):
    image, kernel, stride, relu6, shortcut = SHAPES[case]
    keys = jax.random.split(jax.random.key(0), 4)
    x, k, bias = (
        2 * jax.random.normal(key, shape)
        for key, shape in zip(keys, (image, kernel, kernel[3:]), strict=False)
    )
    size = (image[0], -(-image[1] // stride), -(-image[2] // stride), kernel[3])
    more = (jax.random.normal(keys[3], size),) if shortcut else ()
    return (x, k, bias, *more), stride, relu6


def by_jax(x, kernel, bias, *shortcut, stride, relu6):
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3] // kernel.shape[2],
    )  # fmt: skip
    y = sum(shortcut, y + bias)
    return jnp.clip(y, 0, 6) if relu6 else y


def check_layer(case):
    operands, stride, relu6 = operands_of(case)

    def both(fn):
        def loss(*operands):
            return jnp.sum(jnp.sin(fn(*operands, stride=stride, relu6=relu6)))

        every = tuple(range(len(operands)))
        value = jax.jit(lambda *xs: fn(*xs, stride=stride, relu6=relu6))(*operands)
        gradient = jax.jit(jax.grad(loss, every))(*operands)
        return value, gradient, jax.jit(jax.grad(loss))(*operands)

    for got, want in zip(
        jax.tree.leaves(both(fused.layer)), jax.tree.leaves(both(by_jax)), strict=True
    ):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("case", SHAPES)
def test_value_and_gradients_of_a_layer_are_jax_s(case):
    check_layer(case)


@pytest.mark.parametrize("case", SHAPES)
def test_value_and_gradients_of_a_layer_by_the_library_are_jax_s(case, library):
    check_layer(case)
    operands, stride, relu6 = operands_of(case)
    text = jax.jit(lambda *xs: fused.layer(*xs, stride=stride, relu6=relu6)).lower(*operands)
    assert "onednn$conv" in text.as_text()


@pytest.mark.parametrize("case", ["depthwise", "with a shortcut"])
@pytest.mark.parametrize("mapped", ["images", "all"])
def test_vmap_of_a_layer_equals_one_by_one(case, mapped):
    operands, stride, relu6 = operands_of(case)
    stacked = [jnp.stack([o, -o, 2 * o]) for o in operands]
    if mapped == "images":
        stacked[1:3] = operands[1:3]
    axes = [0 if mapped == "all" or i not in (1, 2) else None for i in range(len(operands))]

    def apply(*operands):
        return fused.layer(*operands, stride=stride, relu6=relu6)

    got = jax.jit(jax.vmap(apply, axes))(*stacked)
    for i in range(3):
        one = apply(*(o if axis is None else o[i] for o, axis in zip(stacked, axes, strict=True)))
        np.testing.assert_allclose(got[i], one, atol=1e-5 * np.abs(one).max())


# The reader of PyTorch's files.


def pickled(value, protocol=2):
    """Returns the bytes that PyTorch's own pickler would write for {name: (storage, ...)}."""
    file = io.BytesIO()
    pickle.dump(value, file, protocol)
    return file.getvalue()


def saved(state, storages, magic=MAGIC):
    head = pickled(magic) + pickled(PROTOCOL) + pickled({"little_endian": True})
    content = b"".join(len(x).to_bytes(8, "little") + x.tobytes() for x in storages.values())
    return head + state + pickled(list(storages)) + content


def tensor_state(offset=0, shape=(2, 3), strides=(3, 1), key="0", size=6):
    """Returns the pickle {"w": tensor}, written by hand as PyTorch 1.5 did."""

    def integers(values):
        return b"(" + b"".join(b"J" + v.to_bytes(4, "little", signed=True) for v in values) + b"t"

    text = b"X" + len(key).to_bytes(4, "little") + key.encode()
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + text
        + b"X\x03\x00\x00\x00cpuJ" + size.to_bytes(4, "little") + b"NtQ"
    )  # fmt: skip
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J"
        + offset.to_bytes(4, "little", signed=True) + integers(shape) + integers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
    return b"\x80\x02ccollections\nOrderedDict\n)RX\x01\x00\x00\x00w" + tensor + b"s."


NUMBERS = np.arange(6, dtype="<f4")


def test_tensors_are_read():
    tensors = read_tensors(io.BytesIO(saved(tensor_state(), {"0": NUMBERS})))
    np.testing.assert_array_equal(tensors["w"], NUMBERS.reshape(2, 3))
    turned = tensor_state(shape=(3, 2), strides=(1, 3))
    tensors = read_tensors(io.BytesIO(saved(turned, {"0": NUMBERS})))
    np.testing.assert_array_equal(tensors["w"], NUMBERS.reshape(2, 3).T)


@pytest.mark.parametrize(
    "state",
    [
        pickled(print),
        pickled(OrderedDict(a=np.zeros(2))),
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02cjaxpoison\nmodels\n.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",
    ],
    ids=["a function", "an array", "a command", "a module", "an unknown storage"],
)
def test_a_pickle_of_anything_else_is_refused(state):
    with pytest.raises(pickle.UnpicklingError, match="the file wants"):
        read_tensors(io.BytesIO(saved(state, {"0": NUMBERS})))


def test_a_dictionary_of_other_things_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="more than tensors"):
        read_tensors(io.BytesIO(saved(pickled({"w": 1}), {"0": NUMBERS})))


def test_other_files_are_refused():
    with pytest.raises(pickle.UnpicklingError, match="no state of a network"):
        read_tensors(io.BytesIO(saved(tensor_state(), {"0": NUMBERS}, magic=7)))
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        read_tensors(io.BytesIO(b"PK\x03\x04 a zip file, as of later versions"))


@pytest.mark.parametrize(
    "change",
    [{"offset": 1}, {"offset": -1}, {"shape": (3, 3)}, {"strides": (3, -1)}, {"strides": (9, 1)}],
)
def test_a_tensor_outside_of_its_storage_is_refused(change):
    with pytest.raises(ValueError, match="does not lie in its storage"):
        read_tensors(io.BytesIO(saved(tensor_state(**change), {"0": NUMBERS})))


def test_a_file_cut_off_is_refused():
    content = saved(tensor_state(), {"0": NUMBERS})
    with pytest.raises(ValueError, match="ends within a storage"):
        read_tensors(io.BytesIO(content[:-4]))


def test_batch_norm_is_in_kernel_and_bias():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3, 1, 1)).astype(np.float32)
    norm = {
        name: rng.uniform(0.5, 2, 4) for name in ("weight", "bias", "running_mean", "running_var")
    }
    tensors = {"c.weight": weight, **{f"n.{name}": value for name, value in norm.items()}}
    folded = convert_efficientnet._folded(tensors, "c", "n")
    x = rng.normal(size=(5, 3))
    y = x @ weight[:, :, 0, 0].T
    want = (y - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"]
    got = x @ folded["kernel"][0, 0] + folded["bias"]
    np.testing.assert_allclose(got, want + norm["bias"], rtol=1e-5)
