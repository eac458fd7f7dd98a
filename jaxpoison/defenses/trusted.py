"""What a trusted set is good for without influence: training on it, and a new head from it.

HINT is given clean labels that its rivals never see. Here are the controls for that, and the one of
them that this library recommends.
"""

import functools

import jax
import jax.numpy as jnp

from jaxpoison import network
from jaxpoison.core import devices
from jaxpoison.data import Dataset, check_trusted, to_float
from jaxpoison.models import Classifier
from jaxpoison.training import heads
from jaxpoison.training.heads import HEAD, HeadRecipe
from jaxpoison.training.hooks import Defense, Info


def add_trusted(
    trusted: Dataset, *, repeats: int | None = 1, mesh: jax.sharding.Mesh | None = None
) -> Defense:
    """Returns the defence that appends the trusted examples to the training set of each epoch.

    Args:
      trusted: M clean examples, at least two classes.
      repeats: how often each of them is seen in an epoch; None: as often as makes them half of the
        examples, as near as whole repeats come to it.
      mesh: devices to use; default all.

    Raises:
      ValueError: for a bad trusted set or fewer than one repeat.
    """
    check_trusted(trusted)
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    mesh = devices.data_mesh() if mesh is None else mesh
    trusted = devices.replicate(trusted, mesh)
    num_trusted = len(trusted.labels)

    def repeats_for(num_examples):
        return repeats or max(1, round(num_examples / num_trusted))

    @jax.jit
    def joined(dataset, trusted):
        repeats = repeats_for(len(dataset.labels))
        images = jnp.tile(to_float(trusted.images), (repeats, 1, 1, 1))
        return dataset._replace(
            images=jnp.concatenate([to_float(dataset.images), images]),
            labels=jnp.concatenate([dataset.labels, jnp.tile(trusted.labels, repeats)]),
            ids=jnp.concatenate([dataset.ids, jnp.full(repeats * num_trusted, -1, jnp.int32)]),
        )

    def on_epoch(state, epoch, train_state, dataset):
        return state, joined(dataset, trusted), Info(changed=epoch == 0)

    return Defense(on_epoch=on_epoch)


def refit_head(model: Classifier, trusted: Dataset, recipe: HeadRecipe = HEAD) -> Defense:
    """Returns the defence that, after training, learns the head anew from trusted examples alone.

    The body stays as training left it, so poisons act through the features only.

    Args:
      model: the network that is trained.
      trusted: clean examples, at least two classes.
      recipe: how the head is trained; see `training.fit_head`.

    Raises:
      ValueError: for a bad trusted set.
    """
    check_trusted(trusted, model.num_classes)
    fit_head = jax.jit(
        functools.partial(heads.fit_head, num_classes=model.num_classes, recipe=recipe)
    )

    def finish(state, train_state):
        features = network.features(model, train_state.variables, trusted.images)
        # On all devices, as the features are, wherever training was.
        key, labels = devices.replicate((state, trusted.labels), devices.data_mesh())
        head = fit_head(key, features, labels)
        return train_state._replace(params={**train_state.params, "head": head})

    return Defense(lambda key, dataset, num_epochs: key, finish=finish)


def recommended(trusted: Dataset, *, mesh: jax.sharding.Mesh | None = None) -> Defense:
    """Returns what this library recommends: trusted examples as half of what each epoch sees.

    Measured against the others in docs/results.md: more than trusted examples once an epoch, or
    alone, or a head refit on them. HINT before it adds nothing there. An epoch is twice as long.

    Args:
      trusted: clean examples, at least two classes.
      mesh: devices to use; default all.

    Raises:
      ValueError: for a bad trusted set.
    """
    return add_trusted(trusted, repeats=None, mesh=mesh)
