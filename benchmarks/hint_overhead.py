"""What HINT costs: training time with it over training time without, and where the time goes.

  python benchmarks/hint_overhead.py    # narrow ResNet, embedded CIFAR-10
  python benchmarks/hint_overhead.py --width 64 --data-dir DIR   # ResNet-18

Plain epochs and updates alternate in one run, so that both see the same machine; medians, first of
each (compilation) reported apart. The prediction counts passes over the training set: an epoch is
3 forward passes' worth of work (forward, backward to activations and to weights), an update is one
forward pass for the features and 2 r for the pixel maps (forward, backward to activations). The
overhead is for the paper's 80 epochs with 3 updates; the paper's code took 1.52 times as long
(Table V).
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax

from jaxpoison import data, defenses, models, runs, training
from jaxpoison.core import devices
from jaxpoison.training.hooks import with_ids

EPOCHS, UPDATES = 80, 3  # of the paper, for CIFAR-10
PARTS = ("features", "solve", "scores", "pixel_maps")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--ratio", type=float, default=0.5, help="share r of the examples")
    parser.add_argument("--rounds", type=int, default=6, help="epochs timed, after one to compile")
    parser.add_argument("--data-dir", help="whole CIFAR-10; default: the embedded slice")
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    options = parser.parse_args()

    splits = (
        data.load("cifar10", data_dir=options.data_dir)
        if options.data_dir
        else data.load_embedded("cifar10")
    )
    model = models.resnet18(width=options.width)
    recipe = dataclasses.replace(training.CIFAR10, epochs=options.rounds + 1, milestones=())
    updates = tuple(range(recipe.epochs))
    defense = defenses.hint(
        model,
        splits.validation,
        defenses.HintConfig(ratio=options.ratio, schedule=updates),
    )
    epochs = []

    def report(epoch, metrics):
        epochs.append(metrics)
        print(
            f"epoch {epoch}: {metrics['seconds'] - metrics['defense_seconds']:.2f} s, "
            f"update {metrics['defense_seconds']:.2f} s",
            flush=True,
        )

    training.fit(model, recipe, splits.train, key=jax.random.key(0), defense=defense, report=report)
    result = summarize(epochs, options.ratio, noise_seconds(defense, splits.train)) | {
        "model": f"resnet18(width={options.width})",
        "examples": len(splits.train.labels),
        "ratio": options.ratio,
        "source": splits.source,
        "environment": runs.environment(),
    }
    print(table(result))
    if options.out:
        runs.write_json(options.out, result)
    else:
        print(json.dumps(result["environment"]))


def noise_seconds(defense: defenses.Defense, train: data.Dataset) -> float:
    """Returns the median time of adding the noise, as HINT does before each epoch."""
    train = devices.replicate(with_ids(train), devices.data_mesh())
    state = defense.init(jax.random.key(0), train, 10**6)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        _, noisy, _ = defense.on_epoch(state, 10**6, None, train)  # an epoch without an update
        jax.block_until_ready(noisy)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def summarize(epochs: list[dict], ratio: float, every_epoch: float) -> dict:
    """Returns medians over all epochs but the first, and the overhead they amount to."""

    def median(seconds):
        return statistics.median(seconds(metrics) for metrics in epochs[1:])

    epoch = median(lambda metrics: metrics["seconds"] - metrics["defense_seconds"])
    update = median(lambda metrics: metrics["defense_seconds"])
    # Scores are computed at the first update alone, where they are compiled too.
    parts = {
        part: median(lambda metrics, part=part: metrics.get(f"{part}_seconds", 0.0))
        for part in PARTS
    } | {"scores": epochs[0].get("scores_seconds", 0.0)}
    return {
        "epoch_seconds": epoch,
        "update_seconds": update,
        "parts_seconds": parts,
        "first_update_seconds": epochs[0]["defense_seconds"],
        "every_epoch_seconds": every_epoch,
        "update_in_epochs": update / epoch,
        "update_in_epochs_predicted": (1 + 2 * ratio) / 3,
        "overhead": 1 + (UPDATES * update + EPOCHS * every_epoch) / (EPOCHS * epoch),
        "overhead_predicted": 1 + UPDATES * (1 + 2 * ratio) / (3 * EPOCHS),
    }


def table(result: dict) -> str:
    """Returns the result as Markdown."""
    epoch, parts = result["epoch_seconds"], result["parts_seconds"]
    lines = [["plain epoch", f"{epoch:.3f}", "1"]]
    for part in PARTS:
        note = " (first update only, with compilation)" if part == "scores" else ""
        lines.append([f"{part}{note}", f"{parts[part]:.3f}", f"{parts[part] / epoch:.3f}"])
    noise, update = result["every_epoch_seconds"], result["update_in_epochs"]
    predicted = f"(predicted {result['update_in_epochs_predicted']:.3f})"
    lines += [
        ["adding the noise, every epoch", f"{noise:.3f}", f"{noise / epoch:.3f}"],
        ["update in all", f"{result['update_seconds']:.3f}", f"{update:.3f} {predicted}"],
    ]
    return "\n".join(
        [
            "",
            f"{result['model']}, {result['examples']:,} examples, r = {result['ratio']}",
            "",
            runs.markdown(["part", "seconds", "in plain epochs"], lines),
            "",
            f"overhead, {UPDATES} updates in {EPOCHS} epochs: {result['overhead']:.4f} "
            f"(predicted {result['overhead_predicted']:.4f}; the paper's code 1.52)",
            "",
        ]
    )


if __name__ == "__main__":
    main()
