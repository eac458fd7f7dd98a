"""A last linear layer with its cached features: what may be one, its logits, its labels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax

from jaxpoison.core.checks import listing, shortened


def check_head(head: Any, features: Any) -> None:
    """Raises ValueError unless `head` is `{"kernel": [d, K], "bias": [K]}` for features `[N, d]`.

    Any mapping will do, and "bias" may be missing.
    """
    expected = "head_params must be a dict with 'kernel' [d, K] and, if it has one, 'bias' [K]"
    if not isinstance(head, Mapping) or not {"kernel"} <= set(head) <= {"kernel", "bias"}:
        found = f"keys {listing(map(repr, head))}" if isinstance(head, Mapping) else f"{type(head)}"
        raise ValueError(f"{expected}, as flax.linen.Dense has, got {found}")
    kernel = jnp.shape(head["kernel"])
    bias = kernel[1:] if head.get("bias") is None else jnp.shape(head["bias"])
    if len(kernel) != 2 or bias != kernel[1:]:
        raise ValueError(f"{expected}, got kernel {kernel} and bias {bias}")
    if kernel[1] < 2:
        raise ValueError(
            f"head_params['kernel'] {kernel} has one logit, whose softmax is always 1: for a "
            "binary problem use two, or write a loss of your own with a sigmoid"
        )
    if jnp.ndim(features) != 2 or jnp.shape(features)[1] != kernel[0]:
        raise ValueError(
            f"features must be [N, d] with d = {kernel[0]}, the rows of the kernel, got shape "
            f"{jnp.shape(features)}"
        )


def head_logits(head: Any, features: Any) -> jax.Array:
    """Returns logits `[N, K]`."""
    # Full precision: in TF32 or bfloat16 a solver cannot pass a residual of about 1e-3.
    logits = jnp.matmul(features, head["kernel"], precision=lax.Precision.HIGHEST)
    return logits if head.get("bias") is None else logits + head["bias"]


def check_labels(labels: Any, num_examples: int, num_classes: int, name: str = "labels") -> None:
    """Raises ValueError unless labels are `[N]`, whole numbers from 0 to K - 1.

    Shapes and dtypes are always checked, values where they are known: not inside `jit`. Whole
    numbers in floating point will do.
    """
    shape = jnp.shape(labels)
    if shape != (num_examples,):
        advice = f"one class number for each of the {num_examples} features"
        if shape == (num_examples, 1):
            advice = "take the column out, as in labels[:, 0]"
        elif shape == (num_examples, num_classes):
            advice = "if each row is 1 at its class and 0 elsewhere, pass labels.argmax(axis=1)"
        raise ValueError(f"{name} must have shape ({num_examples},), got {shape}: {advice}")
    if isinstance(labels, core.Tracer):
        return
    if isinstance(labels, jax.Array) and not labels.is_fully_addressable:
        return
    known = np.asarray(labels)
    if known.dtype.kind == "V":  # bfloat16 and its like
        known = known.astype(np.float32)
    if known.dtype.kind not in "iufb":
        raise ValueError(f"{name} must be class numbers, got dtype {known.dtype}")
    bad = ~((known >= 0) & (known < num_classes))  # True for NaN
    if known.dtype.kind == "f":
        bad |= known != np.floor(known)
    if not bad.any():
        return
    place = int(bad.argmax())
    value, last = known[place].item(), num_classes - 1
    if value == -1:
        advice = "-1 often stands for 'no label': leave those examples out"
    elif value == num_classes and known.min() == 1:
        advice = "they seem to count from 1: subtract 1"
    elif value != value or value != np.floor(value):
        advice = "class numbers are whole"
    else:
        advice = "number the classes from 0, and leave out examples without one"
    raise ValueError(
        f"{name}[{place}] is {shortened(str(value))}, but the head has {num_classes} classes, "
        f"0 to {last} ({int(bad.sum())} of {len(known)} are wrong): {advice}"
    )


def one_for_classes(labels: Any, num_classes: int, dtype: Any) -> jax.Array:
    """Returns 1 for each label that is a class and NaN for others, `[N]`: a factor for its loss.

    A factor, because its derivatives are then NaN too. `jnp.where` would make them 0.
    """
    labels = jnp.asarray(labels)
    valid = (labels >= 0) & (labels < num_classes)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        valid &= labels == jnp.floor(labels)
    return jnp.where(valid, 1.0, jnp.nan).astype(dtype)
