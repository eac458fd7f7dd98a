"""The compiled passes over a data set that the filter is made of, a batch at a time.

Each has two forms: over images, with the network in the loop, and over vectors that were extracted
before. Compiled functions are shared by filters of the same network and settings.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpoison.core import loops
from jaxpoison.filters.centroids import Centroids, fit_centroids
from jaxpoison.filters.extraction import CharVec, Predicate, Stats, extract_charvec
from jaxpoison.filters.inputs import described, shapes_of
from jaxpoison.filters.nearest import Reference, reference_distances
from jaxpoison.filters.settings import PAPER, FilterSettings
from jaxpoison.network import shared


class Extractor(NamedTuple):
    """A network and how it is run; hashable where its parts are.

    Attributes:
      model, predicate, stats: see `extract_charvec`.
      preprocess: applied to each batch first, or None.
      apply_kwargs: (name, value) of further arguments of the forward pass.
    """

    model: Any
    predicate: Predicate
    stats: Stats
    preprocess: Callable[[Any], Any] | None
    apply_kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, variables: Any, x: Any) -> CharVec:
        return extract_charvec(
            self.model,
            variables,
            x if self.preprocess is None else self.preprocess(x),
            predicate=self.predicate,
            stats=self.stats,
            **dict(self.apply_kwargs),
        )


class Passes(NamedTuple):
    """Functions over all examples; arrays are placed by the caller.

    Attributes:
      vectors: `vectors(variables, x) -> CharVec` of one batch, pure.
      extract: `extract(variables, x) -> (CharVec, finite)`, finite bool [N].
      accumulate: `accumulate(variables, centroids, (x, labels)) -> (centroids, finite)`, the
        centroids of these examples and those before; sums only, so memory does not grow with N.
      compare: `compare((variables, reference), (x, labels)) -> (distances [N, K], finite)`.
    """

    vectors: Callable[[Any, Any], CharVec]
    extract: Callable[[Any, Any], tuple[CharVec, jax.Array]]
    accumulate: Callable[[Any, Centroids, Any], tuple[Centroids, jax.Array]]
    compare: Callable[[tuple[Any, Reference], Any], tuple[jax.Array, jax.Array]]


def passes(
    extractor: Extractor | None, settings: FilterSettings, mesh: jax.sharding.Mesh
) -> Passes:
    """Returns the passes over images, or with `extractor=None` over vectors (`x` is a CharVec)."""
    # Settings that are not compiled in are left out of the key.
    compiled_in = ("metric", "beta", "exclude_self", "estimator", "variance", "batch_size")
    settings = PAPER.replace(**{name: getattr(settings, name) for name in compiled_in})
    return shared(_passes, extractor, settings, mesh)


def no_examples(
    run: Passes, settings: FilterSettings, variables: Any, x: Any, num_classes: int
) -> Centroids:
    """Returns the centroids of no examples, for `Passes.accumulate` to begin with."""

    def fit(x):
        return fit_centroids(
            run.vectors(variables, x),
            jnp.zeros(1, int),
            num_classes,
            estimator=settings.estimator,
            variance=settings.variance,
        )

    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(fit, one(x)))


def one(x: Any) -> Any:
    """Returns the shape of one example, of the type that it has on the device."""

    def shape(a):
        return jax.ShapeDtypeStruct((1, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype))

    return jax.tree.map(shape, x)


def explained(extractor: Extractor, variables: Any, x: Any) -> str | None:
    """Returns why the network cannot run on `x`, in one line, or None if it can."""
    model, kwargs = extractor.model, dict(extractor.apply_kwargs)
    own = variables if isinstance(variables, Mapping) else {}
    name = getattr(model, "name", None) or type(getattr(model, "module", model)).__name__

    def forward(variables, x):
        x = x if extractor.preprocess is None else extractor.preprocess(x)
        if isinstance(model, nn.Module):
            return model.apply(variables, x, mutable=True, **kwargs)
        return model.logits(variables, x)

    try:
        jax.eval_shape(forward, variables, one(x))
    except Exception as error:  # of Flax, JAX or the network itself, of any kind
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    else:
        return None
    found = f"the network {name} cannot run on {described(shapes_of(x))}"
    if isinstance(model, nn.Module) and "params" not in own:
        held = ", ".join(map(str, own)) or type(variables).__name__
        return f"variables hold {held}; expected the collections of {name}, as in {{'params': ...}}"
    wanted = _wanted(model, x, extractor.preprocess, kwargs)
    given = _flat(own)
    for path, shape in wanted.items():
        if given.get(path) != shape:
            there = f"{given[path]}" if path in given else "nothing"
            return (
                f"{found} with these variables: it needs {path} {shape}, but variables hold "
                f"{there} there. Pass the variables of this network, and inputs like those that "
                "it was trained on"
            )
    return f"{found}: {reason[:300]}. Pass inputs like those that it was trained on"


def _wanted(model, x, preprocess, kwargs):
    """Returns {path: shape} of the variables that the network would have for `x`; may be empty."""
    module = getattr(model, "module", model)
    if not isinstance(module, nn.Module):
        return {}

    def init(x):
        x = x if preprocess is None else preprocess(x)
        arguments = kwargs if module is model else dict(model.eval_kwargs)
        arguments = {name: value for name, value in arguments.items() if name != "rngs"}
        return module.init(jax.random.key(0), x, **arguments)

    try:
        return _flat(jax.eval_shape(init, one(x)))
    except Exception:  # then the inputs are wrong for any variables
        return {}


def _flat(variables):
    """Returns {"params/Conv_0/kernel": shape}."""
    collections = {n: tree for n, tree in variables.items() if n in ("params", "batch_stats")}
    leaves = jax.tree_util.tree_leaves_with_path(collections)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(jnp.shape(leaf))
        for path, leaf in leaves
    }


def _passes(extractor, settings, mesh):
    def vectors(variables, x):
        return x if extractor is None else extractor(variables, x)

    def extract(variables, x):
        charvec = vectors(variables, x)
        return charvec, _finite(charvec)

    def accumulate(variables, centroids, batch, present):
        x, labels = batch
        charvec = vectors(variables, x)
        added = fit_centroids(
            charvec,
            labels,
            len(centroids.count),
            weights=present,
            estimator=settings.estimator,
            variance=settings.variance,
        )
        return centroids + added, _finite(charvec)

    def compare(constants, batch):
        variables, reference = constants
        x, labels = batch
        charvec = vectors(variables, x)
        return reference_distances(charvec, labels, reference, settings), _finite(charvec)

    batch_size = settings.batch_size
    return Passes(
        vectors,
        loops.map_batches(extract, batch_size=batch_size, mesh=mesh),
        loops.fold_batches(accumulate, batch_size=batch_size, mesh=mesh),
        loops.map_batches(compare, batch_size=batch_size, mesh=mesh),
    )


def _finite(charvec):
    arrays = [jnp.isfinite(array).all(axis=1) for block in charvec.blocks for array in block]
    return jnp.stack(arrays).all(axis=0)
