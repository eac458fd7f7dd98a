"""HINT's selection against the authors' way of computing it, and against one pass over the data.

  python benchmarks/hint_selection.py                          # both networks, sizes of the paper
  python benchmarks/hint_selection.py --networks mnist --examples 5000

Ours: features of all N images once, the solve (H + 0.5 I) s = v over all of them by conjugate
gradients, scores from the features. The authors' code (in JAX here, jitted, so that only the
procedure differs): 980 Hessian products of batches of 50, each forward through the whole network
and twice backward through the last layer, then the score of one image at a time. It is timed on a
part and scaled; its first call, which compiles, is not counted.

Ratios are to ours: a floor of 0.9 means that ours takes 1.1 times the floor.

The floor of the selection is one forward pass over the set, that of the pixel maps one forward
pass and one backward pass to the images: no method with these quantities can do with less. Images
are the embedded ones, repeated; networks are trained on them for an epoch.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import measure
import numpy as np

from jaxpoison import curvature, data, influence, models, solvers, training
from jaxpoison.core import devices, loops

DAMPING = 0.5
AUTHORS_STEPS, AUTHORS_BATCH, AUTHORS_SCALE = 980, 50, 50.0
SHARE = 0.5  # r: pixel maps are made for this share of the examples
NETWORKS = {
    "mnist": ("MNIST CNN", "mnist", models.mnist_cnn, training.MNIST, 59_000),
    "resnet": (
        "ResNet-18 of width 8",
        "cifar10",
        lambda: models.resnet18(width=8),
        training.CIFAR10,
        49_000,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--examples", type=int, help="N; default: the paper's")
    parser.add_argument("--batch-size", type=int, help="images in a pass")
    parser.add_argument("--part", type=int, default=20, help="of the 980 products, and of scores")
    measure.add_arguments(parser)
    parser.set_defaults(rounds=3)
    options = parser.parse_args()
    contenders = [each for name in options.networks for each in contest(name, options)]
    result = measure.race(contenders, rounds=options.rounds, sample_seconds=options.sample_seconds)
    measure.finish("hint_selection.py", options, result)


def contest(network: str, options: argparse.Namespace) -> list[measure.Contender]:
    """Returns our parts, the authors' procedure, and the floors, for one network."""
    title, dataset, make_model, recipe, num_examples = NETWORKS[network]
    num_examples = options.examples or num_examples
    splits = data.load_embedded(dataset)
    model = make_model()
    recipe = dataclasses.replace(recipe, epochs=1, milestones=())
    state = training.fit(model, recipe, splits.train, key=jax.random.key(0))
    variables, head = state.variables, state.variables["params"]["head"]
    mesh = devices.data_mesh()
    index = np.arange(num_examples) % len(splits.train.labels)
    train = devices.replicate(splits.train.take(index), mesh)
    trusted = devices.replicate(splits.validation, mesh)
    chosen = jax.tree.map(lambda x: x[: round(SHARE * num_examples)], train)
    title = f"{title}, N = {num_examples:,}"

    def features_of(variables, images):
        return model.apply(variables, data.to_float(images), method="features")

    def losses(head, variables, batch):
        images, labels = batch
        features = model.apply(variables, images, method="features")
        return influence.linear_head_loss(head, (features, labels))

    def maps_of(constants, batch):
        variables, s = constants
        return influence.pixel_influence(
            lambda head, batch: losses(head, variables, batch),
            variables["params"]["head"], s, (data.to_float(batch.images), batch.labels),
        )  # fmt: skip

    def gradients_of(variables, batch):
        return jax.grad(lambda images: jnp.sum(losses(head, variables, (images, batch.labels))))(
            data.to_float(batch.images)
        )

    def batches(fn):
        return loops.map_batches(fn, batch_size=options.batch_size, mesh=mesh)

    features, maps, gradients = map(batches, (features_of, maps_of, gradients_of))
    forward = batches(lambda variables, images: model.apply(variables, data.to_float(images)))

    @jax.jit
    def solve(head, group, train):
        return influence.group_ihvp(
            influence.linear_head_loss, head, group, train,
            solver=solvers.cg(damping=DAMPING, tolerance=1e-6), curvature=curvature.linear_head,
        )  # fmt: skip

    @jax.jit
    def largest(head, s, train):
        scores = influence.example_influence(influence.linear_head_loss, head, s, train)
        return jax.lax.top_k(jnp.abs(scores), round(SHARE * num_examples))[1]

    def inputs():
        return tuple((features(variables, x.images), x.labels) for x in (trusted, train))

    def select():
        group, cached = inputs()
        return largest(head, solve(head, group, cached).value, cached)

    group, cached = inputs()
    solution = solve(head, group, cached)
    facts = {"products": int(solution.num_steps) + 1, "residual": float(solution.residual)}

    def of(work, name, call, **facts):
        sample = measure.sampler(lambda: jax.block_until_ready(call()))
        return measure.Contender(f"{title}: {work}", name, sample, facts=facts)

    products, scores = authors(losses, variables, train, solution.value, options.part)
    work = f"{title}: solve, features given"
    whole = f"{title}: selection"
    return [
        of("solve, features given", measure.OURS, lambda: solve(head, group, cached), **facts),
        measure.Contender(work, "authors: 980 products", products),
        of("selection", measure.OURS, select),
        of("selection", "floor: one forward pass", lambda: forward(variables, train.images)),
        measure.Contender(whole, "authors: products, scores", lambda n: products(n) + scores(n)),
        of("pixel maps", measure.OURS, lambda: maps((variables, solution.value), chosen)),
        of("pixel maps", "floor: forward, backward", lambda: gradients(variables, chosen)),
    ]


def authors(losses, variables, train, s, part):
    """Returns samplers of the authors' two loops, timed on `part` of each and scaled to all."""
    head, num_examples = variables["params"]["head"], len(train.labels)

    def take(key, count):
        index = jax.random.randint(key, (count,), 0, num_examples)
        return data.to_float(train.images[index]), train.labels[index]

    def gradient(head, batch):
        return jax.grad(lambda head: jnp.mean(losses(head, variables, batch)))(head)

    def inner(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    @jax.jit
    def step(h, v, key):
        batch = take(key, AUTHORS_BATCH)
        product = jax.grad(lambda head: inner(gradient(head, batch), h))(head)
        shrink = 1 - DAMPING / AUTHORS_SCALE
        return jax.tree.map(
            lambda v, h, product: v + shrink * h - product / AUTHORS_SCALE, v, h, product
        )

    @jax.jit
    def score(key):
        return -inner(gradient(head, take(key, 1)), s)

    keys = jax.random.split(jax.random.key(0), part)

    def some_products():
        h = s
        for key in keys:
            h = step(h, s, key)
        jax.block_until_ready(h)

    def some_scores():
        for key in keys:
            score(key).block_until_ready()

    some_products()  # compiles
    some_scores()

    def scaled(call, total):
        sample = measure.sampler(call)
        return lambda repeats: sample(repeats) * total / part

    return scaled(some_products, AUTHORS_STEPS), scaled(some_scores, num_examples)


if __name__ == "__main__":
    main()
