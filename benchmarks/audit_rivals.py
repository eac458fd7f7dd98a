"""What cleanlab's Datalab and ART's detectors make of the audit's own features and predictions.

Runs in a process of its own, in whatever environment has the two packages:

  python audit_rivals.py IN.npz OUT.npz

IN holds `labels` [N], `embedding` [N, D] of the foreign witness, its out-of-sample `probabilities`
[N, K], and `features` [N, F] of the network that was trained on the data. OUT gets a score for each
image, higher for worse, under the detector's name, or no entry where a package is absent.
"""

import importlib
import sys
import warnings
from typing import Any

import numpy as np


def main(source: str, target: str) -> None:
    given = dict(np.load(source, allow_pickle=False))
    found = {}
    for detector in (datalab, art):
        try:
            found |= detector(**given)
        except ImportError as error:
            print(f"left out: {detector.__name__} ({error})", flush=True)
    np.savez(target, **found)


def datalab(labels, embedding, probabilities, **_) -> dict[str, np.ndarray]:
    """Returns scores of Datalab's checks of labels and of outliers."""
    datalab = importlib.import_module("cleanlab").Datalab

    # It wants every class to have examples.
    present, labels = np.unique(labels, return_inverse=True)
    probabilities = probabilities[:, present].astype(float)
    lab = datalab({"label": labels}, label_name="label", verbosity=0)
    lab.find_issues(
        pred_probs=probabilities / probabilities.sum(axis=1, keepdims=True),
        features=np.asarray(embedding, float),
        issue_types={"label": {}, "outlier": {}},
    )
    issues = lab.get_issues()
    return {
        f"Datalab, {kind}": 1 - issues[f"{kind}_score"].to_numpy() for kind in ("label", "outlier")
    }


def art(labels, features, probabilities, **_) -> dict[str, np.ndarray]:
    """Returns spectral signatures' scores, and 1 for what activation clustering calls poison."""
    poison = importlib.import_module("art.defences.detector.poison")
    estimators = importlib.import_module("art.estimators")
    classification = importlib.import_module("art.estimators.classification")
    bases: Any = (
        classification.ClassifierMixin, estimators.NeuralNetworkMixin, estimators.BaseEstimator
    )  # fmt: skip

    class Known(*bases):
        """A classifier of which the last layer's activations are known; its inputs are rows."""

        layer_names = ("features",)
        nb_classes = probabilities.shape[1]
        input_shape = (1,)

        def __init__(self):
            super().__init__(model=None, clip_values=None, channels_first=False)

        def get_activations(self, x, layer, batch_size, framework=False):
            return features[x[:, 0]]

        def predict(self, x, **kwargs):
            return probabilities[x[:, 0]]

        def fit(self, x, y, **kwargs):
            raise NotImplementedError

    rows, onehot = np.arange(len(labels))[:, None], np.eye(probabilities.shape[1])[labels]
    # A share of 1 makes it report a score for every image.
    spectral = poison.SpectralSignatureDefense(Known(), rows, onehot, expected_pp_poison=1.0)
    report, _ = spectral.detect_poison()
    scores = np.array([report.get(row, -np.inf) for row in range(len(labels))])
    clustered = poison.ActivationDefence(Known(), rows, onehot)
    _, clean = clustered.detect_poison(nb_clusters=2, nb_dims=10, reduce="PCA")
    return {"ART, spectral signatures": scores, "ART, activation clustering": 1.0 - np.array(clean)}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(*sys.argv[1:])
