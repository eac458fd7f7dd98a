"""Trains the networks inside the package, and shows accuracy against time.

  python experiments/pretrain.py --preset cifar10 --data-dir DIR
  python experiments/pretrain.py --preset cifar10-48k --data-dir DIR
  python experiments/pretrain.py --preset mnist --data-dir DIR
  python experiments/pretrain.py --preset quick           # embedded slice, CPU

`cifar10` is `models.fast_cnn` on the 49,000 training images of seed 0's split,
`cifar10-48k` on the first 4,800 images of each class, as transfer learning
wants it; `mnist` is HINT's CNN. The test set is looked at after each epoch, and
nothing is chosen by it: the numbers that count are those of the last epoch.

Seconds are those of training, without the tests. In --run-dir are then
result.json, table.md, and weights/seedN.npz: kernels in float16, as they are in
the package; test_correct is of these. A seed that was killed continues.
"""

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from common import cli, tables
from transfer import settings as transfer

from jaxpoison import data, models, network, runs, training
from jaxpoison.core import hosts
from jaxpoison.data import Dataset
from jaxpoison.training import FAST, Checkpoints, Recipe

NETWORKS = {"fast_cnn": models.fast_cnn, "mnist_cnn": models.mnist_cnn}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run; the same settings in the same folder continue it."""

    run_dir: Path
    """Folder for everything."""
    dataset: Literal["cifar10", "mnist"] = "cifar10"
    """Which images."""
    network: Literal["fast_cnn", "mnist_cnn"] = "fast_cnn"
    """Which network."""
    recipe: Recipe = FAST
    """How it is trained."""
    images: Literal["split", "transfer"] = "split"
    """The training images of seed 0's split, or those of transfer learning's extractor."""
    data: Literal["embedded", "full"] = "full"
    """The small slice inside the package, or the whole set (see --data-dir)."""
    data_dir: str | None = None
    """Folder of tensorflow-datasets, or an .npz; default $TFDS_DATA_DIR."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial weights, order and augmentation; the images are the same for all."""
    checkpoint_every: int = 1
    """Epochs from one checkpoint to the next."""


CIFAR10 = Config(run_dir=Path("runs/pretrain-cifar10-fast"))
TRANSFER = dataclasses.replace(
    CIFAR10, run_dir=Path("runs/pretrain-cifar10-48k-fast"), images="transfer", seeds=(0,)
)
MNIST = Config(
    run_dir=Path("runs/pretrain-mnist-fast"),
    dataset="mnist",
    network="mnist_cnn",
    recipe=training.MNIST_FAST,
)
QUICK = dataclasses.replace(
    CIFAR10,
    run_dir=Path("runs/pretrain-cifar10-quick"),
    recipe=dataclasses.replace(FAST, epochs=4, batch_size=64),
    data="embedded",
    seeds=(0,),
)
PRESETS = {"cifar10": CIFAR10, "cifar10-48k": TRANSFER, "mnist": MNIST, "quick": QUICK}


@dataclasses.dataclass(eq=False, kw_only=True)
class Work(runs.Work):
    """A run in progress, counted in epochs."""

    config: Config
    train: Dataset
    test: Dataset


def study(config: Config) -> None:
    """Trains what is missing, and prints the table."""
    config = runs.plain(config)
    train, test, source = load(config)
    # Seeds only choose cells: a folder may be given more of them.
    lasting = {name: value for name, value in dataclasses.asdict(config).items() if name != "seeds"}
    output = runs.Run(config.run_dir, lasting)
    epochs = config.recipe.epochs
    with runs.Meter(epochs * len(config.seeds)) as meter:
        work = Work(config=config, output=output, meter=meter, train=train, test=test)
        for seed in config.seeds:
            if output.finished(f"seed{seed}") is None:
                output.finish(f"seed{seed}", pretrain(work, seed))
            work.done += epochs
    rows = output.rows()
    text = table(config, rows, [output.metrics(f"seed{row['seed']}") for row in rows], source)
    output.write_result(rows, text, kind=tables.PRETRAINING, source=source)
    runs.say("\n" + text)


def load(config: Config) -> tuple[Dataset, Dataset, str]:
    """Returns the training set, the test set, and where the images are from."""
    if config.images == "transfer":
        sets = transfer.load(
            transfer.Config(run_dir=config.run_dir, data=config.data, data_dir=config.data_dir)
        )
        return sets.pretraining, sets.test, sets.source
    if config.data == "embedded":
        splits = data.load_embedded(config.dataset)
    else:
        splits = hosts.on_all(lambda: data.load(config.dataset, data_dir=config.data_dir))
    return splits.train, splits.test, splits.source


def pretrain(work: Work, seed: int) -> dict[str, Any]:
    """Trains one network, writes its weights, and returns what became of it."""
    config, name = work.config, f"seed{seed}"
    model = NETWORKS[config.network]()
    processor = time.process_time()

    def report(epoch, metrics):
        nonlocal processor
        now = time.process_time()
        metrics["processor_seconds"], processor = now - processor, now
        work.output.log(name, epoch, metrics)
        work.tell(
            f"{name}: epoch {epoch + 1}/{config.recipe.epochs}, loss {metrics['loss']:.3f}, test "
            f"accuracy {100 * metrics['test_accuracy']:.2f}%, {metrics['seconds']:.0f} s",
            ahead=epoch + 1,
        )

    checkpoints = Checkpoints(
        work.output.folder / "checkpoints" / name,
        every=config.checkpoint_every,
        identity=f"{name} {work.output.config}",
    )
    try:
        state = training.fit(
            model, config.recipe, work.train, key=jax.random.key(seed), test=work.test,
            checkpoints=checkpoints, report=report,
        )  # fmt: skip
    finally:
        checkpoints.close()
    path = work.output.folder / "weights" / f"{name}.npz"

    def write():
        path.parent.mkdir(exist_ok=True)
        models.write_variables(path, jax.device_get(state.variables))

    hosts.on_main(write)
    rounded = hosts.on_all(lambda: models.read_variables(path))
    predicted = network.predict(model, rounded, work.test.images)
    history = work.output.metrics(name)
    return {
        "seed": seed,
        "test_accuracy": history[-1]["test_accuracy"],
        "test_correct": int(np.sum(predicted == work.test.labels)),
        "test_accuracies": [line["test_accuracy"] for line in history],
        "train_seconds": sum(line["seconds"] for line in history),
        "processor_seconds": sum(line["processor_seconds"] for line in history),
        "num_train": len(work.train.labels),
        "num_test": len(work.test.labels),
        "sha256": hosts.on_main(lambda: hashlib.sha256(path.read_bytes()).hexdigest()),
    }


def table(
    config: Config,
    rows: list[dict[str, Any]],
    histories: list[list[dict[str, float]]],
    source: str,
) -> str:
    """Returns accuracy against time, in Markdown; `histories` are the metrics of each row."""
    caption = (
        f"{config.network}, {rows[0]['num_train']:,} images, {source}. Mean ± standard deviation "
        f"over {len(rows)} seeds: initial weights and order."
    )
    header = [
        *("epoch", "minutes", "of processors, tests included"),
        *("test accuracy, %", "of each seed"),
    ]
    lines = []

    def of(name):
        return np.array([[line[name] for line in history] for history in histories])

    minutes, processor = (of(name).cumsum(1) / 60 for name in ("seconds", "processor_seconds"))
    accuracies = 100 * of("test_accuracy")
    for epoch in range(accuracies.shape[1]):
        now = accuracies[:, epoch]
        spread = f" ± {now.std(ddof=1):.2f}" if len(now) > 1 else ""
        each = ", ".join(f"{accuracy:.2f}" for accuracy in now)
        lines.append(
            [
                str(epoch + 1),
                f"{minutes[:, epoch].mean():.1f}",
                f"{processor[:, epoch].mean():.1f}",
                f"{now.mean():.2f}{spread}",
                each,
            ]
        )
    correct = ", ".join(f"{row['test_correct']:,}" for row in rows)
    ending = f"Right with kernels in float16, of {rows[0]['num_test']:,}: {correct}."
    return "\n".join([caption, "", runs.markdown(header, lines), "", ending, ""])


if __name__ == "__main__":
    cli.main(PRESETS, __doc__, study)
