"""What the characteristic-vector filter costs: a forward pass with it over one without.

  python benchmarks/filter_overhead.py                       # narrow ResNet and ResNet-18
  python benchmarks/filter_overhead.py --widths 8 --batches 32 256

For each network and batch, in one race: the plain forward pass; the same with the characteristic
vectors beside its logits; and the whole verdict, with distances to the centroids of 10 classes and
the vectors never leaving the step. Ratios are to the plain pass; the aim is at most 1.15.
"""

import argparse

import jax
import jax.numpy as jnp
import measure

from jaxpoison import data, filters, models

NUM_CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[8, 64], help="of the first stage; 64: ResNet-18"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[64], help="images in a batch")
    measure.add_arguments(parser)
    options = parser.parse_args()
    contenders = [
        each
        for width in options.widths
        for batch_size in options.batches
        for each in contest(width, batch_size)
    ]
    result = measure.race(contenders, rounds=options.rounds, sample_seconds=options.sample_seconds)
    measure.finish("filter_overhead.py", options, result)


def contest(width: int, batch_size: int) -> list[measure.Contender]:
    """Returns the forward pass without and with the filter, for one network and batch."""
    model = models.resnet18(width=width)
    train = data.load_embedded("cifar10").train
    images = data.to_float(train.images[:batch_size])
    labels = jnp.asarray(train.labels[:batch_size])
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])

    def plain(variables, images):
        return model.apply(variables, images)

    def vectors(variables, images):
        return filters.apply_and_extract(model, variables, images)

    def verdict(variables, images, labels, centroids):
        logits, charvec = vectors(variables, images)
        result = filters.nearest_centroid_filter(charvec, labels, centroids)
        return logits, result.score, result.is_poison

    @jax.jit
    def reference(variables, images, labels):
        return filters.fit_centroids(vectors(variables, images)[1], labels, NUM_CLASSES)

    centroids = reference(variables, images, labels)
    work = f"ResNet-18 of width {width}, B = {batch_size}"
    dim = 2 * sum(block.mean.shape[1] for block in centroids.blocks)
    return [
        measure.contender(work, name, measure.compiled(fn, *args), items=batch_size, **facts)
        for name, fn, args, facts in (
            ("plain forward pass", plain, (variables, images), {}),
            (
                "with characteristic vectors",
                vectors,
                (variables, images),
                {"bytes_per_example": 4 * dim},
            ),
            ("with the verdict", verdict, (variables, images, labels, centroids), {}),
        )
    ]


if __name__ == "__main__":
    main()
