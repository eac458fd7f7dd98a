"""The characteristic-vector filter (arXiv 2403.13523) as a defense: poisons leave before training.

For transfer learning, where the extractor is trained already: the verdict is reached once, before
the first epoch, so defenses after it in a chain never see what was flagged.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.core import devices
from jaxpoison.data import Dataset, check, to_float
from jaxpoison.defenses._ids import for_rows
from jaxpoison.filters import CharacteristicVectorFilter
from jaxpoison.training.hooks import UNCHANGED, Defense, Info, select


def characteristic_filter(
    model: Any,
    variables: Any,
    trusted: Dataset | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    **settings: Any,
) -> Defense:
    """Returns the filter as a defense, to go first: `chain(characteristic_filter(...), hint(...))`.

    At the first epoch its info holds `flagged`, how many examples were dropped, and `chosen`.

    Args:
      model: the extractor, a Flax Linen or NNX module or a `network.Network`; need not be the
        network that is trained.
      variables: of the extractor, trained on data that is not under suspicion.
      trusted: clean examples, five of each class, for the centroids. Without them centroids are
        those of the data, poisons included, and a warning explains the limit.
      mesh: devices to use; default all.
      **settings: arguments of `CharacteristicVectorFilter` by name, such as `settings`, `metric`,
        `gamma` and `margin`.

    Raises:
      ValueError: from here for a bad trusted set or settings, from `init` for bad data.
    """
    if trusted is not None:
        check(trusted, getattr(model, "num_classes", None), "trusted set")
    model_filter = CharacteristicVectorFilter(
        model,
        variables,
        preprocess=to_float,
        centroids="dataset" if trusted is None else "trusted",
        mesh=mesh,
        **settings,
    )

    def init(key, dataset, num_epochs):
        check(dataset, getattr(model, "num_classes", None))
        result = model_filter.fit_filter(dataset, trusted=trusted)
        return jnp.asarray(result.keep_mask)

    def on_epoch(state, epoch, train_state, dataset):
        kept = devices.to_host(for_rows(state, dataset.ids, missing=True))
        info = UNCHANGED
        if epoch == 0:
            flagged = np.flatnonzero(~devices.to_host(state))
            info = Info({"flagged": len(flagged)}, flagged, changed=True)
        return state, select(dataset, kept), info

    return Defense(init, on_epoch)
