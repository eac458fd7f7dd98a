"""The data and the network of an experiment, from its settings."""

import functools

import jax
import jax.numpy as jnp

from common import registry
from common.settings import Common
from jaxpoison import data, models
from jaxpoison.core import hosts
from jaxpoison.data import Splits
from jaxpoison.training.hooks import with_ids


@functools.lru_cache(maxsize=1)  # the cells of a seed follow each other
def load(config: Common, seed: int) -> Splits:
    """Returns the data of one seed, read once for all its cells, by each process from its disk."""
    if config.data == "embedded":
        splits = data.load_embedded(config.dataset, seed=seed)
    else:
        splits = hosts.on_all(
            lambda: data.load(config.dataset, data_dir=config.data_dir, seed=seed)
        )
    sizes = {
        "train": config.train_examples,
        "validation": config.trusted_examples,
        "test": config.test_examples,
    }
    return splits._replace(
        **{part: getattr(splits, part).take(slice(size)) for part, size in sizes.items()}
    )


def build_model(config: Common) -> models.Classifier:
    """Returns the network of the paper for this data set, at the configured width, or the fast one.

    Raises:
      ValueError: for the fast network on other images than CIFAR-10's.
    """
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    if config.network == "fast":
        if config.dataset != "cifar10":
            raise ValueError(f"--network fast is for cifar10, not {config.dataset}")
        widths = (config.width, 2 * config.width, 4 * config.width)
        return models.fast_cnn(widths=widths, dtype=dtype)
    if config.dataset == "mnist":
        return models.mnist_cnn(dtype=dtype)
    return models.resnet18(width=config.width, blocks=config.blocks, dtype=dtype)


def check_defenses(
    config: Common, names: tuple[str, ...], model: models.Classifier, splits: Splits
) -> None:
    """Raises ValueError for a defense that there is not, or that cannot be as configured."""
    registry.check_names("defenses", names, registry.DEFENSES)
    for name in names:
        defense = registry.make_defense(name, config, model, splits)
        defense.init(jax.random.key(0), with_ids(splits.train), config.recipe.epochs)


def checkpoint_bytes(model: models.Classifier, splits: Splits) -> int:
    """Returns what one checkpoint takes at least: parameters and their momentum."""
    shape = splits.train.images.shape[1:]
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables["params"])]
    return 2 * sum(sizes)
