"""Small networks with BatchNorm in every place where it is found, and float64 statistics of them.

Each BatchNorm sits in a `Norm`, which keeps its input under "intermediates": the reference.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from jaxpoison import models


class Norm(nn.Module):
    axis: int = -1
    axis_name: str | None = None
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train, mask=None):
        self.sow("intermediates", "input", x)
        return nn.BatchNorm(
            use_running_average=not train, axis=self.axis, axis_name=self.axis_name,
            momentum=self.momentum, use_fast_variance=False,
        )(x, mask=mask)  # fmt: skip


class Block(nn.Module):
    """Convolution, BatchNorm, ReLU; with a carry, as `nn.scan` wants it."""

    norm: Any = Norm()
    train: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(self.norm.copy()(nn.Conv(4, (3, 3))(x), self.train)), None


CompiledBlock = nn.jit(Block)  # compiled once for all networks


class Convolutional(nn.Module):
    """Three convolutional blocks under a transformation of Flax, or none."""

    lift: str = "none"
    norm: Any = Norm()

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        match self.lift:
            case "none":
                blocks = [Block(self.norm, train) for _ in range(3)]
            case "remat":
                blocks = [nn.remat(Block)(self.norm, train) for _ in range(3)]
            case "jit":
                blocks = [CompiledBlock(self.norm, train) for _ in range(3)]
            case "scan":
                axes = {"params": 0, "batch_stats": 0, "intermediates": 0}
                scanned = nn.scan(Block, axes, length=3, split_rngs={"params": True})
                blocks = [scanned(self.norm, train)]
        for block in blocks:
            x, _ = block(x, None)
        return nn.Dense(3)(x.mean((1, 2)))


class Shared(nn.Module):
    """One BatchNorm that is called twice."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        norm = Norm(momentum=self.momentum)
        x = nn.relu(norm(nn.Conv(4, (3, 3))(x), train))
        return norm(nn.Conv(4, (3, 3), 2)(x), train).mean((1, 2))


class Dense(nn.Module):
    """A network of dense layers, where BatchNorm sees one position for each example."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        for width in (7, 5):
            x = nn.relu(Norm(momentum=self.momentum)(nn.Dense(width)(x), train))
        return nn.Dense(3)(x)


class ChannelsFirst(nn.Module):
    """BatchNorm over axis 1, as PyTorch has it."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        return Norm(axis=1)(x.transpose(0, 3, 1, 2), train).mean((2, 3))


class Frames(nn.Module):
    """Merges examples and frames [N,T,H,W,C] -> [NT,H,W,C]."""

    @nn.compact
    def __call__(self, x, train=False):
        frames = x.reshape(-1, *x.shape[2:])
        y = nn.relu(Norm()(nn.Conv(4, (3, 3))(frames), train))
        y = nn.Dense(3)(y.mean((1, 2)))
        return y.reshape(*x.shape[:2], 3).mean(1)


class Padded(nn.Module):
    """Sequences [N,T,C] of unequal lengths; zeros are padding."""

    @nn.compact
    def __call__(self, x, train=False):
        mask = (x != 0).any(-1, keepdims=True)
        return Norm()(nn.Conv(4, (3,))(x), train, mask).mean(1)


def variables_of(model, x, seed=0):
    """Returns variables whose running statistics and scales are those of a trained network."""
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(np.array, dict(jax.jit(model.init)(jax.random.key(seed), x)))
    variables.pop("intermediates", None)
    flat = traverse_util.flatten_dict(variables)
    for path, array in flat.items():
        if path[0] == "batch_stats" or path[-1] == "scale":
            low = -0.5 if path[-1] == "mean" else 0.5
            flat[path] = rng.uniform(low, low + 1, array.shape).astype(np.float32)
    return traverse_util.unflatten_dict(flat)


def reference(model, variables, x, **kwargs):
    """Returns {path of a Norm: inputs of its calls} of the network in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (variables, x))
        apply = jax.jit(lambda v, x: model.apply(v, x, mutable=["intermediates"], **kwargs))
        _, updates = apply(*wide)
        flat = traverse_util.flatten_dict(updates["intermediates"])
    inputs = {path[:-1]: [np.asarray(a) for a in calls] for path, calls in flat.items()}
    assert all(a.dtype == np.float64 for calls in inputs.values() for a in calls)
    return {"/".join(path): calls for path, calls in inputs.items()}


def tiny_resnet(**settings):
    return models.resnet18(width=4, blocks=(1, 1), **settings)
