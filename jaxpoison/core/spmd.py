"""Values that differ from device to device inside `shard_map`, and means over them."""

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax

AxisName = str | tuple[str, ...] | None


def device_local(tree: Any, *others: Any, axis_name: AxisName = None) -> Any:
    """Returns `tree`, marked as differing from device to device wherever `others` do.

    Inside `shard_map` with its default checks, the gradient to a value that is the same on all
    devices is silently summed over them; differentiating a local loss to such parameters and
    averaging gives the mean times the number of devices. Marked as device-local first, the
    gradient stays local and `mean_over_devices` is right, as it is under `pmap`, `vmap` and
    unchecked `shard_map`, where there is nothing to mark.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    axes = {name for name in _names(axis_name) if name in manual}
    for leaf in jax.tree.leaves((tree, others)):
        axes |= varying_axes(leaf)
    return jax.tree.map(lambda x: _vary(x, axes), tree)


def mean_over_devices(tree: Any, axis_name: AxisName) -> Any:
    """Returns the mean of device-local values over `axis_name`; `tree` itself if that is None."""
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the mesh axes over which `x` may differ, as `shard_map`'s checks see it."""
    return jax.typeof(x).manual_axis_type.varying


def _names(axis_name: AxisName) -> Iterable[str]:
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _vary(x: Any, axes: set[str]) -> Any:
    missing = tuple(axes - varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x
