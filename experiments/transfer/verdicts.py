"""All filters on all trials of an attack, and what they found.

Images that trials share pass the extractor once; characteristic vectors are judged for all trials
in one compiled call. The rivals see features of the last layer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from jaxpoison import filters, network
from jaxpoison.attacks import PoisonedDataset, Victim
from jaxpoison.data import Dataset, to_float
from jaxpoison.evaluation import Outcome
from jaxpoison.filters import CharVec

DATASET, TRUSTED = "characteristic vectors", "characteristic vectors, trusted"
LATE = "characteristic vectors of the last three layers, trusted"
ORACLE = " (oracle)"  # in the name of a filter that is told how many poisons there are
ROC_GRID = np.linspace(0, 1, 51)


class View(NamedTuple):
    """What filters see of T trials: the clean images once, then the poisons of each trial.

    Attributes:
      charvec: of M distinct images.
      features: float32 [M, d].
      places: int32 [T, N], where each trial's images are among them.
      labels: int32 [N], the same in all trials.
      is_poisoned: bool [T, N].
      trusted: characteristic vectors and features of the trusted images, and their labels.
      target_labels: int [T].
      base_labels: int [T].
    """

    charvec: CharVec
    features: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    is_poisoned: np.ndarray
    trusted: tuple[CharVec, np.ndarray, np.ndarray]
    target_labels: np.ndarray
    base_labels: np.ndarray


class Verdict(NamedTuple):
    """What a filter says of T trials of N examples: flagged, and how suspicious."""

    flagged: np.ndarray  # bool [T, N]
    score: np.ndarray  # float32 [T, N]


def view(victim: Victim, clean: Dataset, poisoned: list[PoisonedDataset], trusted: Dataset) -> View:
    """Returns characteristic vectors and features of all trials."""
    model, variables = victim
    is_poisoned = np.stack([one.is_poisoned for one in poisoned])
    num_clean = len(clean.labels)
    places = np.tile(np.arange(num_clean, dtype=np.int32), (len(poisoned), 1))
    places[is_poisoned] = num_clean + np.arange(is_poisoned.sum())
    images = np.concatenate([clean.images, *(one.images[one.is_poisoned] for one in poisoned)])
    charvec, trusted_charvec = (extract(victim, part) for part in (images, trusted.images))
    features, trusted_features = (
        np.asarray(network.features(model, variables, part)) for part in (images, trusted.images)
    )
    targets = [one.target for one in poisoned if one.target is not None]
    return View(
        charvec, features, places, clean.labels, is_poisoned,
        (trusted_charvec, trusted_features, trusted.labels),
        np.array([target.label for target in targets]),
        np.array([target.base_label for target in targets]),
    )  # fmt: skip


def extract(victim: Victim, images: np.ndarray) -> CharVec:
    """Returns the characteristic vectors of images, uint8 or float32 in [0, 1], [N, H, W, C]."""
    return filters.CharacteristicVectorFilter(*victim, preprocess=to_float).extract(images)


def verdicts(view: View) -> dict[str, Verdict]:
    """Returns what every filter says.

    Two of the rivals' settings are the number of poisons itself; these are named as oracles, and
    stand beside the same filter without that knowledge.
    """
    trusted_charvec, trusted_features, trusted_labels = view.trusted
    trusted = trusted_features, trusted_labels
    num_poisons = view.is_poisoned.sum(axis=1)
    share = num_poisons / np.bincount(view.labels).max()
    rivals: dict[str, Callable[..., filters.FilterResult]] = {
        "nearest feature centroid": lambda f, y, t: filters.feature_centroid(f, y),
        "nearest feature centroid, trusted": lambda f, y, t: filters.feature_centroid(
            f, y, trusted=trusted
        ),
        "deep k-NN": lambda f, y, t: filters.deep_knn(f, y),
        "deep k-NN" + ORACLE: lambda f, y, t: filters.deep_knn(
            f, y, k=int(np.clip(2 * num_poisons[t], 1, len(y) - 1))
        ),
        "spectral signatures": lambda f, y, t: filters.spectral_signatures(f, y),
        "spectral signatures" + ORACLE: lambda f, y, t: filters.spectral_signatures(
            f, y, poison_share=share[t]
        ),
        "activation clustering": lambda f, y, t: filters.activation_clustering(
            f, y, num_components=min(10, f.shape[1]), max_relative_size=0.35
        ),
        "distance to the centroid": lambda f, y, t: filters.l2_centroid(f, y),
        "confident learning": lambda f, y, t: filters.confident_learning(f, y),
    }
    found = {}
    reference, num_classes = (trusted_charvec, trusted_labels), int(view.labels.max()) + 1
    for name, centroids_of, gamma in (
        (DATASET, None, "uniform"), (TRUSTED, reference, "uniform"), (LATE, reference, "last_3")
    ):  # fmt: skip
        found[name] = Verdict(
            *characteristic(
                view.charvec, view.places, view.labels, centroids_of, num_classes, gamma
            )
        )
    for name, rival in rivals.items():
        results = [
            rival(view.features[places], view.labels, trial)
            for trial, places in enumerate(view.places)
        ]
        found[name] = Verdict(
            np.stack([result.is_poison for result in results]),
            np.stack([result.score for result in results]),
        )
    return {name: Verdict(*map(np.asarray, verdict)) for name, verdict in found.items()}


@functools.partial(jax.jit, static_argnums=(4, 5))
def characteristic(charvec, places, labels, trusted, num_classes, gamma="uniform"):
    """Returns (flagged, score), [T, N]; the centroids are those of `trusted`, or of each trial."""

    centroids = "dataset" if trusted is None else "trusted"
    settings = filters.FilterSettings(centroids=centroids, gamma=gamma)

    def one_trial(places):
        mine = jax.tree.map(lambda array: array[places], charvec)
        result = filters.filter_vectors(
            mine, labels, num_classes, trusted=trusted, settings=settings
        )
        return result.is_poison, result.score

    return jax.lax.map(one_trial, places)


def measure(view: View, found: dict[str, Verdict], after: Outcome) -> dict[str, Any]:
    """Returns, for each filter, shares found and the outcome of heads trained on the rest.

    Args:
      view: T trials.
      found: F filters.
      after: of F * T heads, filter by filter.
    """
    poisons, clean = view.is_poisoned, ~view.is_poisoned
    measured, curves = {}, {}
    for number, (name, (flagged, score)) in enumerate(found.items()):
        mine = slice(number * len(poisons), (number + 1) * len(poisons))
        row = {
            "successes": int(after.success[mine].sum()),
            "trials": len(poisons),
            "accuracy": float(after.accuracy[mine].mean()),
            "fpr": _mean_share(flagged, clean),
        }
        if poisons.any():
            row |= {
                "tpr": _mean_share(flagged, poisons),
                "auroc": float(np.mean([*map(roc_auc_score, poisons, score)])),
            }
            rates = [roc_curve(*trial) for trial in zip(poisons, score, strict=True)]
            curve = np.mean([np.interp(ROC_GRID, fpr, tpr) for fpr, tpr, _ in rates], axis=0)
            curves[name] = np.round(curve, 4).tolist()
        measured[name] = row
    result: dict[str, Any] = {"filters": measured}
    if poisons.any():
        moved = shift(view)
        limit = filters.detectable_shift(poisons.sum(1)[0] / np.bincount(view.labels).max())
        result |= {
            "shift": float(moved.mean()),
            "share_beyond_limit": float(np.mean(moved > limit)),
            "share_beyond_half": float(np.mean(moved > 0.5)),
            "roc": curves,
        }
    return result


def _mean_share(flagged, among):
    return float(np.mean((flagged & among).sum(axis=1) / among.sum(axis=1)))


def directions(charvec: CharVec) -> np.ndarray:
    """Returns vectors [N, D] whose squared distances are 2 * cosine distance, mean over blocks."""
    return np.asarray(_directions(charvec))


@jax.jit
def _directions(charvec):
    blocks = [array for block in charvec.blocks for array in block]
    unit = [b / jnp.maximum(jnp.linalg.norm(b, axis=1, keepdims=True), 1e-12) for b in blocks]
    return jnp.concatenate(unit, axis=1) / np.sqrt(len(blocks))


def shift(view: View) -> np.ndarray:
    """Returns how far each poison moved from base to target class, [T, P]: 0 at the one's centroid,
    1 at the other's.

    Centroids are those of the clean images, and the distance is `directions`'.
    """
    vectors = directions(view.charvec)
    clean = vectors[: len(view.labels)]
    centers = np.stack([clean[view.labels == label].mean(0) for label in np.unique(view.labels)])
    base, way = centers[view.base_labels], centers[view.target_labels] - centers[view.base_labels]
    poisons = vectors[view.places[view.is_poisoned]].reshape(len(base), -1, vectors.shape[1])
    along = np.einsum("tpd,td->tp", poisons - base[:, None], way)
    return along / np.square(way).sum(1, keepdims=True)
