"""Calling the hooks of a defense as training does."""

from jaxpoison.training.hooks import with_ids


def begin(defense, key, dataset, num_epochs=100):
    """Returns (state, the set as collected), as before the first epoch of a run."""
    dataset = with_ids(dataset)
    return defense.init(key, dataset, num_epochs), dataset
