"""Training steps: images a second, and how near to the matrix product's arithmetic; and PyTorch's.

  python benchmarks/train_step.py
  python benchmarks/train_step.py --peers --peers-python peers/bin/python

A step is the mean cross-entropy of a batch in memory, its gradient, and Nesterov's update of
weights and momentum. XLA alone is the same step with `jax.lax.conv_general_dilated`. PyTorch runs
in a process of its own, with our initial weights and with images last in memory (channels_last),
its fastest setting; its first loss is reported as a difference from ours. Ratios are to jaxpoison
in the same rounds; operations are those of convolutions and the linear layer, forward, to the
weights, and to all activations but the images.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import peers
from problem import cross_entropy

from jaxpoison import models
from jaxpoison.core import loops
from jaxpoison.models._fast_cnn import whitening_kernel

NETWORKS = {
    "ResNet-18 of width 8, one block a stage, 3 stages": functools.partial(
        models.resnet18, width=8, blocks=(1, 1, 1)
    ),
    "ResNet-18 of width 16": functools.partial(models.resnet18, width=16),
    "ResNet-18 of width 64": models.resnet18,
    "MNIST CNN": models.mnist_cnn,
    "fast CNN": models.fast_cnn,
}
LEARNING_RATE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128, help="batch size")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    measure.add_arguments(parser)
    parser.set_defaults(rounds=5)
    peers.add_arguments(parser)
    options = parser.parse_args()

    with PyTorch(options) as other:
        contenders = [
            each for network in options.networks for each in steps_of(network, options.batch, other)
        ]
        result = measure.race(
            contenders, rounds=options.rounds, sample_seconds=options.sample_seconds
        )
    measure.finish("train_step.py", options, result | {"peers": other.versions})


def steps_of(network: str, batch_size: int, other: "PyTorch") -> list[measure.Contender]:
    """Returns the contenders of one network."""
    model = NETWORKS[network]()
    side, channels = (28, 1) if network == "MNIST CNN" else (32, 3)
    images = jax.random.uniform(jax.random.key(0), (batch_size, side, side, channels))
    labels = jnp.arange(batch_size) % 10
    variables = model.init(jax.random.key(1), images[:1])
    flops = batch_size * operations(model, variables, images[:1])
    work = f"{network}, B = {batch_size}"
    ours, loss = compiled_step(model, variables, images, labels)
    with mock.patch.object(loops, "steps_from_host", lambda: False):  # as on accelerators
        plain, plain_loss = compiled_step(model, variables, images, labels)
    difference = abs(plain_loss / loss - 1)
    return [
        measure.contender(work, measure.OURS, ours, flops=flops, items=batch_size),
        measure.contender(
            work, "XLA alone", plain, flops=flops, items=batch_size, difference=difference
        ),
        *other.contenders(work, network, variables, images, labels, loss, flops),
    ]


def compiled_step(model, variables, images, labels) -> tuple[measure.Compiled, float]:
    """Returns the step, from the state in which the last one left it, and the first loss."""
    optimizer = optax.sgd(LEARNING_RATE, momentum=0.9, nesterov=True)

    def step(state):
        params, statistics, moments = state

        def loss_and_statistics(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": statistics}, images, train=True,
                mutable="batch_stats",
            )  # fmt: skip
            return jnp.mean(cross_entropy(logits, labels)), new["batch_stats"]

        (loss, statistics), gradient = jax.value_and_grad(loss_and_statistics, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), statistics, moments), loss

    params = variables["params"]
    state = jax.tree.map(jnp.copy, (params, variables["batch_stats"], optimizer.init(params)))
    start = time.perf_counter()
    executable = jax.jit(step, donate_argnums=0).lower(state).compile()
    seconds = time.perf_counter() - start
    state, first_loss = executable(state)

    def call():
        nonlocal state
        state, loss = executable(state)
        loss.block_until_ready()

    return measure.Compiled(call, seconds), float(first_loss)


def operations(model, variables, image) -> int:
    """Returns operations per image of one step."""
    forward = []

    def count(next_function, args, kwargs, context):
        outputs = next_function(*args, **kwargs)
        if isinstance(context.module, nn.Conv | nn.Dense):
            kernel = context.module.get_variable("params", "kernel")
            forward.append(2 * outputs[0].size // outputs.shape[-1] * kernel.size)
        return outputs

    with nn.intercept_methods(count):
        jax.eval_shape(model.apply, variables, image)
    return 3 * sum(forward) - forward[0]


class PyTorch:
    """PyTorch's process, or none: then there are no contenders. Use as a context manager.

    Attributes:
      versions: of Python and PyTorch, as found in its environment.
    """

    def __init__(self, options: argparse.Namespace):
        self._folder = tempfile.TemporaryDirectory()
        self._worker, self.versions = None, {}
        if peers.available(options):
            self._worker = peers.Worker(options, "train_step_worker.py")
            self.versions = self._worker.ask(do="versions")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._worker:
            self._worker.end()
        self._folder.cleanup()

    def contenders(
        self, work, network, variables, images, labels, loss, flops
    ) -> list[measure.Contender]:
        """Returns PyTorch's step, if it is there."""
        worker = self._worker
        if worker is None:
            return []
        leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
        arrays = {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
        if network == "fast CNN":
            arrays["patches"] = whitening_kernel()
        path = Path(self._folder.name) / "step.npz"
        np.savez(path, allow_pickle=False, images=images, labels=labels, **arrays)
        reply = worker.ask(
            do="prepare", name=work, network=network, path=str(path), rate=LEARNING_RATE
        )

        def sample(repeats):
            return worker.ask(do="sample", name=work, repeats=repeats)["seconds"]

        facts = {"difference": abs(reply["loss"] / loss - 1)}
        return [measure.Contender(work, "PyTorch", sample, flops, items=len(labels), facts=facts)]


if __name__ == "__main__":
    main()
