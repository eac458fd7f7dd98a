"""Convolution of images that is also fast on CPU: value, image gradient and kernel gradient.

A convolution y = x * k of images [B,H,W,C] with a kernel [h,w,C,F] is bilinear, and so are its two
transposes: to the image, and to the kernel. Each of the three is a JAX primitive here whose
derivatives are the other two, so that products of any order, forward and reverse, come out as the
same three operations. How each is computed on CPU is chosen from its shape in `_value`,
`_image_gradient` and `_kernel_gradient`. On accelerators they are `jax.lax.conv_general_dilated`
and its transposes. So they are in programs that XLA partitions over several CPU devices, but for
the gradient to the kernel, which is a product there as well.

XLA's CPU backend alone is up to 9 times off the limit that its matrix product sets, and another 10
to 30 times inside a loop. What serves instead:

- The *library*: oneDNN is linked into jaxlib for x86-64 Linux, and a custom call reaches its
  forward convolution and its matrix product, from loops too. The call is no public
  interface, so it is used with the releases of jaxlib it was tested with, in float32, where JAX
  keeps no cache of compiled programs on disk, and nowhere else.
- *Patches*: one product with the image's patches [pixels, h w C]. They hold each pixel
  h w / (strides) times.
- *Rows*, for gradients to kernels of stride 1: neighbors along the width are copied next to each
  other on the image's side [pixels, w C], those along the height on the output's [pixels, h F], and
  the product of the two, [h F, w C], is the gradient: w C + h F copies rather than h w C, and a
  product of more balanced shape.

A product is made of chunks of examples whose copies stay in the caches. Where the result alone is
large it is made at once.

Milliseconds for 128 images in float32 on two cores of an EPYC, medians of 3 interleaved rounds
(`benchmarks/convolution.py`); the limit is that of a product of large matrices. Of each map: XLA's
own form, outside of loops; patches; what is chosen here without the library; and with it. 5x5 is
without padding; the last number of the first column is the stride.

| pixels, channels, kernel, stride | limit | value | to the image | to the kernel |
|---|---|---|---|---|
| 32x32, 8 to 8, 3x3, 1 | 1.2 | 5.6, 43, 5.6, 2.8 | 5.0, 8.9, 5.7, 2.7 | 16, 12, 6.1, 5.8 |
| 32x32, 16 to 16, 3x3, 1 | 4.6 | 8.7, 78, 8.4, 7.3 | 8.9, 51, 8.8, 6.8 | 113, 22, 14, 15 |
| 16x16, 32 to 32, 3x3, 1 | 4.6 | 11, 45, 11, 5.6 | 11, 11, 11, 6.9 | 31, 14, 13, 9.1 |
| 8x8, 64 to 64, 3x3, 1 | 4.6 | 12, 9.7, 11, 4.7 | 12, 7.8, 13, 5.0 | 20, 9.2, 8.6, 8.2 |
| 4x4, 128 to 128, 3x3, 1 | 4.6 | 6.3, 6.4, 6.6, 4.7 | 6.3, 6.9, 6.5, 4.7 | 9.5, 8.3, 6.5, 7.6 |
| 32x32, 64 to 64, 3x3, 1 | 74 | 152, 350, 160, 69 | 146, 224, 143, 95 | 2,512, 146, 148, 147 |
| 15x15, 128 to 128, 3x3, 1 | 65 | 73, 178, 78, 51 | 74, 166, 73, 66 | 383, 99, 99, 118 |
| 7x7, 256 to 256, 3x3, 1 | 57 | 80, 111, 74, 48 | 75, 64, 77, 51 | 116, 79, 87, 82 |
| 32x32, 3 to 16, 3x3, 1 | 0.9 | 7.2, 6.1, 5.9, 1.9 | 11, 4.3, 4.4, 4.8 | 32, 7.7, 8.7, 8.9 |
| 32x32, 16 to 32, 3x3, 2 | 2.3 | 8.4, 10, 12, 4.9 | 15, 8.5, 9.1, 8.1 | 21, 8.5, 9.8, 8.5 |
| 32x32, 64 to 128, 3x3, 2 | 37 | 96, 115, 115, 40 | 121, 93, 94, 96 | 243, 65, 70, 82 |
| 32x32, 16 to 32, 1x1, 2 | 0.3 | 1.2, 1.2, 1.3, 1.0 | 1.7, 0.9, 0.7, 0.8 | 10, 0.9, 1.3, 1.1 |
| 28x28, 1 to 40, 5x5, 1 | 1.1 | 4.8, 6.3, 6.4, 3.7 | 20, 4.2, 4.1, 4.9 | 28, 6.6, 6.4, 5.7 |
| 12x12, 40 to 100, 5x5, 1 | 13 | 28, 26, 28, 14 | 47, 29, 40, 17 | 33, 20, 31, 37 |
"""

import functools
import json
import math
import platform
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend import core
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir

from jaxpoison.core import loops, spmd

# A product whose result has no more entries than this is made of chunks of examples whose copies
# stay in the caches, others of as many as memory can hold; in bytes.
_LARGE_PRODUCT = 1_000_000
_COPIED_AT_ONCE, _COPIED_BY_LARGE = 12_600_000, 128_000_000
_LIBRARY_TESTED = ("0.10.2", "0.12.0.1")
_LAYOUT = ("NHWC", "HWIO", "NHWC")


class Window(NamedTuple):
    """Which convolution it is, apart from batch and channels; the same for all three maps."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, ...], ...]

    @property
    def output(self) -> tuple[int, ...]:
        return tuple(
            (size + sum(pads) - width) // stride + 1
            for size, width, stride, pads in zip(*self[:3], self.padding, strict=True)
        )


def conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs):
    """Convolution of images [B,H,W,C] with a kernel [h,w,C,F]; arguments and value as JAX's.

    May be differentiated in any mode and to any order, and put under `jit`, `vmap`, `scan` and
    `shard_map`. Dilated and grouped convolutions are left to JAX, as are operands whose sharding
    is part of their type.
    """
    plain = {*kwargs["lhs_dilation"], *kwargs["rhs_dilation"], kwargs["feature_group_count"]} == {1}
    fits = (
        (lhs.ndim, rhs.ndim) == (4, 4)
        and lhs.shape[3] == rhs.shape[2]
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and not any(spec for x in (lhs, rhs) for spec in jax.typeof(x).sharding.spec)
    )
    if loops.steps_from_host() and plain and fits:
        image, kernel, strides = lhs.shape[1:3], rhs.shape[:2], tuple(window_strides)
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(image, kernel, strides, padding)
        window = Window(image, kernel, strides, tuple(map(tuple, padding)))
        if min(lhs.size, rhs.size, *window.output) > 0:
            lhs = spmd.device_local(lhs, rhs)
            return _value_p.bind(lhs, spmd.device_local(rhs, lhs), window=window)
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)


# Each map on CPU.


def _value(x, k, window):
    if library_serves(x) and min(map(min, window.padding)) >= 0:
        return library_value(x, k, window)
    return (_value_of_patches if _few_patches(window, x.shape[3]) else _xla_value)(x, k, window)


def _image_gradient(g, k, window):
    # Of stride 1 it is the value for a kernel turned around.
    turned = tuple(
        (size - 1 - low, size - 1 - high)
        for size, (low, high) in zip(window.kernel, window.padding, strict=True)
    )
    narrow = k.shape[2] <= 3
    unit = window.strides == (1, 1)
    if library_serves(g) and unit and not narrow and min(map(min, turned)) >= 0:
        window = Window(window.output, window.kernel, (1, 1), turned)
        return library_value(g, jnp.flip(k, (0, 1)).swapaxes(2, 3), window)
    form = _value_of_patches if _few_patches(window, k.shape[2]) else _xla_value
    return _transpose_to_image(form, g, k, window)


def _kernel_gradient(x, g, window):
    (height, width), channels, features = window.kernel, x.shape[3], g.shape[3]
    form = _kernel_gradient_form(window, channels)
    if form is _kernel_gradient_of_patches:
        rows, columns = features, height * width * channels
        copied = math.prod(window.output) * columns
    else:
        rows, columns = height * features, width * channels
        copied = window.image[0] * window.output[1] * (rows + columns)
    large = rows * columns >= _LARGE_PRODUCT
    most = _COPIED_BY_LARGE if large else _COPIED_AT_ONCE
    chunk = max(1, most // (copied * x.dtype.itemsize))
    product = functools.partial(form, window=window, contract=_contract_on_cpu)
    return product(x, g) if chunk >= x.shape[0] else _sum_over_chunks(product, chunk, x, g)


def _kernel_gradient_in_parts(x, g, window):
    """Returns it in a program that XLA partitions, where its own form is slow in loops as well."""
    return _kernel_gradient_form(window, x.shape[3])(x, g, window, _contract)


def _kernel_gradient_form(window, channels):
    few = window.strides != (1, 1) or window.kernel == (1, 1) or channels <= 3
    return _kernel_gradient_of_patches if few else _kernel_gradient_of_rows


def _few_patches(window, channels):
    """Returns whether patches are as fast as XLA's own kernels, which are slow in loops.

    Up to 4 copies of each pixel cost about 5% more than XLA outside of loops: 3x3 of stride 2,
    1x1, 2x2. For 3x3 of stride 1 it is 9 copies, the memory with it, and whole networks train 1.4
    times slower; there patches are for one to three channels.
    """
    return math.prod(window.kernel) / math.prod(window.strides) <= 4 or channels <= 3


# Their forms in plain JAX.


def _xla_value(x, k, window):
    return lax.conv_general_dilated(x, k, window.strides, window.padding, dimension_numbers=_LAYOUT)


def _xla_image_gradient(g, k, window):
    return _transpose_to_image(_xla_value, g, k, window)


def _xla_kernel_gradient(x, g, window):
    k = jnp.zeros((*window.kernel, x.shape[3], g.shape[3]), g.dtype)
    return jax.linear_transpose(lambda k: _xla_value(x, k, window), k)(g)[0]


def _transpose_to_image(form, g, k, window):
    x = jnp.zeros((g.shape[0], *window.image, k.shape[2]), g.dtype)
    x = spmd.device_local(x, g, k)
    return jax.linear_transpose(lambda x: form(x, k, window), x)(g)[0]


def _patches(x, window):
    """Returns [B, *output, h w C], in the order of a kernel's entries."""
    x = _pad(x, *window.padding)
    (rows, columns), (down, across) = window.output, window.strides
    return jnp.concatenate(
        [
            x[:, i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
            for i in range(window.kernel[0])
            for j in range(window.kernel[1])
        ],
        axis=-1,
    )


def _value_of_patches(x, k, window):
    return _patches(x, window) @ k.reshape(-1, k.shape[3])


def _image_gradient_of_patches(g, k, window):
    return _transpose_to_image(_value_of_patches, g, k, window)


def _kernel_gradient_of_patches(x, g, window, contract):
    channels, features = x.shape[3], g.shape[3]
    patches = _patches(x, window).reshape(-1, math.prod(window.kernel) * channels)
    # (outputs^T patches) takes two thirds of the time of (patches^T outputs).
    product = contract(g.reshape(-1, features), patches)
    return product.T.reshape(*window.kernel, channels, features)


def _kernel_gradient_of_rows(x, g, window, contract):
    (height, width), channels, features = window.kernel, x.shape[3], g.shape[3]
    (top, _), sides = window.padding
    (rows, columns), num_rows = window.output, x.shape[1]
    x = _pad(x, (0, 0), sides)
    x = jnp.concatenate([x[:, :, j : j + columns] for j in range(width)], axis=-1)
    # Row r of the image meets row r + top - i of the output at row i of the kernel.
    g = _pad(g, (height - 1 - top, num_rows + top - rows), (0, 0))
    g = jnp.concatenate(
        [g[:, height - 1 - i : height - 1 - i + num_rows] for i in range(height)], axis=-1
    )
    product = contract(g.reshape(-1, height * features), x.reshape(-1, width * channels))
    return product.reshape(height, features, width, channels).transpose(0, 2, 3, 1)


def _sum_over_chunks(fn, size, *arrays):
    """Returns the sum of `fn` over chunks of at most `size` examples of `arrays`.

    Equal ones if there need not be twice as many for it, and otherwise a smaller one at the end.
    """
    num_examples = arrays[0].shape[0]
    least = math.ceil(num_examples / size)
    equal = (n for n in range(least, min(2 * least, num_examples) + 1) if num_examples % n == 0)
    num_chunks = next(equal, least)
    size = num_examples // num_chunks
    whole = size * num_chunks
    fold = [x[:whole].reshape(num_chunks, size, *x.shape[1:]) for x in arrays]
    total = lax.map(lambda chunk: fn(*chunk), fold).sum(0)
    return total + fn(*(x[whole:] for x in arrays)) if whole < num_examples else total


def _pad(x, rows, columns):
    """Returns images with zeros around them; negative amounts cut off."""
    amounts = ((0, 0), rows, columns, (0, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in amounts])


def _contract(a, b):
    """Returns a^T b of [K,M] and [K,N]."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _contract_on_cpu(a, b):
    if a.shape[1] * b.shape[1] >= _LARGE_PRODUCT or not library_serves(a):
        return _contract(a, b)
    return _library_product(a, b)


# oneDNN in jaxlib.


def library_serves(x):
    """Returns whether convolutions of `x` on one device's CPU are computed by the library."""
    # XLA cannot write programs with these calls to its cache on disk: it reads invalid memory.
    cached = jax.config.values["jax_compilation_cache_dir"] is not None
    return x.dtype == jnp.float32 and not cached and _library_is_there()


@functools.cache
def _library_is_there():
    """Returns whether this jaxlib reaches oneDNN by a custom call."""
    machine = platform.system(), platform.machine()
    if metadata.version("jaxlib") not in _LIBRARY_TESTED or machine != ("Linux", "x86_64"):
        return False
    like = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    try:
        jax.jit(_library_product).trace(like, like).lower(lowering_platforms=("cpu",)).compile()
    except jax.errors.JaxRuntimeError:  # built without it
        return False
    return True


def library_value(x, k, window, groups=1, then=(), operands=()):
    """Returns the convolution, of as many groups of channels, and what oneDNN does to it after."""

    def data(batch, feature, *spatial):
        return {"data": {"batch_dim": batch, "feature_dim": feature, "spatial_dims": spatial}}

    low, high = zip(*window.padding, strict=True)
    layout = {"input_feature_dim": 2, "output_feature_dim": 3, "spatial_dims": (0, 1)}
    config = {
        "dims": 4,
        "input": data(0, 3, 1, 2),
        "kernel": {"filter": layout},
        "output": data(0, 3, 1, 2),
        "window": {
            "size": window.kernel,
            "strides": window.strides,
            "pad_left": low,
            "pad_right": high,
            "window_dilations": (1, 1),
        },
        "feature_groups": groups,
        **({"fusions": {"ops": then}} if then else {}),
    }
    shape = (x.shape[0], *window.output, k.shape[3])
    return _library_call("convolution", {"onednn_conv_config": config}, shape, x, k, *operands)


def _library_product(a, b):
    """Returns a^T b of [K,M] and [K,N].

    One product a call, although the library takes batches. Of a batch each thread of XLA's pool
    computes one product, and on processors without AVX-512 that starts threads of the same pool
    again, of which oneDNN knows nothing: they write over each other's memory, or wait for ever.
    """
    shape = (1, a.shape[1], b.shape[1])
    config = {"onednn_matmul_config": {"transpose_a": True}}
    return _library_call("matmul", config, shape, a[None], b[None])[0]


def _library_call(name, config, shape, *operands):
    return _library_p.bind(*operands, name=name, config=json.dumps(config), shape=shape)


def _lower_library_call(ctx, *operands, name, config, shape):
    del shape
    call = stablehlo.CustomCallOp(
        [mlir.aval_to_ir_type(ctx.module_context, ctx.avals_out[0])],
        operands,
        call_target_name=ir.StringAttr.get(f"__onednn${name}"),
        backend_config=ir.StringAttr.get(config),
        has_side_effect=ir.BoolAttr.get(False),
        api_version=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 1),
    )
    return call.results


_library_p = core.Primitive("convolution_library")
_library_p.def_abstract_eval(
    lambda *operands, name, config, shape: ShapedArray(shape, operands[0].dtype)
)
mlir.register_lowering(_library_p, _lower_library_call, platform="cpu")


# The primitives. Operands and result of each are two of image, kernel and output, and the third.


def _value_shape(x, k, window):
    return (x.shape[0], *window.output, k.shape[3])


def _image_shape(g, k, window):
    return (g.shape[0], *window.image, k.shape[2])


def _kernel_shape(x, g, window):
    return (*window.kernel, x.shape[3], g.shape[3])


def _primitive(name, shape, on_cpu, in_parts, elsewhere, batched, axes):
    """Returns the primitive of a map.

    Args:
      shape: the map's shape rule.
      on_cpu: how one device's CPU computes it.
      in_parts: how CPU devices do among which XLA partitions the program.
      elsewhere: how everything else does.
      batched: form in plain JAX for many pairs of operands at once.
      axes: of the first operand, the second and the result: for an operand with an axis of its own
        under `vmap`, the axis into which that is folded; for the result, where each then ends up.
    """
    primitive = core.Primitive(name)

    @functools.partial(jax.jit, static_argnames="window")
    def apply(a, b, window):
        return primitive.bind(a, b, window=window)

    def abstract(a, b, *, window):
        return a.update(shape=shape(a, b, window), weak_type=False)

    def lower_plainly(fn):
        def lower(ctx, a, b, *, window):
            # Without the marks of `shard_map`, which have been checked and act no more.
            avals = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
            plain = mlir.lower_fun(functools.partial(fn, window=window), multiple_results=False)
            return plain(ctx.replace(avals_in=avals), a, b)

        return lower

    def lower_on_cpu(ctx, a, b, *, window):
        fn = on_cpu if on_one_device(ctx.module_context.axis_context) else in_parts
        return lower_plainly(fn)(ctx, a, b, window=window)

    def batch(operands, dims, *, window):
        a, b = operands
        if None not in dims:
            a, b = jnp.moveaxis(a, dims[0], 0), jnp.moveaxis(b, dims[1], 0)
            if library_serves(a):  # which is fast in loops
                return lax.map(lambda pair: primitive.bind(*pair, window=window), (a, b)), 0
            return jax.vmap(functools.partial(batched, window=window))(a, b), 0
        which = 0 if dims[1] is None else 1
        count = operands[which].shape[dims[which]]
        operands = list(operands)
        operands[which] = _fold(operands[which], dims[which], axes[which][0])
        return _unfold(primitive.bind(*operands, window=window), axes[which][1], count)

    primitive.def_impl(apply)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lower_plainly(elsewhere))
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
    batching.primitive_batchers[primitive] = batch
    return primitive


def on_one_device(context):
    """Returns whether the program, or this part of it, is compiled for one device.

    XLA cannot partition a custom call, nor a loop over chunks of examples that are spread out.
    """
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) == set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) == 1


def _fold(x, axis, into):
    """Returns `x` with `axis` made the major part of the axis `into` of what remains."""
    x = jnp.moveaxis(x, axis, into)
    return x.reshape(*x.shape[:into], -1, *x.shape[into + 2 :])


def _unfold(x, axis, count):
    """Undoes `_fold`: returns (x, position of the axis of length `count`)."""
    return x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :]), axis


_BATCH, _IN, _OUT = 0, 2, 3  # axes of images and outputs (channels: 3), and of kernels

_value_p = _primitive(
    "convolution", _value_shape, _value, _xla_value, _xla_value, _value_of_patches,
    axes=((_BATCH, _BATCH), (_OUT, 3)),
)  # fmt: skip
_image_gradient_p = _primitive(
    "convolution_to_image", _image_shape, _image_gradient, _xla_image_gradient,
    _xla_image_gradient, _image_gradient_of_patches, axes=((_BATCH, _BATCH), (_IN, 3)),
)  # fmt: skip
_kernel_gradient_p = _primitive(
    "convolution_to_kernel", _kernel_shape, _kernel_gradient, _kernel_gradient_in_parts,
    _xla_kernel_gradient, functools.partial(_kernel_gradient_of_patches, contract=_contract),
    axes=((3, _IN), (3, _OUT)),
)  # fmt: skip

# Each is linear in both operands; what remains when one of them is transposed are the others.
ad.defbilinear(
    _value_p,
    lambda ct, x, k, window: _image_gradient_p.bind(ct, k, window=window),
    lambda ct, x, k, window: _kernel_gradient_p.bind(x, ct, window=window),
)
ad.defbilinear(
    _image_gradient_p,
    lambda ct, g, k, window: _value_p.bind(ct, k, window=window),
    lambda ct, g, k, window: _kernel_gradient_p.bind(ct, g, window=window),
)
ad.defbilinear(
    _kernel_gradient_p,
    lambda ct, x, g, window: _image_gradient_p.bind(g, ct, window=window),
    lambda ct, x, g, window: _value_p.bind(x, ct, window=window),
)
