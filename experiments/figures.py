"""Pictures of results, drawn from arrays and result files."""

from pathlib import Path

import matplotlib
import numpy as np

from jaxpoison.data import Dataset

matplotlib.use("agg")
import matplotlib.pyplot as plt


def healthy_noise(
    path: Path,
    received: Dataset,
    noise: np.ndarray,
    perturbed: np.ndarray,
    *,
    seen: tuple[np.ndarray, np.ndarray],
    class_names: tuple[str, ...],
    beta: float,
) -> None:
    """Draws image, noise and perturbed image, with predictions before and after (cf. Figure 1).

    Args:
      path: PNG to write.
      received: the training images as collected, float [N, H, W, C], with their labels.
      noise: float [N, H, W, C], what HINT added.
      perturbed: float [N, H, W, C] in [0, 1], what was trained on.
      seen: the labels [N] that the trained model predicts for `received` and for `perturbed`.
      class_names: names of the labels.
      beta: bound of the noise; its picture spans [-beta, beta], grey is none.
    """
    images, (before, after) = received.images, seen
    scaled = np.clip(0.5 + noise / (2 * beta), 0, 1)
    figure, axes = plt.subplots(3, len(images), figsize=(1.5 * len(images), 5.4))
    for column in range(len(images)):
        label, seen, seen_now = (
            class_names[index] for index in (received.labels[column], before[column], after[column])
        )
        panels = (images[column], scaled[column], perturbed[column])
        titles = (f"label: {label}\nseen as: {seen}", "", f"seen as: {seen_now}")
        for axis, panel, title in zip(axes[:, column], panels, titles, strict=True):
            axis.imshow(panel.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(
        axes[:, 0], ("as received", f"noise, ±{beta:.3f}", "as trained on"), strict=True
    ):
        axis.set_ylabel(name, fontsize=9)
    figure.suptitle("Training images that HINT changed most, and what the trained model sees")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
