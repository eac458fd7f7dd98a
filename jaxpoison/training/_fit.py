"""Trains a classifier on a data set that stays on the device, an epoch at a time.

On an accelerator an epoch is one compiled scan; on CPU the same step is driven from the host
(`core.loops`). All randomness comes from one key, folded with the epoch for the order of the
examples and with the step for augmentation, so a resumed run repeats what the interrupted one would
have done.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpoison import solvers
from jaxpoison.core import devices, loops
from jaxpoison.data import Dataset, as_dataset, check, random_translate_flip, to_float
from jaxpoison.network import accuracy, as_network, shared
from jaxpoison.training import recipe as recipes
from jaxpoison.training.checkpoints import Checkpoints
from jaxpoison.training.hooks import (
    BatchFn,
    Defense,
    checked,
    checked_info,
    keep_batch,
    keep_epoch,
    none,
    with_ids,
)
from jaxpoison.training.recipe import Recipe
from jaxpoison.training.state import TrainState, init_state

Report = Callable[[int, dict[str, Any]], None]


class Transfer(NamedTuple):
    """Transfer learning: a trained extractor that stays as it is, a head from new initial values.

    Attributes:
      variables: `params` and `batch_stats` of the trained network; its head is not used.
      bn_frozen: whether BatchNorm keeps the running statistics. If not, it uses those of the batch
        and updates the running ones, as the released code of HINT does.
      unfrozen: parts of the body that are trained as well, as names on the way to parameters:
        `("stage2_block0",)`, or `("body/stage2_block0/conv1",)`.
    """

    variables: Any
    bn_frozen: bool = True
    unfrozen: tuple[str, ...] = ()


def fit(
    model: Any,
    recipe: Recipe,
    train: Any,
    *,
    key: jax.Array,
    test: Any = None,
    defense: Defense | None = None,
    transfer: Transfer | None = None,
    mesh: jax.sharding.Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    report: Report | None = None,
) -> TrainState:
    """Returns the state after `recipe.epochs` epochs.

    Args:
      model: a `Network`, or what `network.as_network` takes: a Flax Linen or NNX module. One that
        was made from weights (an NNX module is) starts from those.
      recipe: epochs, batch size, optimizer, augmentation.
      train: N labeled images, possibly poisoned, as `data.as_dataset` takes them; placed on the
        device once.
      key: typed PRNG key; initial weights, order, augmentation and the defense follow from it.
      test: if given, accuracy on it is reported after each epoch; nothing is chosen by it.
      defense: applied while training; default none.
      transfer: if given, the head is trained on this extractor, with the parts that it names.
      mesh: devices to use; default all. The batch size must be divisible by their number.
      checkpoints: if given, the run continues from the newest one and saves as it goes.
      report: called after each epoch as `report(epoch, metrics)`, epochs counted from 0. Metrics
        are floats (`loss`, `train_accuracy`, `test_accuracy`, `seconds` of training,
        `defense_seconds`, and what the defense logged), and `chosen` (bool array [N]) where the
        defense singled examples out.

    Raises:
      TypeError: for a model or a set of another kind. ValueError: for bad images or labels, or
        sizes that do not fit. DivergedError: if the loss is not finite after an epoch.
    """
    mesh = devices.data_mesh() if mesh is None else mesh
    defense = none() if defense is None else checked(defense)
    network, train, test = _checked(model, recipe, train, test, mesh)
    bn_frozen = transfer is not None and transfer.bn_frozen
    unfrozen = None if transfer is None else tuple(transfer.unfrozen)
    optimizer, run_epoch = shared(
        _training, network, recipe, defense.on_batch, mesh, bn_frozen, unfrozen
    )
    init_key, data_key, defense_key = jax.random.split(key, 3)

    train, test = devices.replicate((with_ids(train), test), mesh)
    state = init_state(network, optimizer, init_key, train.images.shape[1:])
    if transfer is not None:
        state = _transferred(network, state, transfer, optimizer)
    # Copies: the loop donates its carry, and the caller has these weights as well.
    state = devices.replicate(jax.tree.map(jnp.array, state), mesh)
    defense_state = devices.replicate(defense.init(defense_key, train, recipe.epochs), mesh)
    first_epoch, most_examples = 0, 0
    if checkpoints is not None:
        first_epoch, (state, defense_state) = checkpoints.restore((state, defense_state))

    for epoch in range(first_epoch, recipe.epochs):
        start, finished = time.perf_counter(), epoch + 1
        defense_state, dataset, metrics = _defended(
            defense, defense_state, epoch, state, train, mesh
        )
        order = epoch_order(data_key, epoch, len(dataset.labels), recipe.batch_size)
        state = _at_epoch(state, epoch, len(order), defense, mesh)
        (dataset, order), length = _fill_up(dataset, order, most_examples, mesh)
        most_examples = len(dataset.labels)
        state, steps = run_epoch((dataset, defense_state, data_key), state, order, length)
        metrics |= _means(steps, epoch)
        if finished == recipe.epochs:
            trained = time.perf_counter()
            state = devices.replicate(defense.finish(defense_state, state), mesh)
            jax.block_until_ready(state)
            metrics["defense_seconds"] += time.perf_counter() - trained
        metrics["seconds"] = time.perf_counter() - start
        if test is not None:
            metrics["test_accuracy"] = accuracy(
                network, state.variables, test.images, test.labels, mesh=mesh
            )
        if report is not None:
            report(epoch, metrics)
        if checkpoints is not None and (
            finished % checkpoints.every == 0 or finished == recipe.epochs
        ):
            checkpoints.save(finished, (state, defense_state))
    return state


def _checked(model, recipe, train, test, mesh):
    """Returns the network and both sets, in the form that the loop takes."""
    train = as_dataset(train)
    check(train)
    network = as_network(model, image_shape=train.images.shape[1:])
    check(train, network.num_classes)
    if test is not None:
        test = as_dataset(test, "test set")
        check(test, network.num_classes, "test set")
    devices.check_divisible(recipe.batch_size, mesh)
    recipes.steps_per_epoch(recipe, len(train.labels))
    return network, train, test


def _defended(defense, defense_state, epoch, state, train, mesh):
    """Returns the defense's state, the data set of this epoch, and what the defense tells of it."""
    start = time.perf_counter()
    defense_state, dataset, info = defense.on_epoch(defense_state, epoch, state, train)
    # However the defense made them: as a resumed run has them, and on every process's devices.
    defense_state, dataset = devices.replicate((defense_state, dataset), mesh)
    metrics: dict[str, Any] = {
        name: float(value) for name, value in checked_info(info).metrics.items()
    }
    if info.chosen is not None:
        metrics["chosen"] = np.isin(np.arange(len(train.labels)), devices.to_host(info.chosen))
    return defense_state, dataset, metrics | {"defense_seconds": time.perf_counter() - start}


def _at_epoch(state, epoch, num_steps, defense, mesh):
    """Returns the state at the start of an epoch, for the loop to consume."""
    opt_state = recipes.at_epoch(state.opt_state, epoch, num_steps)
    state = devices.replicate(state._replace(opt_state=opt_state), mesh)
    # The loop donates its carry, and what a hook keeps of it must survive.
    return state if defense.on_epoch is keep_epoch else jax.tree.map(jnp.array, state)


def _fill_up(dataset, order, most_examples, mesh):
    """Returns (set, order) in the shapes of the largest epoch so far, and how many steps to take.

    The first entries are repeated: shapes stay, so nothing is compiled again. The number of steps
    is None where nothing had to be filled up.
    """
    num_examples, (num_steps, batch_size) = len(dataset.labels), order.shape
    if num_steps == 0:
        raise ValueError(
            f"the defense has left {num_examples} examples, fewer than one batch of {batch_size}: "
            "choose a smaller batch size, or a defense that drops less"
        )
    if num_examples >= most_examples:
        return (dataset, order), None

    def fill_up(tree, length):
        rows = np.arange(length)
        return jax.tree.map(lambda x: x[np.where(rows < len(x), rows, 0)], tree)

    filled = fill_up(dataset, most_examples), fill_up(order, most_examples // batch_size)
    return devices.replicate(filled, mesh), num_steps


def _means(steps, epoch):
    """Returns the means of what the steps of an epoch have measured."""
    means = jax.tree.map(lambda values: float(jnp.mean(values)), steps)
    if not np.isfinite(means["loss"]):
        raise solvers.DivergedError(
            f"the training loss is {means['loss']} after epoch {epoch}: try a smaller learning rate"
        )
    return means


def _training(network, recipe, on_batch, mesh, bn_frozen, unfrozen):
    """Returns the optimizer and the loop over steps, the same ones for the same settings."""
    optimizer = recipes.optimizer(recipe)
    step = train_step(
        network, recipe, optimizer, mesh, on_batch=on_batch, bn_frozen=bn_frozen, unfrozen=unfrozen
    )
    return optimizer, loops.scan(step)


def train_step(
    model: Any,
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    on_batch: BatchFn = keep_batch,
    bn_frozen: bool = False,
    unfrozen: tuple[str, ...] | None = None,
) -> loops.Step:
    """Returns `step((dataset, defense_state, key), train_state, indices [B])`, for `loops.scan`.

    The batch is spread over `mesh`; means over it, BatchNorm's included, are over all of it.
    Dropout, where the network has some, is drawn again; with `bn_frozen` there is none. With
    `unfrozen` the head and these parts of the body move, and the optimizer's state is theirs.
    """
    network = as_network(model)

    def augment(key, images):
        if recipe.max_shift == 0 and not recipe.flip:
            return images
        keys = jax.random.split(key, len(images))
        return random_translate_flip(
            keys,
            images,
            max_shift=recipe.max_shift,
            fill=jnp.asarray(network.mean),
            flip=recipe.flip,
            whole_pixels=recipe.whole_pixels,
        )

    def step(constants, state, indices):
        dataset, defense_state, key = constants
        step_key = jax.random.fold_in(key, state.step)
        augment_key, defense_key = jax.random.split(step_key)
        images, labels = devices.constrain_examples(
            (to_float(dataset.images[indices]), dataset.labels[indices]), mesh
        )
        ids = None if dataset.ids is None else dataset.ids[indices]
        batch = Dataset(augment(augment_key, images), labels, ids)
        batch = on_batch(defense_state, defense_key, state, batch)

        def loss_fn(trained):
            variables = {
                "params": _join(state.params, trained, is_trained),
                "batch_stats": state.batch_stats,
            }
            if bn_frozen:
                logits, updates = network.logits(variables, batch.images), variables
            else:
                rngs = {"dropout": jax.random.fold_in(step_key, 2)}
                logits, updates = network.train_logits(variables, batch.images, rngs=rngs)
            losses, hits = losses_and_hits(
                logits, jnp.asarray(batch.labels), recipe.label_smoothing
            )
            return jnp.mean(losses), (jnp.mean(hits), updates["batch_stats"])

        is_trained = _is_trained(network, state.variables, unfrozen)
        trained = _trained(state.params, is_trained)
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (hits, batch_stats)), gradient = gradient_fn(trained)
        updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        params = _join(state.params, trained, is_trained)
        state = TrainState(state.step + 1, params, batch_stats, opt_state)
        return state, {"loss": loss, "train_accuracy": hits}

    return step


def losses_and_hits(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross-entropy of each example, [B], and whether its likeliest class is hit.

    Args:
      logits: float32 [B, K].
      labels: int32 [B], or the shares of each class, float32 [B, K]: the largest in
        magnitude is to be hit.
      smoothing: share of each label that is spread evenly over all classes.
    """
    classes = labels if labels.ndim == 1 else jnp.argmax(jnp.abs(labels), axis=-1)
    hits = jnp.argmax(logits, axis=-1) == classes
    if smoothing:
        shares = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1])
        labels = optax.smooth_labels(shares, smoothing)
    if labels.ndim == 2:
        return optax.softmax_cross_entropy(logits, labels), hits
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), hits


def _transferred(network, state, transfer, optimizer):
    """Returns the state before the first step: the extractor's body, `state`'s own head."""
    given = {"batch_stats": {}, **transfer.variables}
    wanted = jax.tree.map(jnp.shape, state.variables)
    if jax.tree.map(jnp.shape, {name: given[name] for name in wanted if name in given}) != wanted:
        raise ValueError("transfer.variables do not fit the model: names or shapes differ")
    variables = network.with_head(given, network.head(state.variables))
    trained = _trained(
        variables["params"], _is_trained(network, variables, tuple(transfer.unfrozen))
    )
    return TrainState(
        state.step, variables["params"], variables["batch_stats"], optimizer.init(trained)
    )


def _is_trained(network, variables, unfrozen):
    """Returns a pytree like the parameters: True where they are trained; None where all are.

    Raises:
      ValueError: if a part that is to be trained has no parameters.
    """
    if unfrozen is None:
        return None
    replaced = network.with_head(variables, jax.tree.map(jnp.array, network.head(variables)))
    found = set()

    def is_trained(path, old, new):
        names = "/" + jax.tree_util.keystr(path, simple=True, separator="/") + "/"
        parts = {part for part in unfrozen if f"/{part}/" in names}
        found.update(parts)
        return bool(parts) or old is not new

    mask = jax.tree_util.tree_map_with_path(is_trained, variables["params"], replaced["params"])
    unknown = set(unfrozen) - found
    if unknown:
        paths = jax.tree_util.tree_leaves_with_path(variables["params"])
        parts = {jax.tree_util.keystr(path[:-1], simple=True, separator="/") for path, _ in paths}
        raise ValueError(
            f"the network has no parts {', '.join(sorted(unknown))} to train; its parts are "
            f"{', '.join(sorted(parts))}"
        )
    return mask


def _trained(params, is_trained):
    """Returns what of `params` is trained: all of them, or those with None for the others."""
    if is_trained is None:
        return params
    return jax.tree.map(lambda leaf, trained: leaf if trained else None, params, is_trained)


def _join(params, trained, is_trained):
    """Returns `params` with what is trained in its place."""
    if is_trained is None:
        return trained
    return jax.tree.map(
        lambda old, new: old if new is None else new, params, trained, is_leaf=lambda x: x is None
    )


def epoch_order(key: jax.Array, epoch: int, num_examples: int, batch_size: int) -> jax.Array:
    """Returns the example indices of each step of an epoch, int32 [steps, batch_size]."""
    order = jax.random.permutation(jax.random.fold_in(key, 2**31 + epoch), num_examples)
    num_steps = num_examples // batch_size
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)
