"""The characteristic-vector filter as one object: extraction, centroids and verdict.

For use on arrays or batches from anywhere; the pure functions it is made of are in
`extraction`, `centroids`, `distances` and `nearest`.
"""

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpoison.core import devices
from jaxpoison.core.files import read_npz, replacing
from jaxpoison.data import to_float
from jaxpoison.filters import inputs, limits
from jaxpoison.filters.centroids import Centroids, fit_centroids
from jaxpoison.filters.distances import Mahalanobis
from jaxpoison.filters.extraction import Block, CharVec, Predicate
from jaxpoison.filters.inputs import Batches, Chunk, Whole
from jaxpoison.filters.nearest import Reference, make_reference
from jaxpoison.filters.passes import Extractor, Passes, explained, no_examples, one
from jaxpoison.filters.passes import passes as make_passes
from jaxpoison.filters.result import (
    FilterResult,
    decide,
    warn_of_emptied_classes,
    warn_of_gaps,
    with_classes,
)
from jaxpoison.filters.settings import PAPER, FilterSettings
from jaxpoison.network import Network, as_network, from_nnx, is_batch_norm

CACHE_BYTES = 2**30  # vectors up to this size are kept, so that `fit_filter` runs the network once
MOST_EXAMPLES_OF_MAHA = 8192  # its matrices are n x n
_LINKED = ("apply_kwargs", "preprocess", "predicate", "mesh")  # never saved

_EMPTY = "there are no examples: X is an empty iterable"


class CharacteristicVectorFilter:
    """Finds poisons whose BatchNorm statistics are those of another class (arXiv 2403.13523).

    An example is flagged if its characteristic vector is nearer to the centroid of another class
    than to that of its own label. By default centroids are those of the data itself, poisons
    included, as in the paper: this fails where poisons are many, see `detectable_shift`, and a
    warning says so. `centroids="trusted"` needs a few clean examples of each class (or the clean
    set that the extractor was trained on, if it has the same classes) and has no such limit.

    Everywhere, examples X are N examples of the network's input: an array or data frame [N, ...], a
    list of arrays of one shape, a dict of arrays, or a `CharVec` that was extracted before. Labels
    y are N integers or strings, from NumPy, JAX, pandas or a list, or one-hot rows [N, K]. Without
    y, X is a `data.Dataset`, a `PoisonedDataset`, a pair (X, y), or an iterable of such pairs.

    Args:
      model: a Flax Linen or NNX module with BatchNorm layers, or a `network.Network` made from one.
      variables: its variables; the extractor should be the one that the head is trained on. For
        NNX an `nnx.State`, or None for those that the module holds.
      settings: how vectors become a verdict; default: the paper's.
      apply_kwargs: arguments for evaluation mode, e.g. `{"train": False}`; by default they are
        found in the signature where its names are known, see `network.from_linen`.
      preprocess: applied to each batch inside `jit`, e.g. `jaxpoison.data.to_float`, which is the
        default for 8-bit images where it is plain how they are to be scaled: those of a `Dataset`,
        a `Network` or a `models.Classifier`.
      predicate: at which layers to measure, see `extract_charvec`.
      mesh: devices; default all.
      **changes: settings by name, in place of those of `settings`: `gamma="last_3"`.

    Attributes:
      classes_: [K] labels, ascending.
      centroids_: the `Centroids`.
      layer_weights_: float32 [l].
      covariance_: `Mahalanobis` where the metric is "maha".
      sample_indices_: int64, what `fit_resample` kept.
    """

    def __init__(
        self,
        model: Any,
        variables: Any = None,
        settings: FilterSettings = PAPER,
        *,
        apply_kwargs: dict[str, Any] | None = None,
        preprocess: Callable[[Any], Any] | None = None,
        predicate: Predicate = is_batch_norm,
        mesh: jax.sharding.Mesh | None = None,
        **changes: Any,
    ):
        self.model = model
        self.variables = variables
        self.settings = _changed(settings, changes)
        self.apply_kwargs = apply_kwargs
        self.preprocess = preprocess
        self.predicate = predicate
        self.mesh = mesh

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns the arguments of the constructor, as scikit-learn's estimators do."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> "CharacteristicVectorFilter":
        """Changes arguments of the constructor, settings by name included; `fit` again after it."""
        changes = {name: value for name, value in params.items() if name not in _PARAMETERS}
        settings = _changed(params.get("settings", self.settings), changes)
        for name in params.keys() - changes.keys():
            setattr(self, name, params[name])
        self.settings = settings
        return self

    def extract(self, X: Any) -> CharVec:
        """Returns the characteristic vectors of N examples X, which the other methods take."""
        x = inputs.examples(getattr(X, "images", X))
        run = self._runner(hasattr(X, "images")).of(x)
        charvec, finite = run.passes.extract(run.variables, self._placed(x))
        _require_finite(finite, 0)
        return charvec

    def fit(self, X: Any, y: Any = None, trusted: Any = None) -> "CharacteristicVectorFilter":
        """Computes the centroids.

        Args:
          X: N examples, or examples with their labels; see the class.
          y: labels [N].
          trusted: (X, y) or a `Dataset` of clean examples, for `centroids="trusted"`: five of each
            class suffice.

        Raises:
          TypeError: for examples without labels, or something that is not a network.
          ValueError: for settings, examples, labels or activations that do not allow an answer.
        """
        return self._fit(inputs.chunks(X, y), self._runner(hasattr(X, "images")), trusted)

    def filter(self, X: Any, y: Any = None) -> FilterResult:
        """Returns the verdict on X, in its order, by the centroids of `fit`; arguments as there."""
        self._check_fitted()
        return self._filter(inputs.chunks(X, y), self._runner(hasattr(X, "images")))

    def fit_filter(self, X: Any, y: Any = None, trusted: Any = None) -> FilterResult:
        """Returns `fit(X, y, trusted).filter(X, y)`, with one forward pass where memory allows.

        An iterable of batches is read twice; an iterator, which cannot be, has its vectors kept.
        """
        chunks, runner = inputs.chunks(X, y), self._runner(hasattr(X, "images"))
        if isinstance(chunks, Batches):
            keep = not chunks.readable_again
        else:
            x, positions = chunks[0][:2]
            run = runner.of(x)
            vector = jax.eval_shape(run.passes.vectors, run.variables, one(x))
            keep = len(positions) * _num_bytes(vector) <= CACHE_BYTES
        if keep:
            chunks = Whole([self._collect(chunks, runner)])
        return self._fit(chunks, runner, trusted)._filter(chunks, runner)

    def fit_resample(self, X: Any, y: Any = None, trusted: Any = None) -> tuple[Any, Any]:
        """Returns (X, y) without flagged examples; `sample_indices_` holds the kept rows."""
        chunks = inputs.chunks(X, y)
        if isinstance(chunks, Batches):
            raise TypeError("batches cannot be resampled: give arrays, or use filter")
        self.sample_indices_ = self.fit_filter(X, y, trusted).keep_indices
        if y is None:
            X, y = (X.images, X.labels) if hasattr(X, "images") else X
        return _rows(X, self.sample_indices_), _rows(y, self.sample_indices_)

    def save(self, path: str | os.PathLike) -> None:
        """Writes settings and centroids, not the network, to one `.npz` without pickled objects.

        `~` in the path stands for the home folder.
        """
        self._check_fitted()
        config = {
            "filter": "characteristic_vectors",
            "settings": dataclasses.asdict(self.settings),
            "paths": self.centroids_.paths,
            "sizes": self.centroids_.sizes,
            "shapes": self._shapes,
        }
        fitted = jax.tree.leaves((self.centroids_, self.covariance_))
        with replacing(path) as file:
            np.savez(
                file,
                allow_pickle=False,
                config=np.array(json.dumps(config)),
                classes=self.classes_,
                layer_weights=self.layer_weights_,
                **{f"array_{number}": np.asarray(a) for number, a in enumerate(fitted)},
            )

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: Any, variables: Any = None, **linked: Any
    ) -> "CharacteristicVectorFilter":
        """Returns a fitted filter from a file of `save`.

        Args:
          path: the file; `~` stands for the home folder.
          model: the network, which is not in the file; a different one is an error in `filter`.
          variables: its variables.
          **linked: `apply_kwargs`, `preprocess`, `predicate` and `mesh`, as in the constructor.

        Raises:
          TypeError: for other arguments: the settings are those of the file.
          FileNotFoundError: if there is no such file.
          ValueError: if the file is damaged or something else; the message names it.
        """
        unknown = ", ".join(sorted(linked.keys() - {*_LINKED}))
        if unknown:
            raise TypeError(
                f"load takes {', '.join(_LINKED)} and not {unknown}: settings are those that were "
                "saved; set_params changes them, fit again after it"
            )
        entries = read_npz(path, "a saved filter", required=("config", "classes", "layer_weights"))
        try:
            config = json.loads(str(entries["config"]))
            if config["filter"] != "characteristic_vectors":
                raise ValueError(f"it holds the filter {config['filter']!r}")
            self = cls(model, variables, FilterSettings(**config["settings"]), **linked)
            like = _fitted_structure(
                self.settings, tuple(config["paths"]), tuple(map(int, config["sizes"]))
            )
            fitted = [jnp.asarray(entries[f"array_{i}"]) for i in range(like.num_leaves)]
            self.centroids_, self.covariance_ = jax.tree.unflatten(like, fitted)
            self.classes_, self.layer_weights_ = entries["classes"], entries["layer_weights"]
            self._shapes = config["shapes"]
            _check_loaded(self)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a readable filter: {str(error)[:300]}. Fit and save it again"
            ) from error
        return self

    def _fit(
        self, chunks: Whole | Batches, runner: "_Runner", trusted: Any
    ) -> "CharacteristicVectorFilter":
        settings = self.settings
        if settings.centroids == "dataset":
            if trusted is not None:
                raise ValueError(
                    'trusted examples were given, but centroids="dataset" would not use them: '
                    'make the filter with centroids="trusted"'
                )
            limits.warn_of_contamination(stacklevel=3)
            found = self._summarize(chunks, runner, settings.min_class_size)
        else:
            if trusted is None:
                raise ValueError(
                    'centroids="trusted" needs trusted=(X, y): clean examples, five of each class'
                )
            smallest = 2 if settings.gamma == "fisher" or settings.metric in ("z", "maha") else 1
            found = self._summarize(
                inputs.trusted_chunks(trusted), self._runner(hasattr(trusted, "images")), smallest
            )
        classes, centroids, vectors, shapes = found
        dataset = None
        if settings.tau > 0:
            other = self._summarize(chunks, runner, 1)
            classes = np.union1d(found.classes, other.classes)
            centroids, dataset = (
                _take(each.centroids, inputs.where(classes, each.classes))
                for each in (found, other)
            )
            if vectors is not None:
                vectors = vectors[0], inputs.where(found.classes, classes)[vectors[1]]
        reference = _make_reference(centroids, settings, vectors=vectors, dataset=dataset)
        if not all(np.isfinite(a).all() for a in jax.tree.leaves(reference.centroids.blocks)):
            raise ValueError(
                "the centroids are not finite: activations are so large that float32 does not hold "
                "their squares; scale the inputs of the network (preprocess)"
            )
        self.classes_, self.centroids_, self._shapes = classes, reference.centroids, shapes
        self.covariance_ = reference.covariance
        self.layer_weights_ = devices.to_host(reference.gamma)
        if isinstance(chunks, Whole):  # the labels of batches are checked by `filter`
            self._positions(chunks[0])
        warn_of_gaps(self.classes_)
        layers = zip(self.centroids_.paths, self.centroids_.sizes, strict=True)
        if flat := [path for path, size in layers if size == 1]:
            warnings.warn(
                "layers with a single position have no variance and are compared by their means "
                f"alone: {', '.join(flat)}",
                stacklevel=3,
            )
        return self

    def _filter(self, chunks: Whole | Batches, runner: "_Runner") -> FilterResult:
        reference = Reference(self.centroids_, jnp.asarray(self.layer_weights_), self.covariance_)
        reference = self._placed(reference)
        with_examples = devices.to_host(self.centroids_.count) > 0
        parts, ids, seen = [], [], 0
        for chunk in chunks:
            positions = self._positions(chunk)
            run = runner.of(chunk.x)
            self._check_shapes(chunk, run)
            distances, finite = run.passes.compare(
                (run.variables, reference), self._placed((chunk.x, positions))
            )
            _require_finite(finite, seen)
            distances = devices.to_host(distances)
            _require_finite(np.isfinite(distances[:, with_examples]).all(axis=1), seen, "distances")
            parts.append((distances, positions))
            ids.append(chunk.ids)
            seen += len(positions)
        if not parts:
            raise ValueError(_EMPTY)
        distances, positions = map(np.concatenate, zip(*parts, strict=True))
        config = {
            "filter": "characteristic_vectors",
            **dataclasses.asdict(self.settings),
            "layer_weights": tuple(self.layer_weights_.tolist()),
        }
        result = _decide(
            distances, positions, margin=self.settings.margin, settings=tuple(config.items())
        )
        result = with_classes(result, self.classes_)
        if all(each is not None for each in ids):
            result = dataclasses.replace(result, ids=np.concatenate(ids))
        warn_of_emptied_classes(result)
        return result

    def _summarize(self, chunks: Whole | Batches, runner: "_Runner", smallest: int) -> "_Summary":
        """Returns the centroids of all examples, which are held in memory only if they must be."""
        settings = self.settings
        if settings.metric == "maha" or settings.estimator != "mean":
            vectors, positions, classes, _ = self._collect(chunks, runner)
            if settings.metric == "maha" and len(positions) > MOST_EXAMPLES_OF_MAHA:
                raise ValueError(
                    f'metric="maha" of {len(positions)} examples needs matrices of '
                    f"{len(positions)} x {len(positions)}: give at most {MOST_EXAMPLES_OF_MAHA}, "
                    'e.g. as trusted examples, or take metric="z"'
                )
            centroids = _fit_centroids(
                vectors,
                positions,
                len(classes),
                estimator=settings.estimator,
                variance=settings.variance,
            )
            found = _Summary(classes, centroids, (vectors, positions), runner.shapes)
        else:
            found = self._accumulate(chunks, runner)
        _check_class_sizes(found, smallest)
        return found

    def _accumulate(self, chunks: Whole | Batches, runner: "_Runner") -> "_Summary":
        classes, centroids, seen = np.empty(0), None, 0
        for chunk in chunks:
            run, found = self._checked(chunk, runner), chunk.classes
            if centroids is None:
                classes = found
                centroids = no_examples(
                    run.passes, self.settings, run.variables, chunk.x, len(found)
                )
            elif not np.isin(found, classes).all():
                classes, known = np.union1d(classes, found), classes
                centroids = _take(centroids, inputs.where(classes, known))
            labels = inputs.where(found, classes)[chunk.positions]
            centroids, finite = run.passes.accumulate(
                run.variables, self._placed(centroids), self._placed((chunk.x, labels))
            )
            _require_finite(finite, seen)
            seen += len(labels)
        if centroids is None:
            raise ValueError(_EMPTY)
        return _Summary(classes, centroids, None, runner.shapes)

    def _collect(self, chunks: Whole | Batches, runner: "_Runner") -> Chunk:
        """Returns all examples as one chunk of vectors."""
        vectors, labels, ids, seen = [], [], [], 0
        for chunk in chunks:
            run = self._checked(chunk, runner)
            extracted, finite = run.passes.extract(run.variables, self._placed(chunk.x))
            _require_finite(finite, seen)
            vectors.append(extracted)
            labels.append(chunk.classes[chunk.positions])
            ids.append(chunk.ids)
            seen += len(chunk.positions)
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
        vectors = jax.tree.map(lambda *a: jnp.concatenate(a), *vectors)
        classes, positions = np.unique(np.concatenate(labels), return_inverse=True)
        names = np.concatenate(ids) if all(each is not None for each in ids) else None
        return Chunk(vectors, positions.astype(np.int32), classes, names)

    def _checked(self, chunk: Chunk, runner: "_Runner") -> "_Run":
        """Returns how to run the network on `chunk`; at first looks whether it mixes examples."""
        run, first = runner.of(chunk.x), not runner.looked
        if first and not isinstance(chunk.x, CharVec) and self.predicate is not is_batch_norm:
            alone, together = (
                run.passes.extract(
                    run.variables, self._placed(jax.tree.map(lambda a, n=n: a[:n], chunk.x))
                )[0]
                for n in (1, 2)
            )
            _require_equal(alone, together)
        runner.looked = True
        return run

    def _check_shapes(self, chunk: Chunk, run: "_Run"):
        """Raises if the layers see other sizes than when the centroids were fitted."""
        found = jax.eval_shape(run.passes.vectors, run.variables, one(chunk.x))
        same_layers = found.paths == self.centroids_.paths
        if same_layers and found.sizes != self.centroids_.sizes and self._shapes is not None:
            raise ValueError(
                f"X has {inputs.described(inputs.shapes_of(chunk.x))}, but the centroids are those "
                f"of {inputs.described(self._shapes)}: resize them to one size"
            )

    def _positions(self, chunk: Chunk) -> np.ndarray:
        """Returns the places of labels among the classes of the centroids."""
        unknown = chunk.classes[~np.isin(chunk.classes, self.classes_)]
        if len(unknown):
            raise ValueError(
                f"there are no centroids for the labels [{_some(unknown)}], only for "
                f"[{_some(self.classes_)}]: "
                + (
                    "add trusted examples of every class"
                    if self.settings.centroids == "trusted"
                    else "fit on all classes"
                )
            )
        return inputs.where(chunk.classes, self.classes_)[chunk.positions]

    def _runner(self, of_dataset: bool) -> "_Runner":
        return _Runner(self, of_dataset)

    def _mesh(self):
        return devices.data_mesh() if self.mesh is None else self.mesh

    def _placed(self, tree):
        return devices.replicate(tree, self._mesh())

    def _check_fitted(self):
        if not hasattr(self, "centroids_"):
            raise ValueError("call fit (or fit_filter) first: there are no centroids yet")


_PARAMETERS = [
    name
    for name, parameter in inspect.signature(CharacteristicVectorFilter).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
]


class _Run(NamedTuple):
    """Compiled passes and the variables that they take, on the devices."""

    passes: Passes
    variables: Any


class _Runner:
    """What runs the network for one call of a method: over images, or vectors where they come."""

    def __init__(self, owner: CharacteristicVectorFilter, of_dataset: bool):
        self.owner, self.of_dataset = owner, of_dataset
        self.looked = False  # whether examples are known not to mix
        self.shapes: Any = None  # of the examples that were seen first
        self._over_images: _Run | None = None

    def of(self, x: Any) -> _Run:
        """Returns how to run on `x`, and raises in plain words if the network cannot."""
        mesh, settings = self.owner._mesh(), self.owner.settings
        if isinstance(x, CharVec):
            return _Run(make_passes(None, settings, mesh), None)
        shapes = inputs.shapes_of(x)
        self.shapes = shapes if self.shapes is None else self.shapes
        if self._over_images is None:
            extractor, variables = _extractor(self.owner, x, self.of_dataset)
            run = make_passes(extractor, settings, mesh)
            try:
                jax.eval_shape(run.vectors, variables, one(x))
            except Exception as error:
                reason = explained(extractor, variables, x)
                if reason is None:  # the extraction's own words
                    raise
                raise ValueError(reason) from error
            self._over_images = _Run(run, self.owner._placed(variables))
        return self._over_images


class _Summary(NamedTuple):
    """Classes and their centroids, the vectors and labels where all are needed, and the shapes."""

    classes: np.ndarray
    centroids: Centroids
    vectors: tuple[CharVec, np.ndarray] | None
    shapes: Any


def _changed(settings: Any, changes: dict[str, Any]) -> FilterSettings:
    if not isinstance(settings, FilterSettings):
        raise TypeError(f"settings must be FilterSettings, not {settings!r}")
    if unknown := {*changes} - {field.name for field in dataclasses.fields(settings)}:
        known = ", ".join([*_PARAMETERS, *(field.name for field in dataclasses.fields(settings))])
        raise TypeError(f"unknown parameters: {', '.join(sorted(unknown))}; there are {known}")
    return settings.replace(**changes) if changes else settings


def _extractor(
    owner: CharacteristicVectorFilter, x: Any, of_dataset: bool
) -> tuple[Extractor, Any]:
    """Returns the network as it is run, and its variables."""
    model, variables, kwargs = owner.model, owner.variables, owner.apply_kwargs
    if isinstance(model, nnx.Module):
        if variables is not None and not isinstance(variables, dict):
            model = nnx.clone(model)
            nnx.update(model, variables)
            variables = None
        modes = {} if kwargs is None else {"train_kwargs": {}, "eval_kwargs": kwargs}
        model, kwargs = from_nnx(model, **modes), None
    elif isinstance(model, nn.Module) and kwargs is None:
        try:
            network: Any = as_network(model)
            kwargs = dict(network.eval_kwargs)
        except ValueError:  # its mode cannot be told from the signature: as it is
            kwargs = None
    elif not isinstance(model, nn.Module | Network):
        as_network(model)  # raises
    scaled = of_dataset or isinstance(model, Network) or hasattr(model, "num_features")
    if variables is None:
        variables = model.variables if isinstance(model, Network) else None
        if variables is None:
            raise TypeError(f"variables of the {type(model).__name__} are missing")
    if isinstance(model, Network):
        model = model.without_variables()
    extractor = Extractor(
        model,
        owner.predicate,
        owner.settings.stats,
        _preprocess(owner.preprocess, x, scaled),
        tuple(sorted((kwargs or {}).items())),
    )
    return extractor, variables


def _preprocess(given, x, scaled):
    """Returns what examples go through first, and raises if integers would be taken as they are."""
    if given is not None:
        return given
    for leaf in jax.tree.leaves(x):
        if leaf.ndim == 4 and leaf.dtype.kind in "iu":
            if scaled and leaf.dtype == np.uint8:
                return to_float
            raise ValueError(
                f"X holds images as integers ({leaf.dtype}), and nothing scales them as in the "
                "network's training: pass preprocess, e.g. jaxpoison.data.to_float for 8-bit "
                "images on [0, 1], or convert them"
            )
    return None


def _fitted_structure(settings, paths, sizes):
    leaf: Any = 0
    blocks = (Block(leaf, leaf),) * len(paths)
    centroids = Centroids(leaf, blocks, blocks, paths, sizes, settings.estimator, settings.variance)
    covariance = Mahalanobis(*[leaf] * 6) if settings.metric == "maha" else None
    return jax.tree.structure((centroids, covariance))


def _check_loaded(loaded: CharacteristicVectorFilter) -> None:
    """Raises ValueError if what a file holds does not fit together."""
    centroids, classes = loaded.centroids_, loaded.classes_
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(centroids)}
    if classes.ndim != 1 or lengths != {classes.shape}:
        raise ValueError(f"{len(classes)} classes, but centroids of {sorted(lengths)}")
    if loaded.layer_weights_.shape != (len(centroids.paths),):
        raise ValueError(f"{loaded.layer_weights_.shape} weights of {len(centroids.paths)} layers")


def _check_class_sizes(found: _Summary, smallest: int) -> None:
    counts = devices.to_host(found.centroids.count)
    small = counts < smallest
    if small.any():
        named = [
            f"{name!s}: {count:g}"
            for name, count in zip(found.classes[small], counts[small], strict=True)
        ]
        raise ValueError(
            f"too few examples for a centroid ({_some(named)}), at least {smallest} of each class "
            "are needed: add some, leave the class out, or set min_class_size (for "
            'centroids="dataset" a single example is its own centroid and can never be flagged)'
        )


def _require_finite(finite: Any, seen: int, what: str = "characteristic vectors") -> None:
    bad = np.flatnonzero(~devices.to_host(finite))
    if len(bad):
        raise ValueError(
            f"the {what} of {len(bad)} examples are not finite, the first at "
            f"indices {(bad[:10] + seen).tolist()}: remove these examples or repair them"
        )


def _require_equal(alone: CharVec, together: CharVec) -> None:
    """Raises if the first example has other vectors in company; by 2%, as bfloat16 rounds."""
    for path, a, b in zip(alone.paths, alone.blocks, together.blocks, strict=True):
        for mine, theirs in zip(a, b, strict=True):
            if jnp.linalg.norm(mine[0] - theirs[0]) > 0.02 * jnp.linalg.norm(mine[0]):
                raise ValueError(
                    f"{path}: what an example does there depends on the other examples of its "
                    "batch, as in training mode: pass what your model takes for evaluation mode "
                    "(apply_kwargs)"
                )


def _some(values: Any) -> str:
    """Returns the first few of many values, in words."""
    values = list(values)
    rest = f", and {len(values) - 20} more" if len(values) > 20 else ""
    return ", ".join(map(str, values[:20])) + rest


def _rows(value: Any, rows: np.ndarray) -> Any:
    """Returns these rows of an array, a data frame, a list or a dict of them."""
    if isinstance(value, Mapping | CharVec):
        return jax.tree.map(lambda a: _rows(a, rows), value)
    if hasattr(value, "iloc"):
        return value.iloc[rows]
    return value[rows] if hasattr(value, "shape") else np.asarray(value)[rows]


def _num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


_fit_centroids = jax.jit(fit_centroids, static_argnums=2, static_argnames=("estimator", "variance"))
_take = jax.jit(Centroids.take)
_make_reference = jax.jit(make_reference, static_argnums=1)
_decide = jax.jit(decide, static_argnames=("margin", "settings"))
