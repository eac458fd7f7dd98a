"""Finding examples by their ids, in sets that other defenses may have made smaller or larger."""

import jax
import jax.numpy as jnp

from jaxpoison.data import Dataset, to_float

NO_ID = jnp.iinfo(jnp.int32).max  # fills up lists of ids; no example has it


def rows_of(ids: jax.Array, dataset_ids: jax.Array) -> jax.Array:
    """Returns the row of each of `ids` [M] in a data set, int32 [M]; its length where absent.

    Args:
      ids: not negative.
      dataset_ids: int32 [N], distinct where not negative.
    """
    order = jnp.argsort(dataset_ids)
    ordered = dataset_ids[order]
    place = jnp.minimum(jnp.searchsorted(ordered, ids), len(order) - 1)
    return jnp.where(ordered[place] == ids, order[place], len(order)).astype(jnp.int32)


def for_rows(values: jax.Array, dataset_ids: jax.Array, missing: float | bool = 0) -> jax.Array:
    """Returns what `values` [N, ...] of the set as collected are for the rows of a data set.

    Args:
      values: one entry for each example of the set as collected.
      dataset_ids: int32 [M].
      missing: the value for examples that a defense has added (id -1).
    """
    own = dataset_ids >= 0
    taken = values[jnp.maximum(dataset_ids, 0)]
    return jnp.where(own.reshape(-1, *[1] * (values.ndim - 1)), taken, missing)


@jax.jit
def with_noise(noise: jax.Array, dataset: Dataset) -> Dataset:
    """Returns `dataset` with noise added, pixels kept in [0, 1].

    Args:
      noise: float32 [N, H, W, C], for the set as collected.
      dataset: any part of it; examples that a defense has added stay as they are.
    """
    images = to_float(dataset.images) + for_rows(noise, dataset.ids)
    return dataset._replace(images=jnp.clip(images, 0.0, 1.0))
