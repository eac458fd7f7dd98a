"""The commands `jaxpoison audit`, `clean`, `demo` and `explain`."""

import argparse
import importlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxpoison
from jaxpoison import models, network, runs
from jaxpoison.audit import _audit, clean, decisions, findings, gate
from jaxpoison.audit._explain import explain
from jaxpoison.audit.evidence import SIZE
from jaxpoison.audit.records import Report
from jaxpoison.core.checks import listing
from jaxpoison.core.files import write_text
from jaxpoison.data import Dataset, load_embedded
from jaxpoison.data.readers import open_source
from jaxpoison.data.readers.contents import MAX_PIXELS, Unreadable
from jaxpoison.data.readers.decode import decode

FAILED = 1
"""Exit status where a rule of `--fail-on` is violated."""


def audit_parser() -> argparse.ArgumentParser:
    """Returns the parser of `jaxpoison audit`."""
    parser = argparse.ArgumentParser(
        prog="jaxpoison audit",
        description="Find what is broken, mislabeled or poisoned in labeled images. "
        "The data are never changed; everything is written to --out.",
    )
    parser.add_argument(
        "data",
        nargs="?",
        help="a folder with a folder of images for each class, an .npz file, a table of paths and "
        "labels, or a folder of tensorflow-datasets or Hugging Face datasets",
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: DATA-audit)")
    parser.add_argument(
        "--trusted", metavar="DATA", help="images with labels that you have checked; 5 a class help"
    )
    parser.add_argument(
        "--network",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns (model, variables), or an NNX model: your "
        "own trained network for 32x32 images, in place of one that is trained here",
    )
    parser.add_argument("--quick", action="store_true", help="train nothing: fewer checks, faster")
    parser.add_argument(
        "--no-worth", action="store_true", help="do not retrain without what was flagged"
    )
    parser.add_argument(
        "--certify",
        type=int,
        metavar="PARTS",
        help="say what share of predictions no few images can change: a vote of linear "
        "classifiers, each trained on one of so many parts of the data; 50 is a start",
    )
    parser.add_argument("--decisions", type=Path, help="decisions.json that the report page saved")
    parser.add_argument("--baseline", type=Path, help="findings.json of an earlier audit")
    parser.add_argument(
        "--fail-on",
        metavar="RULE",
        action="append",
        default=[],
        help="exit with status 1 if more is found, such as poison>0 or new:label>10; repeatable",
    )
    parser.add_argument("--split", help="part of the data, such as train")
    parser.add_argument("--root", type=Path, help="folder that paths in a table are relative to")
    parser.add_argument("--image-column", help="of a table")
    parser.add_argument("--label-column", help="of a table")
    parser.add_argument("--follow-links", action="store_true", help="follow symbolic links")
    parser.add_argument("--epochs", type=int, help="passes of the network that is trained")
    parser.add_argument("--seed", type=int, default=0, help="of canaries and trainings")
    parser.add_argument(
        "--config", type=Path, help="config.json of an earlier audit, to be repeated"
    )
    return parser


def audit_main(arguments: Sequence[str]) -> int:
    """Runs `jaxpoison audit`; returns the exit status."""
    parser = audit_parser()
    options = parser.parse_args(arguments)
    if options.config is not None:
        options = parser.parse_args(_replayed(options.config, arguments))
    if options.data is None:
        parser.error("DATA is missing: the folder or file to audit")
    rules = [gate.parse(rule) for rule in options.fail_on]
    baseline = None if options.baseline is None else findings.read(options.baseline)
    decided = None if options.decisions is None else decisions.read(options.decisions)
    data = Path(options.data).expanduser()
    out = _beside(data) if options.out is None else options.out.expanduser()
    _check_apart(data, out)
    source = _opened(options)
    command = _command(options)
    result = run(
        source,
        out,
        name=str(data),
        command=command,
        trusted=options.trusted,
        network=None if options.network is None else _loaded(options.network),
        settings=_settings(options),
        decided=decided,
    )
    failed = gate.violated(rules, result.report, baseline)
    for rule in failed:
        runs.say(f"--fail-on: {rule}")
    return FAILED if failed else 0


def _settings(options):
    """Returns the settings that the arguments of an audit describe."""
    return _audit.Settings(
        quick=options.quick,
        epochs=options.epochs,
        worth=not options.no_worth,
        certify=options.certify,
        seed=options.seed,
    )


def _opened(options):
    """Returns the source that the arguments of an audit describe."""
    return open_source(
        Path(options.data).expanduser(),
        split=options.split,
        root=options.root,
        image_column=options.image_column,
        label_column=options.label_column,
        follow_links=options.follow_links,
    )


def run(
    source: Any, out: Path, *, name: str, command: Sequence[str], **options: Any
) -> _audit.Audit:
    """Audits, shows progress, writes the folder, prints the verdict."""
    start = time.monotonic()
    config = {"command": list(command), "version": jaxpoison.__version__}
    with runs.Stages() as stages:
        result = _audit.audit(
            source,
            folder=out,
            name=name,
            config=config,
            replay=shlex.join(["jaxpoison", *command]),
            tell=stages.tell,
            **options,
        )
    result.write(out)
    write_text(out / "config.json", json.dumps(config, indent=1) + "\n")
    runs.say(_verdict(result.report, out, time.monotonic() - start))
    return result


def _beside(data):
    """Returns the default folder: in the working directory, or next to the data if that is them."""
    place = data.resolve()
    inside = Path.cwd() == place or place in Path.cwd().parents
    return (place.parent if inside else Path()) / f"{place.name}-audit"


def _check_apart(data, out):
    inside, outside = out.resolve(), data.resolve()
    if inside == outside or (data.is_dir() and outside in inside.parents):
        raise ValueError(
            f"--out {out} is inside of the data, {data}, which are never changed: choose another "
            "folder"
        )


def _command(options):
    """Returns the arguments that repeat the audit, paths made absolute."""
    parts = ["audit", str(Path(options.data).expanduser().resolve())]
    for name in ("trusted", "root", "decisions"):
        value = getattr(options, name)
        if value is not None:
            parts += [f"--{name}", str(Path(value).expanduser().resolve())]
    for name in ("network", "split", "image_column", "label_column", "epochs", "certify"):
        value = getattr(options, name)
        if value is not None:
            parts += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("quick", "no_worth", "follow_links"):
        if getattr(options, name):
            parts.append(f"--{name.replace('_', '-')}")
    return [*parts, "--seed", str(options.seed)]


def _replayed(path, arguments):
    """Returns the arguments in a config.json, followed by the other ones of this command."""
    config = runs.read_json(path, "give the config.json that an audit wrote")
    command = config.get("command") if isinstance(config, dict) else None
    if (
        not isinstance(command, list)
        or command[:1] != ["audit"]
        or not all(isinstance(part, str) for part in command)
    ):
        raise ValueError(
            f"{path} is not the config.json of an audit: it has no command that starts with 'audit'"
        )
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    return [*command[1:], *parser.parse_known_args(list(arguments))[1]]


def _loaded(place):
    """Returns what MODULE:FUNCTION returns."""
    module, _, function = place.partition(":")
    if place in models.PRETRAINED:
        return models.load_pretrained(place)
    if not function:
        raise ValueError(
            f"--network {place!r}: expected MODULE:FUNCTION, such as mycode:load, or one of "
            f"{sorted(models.PRETRAINED)}"
        )
    sys.path.insert(0, "")  # as `python -m` has it: modules of the working directory
    try:
        load = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(
            f"--network {place}: {error}; run the command where {module}.py is, or install it"
        ) from error
    if not callable(load):
        raise ValueError(f"--network {place}: {module} has no function {function!r}")
    result = load()
    if not isinstance(result, tuple):
        result = (result, None)
    if len(result) != 2:
        raise ValueError(f"--network {place}: it returns {len(result)} values, not two")
    try:
        network.as_network(result[0])
    except TypeError as error:
        raise ValueError(f"--network {place}: {error}") from error
    return result


def _verdict(report: Report, out: Path, seconds: float) -> str:
    lines = ["", f"{report.verdict.upper()}  ({seconds:.0f} s)", *report.summary, ""]
    if report.power:
        lines.append("Planted into a copy of your data, and found:")
        lines += [runs.columns([_outcome(row) for row in report.power], right=(1, 3)), ""]
    found = [
        [one.kind, ascii(one.id)[1:-1], *(one.reasons[:1] or [""])] for one in report.findings[:10]
    ]
    if found:
        lines.append(runs.columns(found))
    if len(report.findings) > 10:
        lines.append(f"  ... {len(report.findings) - 10:,} more")
    return "\n".join([*lines, "", f"Report: {out / 'report.html'}"])


def _outcome(row):
    """Returns what was found of a planted threat, in cells."""
    if row.whole:
        return [row.title, "", f"the set is {'' if row.found else 'not '}flagged", ""]
    alarms = f"{row.false_alarms_per_thousand:.1f} of 1,000 others"
    return [row.title, f"{row.found:,}", f"of {row.planted:,}", alarms]


def clean_main(arguments: Sequence[str]) -> int:
    """Runs `jaxpoison clean`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="jaxpoison clean",
        description="Copy the data of an audit without what was flagged and not overruled.",
    )
    parser.add_argument("audit", type=Path, help="folder of the audit")
    parser.add_argument("--out", type=Path, required=True, help="folder for the copy; new or empty")
    parser.add_argument("--decisions", type=Path, help="decisions.json that the report page saved")
    options = parser.parse_args(arguments)
    decided = None if options.decisions is None else decisions.read(options.decisions)
    _, audited = _audited(options.audit)
    done = clean.clean(options.audit, options.out, source=_opened(audited), decided=decided)
    what = "copied" if done.copied else "listed in kept.txt"
    runs.say(f"{done.kept:,} images {what} in {done.folder}; {done.left_out:,} left out")
    return 0


def explain_main(arguments: Sequence[str]) -> int:
    """Runs `jaxpoison explain`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="jaxpoison explain",
        description="Name the training images behind one prediction of the network of an audit, "
        "and train without them to see whether it changes.",
    )
    parser.add_argument("audit", type=Path, help="folder of the audit")
    parser.add_argument(
        "--image",
        required=True,
        metavar="FILE",
        help="an image file, or the id of an audited image",
    )
    parser.add_argument(
        "--wanted", metavar="LABEL", help="the class that it should have been given"
    )
    parser.add_argument("--out", type=Path, help="folder of the page (default: AUDIT/explanation)")
    parser.add_argument(
        "--no-retrain", action="store_true", help="refit last layers only, train no networks"
    )
    parser.add_argument("--seed", type=int, default=0, help="of views, refits and random removals")
    options = parser.parse_args(arguments)
    folder, audited = _audited(options.audit)
    out = folder / "explanation" if options.out is None else options.out.expanduser()
    _check_apart(Path(audited.data).expanduser(), out)
    source = _opened(audited)
    names = source.class_names
    if options.wanted is not None and options.wanted not in names:
        raise ValueError(
            f"--wanted {options.wanted!a} is no class of the data; expected one of "
            f"{listing(map(ascii, names), 20)}"
        )
    own = None if audited.network is None else _loaded(audited.network)
    kept = _audit.reopen(source, folder, _settings(audited), own)
    image, others = _asked(options.image, kept.evidence)
    with runs.Stages() as stages:
        explanation = explain(
            kept.model,
            kept.variables,
            Dataset(kept.evidence.images[others], kept.evidence.labels[others]),
            image,
            None if options.wanted is None else names.index(options.wanted),
            key=jax.random.key(options.seed),
            ids=[str(id_) for id_ in kept.evidence.ids[others]],
            class_names=names,
            retrain=own is None and not options.no_retrain,
            progress=stages.tell,
        )
    explanation.save(out)
    runs.say(_answer(explanation, out))
    return 0


def _audited(path):
    """Returns (folder of an audit, its arguments), given the folder or a file in it."""
    folder = path if path.is_dir() else path.parent
    return folder, audit_parser().parse_args(_replayed(folder / "config.json", []))


def _asked(text, evidence):
    """Returns (image uint8 [S, S, 3], bool [N]: other images) of a file or an id."""
    is_it = evidence.ids == text
    if is_it.any():
        return np.array(evidence.images[is_it.argmax()]), ~is_it
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(
            f"--image {text!a} is neither a file nor the id of an audited image, such as "
            f"{str(evidence.ids[0])!a}"
        )
    try:
        return decode(path, SIZE, MAX_PIXELS).pixels, ~is_it
    except Unreadable as error:
        raise ValueError(f"--image {text!a} cannot be read: {error}") from error


def _answer(explanation, out):
    """Returns what was found, for a terminal."""
    names = [ascii(name)[1:-1] for name in explanation.class_names]
    wanted = "wanted" if explanation.wanted_given else "next"
    rows = [
        [one.name.replace("_", " "), one.method, f"{one.num_removed:,} left out",
         f"{one.changed} of {len(one.predictions)} say something else"]
        for one in explanation.removals
    ]  # fmt: skip
    causes = [
        [ascii(explanation.ids[row])[1:-1], names[explanation.labels[row]]]
        for row in explanation.causes[:10]
    ]
    return "\n".join(
        [
            "",
            f"Predicted: {names[explanation.prediction]}; {wanted}: {names[explanation.wanted]}",
            runs.columns(rows),
            "",
            f"Named: {explanation.num_causes:,}",
            runs.columns(causes),
            "",
            f"Page: {out / 'explanation.html'}",
        ]
    )


def demo_main(arguments: Sequence[str]) -> int:
    """Runs `jaxpoison demo`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="jaxpoison demo",
        description="Audit 2,500 CIFAR-10 images that are part of the package, with faults planted "
        "into them; two to four minutes on two cores. The network is trained for fewer epochs than "
        "an audit of as many images would take.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("jaxpoison-demo"), help="folder of the report"
    )
    options = parser.parse_args(arguments)
    from jaxpoison.audit import demo

    source, trusted, planted = demo.data(load_embedded("cifar10"))
    result = run(
        source, options.out, name="embedded CIFAR-10 with planted faults", command=["demo"],
        trusted=trusted, settings=demo.SETTINGS,
    )  # fmt: skip
    runs.say(demo.table(result, planted))
    return 0
