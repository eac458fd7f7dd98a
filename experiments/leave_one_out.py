"""Predicted against real leave-one-out retraining, for a convex model and for a
network.

  python experiments/leave_one_out.py

Influence predicts by how much the loss on a validation set changes when a
training example is removed: -I_up / N. This script removes examples, trains
again, and draws prediction against fact for three cases on MNIST (500 images of
7 x 7 pixels, float64):

  softmax regression        convex: one optimum, to which retraining returns
  network, warm start       retrained from the weights that the prediction was
                            made at
  network, from scratch     retrained from the initial weights: the difference
                            of two runs

Writes result.json and leave_one_out.png into --out.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxpoison import curvature, data, influence, runs, solvers
from jaxpoison.core.files import check_writable
from jaxpoison.runs import pictures

NUM_TRAIN, NUM_GROUP, NUM_REMOVED = 500, 500, 60
L2 = 0.01


def logits(params, inputs):
    """Of softmax regression, or of a network if `params` has a hidden layer."""
    if "hidden" in params:
        inputs = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return inputs @ params["out"]["kernel"] + params["out"]["bias"]


def cross_entropy(logits, labels):
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]


def loss_fn(params, batch):
    inputs, labels = batch
    return cross_entropy(logits(params, inputs), labels)


def init_params(key, num_hidden):
    def layer(key, fan_in, fan_out):
        kernel = jax.random.normal(key, (fan_in, fan_out)) / jnp.sqrt(fan_in)
        return {"kernel": kernel, "bias": jnp.zeros(fan_out)}

    keys = jax.random.split(key)
    if not num_hidden:
        return {"out": layer(keys[1], 49, 10)}
    return {"hidden": layer(keys[0], 49, num_hidden), "out": layer(keys[1], num_hidden, 10)}


def objective(params, train, weights):
    """sum_i weights_i l_i + (L2 / 2) ||theta||^2"""
    flat, _ = ravel_pytree(params)
    return weights @ loss_fn(params, train) + L2 / 2 * (flat @ flat)


def descend(params, train, weights, num_steps, learning_rate=0.5, momentum=0.9):
    """Full-batch gradient descent with Nesterov's momentum."""

    def step(_, state):
        params, velocity = state
        ahead = jax.tree.map(lambda p, v: p + momentum * v, params, velocity)
        gradient = jax.grad(objective)(ahead, train, weights)
        velocity = jax.tree.map(lambda v, g: momentum * v - learning_rate * g, velocity, gradient)
        return jax.tree.map(jnp.add, params, velocity), velocity

    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.fori_loop(0, num_steps, step, (params, zeros))[0]


def predict(params, group, train):
    """Returns the change of the group's mean loss that removing each example should make."""
    gauss_newton = curvature.gauss_newton(logits, cross_entropy)
    solution = solvers.require_converged(
        influence.group_ihvp(
            loss_fn, params, group, train, solver=solvers.cg(damping=L2), curvature=gauss_newton
        )
    )
    scores = influence.example_influence(loss_fn, params, solution.value, train)
    return -scores / len(train[1])


def retrain(start, removed, group, train, num_steps):
    """Returns the group's loss with nothing removed, and with each of `removed`, from `start`."""
    weights = jnp.full((len(removed) + 1, len(train[1])), 1 / len(train[1]))
    weights = weights.at[jnp.arange(len(removed)), removed].set(0.0)

    @jax.jit
    @jax.vmap
    def losses(weights):
        return loss_fn(descend(start, train, weights, num_steps), group).mean()

    *without, whole = losses(weights)
    return np.asarray(without) - whole


def load():
    """Returns (group, train) of images averaged over 4 x 4 pixels, as vectors."""
    splits = data.load_embedded("mnist")

    def part(dataset, size):
        images = np.asarray(dataset.images[:size], np.float64) / 255
        images = images.reshape(size, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(size, 49)
        return jnp.asarray(images), jnp.asarray(dataset.labels[:size])

    return part(splits.validation, NUM_GROUP), part(splits.train, NUM_TRAIN)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/leave-one-out-mnist-laptop"))
    parser.add_argument("--steps", type=runs.count, default=3000, help="of gradient descent")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    with runs.program(options.out):
        study(check_writable(options.out), options.steps, options.seed)


def study(folder: Path, num_steps: int, seed: int) -> None:
    """Predicts, retrains, and writes results and picture into the folder."""
    group, train = load()
    removed = np.random.default_rng(seed).choice(NUM_TRAIN, NUM_REMOVED, replace=False)
    everything = jnp.full(NUM_TRAIN, 1 / NUM_TRAIN)
    cases = []
    for name, num_hidden, warm in (
        ("softmax regression", 0, True),
        ("network, warm start", 16, True),
        ("network, from scratch", 16, False),
    ):
        initial = init_params(jax.random.key(seed), num_hidden)
        trained = jax.jit(descend, static_argnums=3)(initial, train, everything, num_steps)
        predicted = np.asarray(predict(trained, group, train))[removed]
        start = trained if warm else initial
        actual = retrain(start, removed, group, train, num_steps)
        case = {
            "case": name,
            "pearson": float(np.corrcoef(predicted, actual)[0, 1]),
            "slope": float(np.polyfit(predicted, actual, 1)[0]),
            "predicted": predicted.tolist(),
            "actual": np.asarray(actual).tolist(),
        }
        runs.say(f"{name:22s}  Pearson r {case['pearson']:.4f}, slope {case['slope']:.3f}")
        cases.append(case)
    config = {"l2": L2, "steps": num_steps, "seed": seed, "train": NUM_TRAIN}
    result = {"cases": cases, "config": config, "environment": runs.environment()}
    runs.write_json(folder / "result.json", result)
    draw(cases, folder / "leave_one_out.png")


def draw(cases, path):
    figure, axes = pictures.pyplot().subplots(
        1, len(cases), figsize=(4 * len(cases), 4), layout="constrained"
    )
    for axis, case in zip(axes, cases, strict=True):
        predicted, actual = 1e3 * np.array([case["predicted"], case["actual"]])
        axis.scatter(predicted, actual, s=12)
        ends = np.array([predicted.min(), predicted.max()])
        axis.plot(ends, ends, color="gray", linewidth=1, label="prediction = fact")
        axis.set_title(f"{case['case']}: r = {case['pearson']:.3f}")
        axis.set_xlabel("predicted change of the validation loss, x 1000")
    axes[0].set_ylabel("change after retraining without it, x 1000")
    axes[0].legend()
    pictures.save(figure, path, dpi=120)


if __name__ == "__main__":
    main()
