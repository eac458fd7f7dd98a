"""What an audit says of a whole clean set: counts, time, memory, and the first 30 wrong labels.

  python benchmarks/audit_top.py --data DIR/cifar10 \
      --out benchmarks/results/audit_top_cifar10.json --picture docs/audit_top_cifar10.png

The set is that of TensorFlow Datasets, its training images; `--train` trains the second witness as
well. Nothing is planted but the audit's own canaries: what is flagged is an error of the set or a
false alarm. The picture shows the images that look most like wrong labels, flagged or not.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from jaxpoison import audit, runs
from jaxpoison.audit.verdict import Scores
from jaxpoison.data.readers import open_source

SHOWN = 30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of one data set")
    parser.add_argument("--train", action="store_true", help="train a network on the data")
    parser.add_argument("--folder", type=Path, help="keep the audit, to resume it; else a new one")
    parser.add_argument("--out", type=Path, required=True, help="results file (JSON)")
    parser.add_argument("--picture", type=Path, required=True, help="of the first findings (PNG)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        begin, clock = time.process_time(), time.perf_counter()
        with runs.Stages() as stages:
            done = audit.audit(
                open_source(options.data, split="train"),
                settings=audit.Settings(quick=not options.train, worth=False),
                folder=options.folder or temporary,
                tell=stages.tell,
            )
        seconds = time.process_time() - begin, time.perf_counter() - clock
    report = done.report
    of_labels = [f.p for f in done.judgement.families if f.threat.kind == "label"]
    first = np.argsort(np.min(of_labels, axis=0), kind="stable")[:SHOWN]
    neighbors, names = done.judgement.found["neighbors"], done.evidence.class_names
    assert isinstance(neighbors, Scores) and neighbors.suggested is not None
    rows = [
        [str(done.evidence.ids[row]), names[done.evidence.labels[row]], names[other],
         bool(done.flagged[row])]
        for row, other in zip(first, neighbors.suggested[first], strict=True)
    ]  # fmt: skip
    draw(done.evidence.images[first], rows, options.picture)
    out = {
        "script": "audit_top.py", "data": options.data.name, "trained": options.train,
        "images": report.data.num_images, "verdict": report.verdict, "findings": report.counts,
        "processor_seconds": seconds[0], "seconds": seconds[1],
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
        "power": {
            row.threat: [row.found, row.planted, row.false_alarms_per_thousand]
            for row in report.power
        },
        "first": rows,  # id, label, what its neighbors are, whether it is flagged
        "environment": runs.environment(),
    }  # fmt: skip
    runs.write_json(options.out, out)
    runs.say(f"{report.verdict}: {report.counts}, {seconds[1]:.0f} s")


def draw(images: np.ndarray, rows: list[list], path: Path) -> None:
    """Draws images, ten in a row, with their label and what is believed instead."""
    figure, axes = plt.subplots(3, 10, figsize=(11, 4.6), layout="constrained")
    for axis, image, (_, given, believed, _) in zip(axes.flat, images, rows, strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(f"{given}\n→ {believed}", fontsize=8)
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
