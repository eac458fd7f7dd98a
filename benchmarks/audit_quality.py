"""How good is the audit? Real label errors and planted poisons, every check, and rivals.

  python benchmarks/audit_quality.py --data-dir DIR --people cifar10n.npz \
      --rivals-python rivals/bin/python --out benchmarks/results/audit_quality.json
  python benchmarks/audit_quality.py --show benchmarks/results/audit_quality.json

A cell is a data set with one fault in it (`audit_threats.py`): audited twice, without and with
five trusted images a class, and handed to cleanlab's Datalab and ART's detectors
(`audit_rivals.py`, in an environment that has them) with the same features and the same
out-of-sample predictions. Every way to rank images is measured by average precision (AP), with a
bootstrap interval over images, and by the share of faults above all but 1% and 5% of the other
images. The audit's own rankings, of labels and of poisons, are those of its report: by q, then p.
Cells are resumed: what is in --work is not done again.
"""

import argparse
import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from audit_threats import Case, plant

from jaxpoison import audit, runs
from jaxpoison.audit import foreign, power
from jaxpoison.audit.verdict import Scores
from jaxpoison.data import Dataset
from jaxpoison.data.readers import Source
from jaxpoison.data.readers.tfds import newest_version

PLANTED = ("flips", "patch", "patches", "blend", "sig", "collision", "bullseye", "matching")
SHARES = (0.01, 0.05)
WHOLE = ("pgd", "dap", "dc")
"""Attacks on the whole set, at a share of 0.05 and of 1."""
PER_CLASS = 5
"""Trusted images of each class."""
DRAWS = 200
"""Of the bootstrap."""
SPARE = 500
"""Images for trusted ones, and of the test set for targets."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="folder of TensorFlow Datasets")
    parser.add_argument("--people", type=Path, help="CIFAR-10N's labels, .npz")
    parser.add_argument("--images", type=int, default=5_000, help="of each set, but where --full")
    parser.add_argument("--datasets", nargs="+", default=["cifar10", "mnist"])
    parser.add_argument("--only", nargs="+", default=[], help="cells, such as cifar10-flips-0.01")
    parser.add_argument("--full", action="store_true", help="all training images, no attack")
    parser.add_argument("--quick", action="store_true", help="audits without training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/audit-quality"))
    parser.add_argument("--rivals-python", help="interpreter that has cleanlab and ART")
    parser.add_argument("--out", type=Path, help="results file (JSON)")
    parser.add_argument("--show", type=Path, help="print a results file and do nothing else")
    options = parser.parse_args()
    if options.show:
        print(table(json.loads(options.show.read_text())["cells"]))
        return
    cells = [cell for name in options.datasets for cell in run_all(name, options)]
    print(table(cells))
    if options.out:
        paths = ("data_dir", "people", "work", "rivals_python", "out", "show")
        settings = {k: v for k, v in vars(options).items() if k not in paths}
        result = {"script": "audit_quality.py", "settings": settings, "cells": cells}
        runs.write_json(options.out, result | {"environment": runs.environment()})


def run_all(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the cells of one data set, in the order in which they are planned."""
    plans = [("clean", 0.0)]
    if name == "cifar10" and options.people is not None:
        plans += [("aggregate", 1.0), ("random1", 1.0)]
    if not options.full:
        plans += [(threat, share) for threat in PLANTED for share in SHARES]
        plans += [(threat, share) for threat in WHOLE for share in (0.05, 1.0)]
    case, trusted = load(name, options)
    cells = []
    for threat, share in plans:
        label = f"{name}-{threat}-{share:g}"
        if options.only and label not in options.only:
            continue
        path = options.work / f"{label}.json"
        if not path.exists():
            commit = runs.environment()["commit"]  # cells may be of several
            cell = {"dataset": name, "threat": threat, "share": share, "commit": commit}
            folder = options.work / f"{label}-audit"
            runs.write_json(path, cell | measure(case, trusted, threat, share, folder, options))
        cells.append(json.loads(path.read_text()))
        runs.say(f"{label}: {summary(cells[-1])}")
    return cells


def load(name: str, options: argparse.Namespace) -> tuple[Case, Dataset]:
    """Returns the images to plant faults into, and trusted ones, all at random."""
    import tensorflow_datasets as tfds

    folder = newest_version(Path(options.data_dir) / name)
    if folder is None:
        raise SystemExit(f"--data-dir: {options.data_dir} has no {name} of tensorflow-datasets")
    source: Any = tfds.builder_from_directory(folder).as_data_source()
    records = source["train"]
    order = np.random.default_rng(options.seed).permutation(len(records))
    count = len(order) - SPARE if options.full else options.images
    chosen = [records[int(row)] for row in order[: count + SPARE]]
    images = np.stack([record["image"] for record in chosen])
    labels = np.array([record["label"] for record in chosen], np.int32)
    people = {}
    if name == "cifar10" and options.people is not None:
        # Their order is that of the original files, which TFDS keeps in its ids.
        places = [int(record["id"].decode().removeprefix("train_")) for record in chosen[:count]]
        given = np.load(options.people, allow_pickle=False)
        people = {kind: given[kind][places].astype(np.int32) for kind in given.files}
    tests = [source["test"][row] for row in range(SPARE)]
    candidates = Dataset(
        np.stack([record["image"] for record in tests]),
        np.array([record["label"] for record in tests], np.int32),
    )
    spare = np.arange(count, count + SPARE)
    known = [spare[labels[spare] == k][:PER_CLASS] for k in range(labels.max() + 1)]
    trusted = np.concatenate(known)
    case = Case(name, images[:count], labels[:count], candidates, people, options.seed)
    return case, Dataset(images[trusted], labels[trusted])


def measure(case, trusted, threat, share, folder, options) -> dict[str, Any]:
    """Returns all that is known of one cell, whose audits are kept in `folder`."""
    images, labels, changed = case.images, case.labels, np.zeros(len(case.labels), bool)
    if threat != "clean":
        images, labels, changed = plant(case, threat, share)
    settings = audit.Settings(worth=False, quick=options.quick, seed=options.seed)
    out: dict[str, Any] = {"images": len(labels), "changed": int(changed.sum())}
    for name, known in (("alone", None), ("trusted", (trusted.images, trusted.labels))):
        begin, clock = time.process_time(), time.perf_counter()
        source = Source.from_arrays(images, labels)
        done = audit.audit(source, trusted=known, settings=settings, folder=folder)
        took = folder / f"{name}-seconds.json"
        if not took.exists():  # what is judged again finds its trainings done
            seconds = time.process_time() - begin, time.perf_counter() - clock
            runs.write_json(took, dict(zip(("processor_seconds", "seconds"), seconds, strict=True)))
        out[name] = judged(done, changed) | json.loads(took.read_text())
        if known is None and options.rivals_python:
            out["rivals"] = rivals(done, changed, options.rivals_python)
    out["cache_megabytes"] = (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 10**6
    )
    out["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    return out


def judged(done: audit.Audit, changed: np.ndarray) -> dict[str, Any]:
    """Returns what an audit found, and how well each of its scores ranks what was changed."""
    families = {family.threat.name: family for family in done.judgement.families}
    kinds = dict.fromkeys(family.threat.kind for family in families.values())
    ranked = {f"audit, {kind}": ranking(done, kind) for kind in kinds}
    checks = {
        check.name: found.score
        for check in done.judgement.checks
        if isinstance(found := done.judgement.found[check.name], Scores) and found.score is not None
    }
    kinds = np.full(len(changed), "", "U8")
    for finding in done.report.findings:
        kinds[finding.row] = finding.kind
    counts = {
        str(kind): {"of_changed": int((kinds[changed] == kind).sum()),
                    "of_others": int((kinds[~changed] == kind).sum())}
        for kind in np.unique(kinds[kinds != ""])
    }  # fmt: skip
    return {
        "verdict": done.report.verdict,
        "whole_set": [whole.reason for whole in done.report.wholes if whole.flagged],
        "findings": counts,
        "flagged_changed": int(done.flagged[changed].sum()),
        "flagged_others": int(done.flagged[~changed].sum()),
        "power": {
            name: {"planted": family.planted, "found": family.found,
                   "others_of_1000": family.others_flagged}
            for name, family in families.items()
        },
        "ranked": {
            name: quality(np.asarray(score, float), changed)
            for name, score in (ranked | checks).items()
        },
    }  # fmt: skip


def ranking(done: audit.Audit, kind: str) -> np.ndarray:
    """Returns int [N], highest first: the order of the report's findings of a kind, of all rows."""
    own = [family for family in done.judgement.families if family.threat.kind == kind]
    surest = power.surest(own, len(done.evidence.labels))
    pairs = np.stack([surest.q, surest.p], axis=1)
    _, place = np.unique(pairs, axis=0, return_inverse=True)
    return -place.ravel()


def rivals(done: audit.Audit, changed: np.ndarray, python: str) -> dict[str, Any]:
    """Returns how well others rank the same rows, and the lead over Datalab's label check."""
    evidence = done.evidence
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        probabilities = foreign.predictions(evidence).probabilities
        trained = evidence.trained
        np.savez(
            source, labels=evidence.labels, embedding=evidence.embedding,
            probabilities=probabilities,
            features=evidence.embedding if trained is None else trained.features,
        )  # fmt: skip
        script = Path(__file__).with_name("audit_rivals.py")
        begin = time.perf_counter()
        subprocess.run([python, script, source, target], check=True)
        seconds = time.perf_counter() - begin
        scores = dict(np.load(target, allow_pickle=False))
    found = {name: quality(score, changed) for name, score in scores.items()}
    if changed.any() and not changed.all() and "Datalab, label" in scores:
        low, high = lead(ranking(done, "label"), scores["Datalab, label"], changed)
        found["Datalab, label"] |= {"lead_low": low, "lead_high": high}
    return {"seconds": seconds, "ranked": found}


def quality(score: np.ndarray, changed: np.ndarray) -> dict[str, float]:
    """Returns AP with its 95% interval, and the recall at 1% and 5% of the other images."""
    if not changed.any() or changed.all():
        return {}
    # What a check cannot judge comes last.
    score = np.where(np.isnan(score), -np.inf, score)
    low, high = np.quantile(boot(lambda rows: average_precision(score[rows], changed[rows]),
                                 len(score)), [0.025, 0.975])  # fmt: skip
    recalls = {}
    for percent in (1, 5):
        threshold = np.quantile(score[~changed], 1 - percent / 100, method="higher")
        recalls[f"recall_{percent}"] = float(np.mean(score[changed] > threshold))
    ap = average_precision(score, changed)
    return {"ap": ap, "ap_low": float(low), "ap_high": float(high)} | recalls


def lead(ours, theirs, changed) -> tuple[float, float]:
    """Returns the 95% interval of our AP less theirs, over the same bootstrap samples."""
    found = boot(
        lambda rows: (
            average_precision(ours[rows], changed[rows])
            - average_precision(theirs[rows], changed[rows])
        ),
        len(ours),
    )
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def boot(statistic, size) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.array([statistic(random.integers(0, size, size)) for _ in range(DRAWS)])


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
    """Returns the mean over positives of the precision where each is found, highest first.

    Equal scores are found together: the precision is that after all of them.
    """
    order = np.argsort(-score, kind="stable")
    score, hits = score[order], positive[order]
    if not hits.any():
        return 0.0
    last = np.searchsorted(-score, -score, side="right") - 1
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[last][hits].mean())


def summary(cell: dict[str, Any]) -> str:
    """Returns a line on a cell."""
    alone = cell["alone"]
    ranked = {
        name: figures["ap"]
        for name, figures in alone["ranked"].items()
        if figures and name.startswith("audit")
    }
    figures = ", ".join(
        f"{name.removeprefix('audit, ')} AP {ap:.2f}" for name, ap in ranked.items()
    )
    return (
        f"{alone['verdict']}, flagged {alone['flagged_changed']} of {cell['changed']} and "
        f"{alone['flagged_others']} others; {figures}; {alone['processor_seconds']:.0f} s"
    )


LIKE = {
    "aggregate": ("mistake",), "random1": ("mistake",), "flips": ("flip",), "patch": ("patch",),
    "patches": ("patch",), "blend": ("blend",), "sig": ("wave",),
    "collision": ("collision",), "bullseye": ("collision",), "matching": ("collision",),
}  # fmt: skip
"""Canaries of the audit that are nearest to a fault; there are none for attacks on whole sets."""
RIVALS = (
    "Datalab, label",
    "Datalab, outlier",
    "ART, spectral signatures",
    "ART, activation clustering",
)


def table(cells: list[dict[str, Any]]) -> str:
    """Returns cells as Markdown: what the audit decides, who ranks faults best, and each check."""
    return "\n\n".join([decided(cells), ranked(cells), by_check(cells)])


def decided(cells):
    header = ["fault", "images", "verdict", "found", "with trusted", "others flagged",
              "with trusted", "such faults in the copy"]  # fmt: skip
    rows = []
    for cell in cells:
        alone, trusted = cell["alone"], cell["trusted"]
        planted = [
            f"{name} {each['found']} of {each['planted']}"
            for name, each in alone["power"].items()
            if name in LIKE.get(cell["threat"], ())
        ]
        verdict = alone["verdict"]
        if trusted["verdict"] != verdict:
            verdict += f"; with trusted {trusted['verdict']}"
        rows.append([
            title(cell), f"{cell['changed']:,} of {cell['images']:,}", verdict,
            f"{alone['flagged_changed']:,}", f"{trusted['flagged_changed']:,}",
            f"{alone['flagged_others']:,}", f"{trusted['flagged_others']:,}", ", ".join(planted),
        ])  # fmt: skip
    return runs.markdown(header, rows)


def ranked(cells):
    header = ["fault", "audit", "with trusted", "best check", *RIVALS]
    rows = []
    for cell in cells:
        best = max(
            ((name, x) for name, x in cell["alone"]["ranked"].items() if x and "audit" not in name),
            key=lambda pair: pair[1]["ap"],
            default=None,
        )
        if best is not None:
            others = cell.get("rivals", {}).get("ranked", {})
            cells_of = [combined(cell["alone"]), combined(cell["trusted"])]
            theirs = [figures(others.get(name)) for name in RIVALS]
            rows.append([title(cell), *cells_of, f"{best[0]}: {figures(best[1])}", *theirs])
    return runs.markdown(header, rows)


def by_check(cells):
    known = [cell for cell in cells if any(cell["trusted"]["ranked"].values())]
    names = dict.fromkeys(name for cell in known for name in cell["trusted"]["ranked"])
    rows = []
    for name in names:
        found = [cell["trusted"]["ranked"].get(name) for cell in known]
        rows.append([name, *("" if not x else f"{x['ap']:.2f}" for x in found)])
    return runs.markdown(["AP, with trusted images", *map(title, known)], rows)


def title(cell) -> str:
    """Returns the name of a cell."""
    share = f" {cell['share']:.0%}" if cell["threat"] in (*PLANTED, *WHOLE) else ""
    return f"{cell['dataset']}, {cell['threat']}{share}"


def combined(judged: dict[str, Any]) -> str:
    """Returns the better of the audit's rankings of labels and of poisons."""
    pairs = [x for name, x in judged["ranked"].items() if x and name.startswith("audit")]
    return figures(max(pairs, key=lambda x: x["ap"])) if pairs else ""


def figures(ranked: dict[str, float] | None) -> str:
    """Returns AP, recall at 1% and at 5%."""
    if not ranked:
        return ""
    return f"{ranked['ap']:.2f} ({ranked['recall_1']:.0%}, {ranked['recall_5']:.0%})"


if __name__ == "__main__":
    main()
