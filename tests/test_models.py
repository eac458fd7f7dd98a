import itertools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpoison import data, models
from jaxpoison.models import _fast_cnn, layers
from jaxpoison.models.resnet import CIFAR10_MEAN, CIFAR10_STD


def tiny_resnet(**settings):
    return models.resnet18(width=4, blocks=(1, 1), **settings)


def pixels(*shape, seed=0):
    return jax.random.uniform(jax.random.key(seed), shape)


def resnet18_parameters(width, num_classes):
    """Counts by hand: 3x3 and 1x1 convolutions without bias, two numbers per BatchNorm channel."""
    total, inputs = 9 * 3 * width + 2 * width, width
    for stage in range(4):
        outputs = width * 2**stage
        total += 9 * inputs * outputs + 3 * 9 * outputs * outputs + 4 * 2 * outputs
        total += inputs * outputs + 2 * outputs if stage else 0
        inputs = outputs
    return total + (inputs + 1) * num_classes


def vgg16_parameters(num_classes):
    """Counts by hand: 3x3 convolutions with bias, two numbers per BatchNorm channel."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    pairs = itertools.pairwise(widths)
    return sum((9 * before + 3) * after for before, after in pairs) + 513 * num_classes


@pytest.mark.parametrize(
    ("model", "image_shape", "want", "published", "num_features"),
    [
        (
            models.mnist_cnn(),
            (28, 28, 1),
            (25 + 1) * 40 + 2 * 40 + (25 * 40 + 1) * 100 + 2 * 100 + (1600 + 1) * 10,
            117_430,
            1600,
        ),
        (models.resnet18(), (32, 32, 3), resnet18_parameters(64, 10), 11_173_962, 512),
        (models.vgg16(), (32, 32, 3), vgg16_parameters(10), 14_728_266, 512),
    ],
    ids=["mnist_cnn", "resnet18", "vgg16"],
)
def test_numbers_of_parameters_and_features(model, image_shape, want, published, num_features):
    images = jnp.zeros((2, *image_shape))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    features = jax.eval_shape(lambda v: model.apply(v, images, method="features"), variables)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    assert count == want == published
    assert features.shape == (2, num_features)
    assert model.num_features == num_features
    assert variables["params"]["head"]["kernel"].shape == (num_features, 10)


@pytest.mark.parametrize("model", [tiny_resnet(), models.mnist_cnn(num_classes=7)])
def test_logits_are_the_head_applied_to_the_features(model):
    images = pixels(3, 28, 28, 3 if model.mean != (0.0,) else 1)
    variables = model.init(jax.random.key(0), images)
    head = variables["params"]["head"]
    features = model.apply(variables, images, method="features")
    logits = model.apply(variables, images)
    assert logits.shape == (3, model.num_classes)
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"], atol=1e-6)


def test_max_pool_is_flax_s_and_so_is_its_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    weights = jax.random.normal(jax.random.key(1), (2, 3, 3, 3))

    def outputs(pool):
        return pool(x), jax.grad(lambda x: jnp.sum(weights * pool(x)))(x)

    ours, flax_s = outputs(layers.max_pool_2x2), outputs(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    jax.tree.map(np.testing.assert_array_equal, ours, flax_s)


def test_patches_of_the_fast_network_are_nearly_white():
    images = data.load_embedded("cifar10").train.images[:1000] / np.float32(255)
    normalized = (images - np.float32(CIFAR10_MEAN)) / np.float32(CIFAR10_STD)
    patches = np.asarray(_fast_cnn.whiten(jnp.asarray(normalized)), np.float64)
    assert patches.shape == (1000, 31, 31, 12)
    # The second patch function of the first color axis by hand: left minus right, over its std.
    brightness = normalized.sum(-1) / np.sqrt(3)
    pairs = brightness[:, :, :-1] - brightness[:, :, 1:]
    by_hand = (pairs[:, :-1] + pairs[:, 1:]) / 2 / 0.72
    np.testing.assert_allclose(patches[..., 3], by_hand, atol=1e-4)
    patches = patches.reshape(-1, 12)
    assert (patches.std(0) < 1.05).all()
    assert (np.abs(patches.std(0)[[0, 1, 2, 3, 6, 9]] - 1) < 0.12).all()  # no floor
    assert np.abs(np.corrcoef(patches.T) - np.eye(12)).max() < 0.2


def test_initial_kernels_of_the_fast_network_hand_on_their_inputs():
    kernel = _fast_cnn._near_identity(jax.random.key(0), (3, 3, 4, 6))
    x = jax.random.normal(jax.random.key(1), (1, 5, 5, 4))
    noise = kernel.at[1, 1, jnp.arange(4), jnp.arange(4)].add(-1)
    assert float(jnp.abs(noise).max()) <= 1 / 6
    y, rest = (layers.convolve(x, k) for k in (kernel, noise))
    np.testing.assert_allclose((y - rest)[..., :4], x[:, 1:-1, 1:-1], atol=1e-6)
    np.testing.assert_allclose((y - rest)[..., 4:], 0, atol=1e-6)


def test_weights_are_the_same_after_a_file_to_half_precision(tmp_path):
    model = models.fast_cnn(widths=(4, 6))
    variables = model.init(jax.random.key(0), pixels(1, 32, 32, 3))
    path = tmp_path / "weights.npz"
    models.write_variables(path, variables)
    read = models.read_variables(path)
    assert jax.tree.structure(read) == jax.tree.structure(variables)

    def same(got, want):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(
            got, want.astype(jnp.float16 if want.ndim > 1 else jnp.float32)
        )

    jax.tree.map(same, read, variables)


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a/kernel has values that float16 cannot hold"):
        models.write_variables(tmp_path / "w.npz", {"a": {"kernel": np.full((2, 2), 1e6)}})
    assert not list(tmp_path.iterdir())


def test_bfloat16_body_keeps_parameters_and_logits_in_float32():
    images = pixels(4, 12, 12, 3)
    full, half = tiny_resnet(), tiny_resnet(dtype=jnp.bfloat16)
    variables = half.init(jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = half.apply(variables, images)
    assert logits.dtype == jnp.float32
    features = half.apply(variables, images, method="features")
    assert jnp.all(features == features.astype(jnp.bfloat16))  # the body did compute in bfloat16
    exact = full.apply(variables, images)
    assert 0 < float(jnp.max(jnp.abs(logits - exact))) < 0.05


def test_running_statistics_after_one_step_are_a_tenth_of_the_batchs():
    model = tiny_resnet()
    images = pixels(6, 8, 8, 3)
    variables = model.init(jax.random.key(0), images)
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    normalized = (np.asarray(images) - np.array(model.mean)) / np.array(model.std)
    kernel = np.asarray(variables["params"]["body"]["stem"]["kernel"], np.float64)
    padded = np.pad(normalized, ((0, 0), (1, 1), (1, 1), (0, 0)))
    stem = sum(
        padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3)
    ).reshape(-1, 4)
    stats = updates["batch_stats"]["body"]["stem_norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * stem.mean(0), rtol=1e-4, atol=1e-6)
    # Flax keeps the biased variance; PyTorch the unbiased one, n / (n - 1) times as large.
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * stem.var(0), rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_is_flax_s_and_so_are_its_derivatives(masked, running, dtype):
    """Value, new statistics, and gradients of first and second order, far from mean 0."""
    with jax.enable_x64(dtype == jnp.float64):
        x = (3 + 2 * pixels(8, 5, 5, 4)).astype(dtype)
        mask = jnp.arange(8)[:, None, None, None] < 6 if masked else None
        settings = dict(use_running_average=running, dtype=dtype, param_dtype=jnp.float32)
        if dtype == jnp.float64:
            settings["param_dtype"] = dtype
        params = {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0) - 1}
        statistics = {"mean": 3 + jnp.arange(4.0) / 9, "var": 1 + jnp.arange(4.0)}
        statistics = jax.tree.map(lambda z: z.astype(jnp.float32), statistics)

        def of(layer):
            def loss(params, x):
                variables = {"params": params, "batch_stats": statistics}
                y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
                return jnp.sum(jnp.sin(y.astype(params["scale"].dtype))), (y, new)

            def product(params, x):
                gradient, aux = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
                return gradient, aux

            point = params, x
            (gradient, aux), (second, _) = jax.jvp(product, point, point)
            return gradient, second, aux

        ours = of(layers.BatchNorm(**settings))
        flax_s = of(nn.BatchNorm(momentum=0.9, epsilon=1e-5, **settings))
        chex.assert_trees_all_equal_dtypes(ours, flax_s)
        tolerance = {jnp.float64: 1e-12, jnp.float32: 2e-5, jnp.bfloat16: 3e-2}[dtype]
        for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(flax_s), strict=True):
            got, want = (np.asarray(z, np.float64) for z in (got, want))
            np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


def test_evaluation_uses_running_statistics_so_examples_do_not_interact():
    model = tiny_resnet()
    images = pixels(5, 8, 8, 3)
    variables = model.init(jax.random.key(0), images)
    alone = jnp.concatenate([model.apply(variables, images[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(model.apply(variables, images), alone, atol=1e-5)


def test_initial_values_fill_pytorchs_ranges():
    model = models.mnist_cnn()
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    for fan_in, layer in [
        (25, params["body"]["Conv_0"]),
        (1000, params["body"]["Conv_1"]),
        (1600, params["head"]),
    ]:
        bound = 1 / math.sqrt(fan_in)
        kernel = np.asarray(layer["kernel"])
        assert 0.99 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6)
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.05)
        assert 0.5 * bound < np.abs(layer["bias"]).max() <= bound
    assert np.all(np.asarray(params["body"]["BatchNorm_0"]["scale"]) == 1)


def test_pixels_are_normalized_inside():
    model = tiny_resnet()
    images = pixels(2, 8, 8, 3)
    variables = model.init(jax.random.key(0), images)
    outside = (images - jnp.array([0.4914, 0.4822, 0.4465])) / jnp.array([0.2023, 0.1994, 0.2010])
    plain = model.clone(mean=(0.0,), std=(1.0,))
    np.testing.assert_allclose(
        model.apply(variables, images), plain.apply(variables, outside), atol=1e-5
    )
    assert float(jnp.max(jnp.abs(plain.apply(variables, images) - plain.apply(variables, outside))))


def test_average_pool():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    pooled = np.asarray(layers.average_pool_2x2(jnp.asarray(x)))
    want = (x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]) / 4
    np.testing.assert_array_equal(pooled, want)
