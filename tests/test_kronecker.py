"""K-FAC and EK-FAC against dense matrices in float64, and what solvers make of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from flax import nnx
from jax import lax
from jax.flatten_util import ravel_pytree
from problems import cross_entropy, float64, ravel, relative_error

from jaxpoison import curvature, data, influence, models, network, solvers
from jaxpoison.core.layers import DenseLayer
from jaxpoison.curvature import ConvLayer, no_tap

HIDDEN = DenseLayer("hidden/0", "hidden/1")
OUT = DenseLayer("out/kernel")


def tapped(params, x, tap=no_tap):
    """The network of `problems.small_network`."""
    kernel, bias = params["hidden"]
    hidden = jnp.tanh(tap(HIDDEN, x, x @ kernel + bias))
    return tap(OUT, hidden, hidden @ params["out"]["kernel"])


def only_last(params, x, tap=no_tap):
    """The same, without a tap at the first layer: its leaves are a small block."""
    return tapped(params, x, lambda layer, *args: (tap if layer == OUT else no_tap)(layer, *args))


@pytest.fixture(autouse=True)
def in_float64(request):
    """All tests but those marked by their name."""
    with jax.enable_x64(not request.function.__name__.endswith("in_float32")):
        yield


@pytest.fixture(scope="module")
def dense():
    return problems.dense(problems.small_network)


@pytest.fixture(scope="module")
def problem():
    with jax.enable_x64(False):
        return problems.small_network()


@pytest.fixture(scope="module")
def factors(problem):
    """EK-FAC and K-FAC of the small network, in float64."""
    with jax.enable_x64(True):
        params, train = float64((problem.params, problem.train))
        return {
            fn.__name__: fn(tapped, cross_entropy, params, train)
            for fn in (curvature.ekfac, curvature.kfac)
        }


def matrix_of(factors, like):
    """Returns the matrix that `factors.product` multiplies with, `[P, P]`."""
    flat, unravel = ravel_pytree(like)
    columns = jax.vmap(lambda e: ravel_pytree(factors.product(unravel(e)))[0])
    return np.asarray(columns(jnp.eye(flat.size, dtype=flat.dtype))).T


def gauss_newton_of(fn, params, batch):
    """Returns the mean Gauss-Newton matrix of cross-entropy, by the Jacobian of each example."""
    flat, unravel = ravel_pytree(params)
    inputs, _ = batch

    def of_one(x):
        jacobian = jax.jacobian(lambda p: fn(unravel(p), x[None])[0])(flat)
        p = jax.nn.softmax(fn(params, x[None])[0])
        return jacobian.T @ (jnp.diag(p) - jnp.outer(p, p)) @ jacobian

    return np.asarray(jax.vmap(of_one)(inputs).mean(0))


def row(stack, index):
    return jax.tree.map(lambda x: x[index], stack)


def places(params, names):
    """Returns the places of leaves in `ravel_pytree(params)`, laid end to end."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    ends = np.cumsum([0, *(leaf.size for _, leaf in leaves)])
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.arange(ends[i], ends[i + 1])
        for i, (path, _) in enumerate(leaves)
    }
    return np.concatenate([found[name] for name in names])


def assert_diagonal_of(block, matrix, tolerance=1e-10):
    """The eigenvalues of a layer are the diagonal of its exact block in their eigenvectors."""
    basis = np.kron(block.inputs, block.outputs)
    assert relative_error(basis.T @ basis, np.eye(len(basis))) < 1e-12
    want = np.diag(basis.T @ matrix @ basis)
    assert relative_error(block.eigenvalues, want) < tolerance


# What the factors are.


def test_ekfac_has_the_diagonal_of_each_exact_block(problem, dense, factors):
    hidden, out = factors["ekfac"].blocks
    for block, layer in ((hidden, HIDDEN), (out, OUT)):
        assert block.layer == layer
        at = places(problem.params, block.names)
        assert_diagonal_of(block, dense.gauss_newton[np.ix_(at, at)])
    # So the best diagonal in its basis, and nearer than K-FAC's.
    at = places(problem.params, hidden.names)
    errors = {
        name: relative_error(
            matrix_of(each, problem.params)[np.ix_(at, at)], dense.gauss_newton[np.ix_(at, at)]
        )
        for name, each in factors.items()
    }
    assert errors["ekfac"] < errors["kfac"] < 1


def test_kfac_is_the_product_of_second_moments(problem, factors):
    params, train = float64((problem.params, problem.train))
    (kernel, bias), out = params["hidden"], params["out"]["kernel"]
    inputs = np.concatenate([train[0], np.ones((len(train[0]), 1))], axis=1)
    hidden = np.tanh(train[0] @ kernel + bias)
    p = np.exp(hidden @ out)
    p /= p.sum(1, keepdims=True)
    covariance = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None]  # [N, K, K]
    to_hidden = (1 - hidden**2)[:, :, None] * out  # [N, 8, K]
    g_hidden = np.einsum("nik,nkl,njl->ij", to_hidden, covariance, to_hidden) / len(p)
    a_hidden = inputs.T @ inputs / len(p)
    a_out = hidden.T @ hidden / len(p)
    got = matrix_of(factors["kfac"], params)
    for names, a, g in (
        (("hidden/0", "hidden/1"), a_hidden, g_hidden),
        (("out/kernel",), a_out, covariance.mean(0)),
    ):
        at = places(params, names)
        assert relative_error(got[np.ix_(at, at)], np.kron(a, g)) < 1e-12
    first, second = (places(params, names) for names in (("hidden/0",), ("out/kernel",)))
    assert not got[np.ix_(first, second)].any()


@pytest.mark.parametrize("estimate", [curvature.kfac, curvature.ekfac])
def test_a_linear_layer_with_squared_errors_is_exact(estimate):
    def linear(params, x, tap=no_tap):
        return tap(DenseLayer("kernel", "bias"), x, x @ params["kernel"] + params["bias"])

    def squared(outputs, targets):
        return jnp.sum(jnp.array([0.5, 1.0, 3.0]) * (outputs - targets) ** 2, axis=-1)

    params, _, train = problems.float64(problems.softmax_head()[3:])
    batch = train[0], np.eye(3)[train[1]]
    got = estimate(linear, squared, params, batch)
    multiply = curvature.product(curvature.gauss_newton(linear, squared), params, batch)
    v = jax.tree.map(jnp.cos, params)
    assert relative_error(ravel(got.product(v)), ravel(multiply(v))) < 1e-12
    # The solve is the inverse of what is exact, so one product shows a residual of zero.
    solution = jax.jit(solvers.ekfac(got, damping=1e-3))(multiply, v)
    assert solution.residual < 1e-10 and solution.converged
    damped = jax.tree.map(lambda h, x: h + 1e-3 * x, multiply(solution.value), solution.value)
    assert relative_error(ravel(damped), ravel(v)) < 1e-10


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": "VALID", "strides": (2, 1)},
        {"padding": ((2, 0), (1, 3)), "dilation": (2, 1)},
        {"padding": "SAME", "strides": (3, 2), "dilation": (1, 2)},
    ],
)
def test_rows_of_a_convolution_are_its_patches(settings):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 8, 3)), rng.normal(size=(3, 2, 3, 5))
    layer = ConvLayer("kernel", **settings)
    want = lax.conv_general_dilated(
        x, kernel, layer.strides or (1, 1), layer.padding, rhs_dilation=layer.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    got = layer.rows(jnp.asarray(x), kernel.shape) @ kernel.reshape(-1, 5)
    assert relative_error(got.reshape(want.shape), want) < 1e-12


class Convolutional(nn.Module):
    """A strided convolution, BatchNorm, a grouped convolution, and a linear layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(3, (3, 2), strides=2, padding=((1, 0), (0, 1)), name="conv")(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Conv(3, (2, 2), feature_group_count=3, name="grouped")(x)
        return nn.Dense(4, name="head")(jnp.tanh(x).mean((1, 2)))


@pytest.fixture(scope="module")
def convolutional():
    """Linen network, its variables, a batch, and its dense Gauss-Newton matrix, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        batch = rng.normal(size=(10, 6, 5, 2)), rng.integers(0, 4, 10)
        variables = float64(Convolutional().init(jax.random.key(0), batch[0]))
        stats = {"mean": rng.normal(size=3), "var": rng.uniform(0.5, 2, 3)}
        variables = {"params": variables["params"], "batch_stats": {"norm": stats}}
        net = network.as_network(Convolutional())

        def logits(params, x):
            return net.logits({**variables, "params": params}, x)

        matrix = gauss_newton_of(logits, variables["params"], batch)
        apply = network.tapped_logits(net, variables)
        np.testing.assert_array_equal(
            apply(variables["params"], batch[0]), logits(variables["params"], batch[0])
        )
        got = curvature.ekfac(apply, cross_entropy, variables["params"], batch)
        return variables, batch, matrix, got


def test_convolutions_of_a_flax_network_have_the_diagonal_of_their_exact_blocks(convolutional):
    variables, _, matrix, got = convolutional
    params = variables["params"]
    conv, head, others = got.blocks
    assert conv.layer == ConvLayer("conv/kernel", "conv/bias", (2, 2), ((1, 0), (0, 1)), (1, 1))
    assert head.layer == DenseLayer("head/kernel", "head/bias")
    for block in (conv, head):
        at = places(params, block.names)
        assert_diagonal_of(block, matrix[np.ix_(at, at)])
    # BatchNorm, and the grouped convolution, which is no Kronecker product: one exact block.
    assert set(others.names) == {"grouped/bias", "grouped/kernel", "norm/bias", "norm/scale"}
    at = places(params, others.names)
    dense = matrix_of(got, params)[np.ix_(at, at)]
    assert relative_error(dense, matrix[np.ix_(at, at)]) < 1e-10


def test_factors_of_a_convolution_are_those_of_its_definition(convolutional):
    """A = E sum_t a a^T with patches written out, G = E (1/T) sum_t sum_k g g^T."""
    variables, (images, labels), _, _ = convolutional
    params = variables["params"]
    apply = network.tapped_logits(Convolutional(), variables)
    block = curvature.kfac(apply, cross_entropy, params, (images, labels)).blocks[0]
    shifts = jnp.zeros((10, 3, 3, 3))

    def with_shifts(shift, x):
        def tap(layer, inputs, output):
            return output + shift if layer == block.layer else output

        return apply(params, x[None], tap)[0]

    jacobians = np.asarray(jax.vmap(jax.jacobian(with_shifts))(shifts, images))
    p = np.asarray(jax.nn.softmax(apply(params, images)))
    padded = np.pad(images, ((0, 0), (1, 0), (0, 1), (0, 0)))
    a, g = np.zeros((13, 13)), np.zeros((3, 3))
    for n in range(10):
        middle = np.diag(p[n]) - np.outer(p[n], p[n])
        for row in range(3):
            for column in range(3):
                patch = padded[n, 2 * row : 2 * row + 3, 2 * column : 2 * column + 2]
                entry = np.append(patch.ravel(), 1.0)
                a += np.outer(entry, entry) / 10
                j = jacobians[n][:, row, column]
                g += j.T @ middle @ j / 9 / 10
    only = {"conv": params["conv"]}
    got = matrix_of(curvature.KroneckerFactors((block,)), only)
    order = places(only, block.names)
    assert relative_error(got[np.ix_(order, order)], np.kron(a, g)) < 1e-10


def test_nnx_gives_what_linen_gives(convolutional):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3, 2), strides=2, padding=((1, 0), (0, 1)), rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.grouped = nnx.Conv(3, 3, (2, 2), feature_group_count=3, rngs=rngs)
            self.head = nnx.Linear(3, 4, rngs=rngs)

        def __call__(self, x):
            x = jnp.tanh(self.norm(self.conv(x)))
            return self.head(jnp.tanh(self.grouped(x)).mean((1, 2)))

    variables, batch, _, want = convolutional
    apply = network.tapped_logits(Net(nnx.Rngs(0)), variables)
    got = curvature.ekfac(apply, cross_entropy, variables["params"], batch)
    u = jax.tree.map(jnp.cos, variables["params"])
    assert [b.names for b in got.blocks] == [b.names for b in want.blocks]
    assert relative_error(ravel(got.product(u)), ravel(want.product(u))) < 1e-10


VOCABULARY, TOKENS = 5, 3


class LinenText(nn.Module):
    """A causal transformer of one layer, in Linen."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, 4, name="embed")(tokens)
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x), mask=mask)
        return nn.Dense(VOCABULARY, name="head")(jnp.tanh(x))


class NnxText(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(4, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        mask = nnx.make_causal_mask(tokens)
        x = x + self.attention(self.norm(x), mask=mask)
        return self.head(jnp.tanh(x))


@pytest.fixture(scope="module", params=["linen", "nnx"])
def language(request):
    """Tapped function, parameters, tokens, Gauss-Newton matrix, and how exact it is."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, VOCABULARY, (6, TOKENS + 1))
        batch = tokens[:, :-1], tokens[:, 1:]
        if request.param == "linen":
            model = LinenText()
            variables = float64(model.init(jax.random.key(0), batch[0]))
        else:
            model = network.from_nnx(NnxText(nnx.Rngs(0)))
            variables = float64(model.variables)
        apply, params = network.tapped_logits(model, variables), variables["params"]

        def at_position(t):
            return gauss_newton_of(lambda p, x: apply(p, x)[:, t], params, batch)

        matrix = sum(at_position(t) for t in range(TOKENS))
        # NNX's attention takes its softmax in float32.
        return apply, params, batch, matrix, 1e-6 if request.param == "nnx" else 1e-10


def test_the_layers_of_a_language_model_have_the_diagonal_of_their_exact_blocks(language):
    """Attention's kernels have three axes; the loss of a text is a sum over its tokens."""
    apply, params, batch, matrix, tolerance = language
    got = curvature.ekfac(apply, curvature.cross_entropy, params, batch)
    layers = {block.layer.kernel: block for block in got.blocks if hasattr(block, "layer")}
    assert {name: len(block.inputs) for name, block in layers.items()} == {
        **{f"attention/{name}/kernel": 5 for name in ("query", "key", "value", "out")},
        "head/kernel": 5,
    }
    assert layers["attention/out/kernel"].layer.num_axes == 2
    for block in layers.values():
        at = places(params, block.names)
        assert_diagonal_of(block, matrix[np.ix_(at, at)], tolerance)
    # One product with the true matrix, over all tokens.
    multiply = curvature.product(
        curvature.gauss_newton(apply, curvature.cross_entropy), params, batch
    )
    u = jax.tree.map(jnp.cos, params)
    assert relative_error(ravel(multiply(u)), matrix @ ravel(u)) < tolerance
    # The embedding is no layer: an exact block, with the norm's scales.
    (block,) = [block for block in got.blocks if not hasattr(block, "layer")]
    at = places(params, block.names)
    dense = matrix_of(got, params)[np.ix_(at, at)]
    assert relative_error(dense, matrix[np.ix_(at, at)]) < tolerance


def test_random_signs_of_tokens_are_right_on_average(language):
    apply, params, batch, matrix, _ = language
    estimate = functools.partial(
        curvature.kfac, apply, curvature.cross_entropy, params, batch, num_samples=2
    )
    keys = jax.random.split(jax.random.key(0), 300)
    u = jax.tree.map(jnp.cos, params)
    many = jax.lax.map(lambda key: estimate(key=key).product(u)["embed"], keys)
    at = places(params, ("embed/embedding",))
    got = jax.tree.map(lambda x: x.mean(0), many)
    block = places(
        params, next(b for b in estimate(key=keys[0]).blocks if not hasattr(b, "layer")).names
    )
    want = np.zeros(len(matrix))
    want[block] = matrix[np.ix_(block, block)] @ ravel(u)[block]
    assert relative_error(ravel(got), want[at]) < 0.1


def test_cross_entropy_knows_a_root_of_its_hessian():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 4)), np.array([[0, 3, 1], [2, -1, 0]])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(p, np.maximum(labels, 0)[..., None], -1))[..., 0]
    want = np.where(labels < 0, 0, nats).sum(1)
    np.testing.assert_allclose(curvature.cross_entropy(logits, labels), want, rtol=1e-12)
    wrong = labels + 1  # one of them is no class
    with pytest.raises(ValueError, match=r"labels go up to 4, but logits .* have 4 classes"):
        curvature.cross_entropy(logits, wrong)
    found = jax.jit(jax.value_and_grad(lambda z, y: curvature.cross_entropy(z, y)[0]))
    assert np.isnan(found(logits, wrong)[0]) and np.isnan(found(logits, wrong)[1]).any()
    for bad in (labels[:, :2], labels * 1.0):
        with pytest.raises(ValueError, match=r"labels must be int \(2, 3\), one for each row of"):
            curvature.cross_entropy(logits, bad)
    # Of two texts at once, and of one label an example.
    for z, y in ((logits, labels), (logits[:, 0], labels[:, 0])):

        def loss(flat, z=z, y=y):
            return curvature.cross_entropy(flat.reshape(z.shape), y).sum()

        def root(signs, z=z, y=y):
            return curvature.cross_entropy.root(z, y, signs.reshape(z.shape)).ravel()

        hessian = jax.hessian(loss)(z.ravel())
        columns = jax.vmap(root)(jnp.eye(z.size)).T
        assert relative_error(columns @ columns.T, hessian) < 1e-12


def test_a_layer_called_twice_has_further_positions():
    def twice(params, x, tap=no_tap):
        layer = DenseLayer("w")
        hidden = jnp.tanh(tap(layer, x, x @ params["w"]))
        return tap(layer, hidden, hidden @ params["w"])

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 4))}
    batch = rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
    (block,) = curvature.ekfac(twice, cross_entropy, params, batch).blocks
    assert_diagonal_of(block, gauss_newton_of(twice, params, batch))


def test_leaves_outside_of_layers_get_their_block_or_their_diagonal(problem, dense):
    params, train = float64((problem.params, problem.train))
    at = places(params, ("hidden/0", "hidden/1"))
    want = dense.gauss_newton[np.ix_(at, at)]
    estimate = functools.partial(curvature.ekfac, only_last, cross_entropy, params, train)
    for size, exact in ((48, want), (47, None), (1, np.diag(np.diag(want)))):
        got = matrix_of(estimate(block_size=size), params)[np.ix_(at, at)]
        if exact is None:  # one after the other, as they do not fit together
            exact = want.copy()
            exact[:40, 40:] = exact[40:, :40] = 0
        assert relative_error(got, exact) < 1e-10


# However it is computed.


@pytest.mark.parametrize("estimate", [curvature.kfac, curvature.ekfac])
def test_chunks_order_weights_and_streams_do_not_matter(problem, estimate):
    params, train = float64((problem.params, problem.train))
    estimate = functools.partial(estimate, tapped, cross_entropy, params)
    u = jax.tree.map(jnp.cos, params)
    whole = ravel(estimate(train).product(u))

    def parts():
        for start in range(0, 64, 24):
            yield train[0][start : start + 24], train[1][start : start + 24]

    shuffled = jax.tree.map(lambda x: x[np.random.default_rng(0).permutation(64)], train)
    for other in (
        estimate(shuffled, chunk_size=24),
        jax.jit(lambda batch: estimate(batch, chunk_size=24))(shuffled),
        estimate(influence.Stream(parts)),
    ):
        assert relative_error(ravel(other.product(u)), whole) < 1e-9

    weights = np.random.default_rng(0).integers(0, 3, 64)
    repeated = jax.tree.map(lambda x: np.repeat(x, weights, axis=0), train)
    got = estimate(train, weights=3.5 * weights, chunk_size=24)
    assert relative_error(ravel(got.product(u)), ravel(estimate(repeated).product(u))) < 1e-9


@pytest.mark.parametrize("wrap", problems.COMPOSITIONS)
def test_it_does_not_matter_over_how_many_devices_in_float32(problem, factors, wrap):
    """Distributed over devices and under every transformation: solved with, in float32."""

    def solve(params, group, train, axis_name):
        del group
        got = curvature.ekfac(tapped, cross_entropy, params, train, axis_name=axis_name)
        return got.solve(jax.tree.map(jnp.cos, params), 0.1)

    data = problem.params, problem.group, problem.train
    got = wrap(solve, *data)
    with jax.enable_x64(True):
        u = jax.tree.map(jnp.cos, float64(problem.params))
        want = ravel(factors["ekfac"].solve(u, 0.1))
    assert relative_error(ravel(got), want) < 1e-4


def test_random_signs_are_right_on_average_in_float32(problem, dense):
    params, train = problem.params, problem.train

    @jax.jit
    @jax.vmap
    def product(key):  # of the exact block, which is linear in what is drawn
        estimate = functools.partial(curvature.kfac, only_last, cross_entropy, params, train)
        got = estimate(num_samples=1, key=key, chunk_size=24)
        return got.product(jax.tree.map(jnp.cos, params))["hidden"]

    many = product(jax.random.split(jax.random.key(0), 400))
    at = places(params, ("hidden/0", "hidden/1"))
    u = ravel(jax.tree.map(jnp.cos, params))
    want = dense.gauss_newton[np.ix_(at, at)] @ u[at]
    assert relative_error(ravel(jax.tree.map(lambda x: x.mean(0), many)), want) < 0.02
    one = ravel(jax.tree.map(lambda x: x[0], many))
    assert relative_error(one, want) > 0.05


def test_called_twice_it_compiles_once(problem):
    traces = []

    def counted(params, x, tap=no_tap):
        traces.append(isinstance(x, jax.core.Tracer))
        return tapped(params, x, tap)

    estimate = functools.partial(curvature.ekfac, counted, cross_entropy, problem.params)
    estimate(problem.train, chunk_size=32)
    first = sum(traces)
    estimate(problem.train, chunk_size=32)
    assert sum(traces) == first + 1  # the layout: no program is made again

    # Networks that are equal share their programs, whatever their variables.
    one, other = (
        network.tapped_logits(
            Convolutional(), {"params": {}, "batch_stats": {"x": jnp.ones(2) * c}}
        )
        for c in (1, 2)
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)


# What solvers make of them.


def test_the_solver_measures_its_answer_with_the_true_product(problem, dense, factors):
    damping = 0.3
    params = float64(problem.params)
    flat, unravel = ravel_pytree(params)
    rhs = unravel(dense.gradient)
    solver = solvers.ekfac(factors["ekfac"], damping=damping)

    def matvec(u):
        return unravel(dense.gauss_newton @ ravel_pytree(u)[0])

    solution = jax.jit(lambda v: solver(matvec, v))(rhs)
    approximate = matrix_of(factors["ekfac"], params)
    want = np.linalg.solve(approximate + damping * np.eye(flat.size), dense.gradient)
    assert relative_error(ravel(solution.value), want) < 1e-10
    error = dense.gauss_newton @ want + damping * want - dense.gradient
    size = np.linalg.norm(dense.gradient)
    np.testing.assert_allclose(solution.residual, np.linalg.norm(error) / size, rtol=1e-8)
    assert not solution.converged
    # Many right-hand sides share the factors.
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x, jnp.cos(x)]), rhs)
    several = jax.vmap(lambda v: solver(matvec, v))(stack)
    assert relative_error(ravel(row(several.value, 1)), 2 * want) < 1e-10
    assert several.residual.shape == (3,)
    # And an answer is differentiated as that of an implicit equation.
    tangent = jax.jvp(lambda v: solver(matvec, v).value, (rhs,), (row(stack, 2),))[1]
    assert relative_error(ravel(tangent), ravel(row(several.value, 2))) < 1e-10


@pytest.mark.parametrize("times", [1, 30])
def test_preconditioned_conjugate_gradients_give_the_dense_solution(problem, dense, factors, times):
    damping = 1e-3
    unravel = ravel_pytree(float64(problem.params))[1]

    def matvec(u):
        return unravel(dense.gauss_newton @ ravel_pytree(u)[0])

    preconditioner = solvers.kronecker_preconditioner(factors["ekfac"], damping=times * damping)
    solver = solvers.cg(damping=damping, tolerance=1e-11, preconditioner=preconditioner)
    solution = solver(matvec, unravel(dense.gradient))
    assert solution.converged
    want = dense.solve(damping, dense.gauss_newton)
    assert relative_error(ravel(solution.value), want) < 1e-8


def test_where_the_factors_are_near_products_fall_tenfold_in_float32():
    """A last layer over features of very different sizes: all curvature is within the layer."""
    problem = problems.softmax_head(num_train=256, dim=24, num_classes=4)
    scales = jnp.geomspace(1, 1e-2, 24)
    train, group = ((x * scales, y) for x, y in (problem.train, problem.group))
    params = jax.tree.map(lambda x: 0.1 * x, problem.params)

    def linear(params, x, tap=no_tap):
        return tap(DenseLayer("kernel", "bias"), x, x @ params["kernel"] + params["bias"])

    got = curvature.ekfac(linear, cross_entropy, params, train)
    damping = 1e-5
    preconditioner = solvers.kronecker_preconditioner(got, damping=damping)
    solve = functools.partial(
        influence.group_ihvp, influence.linear_head_loss, params, group, train,
        curvature=curvature.linear_head,
    )  # fmt: skip
    plain = solve(solver=solvers.cg(damping=damping, tolerance=1e-4))
    fast = solve(solver=solvers.cg(damping=damping, tolerance=1e-4, preconditioner=preconditioner))
    assert plain.converged and fast.converged
    assert 10 * int(fast.num_steps) <= int(plain.num_steps)
    assert relative_error(ravel(fast.value), ravel(plain.value)) < 1e-2


def test_equal_settings_are_equal(factors):
    found, other = factors["ekfac"], factors["kfac"]
    for make in (
        solvers.ekfac,
        solvers.kronecker_preconditioner,
        lambda f, damping: solvers.cg(
            damping=0.1, preconditioner=solvers.kronecker_preconditioner(f, damping=damping)
        ),
    ):
        assert make(found, damping=0.5) == make(found, damping=np.float64(0.5))
        assert hash(make(found, damping=0.5)) == hash(make(found, damping=0.5))
        assert make(found, damping=0.5) != make(other, damping=0.5)
        assert make(found, damping=0.5) != make(found, damping=0.6)


def test_a_part_of_the_parameters_in_float32(problem):
    """Layers that are held fixed take no part: the blocks are those of the others."""
    selected, merge = influence.split_params(problem.params, lambda path, _: path == "out/kernel")

    def part(params, x, tap=no_tap):
        return tapped(merge(params), x, tap)

    got = curvature.ekfac(part, cross_entropy, selected, problem.train)
    whole = curvature.ekfac(tapped, cross_entropy, problem.params, problem.train)
    assert [block.names for block in got.blocks] == [("out/kernel",)]
    u = jax.tree.map(jnp.cos, problem.params)
    picked = {"hidden": (None, None), "out": u["out"]}
    want = whole.product(u)["out"]["kernel"]
    assert relative_error(got.product(picked)["out"]["kernel"], want) < 1e-5


def test_a_whole_network_from_end_to_end_in_float32():
    """HINT's MNIST network: group_ihvp by preconditioned conjugate gradients is the plain one."""
    splits = data.load_embedded("mnist")
    train, group = (
        (data.to_float(part.images[:size]), jnp.asarray(part.labels[:size]))
        for part, size in ((splits.train, 8), (splits.validation, 4))
    )
    model = models.Classifier(models._mnist_cnn.MnistBody(widths=(3, 4)), num_features=64)
    variables = model.init(jax.random.key(0), train[0])
    apply, params = network.tapped_logits(model, variables), variables["params"]
    gauss_newton = curvature.gauss_newton(apply, cross_entropy)
    got = curvature.ekfac(apply, cross_entropy, params, train, chunk_size=4)
    solve = functools.partial(
        influence.group_ihvp, lambda p, batch: cross_entropy(apply(p, batch[0]), batch[1]),
        params, group, train, curvature=gauss_newton,
    )  # fmt: skip
    settings = {"damping": 0.01, "tolerance": 1e-5}
    plain = solve(solver=solvers.cg(**settings))
    preconditioner = solvers.kronecker_preconditioner(got, damping=0.01)
    fast = solve(solver=solvers.cg(**settings, preconditioner=preconditioner))
    alone = solve(solver=solvers.ekfac(got, damping=0.01))
    assert plain.converged and fast.converged
    assert relative_error(ravel(fast.value), ravel(plain.value)) < 1e-3
    assert alone.residual > 1e-3


# At the door.


def test_errors_say_what_is_wrong(problem, factors):
    params, train = problem.params, problem.train

    def fails(match, fn, kind=ValueError, batch=train, output_loss=cross_entropy, **settings):
        with pytest.raises(kind, match=match):
            curvature.ekfac(fn, output_loss, params, batch, **settings)

    def summed(logits, labels):
        return cross_entropy(logits.reshape(-1, 3), labels.ravel()).reshape(len(labels), -1).sum(1)

    def first(layer, change=lambda y: y):
        def fn(params, x, tap=no_tap):
            kernel, bias = params["hidden"]
            hidden = jnp.tanh(tap(layer, x, change(x @ kernel + bias)))
            return hidden[: len(x), :8] @ params["out"]["kernel"]

        return fn

    fails(
        "hands no layer of params to its tap; params hold hidden/0, hidden/1, out/kernel",
        lambda p, x, tap=no_tap: tapped(p, x),
    )
    fails("hands no layer of params", first(DenseLayer("w")))
    fails("'hidden/b', which params do not hold", first(DenseLayer("hidden/0", "hidden/b")))
    fails(r"must end in \(8,\), as its kernel", first(HIDDEN, lambda y: jnp.tile(y, 2)))
    fails(
        r"hidden/0 \(5, 8\) has inputs \(1, 5\) and output \(2, 8\), which do not fit",
        first(HIDDEN, lambda y: jnp.concatenate([y, y])),
    )

    def compiled(params, x, tap=no_tap):
        return jax.jit(lambda p, x: tapped(p, x, tap))(params, x)

    fails("called in a transformation inside the network", compiled)

    def shared(params, x, tap=no_tap):
        again = tap(DenseLayer("hidden/0"), x, x @ params["hidden"][0])
        return tapped(params, x, tap) + again[:, :3]

    fails("is the kernel of two layers", shared)
    fails("pass a PRNG key", tapped, num_samples=2)
    fails("num_samples must be at least 1, got 0", tapped, num_samples=0)

    def many(params, x, tap=no_tap):  # a language model's outputs: 1,500 tokens, 3 words
        return jnp.tile(tapped(params, x, tap)[:, None], (1, 1500, 1))

    labels = np.zeros((len(train[0]), 1500), int)
    for settings in ({}, {"num_samples": 1, "key": jax.random.key(0)}):
        fails(
            "an example has 4,500 outputs.* give num_samples=1 or more, and as output_loss "
            "curvature.cross_entropy", many, batch=(train[0], labels),
            output_loss=curvature.cross_entropy if not settings else summed, **settings,
        )  # fmt: skip
    fails("block_size must be at least 1, got 0", tapped, block_size=0)
    fails("chunk_size must be at least 1 or None, got 0", tapped, chunk_size=0)
    fails("weights must have one number per example", tapped, weights=jnp.ones(3))
    fails("must be a function, got 3", 3, TypeError)
    fails("a batch must be a pair", tapped, batch=train[0])
    stream = influence.Stream([train])
    fails("weights, chunk_size and axis_name are for", tapped, batch=stream, chunk_size=3)
    fails(
        "the loss of an example depends on the others",
        lambda p, x, tap=no_tap: tapped(p, x - x.mean(0), tap),
    )

    with pytest.raises(TypeError, match="factors must be those of"):
        solvers.ekfac(lambda r: r, damping=0.1)
    with pytest.raises(TypeError, match="factors must be those of"):
        solvers.kronecker_preconditioner(None, damping=0.1)
    with pytest.raises(ValueError, match="damping must be positive"):
        solvers.ekfac(factors["kfac"], damping=0)
    with pytest.raises(ValueError, match=r"only in the factors \[out/kernel\]"):
        factors["kfac"].solve({"hidden": params["hidden"]}, 0.1)
    plain = network.from_functions(tapped, params)
    with pytest.raises(ValueError, match="FunctionNetwork has no layers to tap"):
        network.tapped_logits(plain, plain.variables)(params, train[0])
