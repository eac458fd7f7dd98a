"""Pictures of results, drawn from arrays and result files."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.summary import Line
from jaxpoison.data import Dataset
from jaxpoison.runs import pictures

plt = pictures.pyplot()


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
      beta: bound of the noise; its picture spans [-beta, beta], gray is none.
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
    pictures.save(figure, path, dpi=130)


class Changed(NamedTuple):
    """Training images that were poisoned, and that HINT has changed.

    Attributes:
      clean: float [N, H, W, C] in [0, 1], before the attack.
      received: the same shape, after it.
      noise: the same shape, what HINT added.
      names: of their classes.
    """

    clean: np.ndarray
    received: np.ndarray
    noise: np.ndarray
    names: list[str]


_COLORS = {"clean": "0.6", "none": "tab:red", "recommended": "tab:green", "trusted": "0.6"}


MOST_IN_TWO_LINES = 8  # bars whose names have room for a second line


def summary(path: Path, lines: Sequence[Line], shown: Changed, title: str) -> None:
    """Draws accuracies as bars, next to images, poison and HINT's noise, both magnified.

    Args:
      path: PNG to write.
      lines: the networks, the first at the top.
      shown: a few images, the first at the top.
      title: of the picture.
    """
    poison = shown.received - shown.clean
    columns = [
        ("clean", shown.clean),
        magnified("what the attack\nchanged", poison),
        ("poisoned", shown.received),
        magnified("what HINT\nchanged", shown.noise),
        ("HINT trains on", np.clip(shown.received + shown.noise, 0, 1)),
    ]
    count = len(shown.names)
    height = max(1.8 + 1.15 * count, 1.2 + 0.33 * len(lines))
    figure = plt.figure(figsize=(13, height), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1])
    _bars(left.subplots(), lines)
    axes = right.subplots(count, len(columns), squeeze=False)
    for row, name in enumerate(shown.names):
        axes[row, 0].set_ylabel(f"label: {name}", fontsize=9)
        for axis, (heading, images) in zip(axes[row], columns, strict=True):
            axis.imshow(images[row].squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(heading, fontsize=9)
    figure.suptitle(title.replace(". ", ".\n"), fontsize=13, fontweight="bold")
    pictures.save(figure, path, dpi=110)


def magnified(name, noise):
    """Returns (heading, images) of noise as differences from gray, the largest one black or white.

    A few pixels may be larger: the largest is the 99.9th percentile.
    """
    largest = max(float(np.quantile(np.abs(noise), 0.999)), 1e-6)
    factor = 0.5 / largest
    return f"{name}, ×{factor:.2g}", np.clip(0.5 + factor * noise, 0, 1)


def _bars(axis, lines):
    places = range(len(lines))
    accuracies = [100 * line.accuracy for line in lines]
    colors = [_COLORS.get(line.defense, "tab:blue") for line in lines]
    axis.barh(places, accuracies, color=colors, height=0.65)
    names = [line.name.replace(", ", ",\n") for line in lines]
    if len(lines) > MOST_IN_TWO_LINES:
        names = [line.name.removeprefix("poisoned, ") for line in lines]
    axis.set_yticks(places, names, fontsize=10)
    axis.invert_yaxis()
    axis.set_xlim(0, 119)
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel("test images classified right, %")
    for place, accuracy in zip(places, accuracies, strict=True):
        axis.text(accuracy + 1, place, f"{accuracy:.1f}%", va="center", fontsize=11)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def predictions(
    path: Path,
    shown: Dataset,
    seen: dict[str, tuple[np.ndarray, np.ndarray]],
    *,
    class_names: tuple[str, ...],
    title: str,
    intended: np.ndarray | None = None,
) -> None:
    """Draws images with what several networks see, as Figures 2, 3 and 4 do.

    Args:
      path: PNG to write.
      shown: images, uint8 or float [N, H, W, C], with their true labels.
      seen: for each network by name: the labels [N] that it gives, and how sure it is, in [0, 1].
      class_names: names of the labels.
      title: of the picture.
      intended: the labels [N] that an attack wanted; given these, they are red and others black.
        Without, all wrong ones are red.
    """
    count = len(shown.labels)
    figure, axes = plt.subplots(
        2,
        count,
        figsize=(1.1 + 1.5 * count, 1.8 + 0.24 * len(seen)),
        height_ratios=[1.4, 0.24 * len(seen)],
        squeeze=False,
    )
    for column in range(count):
        picture, text = axes[:, column]
        image, truth = shown.images[column], shown.labels[column]
        picture.imshow(image.squeeze(), cmap="gray", interpolation="nearest")
        picture.set_title(class_names[truth], fontsize=9)
        picture.set_xticks([])
        picture.set_yticks([])
        text.set_axis_off()
        for row, (name, (labels, sure)) in enumerate(seen.items()):
            label = labels[column]
            bad = label != truth if intended is None else label == intended[column]
            color = "tab:green" if label == truth else "tab:red" if bad else "black"
            height = 1 - (row + 0.5) / len(seen)
            if column == 0:
                text.text(-0.05, height, name, ha="right", va="center", fontsize=8,
                          transform=text.transAxes)  # fmt: skip
            text.text(0.5, height, f"{class_names[label]} ({100 * float(sure[column]):.0f} %)",
                      ha="center", va="center", fontsize=8, color=color,
                      transform=text.transAxes)  # fmt: skip
    figure.suptitle(title, fontsize=10, y=1.02)
    pictures.save(figure, path, dpi=130, bbox_inches="tight")


def accuracy(path: Path, curves: dict[str, list[tuple[float, float, float, float | None]]]) -> None:
    """Draws test accuracy over the share of poisons.

    Args:
      path: PNG to write.
      curves: for each defense by name: (p, mean, sd, the paper's mean or None), in percent and in
        order of p. The paper's are dashed, on an axis of their own as the scale differs.
    """
    figure, (ours, theirs) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    for name, points in curves.items():
        ratios, means, spreads, published = zip(*points, strict=True)
        (line,) = ours.plot(ratios, means, marker="o", markersize=4, label=name)
        low, high = (np.add(means, sign * np.array(spreads)) for sign in (-1, 1))
        ours.fill_between(ratios, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        known = [(p, mean) for p, mean in zip(ratios, published, strict=True) if mean is not None]
        if known:
            theirs.plot(*zip(*known, strict=True), "--o", markersize=4, color=line.get_color())
    ours.set_title("ours, ± one standard deviation over seeds", fontsize=9)
    theirs.set_title("paper", fontsize=9)
    ours.set_ylabel("test accuracy, %")
    for axis in (ours, theirs):
        axis.set_xlabel("p, share of poisoned training images")
        axis.grid(alpha=0.3)
    ours.legend(fontsize=8)
    pictures.save(figure, path, dpi=130)
