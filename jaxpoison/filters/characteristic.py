"""The characteristic-vector filter as one object: extraction, centroids and verdict.

For use on arrays or batches from anywhere; the pure functions it is made of are in
`extraction`, `centroids`, `distances` and `nearest`.
"""

import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.core import devices
from jaxpoison.core.files import replacing
from jaxpoison.filters import limits
from jaxpoison.filters.centroids import Centroids, Estimator, Variance, fit_centroids, shrink
from jaxpoison.filters.distances import (
    Mahalanobis,
    Metric,
    fisher_weights,
    fit_mahalanobis,
    layer_weights,
)
from jaxpoison.filters.extraction import Block, CharVec, Predicate, Stats, is_batch_norm
from jaxpoison.filters.passes import Comparison, Extractor, Passes
from jaxpoison.filters.passes import passes as make_passes
from jaxpoison.filters.result import (
    FilterResult,
    decide,
    encode_labels,
    warn_of_emptied_classes,
    warn_of_gaps,
    with_classes,
)

CACHE_BYTES = 2**30  # vectors up to this size are kept, so that `fit_filter` runs the network once
MOST_EXAMPLES_OF_MAHA = 8192  # its matrices are n x n
_LINKED = ("module", "variables", "apply_kwargs", "preprocess", "predicate", "mesh")  # never saved

_EMPTY = "there are no examples: X is an empty iterable"

Chunks = Iterable[tuple[Any, Any]]  # (examples, labels), a re-iterable


class CharacteristicVectorFilter:
    """Finds poisons whose BatchNorm statistics are those of another class (arXiv 2403.13523).

    An example is flagged if its characteristic vector is nearer to the centroid of another class
    than to that of its own label. By default centroids are those of the data itself, poisons
    included, as in the paper: this fails where poisons are many, see `detectable_shift`, and a
    warning says so. `centroids="trusted"` needs a few clean examples of each class (or the clean
    set that the extractor was trained on, if it has the same classes) and has no such limit.

    Args:
      module: any Flax Linen model with BatchNorm layers.
      variables: its variables; the extractor should be the one that the head is trained on.
      apply_kwargs: arguments for evaluation mode, e.g. `{"train": False}`; default none.
      preprocess: applied to each batch inside `jit`, e.g. `jaxpoison.data.to_float`.
      predicate: at which layers to measure, see `extract_charvec`.
      stats: "input" or "self", see `extract_charvec`.
      metric: "cosine" (paper), "l2", "z" or "maha", see `centroid_distances`.
      centroids: "dataset" (paper) or "trusted".
      estimator: of the centroids, see `fit_centroids`. All but "mean" hold all vectors in memory.
      variance: "pooled" or "mean", see `fit_centroids`.
      gamma: weights of the layers, see `layer_weights`; or "fisher", from trusted examples.
      beta: share of the means in each layer's weight; the rest is the variances'.
      margin: flag where the own class is further than the nearest other one by more than this.
      exclude_self: compare each example with its class without it (`centroids="dataset"`).
      tau: pulls trusted centroids towards those of the data as if it held tau examples a class.
      min_class_size: smallest class of the data from which a centroid is computed.
      batch_size: examples in one forward pass.
      mesh: devices; default all.

    Attributes:
      classes_: [K] labels, ascending. centroids_: the `Centroids`. layer_weights_: float32 [l].
      covariance_: `Mahalanobis` where the metric is "maha". sample_indices_: int64, what
      `fit_resample` kept.
    """

    def __init__(
        self,
        module: nn.Module,
        variables: Any,
        *,
        apply_kwargs: dict[str, Any] | None = None,
        preprocess: Callable[[Any], Any] | None = None,
        predicate: Predicate = is_batch_norm,
        stats: Stats = "input",
        metric: Metric = "cosine",
        centroids: Literal["dataset", "trusted"] = "dataset",
        estimator: Estimator = "mean",
        variance: Variance = "pooled",
        gamma: str | Sequence[float] = "uniform",
        beta: float = 0.5,
        margin: float = 0.0,
        exclude_self: bool = False,
        tau: float = 0.0,
        min_class_size: int = 2,
        batch_size: int = 256,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.module = module
        self.variables = variables
        self.apply_kwargs = apply_kwargs
        self.preprocess = preprocess
        self.predicate = predicate
        self.stats: Stats = stats
        self.metric: Metric = metric
        self.centroids: Literal["dataset", "trusted"] = centroids
        self.estimator: Estimator = estimator
        self.variance: Variance = variance
        self.gamma = gamma
        self.beta = beta
        self.margin = margin
        self.exclude_self = exclude_self
        self.tau = tau
        self.min_class_size = min_class_size
        self.batch_size = batch_size
        self.mesh = mesh

    @classmethod
    def _names(cls) -> list[str]:
        return list(inspect.signature(cls).parameters)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns the arguments of the constructor, as scikit-learn's estimators do."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> "CharacteristicVectorFilter":
        """Changes arguments of the constructor; `fit` anew afterwards."""
        unknown = params.keys() - set(self._names())
        if unknown:
            raise ValueError(f"unknown parameters: {', '.join(sorted(unknown))}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def fit(self, X: Any, y: Any = None, trusted: Any = None) -> "CharacteristicVectorFilter":
        """Computes the centroids.

        Args:
          X: N examples, an array [N, ...] or a dict of arrays; or, without `y`, an iterable of
            (examples, labels) batches.
          y: labels [N] (integers or strings) or one-hot rows [N, K].
          trusted: (X, y) of clean examples, for `centroids="trusted"`: five of each class suffice.

        Raises:
          ValueError: for settings, labels or activations that do not allow an answer.
        """
        return self._fit(_chunks(X, y), self._passes(), trusted)

    def filter(self, X: Any, y: Any = None) -> FilterResult:
        """Returns the verdict on X, in its order, by the centroids of `fit`; arguments as there."""
        self._check_fitted()
        return self._filter(_chunks(X, y), self._passes())

    def fit_filter(self, X: Any, y: Any = None, trusted: Any = None) -> FilterResult:
        """Returns `fit(X, y, trusted).filter(X, y)`, with one forward pass where memory allows.

        An iterable of batches is read twice; an iterator, which cannot be, has its vectors kept.
        """
        chunks, passes = _chunks(X, y), self._passes()
        if isinstance(chunks, _Whole):
            vector = jax.eval_shape(passes.vectors, self.variables, _one(chunks[0][0]))
            keep = len(y) * _num_bytes(vector) <= CACHE_BYTES
        else:
            keep = isinstance(chunks, Iterator)
        if keep:
            chunks = _Whole([self._collect(chunks, passes)])
            passes = self._passes(extracted=True)
        return self._fit(chunks, passes, trusted)._filter(chunks, passes)

    def fit_resample(self, X: Any, y: Any, trusted: Any = None) -> tuple[Any, Any]:
        """Returns (X, y) without what was flagged; `sample_indices_` says what was kept."""
        self.sample_indices_ = self.fit_filter(X, y, trusted).keep_indices
        ((X, y),) = _chunks(X, y)
        return jax.tree.map(lambda a: a[self.sample_indices_], (X, np.asarray(y)))

    def save(self, path: str | os.PathLike) -> None:
        """Writes settings and centroids, not the network, to one `.npz` without pickled objects."""
        self._check_fitted()
        layers = {"paths": self.centroids_.paths, "sizes": self.centroids_.sizes}
        fitted = jax.tree.leaves((self.centroids_, self.covariance_))
        with replacing(path) as file:
            np.savez(
                file,
                allow_pickle=False,
                config=np.array(json.dumps({"settings": self._settings(), **layers})),
                classes=self.classes_,
                layer_weights=self.layer_weights_,
                **{f"array_{number}": np.asarray(a) for number, a in enumerate(fitted)},
            )

    @classmethod
    def load(
        cls, path: str | os.PathLike, module: nn.Module, variables: Any, **linked: Any
    ) -> "CharacteristicVectorFilter":
        """Returns a fitted filter from a file of `save`.

        Args:
          path: the file.
          module: the network, which is not in the file; a different one is an error in `filter`.
          variables: its variables.
          **linked: `apply_kwargs`, `preprocess`, `predicate` and `mesh`, as in the constructor.

        Raises:
          ValueError: if the file is damaged or something else.
        """
        with open(path, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as archive:
                    entries = {name: archive[name] for name in archive.files}
                config = json.loads(str(entries.pop("config")))
                settings = config["settings"]
                if settings.pop("filter") != "characteristic_vectors":
                    raise ValueError("another kind of filter")
                self = cls(module, variables, **settings, **linked)
                self.classes_ = entries.pop("classes")
                self.layer_weights_ = entries.pop("layer_weights")
                like = self._fitted_structure(tuple(config["paths"]), tuple(config["sizes"]))
                fitted = [jnp.asarray(entries[f"array_{i}"]) for i in range(like.num_leaves)]
                self.centroids_, self.covariance_ = jax.tree.unflatten(like, fitted)
            except Exception as error:  # zipfile, zlib, json and numpy raise many kinds
                raise ValueError(f"{path} is not a readable filter ({error!r})") from error
        return self

    def _fit(self, chunks: Chunks, passes: Passes, trusted: Any) -> "CharacteristicVectorFilter":
        if self.centroids == "dataset":
            if trusted is not None:
                raise ValueError(
                    'trusted examples were given, but centroids="dataset" would not use them: '
                    'make the filter with centroids="trusted"'
                )
            limits.warn_of_contamination(stacklevel=3)
            reference = self._summarise(chunks, passes, self.min_class_size)
        else:
            if trusted is None:
                raise ValueError(
                    'centroids="trusted" needs trusted=(X, y): clean examples, five of each class'
                )
            smallest = 2 if self.gamma == "fisher" or self.metric in ("z", "maha") else 1
            reference = self._summarise(_chunks(*trusted), self._passes(), smallest)
        gamma = _fisher_weights(reference.centroids) if self.gamma == "fisher" else self.gamma
        gamma = layer_weights(gamma, len(reference.centroids.paths))
        covariance = None
        if self.metric == "maha":
            covariance = _fit_mahalanobis(
                reference.vectors,
                reference.positions,
                reference.centroids,
                gamma=gamma,
                beta=self.beta,
            )
        if self.tau > 0:
            reference = _pulled(reference, self._summarise(chunks, passes, 1), self.tau)
        self.classes_, self.centroids_ = reference[:2]
        self.covariance_, self.layer_weights_ = covariance, devices.to_host(gamma)
        if isinstance(chunks, _Whole):  # the labels of batches are checked by `filter`
            self._positions(chunks[0][1])
        warn_of_gaps(self.classes_)
        layers = zip(self.centroids_.paths, self.centroids_.sizes, strict=True)
        if flat := [path for path, size in layers if size == 1]:
            warnings.warn(
                "layers with a single position have no variance and are compared by their means "
                f"alone: {', '.join(flat)}",
                stacklevel=3,
            )
        return self

    def _filter(self, chunks: Chunks, passes: Passes) -> FilterResult:
        constants = self._placed(
            (self.variables, self.centroids_, self.layer_weights_, self.covariance_)
        )
        parts, seen = [], 0
        for x, y in chunks:
            positions = self._positions(y)
            distances, finite = passes.compare(constants, self._placed((x, positions)))
            _require_finite(finite, seen)
            parts.append((devices.to_host(distances), positions))
            seen += len(positions)
        if not parts:
            raise ValueError(_EMPTY)
        distances, positions = map(np.concatenate, zip(*parts, strict=True))
        config = self._settings() | {"layer_weights": tuple(self.layer_weights_.tolist())}
        result = _decide(distances, positions, margin=self.margin, settings=tuple(config.items()))
        result = with_classes(result, self.classes_)
        warn_of_emptied_classes(result)
        return result

    def _summarise(self, chunks: Chunks, passes: Passes, smallest: int) -> "_Reference":
        """Returns the centroids of all examples, which are held in memory only if they must be."""
        if self.metric == "maha" or self.estimator != "mean":
            vectors, y = self._collect(chunks, passes)
            positions, classes = encode_labels(y)
            if self.metric == "maha" and len(y) > MOST_EXAMPLES_OF_MAHA:
                raise ValueError(
                    f'metric="maha" of {len(y)} examples needs matrices of {len(y)} x {len(y)}: '
                    f"give at most {MOST_EXAMPLES_OF_MAHA}, e.g. as trusted examples, or take "
                    'metric="z"'
                )
            centroids = _fit_centroids(
                vectors, positions, len(classes), estimator=self.estimator, variance=self.variance
            )
            reference = _Reference(classes, centroids, vectors, positions)
        else:
            reference = self._accumulate(chunks, passes)
        _check_class_sizes(reference, smallest)
        return reference

    def _accumulate(self, chunks: Chunks, passes: Passes) -> "_Reference":
        variables = self._placed(self.variables)
        classes, centroids, seen = np.empty(0), None, 0
        for x, y in self._checked(chunks, passes):
            positions, found = encode_labels(y)
            if centroids is None:
                classes, centroids = found, self._no_examples(passes, x, len(found))
            elif not np.isin(found, classes).all():
                classes, known = np.union1d(classes, found), classes
                centroids = _take(centroids, _where(classes, known))
            labels = _where(found, classes)[positions]
            centroids, finite = passes.accumulate(
                variables, self._placed(centroids), self._placed((x, labels))
            )
            _require_finite(finite, seen)
            seen += len(labels)
        if centroids is None:
            raise ValueError(_EMPTY)
        return _Reference(classes, centroids, None, None)

    def _no_examples(self, passes, x, num_classes):
        def fit(x):
            return fit_centroids(
                passes.vectors(self.variables, x), jnp.zeros(1, int), num_classes,
                estimator=self.estimator, variance=self.variance,
            )  # fmt: skip

        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(fit, _one(x)))

    def _collect(self, chunks: Chunks, passes: Passes) -> tuple[CharVec, np.ndarray]:
        """Returns the vectors and labels of all examples."""
        variables = self._placed(self.variables)
        vectors, labels, seen = [], [], 0
        for x, y in self._checked(chunks, passes):
            positions, classes = encode_labels(y)
            extracted, finite = passes.extract(variables, self._placed(x))
            _require_finite(finite, seen)
            vectors.append(extracted)
            labels.append(classes[positions])
            seen += len(positions)
        if not vectors:
            raise ValueError(_EMPTY)
        num_bytes = sum(map(_num_bytes, vectors))
        if num_bytes > CACHE_BYTES:
            warnings.warn(
                f"{seen} characteristic vectors take {num_bytes / 2**30:.1f} GiB of memory; none "
                'need be kept with estimator="mean", a metric other than "maha", and an array or '
                "an iterable that can be read twice",
                stacklevel=4,
            )
        return jax.tree.map(lambda *a: jnp.concatenate(a), *vectors), np.concatenate(labels)

    def _checked(self, chunks: Chunks, passes: Passes) -> Iterator[tuple[Any, Any]]:
        """Yields `chunks`, and looks whether examples mix in layers whose mode is not known."""
        unknown = self.predicate is not is_batch_norm
        for x, y in chunks:
            if unknown:
                unknown = False
                alone, together = (
                    passes.extract(
                        self._placed(self.variables),
                        self._placed(jax.tree.map(lambda a, number=number: a[:number], x)),
                    )[0]
                    for number in (1, 2)
                )
                _require_equal(alone, together)
            yield x, y

    def _positions(self, y):
        """Returns the places of labels among the classes of the centroids."""
        positions, found = encode_labels(y)
        unknown = found[~np.isin(found, self.classes_)]
        if len(unknown):
            raise ValueError(
                f"there are no centroids for the labels {unknown.tolist()}, only for "
                f"{self.classes_.tolist()}: "
                + (
                    "add trusted examples of every class"
                    if self.centroids == "trusted"
                    else "fit on all classes"
                )
            )
        return _where(found, self.classes_)[positions]

    def _passes(self, *, extracted: bool = False) -> Passes:
        self._check()
        extractor = Extractor(
            self.module,
            self.predicate,
            self.stats,
            self.preprocess,
            tuple(sorted((self.apply_kwargs or {}).items())),
        )
        comparison = Comparison(
            self.estimator, self.variance, self.metric, self.beta, self.exclude_self
        )
        return make_passes(
            None if extracted else extractor, comparison, self.batch_size, self._mesh()
        )

    def _mesh(self):
        return devices.data_mesh() if self.mesh is None else self.mesh

    def _placed(self, tree):
        return devices.replicate(tree, self._mesh())

    def _settings(self) -> dict[str, Any]:
        """Returns the settings in a form that JSON holds."""
        params = {name: value for name, value in self.get_params().items() if name not in _LINKED}
        if not isinstance(self.gamma, str):
            params["gamma"] = tuple(map(float, self.gamma))
        return {"filter": "characteristic_vectors", **params}

    def _fitted_structure(self, paths, sizes):
        leaf: Any = 0
        blocks = (Block(leaf, leaf),) * len(paths)
        centroids = Centroids(leaf, blocks, blocks, paths, sizes, self.estimator, self.variance)
        covariance = Mahalanobis(*[leaf] * 6) if self.metric == "maha" else None
        return jax.tree.structure((centroids, covariance))

    def _check_fitted(self):
        if not hasattr(self, "centroids_"):
            raise ValueError("call fit (or fit_filter) first: there are no centroids yet")

    def _check(self):
        for name, allowed in (("centroids", ("dataset", "trusted")), ("metric", get_args(Metric))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        for name, lowest in (("tau", 0), ("min_class_size", 1), ("batch_size", 1)):
            if not lowest <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {lowest}, not {getattr(self, name)}")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite, not {self.margin}")
        trusted = self.centroids == "trusted"
        if not trusted and (self.gamma == "fisher" or self.tau > 0):
            raise ValueError(
                'gamma="fisher" and tau > 0 are for centroids="trusted": on the data itself an '
                "attacker would choose the weights"
            )
        if self.exclude_self and (trusted or self.estimator != "mean" or self.min_class_size < 2):
            raise ValueError(
                'exclude_self=True is for centroids="dataset" with estimator="mean", of at least '
                "2 examples a class"
            )


class _Whole(list):
    """Arrays, as a list of one chunk."""


class _Reference(NamedTuple):
    """Classes, their centroids, and (where all vectors are needed) what they were computed from."""

    classes: np.ndarray
    centroids: Centroids
    vectors: CharVec | None
    positions: np.ndarray | None


def _pulled(trusted: _Reference, dataset: _Reference, tau: float) -> _Reference:
    classes = np.union1d(trusted.classes, dataset.classes)
    mine, theirs = (
        _take(each.centroids, _where(classes, each.classes)) for each in (trusted, dataset)
    )
    return trusted._replace(classes=classes, centroids=_shrink(mine, theirs, tau))


def _check_class_sizes(reference: _Reference, smallest: int) -> None:
    counts = devices.to_host(reference.centroids.count)
    small = counts < smallest
    if small.any():
        found = ", ".join(
            f"{name!s}: {count:g}"
            for name, count in zip(reference.classes[small], counts[small], strict=True)
        )
        raise ValueError(
            f"too few examples for a centroid ({found}), at least {smallest} of each class are "
            'needed: add some, leave the class out, or set min_class_size (for centroids="dataset" '
            "a single example is its own centroid and can never be flagged)"
        )


def _require_finite(finite: jax.Array, seen: int) -> None:
    bad = np.flatnonzero(~devices.to_host(finite))
    if len(bad):
        raise ValueError(
            f"the characteristic vectors of {len(bad)} examples are not finite, the first at "
            f"indices {(bad[:10] + seen).tolist()}: remove these examples or repair them"
        )


def _require_equal(alone: CharVec, together: CharVec) -> None:
    """Raises if the first example has other vectors in company; by 2 %, as bfloat16 rounds."""
    for path, a, b in zip(alone.paths, alone.blocks, together.blocks, strict=True):
        for mine, theirs in zip(a, b, strict=True):
            if jnp.linalg.norm(mine[0] - theirs[0]) > 0.02 * jnp.linalg.norm(mine[0]):
                raise ValueError(
                    f"{path}: what an example does there depends on the other examples of its "
                    "batch, as in training mode: pass what your model takes for evaluation mode "
                    "(apply_kwargs)"
                )


def _where(wanted: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns the place of each of `wanted` among the ascending `classes`, int32; -1 if absent."""
    place = np.searchsorted(classes, wanted).astype(np.int32)
    return np.where(np.isin(wanted, classes), place, -1)


def _chunks(X: Any, y: Any) -> Chunks:
    """Returns (examples, labels) in a list of one, or the batches that X yields."""
    if y is None:
        if hasattr(X, "shape") or not isinstance(X, Iterable):
            raise ValueError("labels are missing: give y, or batches of (examples, labels) as X")
        return X
    X = X if hasattr(X, "shape") or isinstance(X, dict) else np.asarray(X)
    num_examples, num_labels = {a.shape[:1] for a in jax.tree.leaves(X)}, np.shape(y)[:1]
    if num_examples != {num_labels}:
        raise ValueError(
            f"the examples have lengths {sorted(num_examples)}, the labels {num_labels}: give one "
            "label to each example"
        )
    return _Whole([(X, y)])


def _one(x):
    """Returns the shape of one example, of the type that it has on the device."""

    def shape(a):
        return jax.ShapeDtypeStruct((1, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype))

    return jax.tree.map(shape, x)


def _num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_fit_centroids = jax.jit(fit_centroids, static_argnums=2, static_argnames=("estimator", "variance"))
_fisher_weights = jax.jit(fisher_weights)
_shrink = jax.jit(shrink)
_take = jax.jit(Centroids.take)
_fit_mahalanobis = jax.jit(fit_mahalanobis, static_argnames=("beta",))
_decide = jax.jit(decide, static_argnames=("margin", "settings"))
