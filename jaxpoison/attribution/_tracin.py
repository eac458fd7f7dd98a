"""Influence along the training path, from checkpoints.

    I(z) = -sum_t eta_t <grad L(theta_t), grad l(z; theta_t)>

TracInCP of Pruthi et al. 2020 (arXiv:2002.08484), with the sign of this
library and the gradient of a group's mean loss L in place of one test point's.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from jaxpoison import influence
from jaxpoison.core import batches, programs
from jaxpoison.core.batches import Batch, LossFn, Stream
from jaxpoison.core.checks import check_no_nan
from jaxpoison.core.trees import Params


def tracin(
    loss_fn: LossFn,
    checkpoints: Iterable[Params],
    learning_rates: Sequence[float] | jax.Array,
    group: Batch | Stream,
    train: Batch | Stream,
    *,
    group_weights: jax.Array | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """Returns minus the drop of the group's loss that steps on each example made, shape `[N]`.

    Positive is harmful; the paper's sign is the other. To first order, -score is the sum over the
    checkpoints of how far one step of gradient descent on the example alone lowers the group's
    mean loss: the unit is that of the loss.

    Args:
      loss_fn: as for `influence.group_ihvp`.
      checkpoints: T parameters; an iterable that reads them one at a time keeps one in memory.
      learning_rates: `[T]`, that of the steps around each checkpoint; times the number of steps
        between checkpoints, if the scores are to have the unit of the whole training.
      group: examples whose mean loss is of interest, with leading axis M.
      train: examples to score, with leading axis N. Either may be an `influence.Stream`, read once
        for each checkpoint, outside `jit`.
      group_weights: `[M]`, for a weighted mean.
      chunk_size: examples per pass.

    Raises:
      ValueError: unless there is one learning rate for each checkpoint, and at least one; as
        `influence.group_ihvp` for what is wrong with the data.
    """
    rates = jnp.asarray(learning_rates)
    if rates.ndim != 1 or not rates.size:
        raise ValueError(
            f"learning_rates must be one number per checkpoint, [T], got shape {rates.shape}"
        )
    check_no_nan(learning_rates=rates)
    for name, data in {"group": group, "train": train}.items():
        if not isinstance(data, Stream):
            batches.count_examples(data, name)
            check_no_nan(**{name: data})

    def scores(params, rate):
        direction = influence.group_gradient(
            loss_fn, params, group, weights=group_weights, chunk_size=chunk_size
        )
        return rate * influence.example_influence(
            loss_fn, params, direction, train, chunk_size=chunk_size
        )

    streamed = isinstance(group, Stream) or isinstance(train, Stream)
    step = scores if streamed or programs.is_traced(rates) else programs.compiled(scores)
    total, count = None, 0
    for count, params in enumerate(checkpoints, start=1):
        check_no_nan(checkpoints=params)
        if count == 1 and not streamed:  # where `scores` is compiled it cannot look
            batches.check_independent(loss_fn, params, group, "group")
            batches.check_independent(loss_fn, params, train, "train")
        if count <= len(rates):
            more = step(params, rates[count - 1])
            total = more if total is None else total + more
    if total is None or count != len(rates):
        raise ValueError(
            f"learning_rates has {len(rates)} numbers for {count} checkpoints: give one for each"
        )
    return total
