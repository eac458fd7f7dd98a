"""What every filter returns: a verdict for each example, and views of it for other libraries.

- scikit-learn: `result.to_sklearn()` (1 in, -1 out); `result.decision_function()` (high = normal)
- imbalanced-learn: `CharacteristicVectorFilter.fit_resample` and `sample_indices_`
- ART: `result.to_art()`, that is (report, list with 1 = clean)
- cleanlab: `result.to_cleanlab()` (True = issue), `result.ranked_indices()`; its own functions take
  `result.label_indices` and `result.pred_probs()`
- pandas: `result.to_frame()`
- Hugging Face datasets: `ds.select(result.keep_indices)`
- grain, and data sources of TFDS:
  `grain.MapDataset.source(result.keep_indices).map(lambda index: ds[int(index)])`
- tf.data: `keep = tf.constant(result.keep_mask)`, `ds.enumerate().filter(lambda i, _: keep[i])`;
  `ds` must have the order in which the filter saw the examples
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpoison.core.extras import require
from jaxpoison.filters.centroids import class_numbers, known


class ContaminationWarning(UserWarning):
    """The filter may be blind: its reference may be poisoned, or it threw too much away."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FilterResult:
    """The verdict on N examples, in the order in which they came; a pytree.

    Attributes:
      is_poison: bool [N], True = flagged.
      score: float32 [N], larger = more suspicious. Units are the filter's.
      labels: [N], the labels the examples came with.
      classes: [K], all labels, ascending.
      real_label: [N], the label that the filter would give; None where it has no opinion.
      distances: float32 [N, K], to each class, in the order of `classes`; None likewise.
      settings: (name, value) of the filter and its settings, oracle quantities included.
      ids: [N], names of the examples: the index of the pandas Series that the labels came in, or
        the ids of a `data.Dataset`; None where they have none.
    """

    is_poison: Any
    score: Any
    labels: Any
    classes: Any
    real_label: Any
    distances: Any
    settings: tuple[tuple[str, Any], ...] = dataclasses.field(metadata={"static": True})
    ids: Any = None

    @property
    def config(self) -> dict[str, Any]:
        """The filter and its settings."""
        return dict(self.settings)

    @property
    def keep_mask(self) -> np.ndarray:
        """bool [N], True = keep."""
        return ~np.asarray(self.is_poison)

    @property
    def keep_indices(self) -> np.ndarray:
        """int64 [N'], ascending."""
        return np.flatnonzero(self.keep_mask).astype(np.int64)

    @property
    def label_indices(self) -> np.ndarray:
        """Places of `labels` among `classes`, int64 [N], 0 to K - 1: what cleanlab calls labels."""
        return np.searchsorted(np.asarray(self.classes), np.asarray(self.labels))

    @property
    def real_label_indices(self) -> np.ndarray | None:
        """Places of `real_label` among `classes`, int64 [N]; None where there is no opinion."""
        if self.real_label is None:
            return None
        return np.searchsorted(np.asarray(self.classes), np.asarray(self.real_label))

    @property
    def per_class(self) -> dict[str, np.ndarray]:
        """`class`, `n`, `flagged` and `share` of each class, [K] each; made for a data frame."""
        classes, places = np.asarray(self.classes), self.label_indices
        n = np.bincount(places, minlength=len(classes))
        flagged = np.bincount(places[np.asarray(self.is_poison)], minlength=len(classes))
        return {"class": classes, "n": n, "flagged": flagged, "share": flagged / np.maximum(n, 1)}

    def ranked_indices(self) -> np.ndarray:
        """Returns all examples, int64 [N], most suspicious first."""
        return np.argsort(-np.asarray(self.score), kind="stable").astype(np.int64)

    def decision_function(self) -> np.ndarray:
        """Returns scikit-learn's score, float32 [N]: larger = more normal."""
        return -np.asarray(self.score)

    def to_sklearn(self) -> np.ndarray:
        """Returns what an outlier detector of scikit-learn predicts: int64 [N], 1 in, -1 out."""
        return np.where(self.is_poison, -1, 1)

    def to_art(self) -> tuple[dict[str, Any], list[int]]:
        """Returns (report, is_clean) as ART's `detect_poison` does: 1 = clean, 0 = poison."""
        report = {name: array.tolist() for name, array in self.per_class.items()}
        return report | {"config": self.config}, self.keep_mask.astype(int).tolist()

    def to_cleanlab(self) -> np.ndarray:
        """Returns cleanlab's mask, bool [N]: True = issue."""
        return np.asarray(self.is_poison)

    def to_frame(self) -> Any:
        """Returns a pandas DataFrame with a row for each example, in their order.

        Columns: label, is_poison, score, and real_label where the filter has an opinion. The index
        is `ids`, or 0 to N - 1.

        Raises:
          ImportError: without pandas.
        """
        columns = {
            "label": np.asarray(self.labels),
            "is_poison": np.asarray(self.is_poison),
            "score": np.asarray(self.score),
        }
        if self.real_label is not None:
            columns["real_label"] = np.asarray(self.real_label)
        return require("pandas", extra="experiments").DataFrame(columns, index=self.ids)

    def pred_probs(self) -> np.ndarray:
        """Returns softmax(-distances), float64 [N, K]: the place of cleanlab's `pred_probs`.

        Raises:
          ValueError: if the filter has no distances to classes.
        """
        if self.distances is None:
            raise ValueError(f"{self.config['filter']} has no distances to classes")
        nearness = -np.asarray(self.distances, np.float64)
        odds = np.exp(nearness - nearness.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)


def decide(
    distances: jax.Array, labels: jax.Array, *, margin: float, settings: tuple[tuple[str, Any], ...]
) -> FilterResult:
    """Returns the verdict by nearest class; pure, may be put under `jit`.

    score = distance to the own class - distance to the nearest other one; flagged where it is
    above `margin`, so a tie is kept (eqs. 6 and 7 of arXiv 2403.13523 at margin 0). An example
    whose distances are not numbers has no score (NaN) and is flagged; so, under `jit`, has one
    whose label is not in [0, K).

    Args:
      distances: float32 [N, K], K >= 2.
      labels: int32 [N], in [0, K).
      margin: how much nearer another class must be.
      settings: what to tell in `FilterResult.config`.

    Raises:
      ValueError: for a single class; for labels that are not [N] integers; outside `jit` for
        labels out of range.
    """
    num_examples, num_classes = distances.shape
    if num_classes < 2:
        raise ValueError("there is one class only: a filter that compares classes needs two")
    labels = class_numbers(labels, num_examples, num_classes)
    own = jnp.arange(num_classes) == labels[:, None]
    other = jnp.min(jnp.where(own, jnp.inf, distances), axis=1)
    score = jnp.sum(jnp.where(own, distances, 0), axis=1) - other
    score = jnp.where(known(labels, num_classes), score, jnp.nan)
    return FilterResult(
        is_poison=~(score <= margin),
        score=score,
        labels=labels,
        classes=jnp.arange(num_classes),
        real_label=jnp.argmin(distances, axis=1),
        distances=distances,
        settings=settings,
    )


def with_classes(result: FilterResult, classes: np.ndarray) -> FilterResult:
    """Returns `result` in NumPy arrays, with labels from `classes` [K] instead of 0 to K - 1."""
    result = jax.tree.map(np.asarray, result)
    real = result.real_label
    return dataclasses.replace(
        result,
        labels=classes[result.labels],
        classes=classes,
        real_label=None if real is None else classes[real],
    )


def warn_of_emptied_classes(result: FilterResult) -> None:
    """Warns if a class lost more than half of its examples, or all."""
    table = result.per_class
    heavy = table["share"] > 0.5
    if heavy.any():
        losses = ", ".join(
            f"{name!s}: {flagged} of {n}{' (all)' if flagged == n else ''}"
            for name, n, flagged in zip(
                *(table[column][heavy] for column in ("class", "n", "flagged")), strict=True
            )
        )
        warnings.warn(
            f"more than half of a class was flagged ({losses}): poisons may be its majority, so "
            "that the rest is what should go, or the features do not tell the classes apart; "
            "look at the examples before training",
            ContaminationWarning,
            stacklevel=3,
        )


def top_of_each_class(score: np.ndarray, labels: np.ndarray, share: float) -> np.ndarray:
    """Returns the floor(share * n_y) highest scores of each class, bool [N], but never all."""
    counts = np.bincount(labels)
    # Products such as 0.15 * 20 may land just below the integer that is meant.
    drop = np.minimum(np.floor(share * counts + 1e-9).astype(int), counts - 1)
    order = np.lexsort((-score, labels))
    rank = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    flagged = np.zeros(len(labels), bool)
    flagged[order] = rank < drop[labels[order]]
    return flagged


def warn_of_gaps(classes: np.ndarray) -> None:
    """Warns if integer labels skip a number: a class may have got lost on the way."""
    if classes.dtype.kind not in "iu":
        return
    low, high = int(classes[0]), int(classes[-1])
    if high - low + 1 != len(classes):
        # In Python's integers: differences of 64-bit hashes overflow.
        first = next(i for i, c in enumerate(classes.tolist(), low) if c != i)
        warnings.warn(
            f"the labels have gaps: {len(classes)} classes among {low}..{high}, {first} is none of "
            f"them; taken as {len(classes)} classes, in the order of result.classes",
            stacklevel=3,
        )
