"""The characteristic-vector filter (arXiv 2403.13523) as a defence: poisons leave before training.

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
from jaxpoison.models import Classifier
from jaxpoison.training.hooks import UNCHANGED, Defense, Info, select


def characteristic_filter(
    model: Classifier,
    variables: Any,
    trusted: Dataset | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    **settings: Any,
) -> Defense:
    """Returns the filter as a defence, to go first: `chain(characteristic_filter(...), hint(...))`.

    At the first epoch its info holds `flagged`, how many examples were dropped, and `chosen`.

    Args:
      model: the extractor; need not be the network that is trained.
      variables: of the extractor, trained on data that is not under suspicion.
      trusted: clean examples, five of each class, for the centroids. Without them centroids are
        those of the data, poisons included, and a warning says what that means.
      mesh: devices to use; default all.
      **settings: of `CharacteristicVectorFilter`, such as `metric`, `gamma` and `margin`.

    Raises:
      ValueError: from here for a bad trusted set, from `init` for bad settings or data.
    """
    if trusted is not None:
        check(trusted, model.num_classes, "trusted set")
    model_filter = CharacteristicVectorFilter(
        model,
        variables,
        preprocess=to_float,
        centroids="dataset" if trusted is None else "trusted",
        mesh=mesh,
        **settings,
    )

    def init(key, dataset, num_epochs):
        check(dataset, model.num_classes)
        reference = None if trusted is None else (trusted.images, trusted.labels)
        result = model_filter.fit_filter(dataset.images, dataset.labels, reference)
        return jnp.asarray(result.keep_mask)

    def on_epoch(state, epoch, train_state, dataset):
        kept = devices.to_host(for_rows(state, dataset.ids, missing=True))
        info = UNCHANGED
        if epoch == 0:
            flagged = np.flatnonzero(~devices.to_host(state))
            info = Info({"flagged": len(flagged)}, flagged, changed=True)
        return state, select(dataset, kept), info

    return Defense(init, on_epoch)
