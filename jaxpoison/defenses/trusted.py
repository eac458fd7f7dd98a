"""What a trusted set is good for without influence: training on it, and a new head from it.

HINT is given clean labels that its rivals never see. Here are the controls for that, and the one of
them that this library recommends.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxpoison.core import devices
from jaxpoison.core.settings import plain
from jaxpoison.core.trees import cast_like
from jaxpoison.data import check, check_alike, to_float
from jaxpoison.defenses._checks import check_kind, trusted_set
from jaxpoison.network import as_network, features
from jaxpoison.training import heads
from jaxpoison.training.heads import HEAD, HeadRecipe
from jaxpoison.training.hooks import Defense, Info


def add_trusted(
    trusted: Any, *, repeats: int | None = 1, mesh: jax.sharding.Mesh | None = None
) -> Defense:
    """Returns the defense that appends the trusted examples to the training set of each epoch.

    Args:
      trusted: M clean examples, at least two classes, as `data.as_dataset` takes them.
      repeats: how often each of them is seen in an epoch; None: as often as makes them half of the
        examples, as near as whole repeats come to it.
      mesh: devices to use; default all.

    Raises:
      TypeError, ValueError: for a bad trusted set or fewer than one repeat. ValueError: from
        `init`, if images of the trusted set have another size than those of the training set, or
        its labels go beyond the training set's: the number of classes is not known here.
    """
    trusted, repeats = trusted_set(trusted), plain(repeats)
    if repeats is not None and (type(repeats) is not int or repeats < 1):
        raise ValueError(f"repeats must be a whole number, at least 1, or None; not {repeats!r}")
    mesh = devices.data_mesh() if mesh is None else mesh
    trusted = devices.replicate(trusted, mesh)
    return Defense(
        functools.partial(_init_added, trusted),
        functools.partial(_on_epoch_added, trusted, repeats),
    )


def _init_added(trusted, key, dataset, num_epochs):
    check(dataset)
    check_alike(trusted, dataset)
    return ()


def _on_epoch_added(trusted, repeats, state, epoch, train_state, dataset):
    if repeats is None:
        repeats = max(1, round(len(dataset.labels) / len(trusted.labels)))
    return state, _joined(repeats, dataset, trusted), Info(changed=epoch == 0)


@functools.partial(jax.jit, static_argnums=0)
def _joined(repeats, dataset, trusted):
    images = jnp.tile(to_float(trusted.images), (repeats, 1, 1, 1))
    added = jnp.full(repeats * len(trusted.labels), -1, jnp.int32)
    return dataset._replace(
        images=jnp.concatenate([to_float(dataset.images), images]),
        labels=jnp.concatenate([dataset.labels, jnp.tile(trusted.labels, repeats)]),
        ids=jnp.concatenate([dataset.ids, added]),
    )


def refit_head(model: Any, trusted: Any, recipe: HeadRecipe = HEAD) -> Defense:
    """Returns the defense that, after training, learns a new head from trusted examples alone.

    The body stays as training left it, so poisons act through the features only.

    Args:
      model: the network that is trained, a `Network` or what `network.as_network` takes.
      trusted: clean examples, at least two classes, as `data.as_dataset` takes them.
      recipe: how the head is trained; see `training.fit_head`.

    Raises:
      TypeError, ValueError: for a bad trusted set. ValueError: from `init`, if it does not fit the
        training set or the network, or the network has no last linear layer.
    """
    network = as_network(model)
    trusted = trusted_set(trusted, network.num_classes)
    check_kind(recipe, HeadRecipe)
    return Defense(
        functools.partial(_init_refit, network, trusted),
        finish=functools.partial(_finish_refit, network, trusted, recipe),
    )


def _init_refit(network, trusted, key, dataset, num_epochs):
    check(dataset)
    network = network.for_images(dataset.images.shape[1:])
    check(dataset, network.num_classes)
    check_alike(trusted, dataset, network.num_classes)
    return key


def _finish_refit(network, trusted, recipe, state, train_state):
    network = network.for_images(trusted.images.shape[1:])
    variables = train_state.variables
    inputs = features(network, variables, trusted.images)
    # On all devices, as the features are, wherever training was.
    key, labels = devices.replicate((state, trusted.labels), devices.data_mesh())
    head = _fit_head(
        key,
        inputs,
        labels,
        num_classes=network.num_classes,
        recipe=recipe,
        bias="bias" in network.head(variables),
    )
    head = cast_like(head, network.head(variables))
    return train_state._replace(params=network.with_head(variables, head)["params"])


_fit_head = jax.jit(heads.fit_head, static_argnames=("num_classes", "recipe", "bias"))


def recommended(trusted: Any, *, mesh: jax.sharding.Mesh | None = None) -> Defense:
    """Returns what this library recommends: trusted examples as half of what each epoch sees.

    Measured against the others in docs/results.md: more than trusted examples once an epoch, or
    alone, or a head refit on them. HINT before it adds nothing there. An epoch is twice as long.

    Args:
      trusted: clean examples, at least two classes, as `data.as_dataset` takes them.
      mesh: devices to use; default all.

    Raises:
      TypeError, ValueError: as `add_trusted`.
    """
    return add_trusted(trusted, repeats=None, mesh=mesh)
