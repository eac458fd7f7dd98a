"""The convolution for CPU against `jax.lax.conv_general_dilated`: values, products, transforms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P

from jaxpoison.core import loops
from jaxpoison.models import convolution

PLAIN = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1}
NO_PADDING = ((0, 0), (0, 0))
LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

# Image [B,H,W,C], kernel [h,w,F], strides, padding. With every way in which a map is computed.
CASES = {
    "rows": ((3, 6, 5, 4), (3, 3, 5), (1, 1), "SAME"),
    "rows, no padding": ((2, 7, 8, 4), (5, 3, 6), (1, 1), "VALID"),
    "rows, wide padding": ((2, 4, 5, 4), (2, 3, 6), (1, 1), ((2, 1), (0, 3))),
    "rows, an image smaller than the kernel": ((2, 2, 1, 4), (3, 3, 5), (1, 1), "SAME"),
    "rows, cut off instead of padded": ((2, 7, 8, 4), (3, 3, 5), (1, 1), ((-1, 0), (1, -2))),
    "one channel": ((2, 7, 6, 1), (5, 5, 4), (1, 1), "VALID"),
    "three channels": ((2, 5, 6, 3), (3, 3, 4), (1, 1), "SAME"),
    "strides": ((2, 7, 6, 4), (3, 3, 5), (2, 2), ((1, 1), (1, 1))),
    "strides that leave pixels over": ((2, 8, 9, 4), (2, 4, 5), (3, 2), "VALID"),
    "1x1": ((2, 5, 6, 4), (1, 1, 5), (1, 1), "SAME"),
    "1x1, strides": ((2, 5, 6, 4), (1, 1, 5), (2, 2), ((0, 0), (0, 0))),
    "many patches": ((2, 9, 9, 4), (5, 5, 3), (2, 1), "SAME"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(loops, "steps_from_host", lambda: True)


@pytest.fixture(params=["library", "no library"])
def library(request, monkeypatch):
    if request.param == "no library":
        monkeypatch.setattr(convolution, "_library_is_there", lambda: False)
        yield
        return
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    if not convolution._library_is_there():
        pytest.skip("this jaxlib does not reach oneDNN, or was not tested with it")
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def operands(image, kernel, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(sum(image) + sum(kernel)), 2)
    shapes = image, (*kernel[:2], image[3], kernel[2])
    return tuple(jax.random.normal(*each).astype(dtype) for each in zip(keys, shapes, strict=True))


def ours(x, k, strides=(1, 1), padding="SAME"):
    return convolution.conv_general_dilated(x, k, strides, padding, **PLAIN, **LAYOUT)


def xla(x, k, strides=(1, 1), padding="SAME"):
    return lax.conv_general_dilated(x, k, strides, padding, **PLAIN, **LAYOUT)


def assert_close(got, want, tolerance):
    """Largest error in units of the largest value, leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * np.abs(w).max())


def products(convolve, point):
    """Returns value, gradient, and Hessian products in both orders, of a loss of both operands."""
    direction = jax.tree.map(jnp.cos, point)

    def loss(point):
        return jnp.sum(jnp.sin(convolve(*point)))

    def slope(point):
        return jax.jvp(loss, (point,), (direction,))[1]

    def along(point):
        gradient = jax.grad(loss)(point)
        return sum(jnp.vdot(g, d) for g, d in zip(gradient, direction, strict=True))

    forward_over_reverse = jax.jvp(jax.grad(loss), (point,), (direction,))
    return (
        convolve(*point), forward_over_reverse, jax.grad(slope)(point), jax.grad(along)(point),
        jax.jvp(jax.grad(slope), (point,), (direction,))[1],  # a third derivative
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@jax.enable_x64(True)
def test_value_and_products_of_all_orders_equal_xla_in_float64(case):
    image, kernel, strides, padding = CASES[case]
    point = operands(image, kernel)

    def of(convolve):
        return products(lambda x, k: convolve(x, k, strides, padding), point)

    assert_close(jax.jit(of, static_argnums=0)(ours), jax.jit(of, static_argnums=0)(xla), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_xla_in_float32(library, case):
    assert_gradients_close(case, jnp.float32, 3e-6)


@pytest.mark.parametrize("case", ["rows", "one channel", "strides"])
def test_value_and_gradients_are_near_xla_s_in_bfloat16(case):
    assert_gradients_close(case, jnp.bfloat16, 0.03)


def assert_gradients_close(case, dtype, tolerance):
    image, kernel, strides, padding = CASES[case]
    point = operands(image, kernel, dtype)

    def of(convolve, *point):
        y, transpose = jax.vjp(lambda x, k: convolve(x, k, strides, padding), *point)
        return y, transpose(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

    want = of(xla, *(x.astype(jnp.float32) for x in point))
    want = jax.tree.map(lambda x: x.astype(dtype), want)
    assert_close(jax.jit(of, static_argnums=0)(ours, *point), want, tolerance)


@pytest.mark.parametrize("num_images", [1, 5, 8, 11])
@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradient_in_chunks_equals_xla_for_any_number_of_images(
    library, monkeypatch, num_images, chunk, stride
):
    copied = 4 * 4 * 2 * 12 if stride == 1 else 2 * 2 * 9 * 4  # of an image, numbers
    monkeypatch.setattr(convolution, "_COPIED_AT_ONCE", chunk * copied * 4)
    x, k = operands((num_images, 4, 4, 4), (3, 3, 4), jnp.float32)

    def gradient(convolve):
        def loss(k):
            return jnp.sum(jnp.sin(convolve(x, k, (stride, stride), ((1, 1), (1, 1)))))

        return jax.jit(jax.grad(loss))(k)

    assert_close(gradient(ours), gradient(xla), 3e-6)


# Which of image and kernel there are three of, and which axis counts them.
MAPPED = {"images": (1, None), "kernels": (None, 4), "kernels in front": (None, 0), "both": (0, 2)}


@pytest.mark.parametrize("case", ["rows", "strides"])
@pytest.mark.parametrize("mapped", MAPPED)
def test_vmap_of_value_and_products_equals_one_by_one(library, mapped, case):
    image, kernel, strides, padding = CASES[case]
    axes = MAPPED[mapped]
    point = tuple(
        x if axis is None else jnp.stack([x, 2 * x, jnp.sin(x)], axis)
        for x, axis in zip(operands(image, kernel, jnp.float32), axes, strict=True)
    )

    def of(convolve, *point):
        def loss(point):
            return jnp.sum(jnp.sin(convolve(*point, strides, padding)))

        direction = jax.tree.map(jnp.cos, point)
        return convolve(*point, strides, padding), jax.jvp(jax.grad(loss), (point,), (direction,))

    def single(index):
        return (
            x if axis is None else jnp.take(x, index, axis)
            for x, axis in zip(point, axes, strict=True)
        )

    got = jax.jit(jax.vmap(functools.partial(of, ours), axes))(*point)
    one_by_one = jax.jit(functools.partial(of, xla))
    want = [one_by_one(*single(index)) for index in range(3)]
    assert_close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *want), 1e-5)


def test_per_example_gradients_and_their_hessian_products(library):
    x, k = operands((4, 6, 6, 4), (3, 3, 4), jnp.float32)

    def of(convolve):
        def loss(k, image):
            return jnp.sum(jnp.sin(convolve(image[None], k)))

        gradients = jax.vmap(jax.grad(loss), (None, 0))
        return gradients(k, x), jax.jvp(lambda k: gradients(k, x), (k,), (k,))[1]

    assert_close(jax.jit(of, static_argnums=0)(ours), jax.jit(of, static_argnums=0)(xla), 1e-5)


def test_unrolled_training_steps_inside_a_loop_have_xla_s_second_order_gradient(library):
    x, k = operands((4, 6, 6, 4), (3, 3, 4), jnp.float32)
    k = 0.1 * k

    def of(convolve):
        def loss(k, x):
            return jnp.mean(jnp.sin(convolve(x, k)))

        def after_steps(x):
            def step(k, scale):
                return k - scale * jax.grad(loss)(k, x), loss(k, x)

            k_after, losses = lax.scan(step, k, jnp.array([0.5, 0.4, 0.3]))
            return loss(k_after, x[::-1]) + jnp.sum(losses)

        return jax.value_and_grad(after_steps)(x)

    assert_close(jax.jit(of, static_argnums=0)(ours), jax.jit(of, static_argnums=0)(xla), 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_images_with_the_kernel_on_all_devices(library, check_vma):
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    x, k = operands((16, 6, 6, 4), (3, 3, 4), jnp.float32)

    def loss(convolve, x, k):
        return jnp.sum(jnp.sin(convolve(x, k)))

    def whole(x, k):
        return (
            jax.jvp(functools.partial(loss, xla, x), (k,), (k,)),
            jax.grad(functools.partial(loss, xla), (0, 1))(x, k),
            jax.jvp(jax.grad(functools.partial(loss, xla, x)), (k,), (k,))[1],
        )

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P()),
        out_specs=(P(), (P("data"), P()), P()), check_vma=check_vma,
    )  # fmt: skip
    def on_devices(x, k):
        # With checks the kernel's gradient is summed over devices where the kernel is made varying.
        total = (lambda x: x) if check_vma else functools.partial(lax.psum, axis_name="data")
        image, kernel = jax.grad(functools.partial(loss, ours), (0, 1))(x, k)
        product = jax.jvp(jax.grad(functools.partial(loss, ours, x)), (k,), (k,))[1]
        value = lax.psum(jax.jvp(functools.partial(loss, ours, x), (k,), (k,)), "data")
        return value, (image, total(kernel)), total(product)

    assert_close(on_devices(x, k), jax.jit(whole)(x, k), 1e-5)


# [batch, height, width, channels], [height, width, features] of the kernel, strides.
PARTITIONED = [
    ((16, 6, 6, 4), (3, 3, 4), (1, 1)),
    ((16, 7, 6, 1), (5, 5, 3), (1, 1)),
    ((8, 8, 8, 4), (3, 3, 6), (2, 2)),
]


@pytest.mark.parametrize(("image", "kernel", "strides"), PARTITIONED)
def test_program_that_xla_partitions_over_devices(library, image, kernel, strides):
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    x, k = operands(image, kernel, jnp.float32)
    spread = jax.device_put(x, sharding)

    def of(convolve, x):
        y, transpose = jax.vjp(lambda x, k: convolve(x, k, strides), x, k)
        return y, transpose(jnp.sin(y))

    program = jax.jit(of, static_argnums=0).lower(ours, spread)
    text = program.as_text()
    # The kernel's gradient is a product: in loops XLA's own form took eight times as long.
    assert text.count("stablehlo.convolution(") == 2 and "custom_call @__onednn" not in text
    compiled = program.compile()
    assert "all-reduce" in compiled.as_text() and "all-gather" not in compiled.as_text()
    got = compiled(spread)
    assert got[0].sharding.is_equivalent_to(sharding, 4)
    assert_close(got, jax.jit(of, static_argnums=0)(xla, x), 1e-5)


def lowered(fn, *args, platform):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


# How often XLA's convolution, the library's and the library's product are used for the value, the
# gradient to the image and that to the kernel; first with the library, then without it.
FORMS = {
    (8, 8, 8, 3, 1): ((0, 2, 1), (2, 0, 0)),  # [pixels, channels, features, kernel, stride]
    (4, 128, 128, 3, 1): ((0, 2, 1), (2, 0, 0)),
    (8, 3, 16, 3, 1): ((0, 1, 1), (0, 0, 0)),
    (12, 1, 40, 5, 1): ((0, 1, 1), (0, 0, 0)),
    (12, 40, 10, 5, 1): ((0, 2, 1), (2, 0, 0)),
    (8, 16, 32, 3, 2): ((0, 1, 1), (0, 0, 0)),
    (8, 16, 32, 1, 2): ((0, 1, 1), (0, 0, 0)),
    (8, 16, 32, 1, 1): ((0, 2, 1), (0, 0, 0)),
    (9, 4, 4, 5, 2): ((1, 1, 1), (2, 0, 0)),
}


@pytest.mark.parametrize("shape", FORMS)
def test_form_is_chosen_by_shape_and_accelerators_get_xla_s(library, shape):
    pixels, channels, features, size, stride = shape
    x, k = operands((2, pixels, pixels, channels), (size, size, features), jnp.float32)

    def gradients(x, k):
        y, transpose = jax.vjp(lambda x, k: ours(x, k, (stride, stride)), x, k)
        return y, transpose(jnp.sin(y))

    text = lowered(gradients, x, k, platform="cuda")
    assert text.count("stablehlo.convolution(") == 3
    assert "custom_call" not in text
    text = lowered(gradients, x, k, platform="cpu")
    counts = tuple(map(text.count, ("stablehlo.convolution(", "onednn$conv", "onednn$matmul")))
    assert counts == FORMS[shape][0 if convolution._library_is_there() else 1]


@pytest.mark.parametrize("count", [16, 64, 100])
def test_each_call_of_the_library_makes_one_product(library, count):
    # Of several, threads start threads of their own pool: memory is lost (AVX2, jaxlib 0.10.2).
    x, k = operands((count, 16, 16, 8), (3, 3, 8), jnp.float32)

    def gradients(x, k):
        return jax.vmap(jax.grad(lambda k, x: jnp.sum(ours(x[None], k) ** 2)), (None, 0))(k, x)

    for fn in (gradients, jax.grad(lambda x, k: jnp.sum(ours(x, k) ** 2), argnums=1)):
        text = lowered(fn, x, k, platform="cpu")
        calls = [line for line in text.splitlines() if "@__onednn$matmul" in line]
        assert bool(calls) == convolution._library_is_there()
        assert all(re.search(r": \(tensor<1x\d+x\d+xf32>", line) for line in calls)


@pytest.mark.parametrize(
    "change",
    [{"rhs_dilation": (2, 2)}, {"lhs_dilation": (2, 1)}, {"feature_group_count": 2}],
)
def test_dilated_and_grouped_convolutions_are_left_to_jax(change):
    x, k = operands((2, 7, 8, 4), (3, 3, 6), jnp.float32)
    k = k[:, :, : 4 // change.get("feature_group_count", 1)]
    settings = PLAIN | change | LAYOUT
    got = convolution.conv_general_dilated(x, k, (1, 1), NO_PADDING, **settings)
    np.testing.assert_array_equal(
        got, lax.conv_general_dilated(x, k, (1, 1), NO_PADDING, **settings)
    )


def test_operands_that_do_not_fit_are_refused_as_by_jax():
    x, k = operands((2, 7, 8, 4), (3, 3, 6), jnp.float32)
    with pytest.raises(ValueError, match="feature"):
        ours(x[..., :3], k)
    with pytest.raises(TypeError, match="dtype"):
        ours(x.astype(jnp.bfloat16), k)
    assert ours(x, k, padding=((0, 0), (-4, -4))).shape == (2, 5, 0, 6)
