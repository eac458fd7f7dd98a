"""The audit from end to end: measure, train, plant, judge, retrain. Each stage is kept and resumed.

In `cache/` of the audit's folder, keyed by the content of the data:

measure-KEY/    arrays of one pass over the images (and of trusted ones)
planted-KEY/    canaries
train-KEY/      checkpoints of the network trained on the data
copy-KEY/       and of the one trained on the copy with canaries
half-KEY/       and of one trained on half of the data, where there are trusted images
worth-KEY/      trainings with and without what was flagged
"""

import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from jaxpoison.audit import assemble, decisions, findings, plant, power, trained, witness
from jaxpoison.audit.certificate import certificate
from jaxpoison.audit.checks import CHECKS
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.measure import BATCH, foreign, measure, side
from jaxpoison.audit.records import Report, Unreadable, WorthRow
from jaxpoison.audit.records import Worth as WorthRecord
from jaxpoison.audit.worth import worth as measure_worth
from jaxpoison.core.files import check_writable, read_npz, replacing
from jaxpoison.core.settings import check_range
from jaxpoison.data import Dataset
from jaxpoison.data.readers import Source, open_source

Tell = Callable[[str, int, int], None]


def _tell_nobody(stage: str, done: int, total: int) -> None:
    del stage, done, total


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines the result of an audit, besides the data."""

    quick: bool = False
    """Without training: files, copies, and the foreign witness alone."""
    epochs: int | None = None
    """Passes of the network that is trained on the data; None for what suits their number."""
    worth: bool = True
    """Whether to retrain with and without what was flagged; never with `quick`."""
    certify: int | None = None
    """Parts of the data that linear classifiers are trained on, at least 3, for a certificate: how
    many of their joint predictions no few images can change. None for none."""
    seed: int = 0
    """Of canaries and trainings."""

    def __post_init__(self) -> None:
        if self.certify is not None:
            check_range(self, "certify", 3, whole=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Audit:
    """The result: a report, and the arrays behind it.

    Attributes:
      report: what was found, for people and files.
      evidence: what was measured, N rows.
      judgement: the verdict of each check and each family of checks.
      source_rows: int [N], rows of the source that could be read.
      source: the images.
    """

    report: Report
    evidence: Evidence
    judgement: assemble.Judgement
    source_rows: np.ndarray
    source: Source

    @property
    def flagged(self) -> np.ndarray:
        """bool [N]: images with an open finding."""
        out = np.zeros(len(self.evidence.labels), bool)
        out[[finding.row for finding in self.report.findings if finding.open]] = True
        return out

    def to_pandas(self) -> Any:
        """Returns a DataFrame, one row for each finding; see `findings.to_pandas`."""
        return findings.to_pandas(self.report)

    def write(self, folder: str | Path) -> None:
        """Writes report.html, findings.csv and .json, kept.txt; see `findings.write`."""
        findings.write(self.report, folder, ids=[str(id_) for id_ in self.evidence.ids])


def audit(
    images: Any,
    labels: Any = None,
    *,
    trusted: Any = None,
    network: Any = None,
    settings: Settings | None = None,
    decided: decisions.Decisions | None = None,
    folder: str | Path | None = None,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    replay: str = "",
    tell: Tell = _tell_nobody,
) -> Audit:
    """Finds what is broken, mislabeled or poisoned in labeled images.

    Changes nothing, and writes only to `folder`.

    Args:
      images: a path or `Source` (see `data.readers.open_source`), or an array as
        `Source.from_arrays` takes it: uint8 or floats in [0, 1], [N, H, W, C].
      labels: N labels, for an array.
      trusted: images with labels that are known to be right, of the same classes: a path, a
        `Source`, or a pair (images, labels). Five of each class help.
      network: a trained network to be used in place of one that is trained here, as a pair
        (model, variables) of what `network.as_network` takes; variables may be None where the
        model holds them. It sees images of 32x32, and has a logit for each class, in the order of
        the classes' names.
      settings: what else decides the result.
      decided: people's decisions on images of an earlier report.
      folder: of the audit; its `cache` makes a second run fast, and lets an interrupted one resume.
        None for a temporary one.
      name: of the data, for the report.
      config: kept in the report, as JSON has it.
      replay: the command that repeats the audit, for the report.
      tell: called as `tell(stage, done, total)`.

    Raises:
      ValueError: for data that cannot be audited: see `open_source`; a trusted set of other
        classes; or a network that does not fit, see `trained.checked`.
    """
    settings = Settings() if settings is None else settings
    given = locals()
    # Threads of linear algebra wait in busy loops for processors that XLA's threads are using: a
    # factorization of 1,500 rows took 2 s with two threads on two busy processors, 0.06 s with one.
    with threadpool_limits(1, user_api="blas"):
        if folder is not None:
            return _audit(**given, in_memory=False)
        with tempfile.TemporaryDirectory() as temporary:
            return _audit(**given | {"folder": temporary}, in_memory=True)


class _Stage(NamedTuple):
    """Where one audit keeps what it has, and whom it tells."""

    cache: Path
    settings: Settings
    tell: Tell

    def folder(self, what: str, *parts: str) -> Path:
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        return self.cache / f"{what}-{key}"

    def progress(self, stage: str) -> Callable[[int, int], None]:
        return functools.partial(self.tell, stage)


def _audit(
    images, labels, trusted, network, settings, decided, folder, name, config, replay, tell,
    in_memory, **_,
):  # fmt: skip
    source = as_source(images, labels, "images")
    if network is not None:
        network = trained.checked(*network, len(source.class_names))
    embedding = foreign()
    stage = _Stage(check_writable(Path(folder) / "cache"), settings, tell)
    fingerprint = source.fingerprint()
    if decided is not None:
        decisions.check_same(decided, fingerprint)
    evidence, problems, rows = _measured(stage, source, fingerprint, embedding, "Reading images")
    white = witness.whitening(evidence.embedding)
    embedding, plain = embedding.then(white), evidence
    evidence = _whitened(stage, evidence, white, fingerprint)
    extra, extra_key = _trusted(stage, trusted, evidence, decided, white)
    evidence = dataclasses.replace(evidence, trusted=extra)
    read = _Reader(source, rows)
    # Nothing of this depends on trusted images: with others, or more, nothing is trained again.
    key = _training_key(fingerprint, embedding, settings)
    planted = (*key, str(plant.THREATS))
    copy = _planted(stage, evidence, read, embedding, planted)
    if not settings.quick and len(np.unique(evidence.labels)) > 1:
        evidence = _with_training(stage, "train", evidence, key, network)
        twin = _with_training(stage, "copy", copy.evidence, planted, network)
        copy = copy._replace(evidence=twin)
        if evidence.trusted is not None and network is None:
            evidence = _with_held_out(stage, evidence, key)
    judgement = _judged(stage, evidence, copy, decided)._replace(
        shortcuts=_with_shortcuts(stage, evidence, read, embedding)
    )
    report = assemble.report(
        judgement, evidence, tuple(Unreadable(p.id, p.reason) for p in problems),
        source=name or source.kind, fingerprint=fingerprint,
        picture=_Pictures(source, rows, evidence), config=config, replay=replay,
    )  # fmt: skip
    if decided is not None:
        report = decisions.merge(report, decided)
    if settings.worth and evidence.trained is not None:
        key = (*key, extra_key)
        report = assemble.with_worth(report, _worth(stage, report, judgement, evidence, key))
    if settings.certify is not None:
        # Whitening depends on all images, so a certificate knows nothing of it.
        extra, _ = _trusted(stage, trusted, plain, decided, lambda embedding: embedding)
        tell("Certifying", 0, 1)
        report = assemble.with_certificate(report, certificate(plain, extra, settings.certify))
        tell("Certifying", 1, 1)
    if in_memory:
        evidence = _in_memory(evidence)
    return Audit(report, evidence, judgement, rows, source)


class Reopened(NamedTuple):
    """What an earlier audit has kept.

    Attributes:
      evidence: what was measured of each image; its embedding is not whitened.
      model: the network, and
      variables: its weights.
    """

    evidence: Evidence
    model: Any
    variables: Any


def reopen(source: Source, folder: str | Path, settings: Settings, network: Any = None) -> Reopened:
    """Returns the images and the network of a finished audit, from its cache; trains nothing.

    Args:
      source: the images that were audited.
      folder: of the audit.
      settings: of the audit.
      network: see `audit`.

    Raises:
      ValueError: if the folder does not hold what an audit of these images keeps, the network
        included, or the network does not fit.
    """
    stage = _Stage(Path(folder) / "cache", settings, _tell_nobody)
    fingerprint, embedding = source.fingerprint(), foreign()
    if not stage.folder("measure", fingerprint, embedding.name).is_dir():
        raise ValueError(
            f"{folder} has no cache of these images: they have changed since the audit, or its "
            "cache was removed; repeat the audit"
        )
    evidence, _, _ = _measured(stage, source, fingerprint, embedding, "Reading images")
    if network is not None:
        model, variables = network
        model, variables = trained.checked(model, variables, evidence.num_classes)
        return Reopened(evidence, model, variables)
    if settings.quick:
        raise ValueError(
            f"{folder} holds a quick audit, which trains no network: repeat it without --quick"
        )
    place = stage.folder("train", *_training_key(fingerprint, embedding, settings))
    if not (place / "checkpoints").is_dir():
        raise ValueError(
            f"{folder} has no trained network: the audit did not finish, its cache was removed, or "
            "there is a single class; repeat the audit"
        )
    _, variables, model = _trained_here(stage, place, evidence, "Reading the network")
    return Reopened(evidence, model, variables)


def _training_key(fingerprint, embedding, settings):
    """Returns what decides a training on the data."""
    return fingerprint, embedding.name, str(settings.seed), str(settings.epochs)


def as_source(
    images: Any, labels: Any, what: str, class_names: Sequence[str] | None = None
) -> Source:
    """Returns a `Source`: one as it is, a path opened, arrays wrapped.

    Arrays with whole numbers for labels get `class_names`.

    Raises:
      TypeError: for labels next to a path, or an array without labels.
    """
    if isinstance(images, Source | str | Path):
        if labels is not None:
            raise TypeError(f"{what} have their own labels; leave out `labels`")
        return images if isinstance(images, Source) else open_source(images)
    if labels is None:
        raise TypeError(f"{what} are an array without labels; pass labels as well")
    numbered = np.issubdtype(np.asarray(labels).dtype, np.integer)
    return Source.from_arrays(images, labels, class_names=class_names if numbered else None)


def _measured(stage, source, fingerprint, embedding, title):
    folder = stage.folder("measure", fingerprint, embedding.name)
    return measure(source, embedding, folder, progress=stage.progress(title))


def _whitened(stage, evidence, white, fingerprint):
    """Returns evidence whose embedding is whitened, kept in a file that is mapped into memory."""
    path = stage.folder("measure", fingerprint, foreign().name) / "white.npy"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        array = np.lib.format.open_memmap(
            unfinished, mode="w+", dtype=np.float32, shape=evidence.embedding.shape
        )
        for start in range(0, len(array), 8192):
            block = slice(start, start + 8192)
            array[block] = white(evidence.embedding[block])
        array.flush()
        unfinished.replace(path)
    return dataclasses.replace(evidence, embedding=np.load(path, mmap_mode="r", allow_pickle=False))


def _trusted(stage, trusted, evidence, decided, white):
    """Returns (trusted evidence or None, key): what was given, and what people called fine."""
    parts, keys = [], []
    if trusted is not None:
        pair = trusted if isinstance(trusted, tuple) else (trusted, None)
        given = as_source(pair[0], pair[1], "trusted", evidence.class_names)
        fingerprint = given.fingerprint()
        found, _, _ = _measured(stage, given, fingerprint, foreign(), "Reading trusted images")
        found = dataclasses.replace(found, embedding=white(found.embedding))
        parts.append(_in_classes(found, evidence.class_names))
        keys.append(fingerprint)
    if decided is not None:
        fine = np.flatnonzero(np.isin(evidence.ids, sorted(decided.fine)))
        if len(fine):
            parts.append(_rows_of(evidence, fine))
            keys += [str(id_) for id_ in evidence.ids[fine]]
    return (_together(parts) if parts else None), "\0".join(keys)


def _in_classes(evidence, class_names):
    """Returns evidence with labels in `class_names`; raises ValueError for others."""
    strangers = sorted(set(evidence.class_names) - set(class_names))
    if strangers:
        raise ValueError(
            f"trusted images have classes that the data have not: {strangers[:5]}; the data have "
            f"{list(class_names)[:10]}"
        )
    place = np.array([class_names.index(name) for name in evidence.class_names], np.int32)
    return dataclasses.replace(
        evidence, labels=place[evidence.labels], class_names=tuple(class_names)
    )


_ARRAYS = ("ids", "labels", "images", "digests", "hashes", "sizes", "embedding")


def _rows_of(evidence, rows):
    return dataclasses.replace(
        evidence, trained=None, trusted=None,
        **{name: getattr(evidence, name)[rows] for name in _ARRAYS},
    )  # fmt: skip


def _together(parts):
    return dataclasses.replace(
        parts[0],
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS},
    )


def _in_memory(evidence):
    """Returns evidence whose arrays do not lie in a folder that is about to go."""
    whole = {name: np.array(getattr(evidence, name)) for name in _ARRAYS}
    if evidence.trusted is not None:
        whole["trusted"] = _in_memory(evidence.trusted)
    return dataclasses.replace(evidence, **whole)


class _Reader(NamedTuple):
    """Reads images of the evidence at the size that the foreign witness sees."""

    source: Source
    rows: np.ndarray

    def __call__(self, some: np.ndarray) -> np.ndarray:
        size = side(self.source)
        unique, place = np.unique(self.rows[some], return_inverse=True)
        parts = [batch.images for batch in self.source.batches(size, BATCH, rows=unique)]
        images = np.concatenate(parts) if parts else np.empty((0, size, size, 3), np.uint8)
        if len(images) != len(unique):
            raise ValueError(
                "images that could be read before cannot be read any more: the data changed during "
                "the audit; start it again"
            )
        return np.array(images[place])


def _planted(stage, evidence, read, embedding, key):
    """Returns the copy with canaries, which are kept in a file."""
    stage.tell("Planting known faults into a copy", 0, 1)
    path = stage.folder("planted", *key) / "canaries.npz"
    if path.exists():
        changes = plant.Changes(**read_npz(path, "canaries", required=plant.Changes._fields))
    else:
        changes = plant.canaries(evidence, read, embedding, seed=stage.settings.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, **changes._asdict())
    stage.tell("Planting known faults into a copy", 1, 1)
    return plant.plant(evidence, changes)


def _with_shortcuts(stage, evidence, read, embedding):
    """Returns what checks of the whole set say of copies with a shortcut."""
    told = stage.progress("Planting shortcuts into copies")
    done = iter(range(len(plant.SHORTCUTS)))

    def copy_with(share):
        told(next(done), len(plant.SHORTCUTS))
        return plant.with_shortcut(evidence, read, embedding, share, seed=stage.settings.seed)

    found = power.shortcuts(CHECKS, copy_with)
    told(len(plant.SHORTCUTS), len(plant.SHORTCUTS))
    return found


def _with_training(stage, what, evidence, key, network):
    """Returns evidence with the second witness, for the data and for the trusted images."""
    title = "Training on the data" if what == "train" else "Training on the copy with faults"
    folder = stage.folder(what, *key)
    if network is None:
        told, variables, model = _trained_here(stage, folder, evidence, title)
    else:
        model, variables = network
        told = trained.of_network(model, variables, evidence.images, evidence.labels)
    extra = evidence.trusted
    if extra is not None:
        seen = trained.of_network(model, variables, extra.images, extra.labels)
        extra = dataclasses.replace(extra, trained=seen)
    return dataclasses.replace(evidence, trained=told, trusted=extra)


def _trained_here(stage, folder, evidence, title):
    model = trained.small_network(evidence.num_classes)
    done = trained.train(
        evidence.images, evidence.labels, evidence.num_classes, seed=stage.settings.seed,
        epochs=stage.settings.epochs, folder=folder / "checkpoints",
        progress=stage.progress(title),
    )  # fmt: skip
    return done.training, done.variables, model


def _with_held_out(stage, evidence, key):
    """Returns evidence with what a network learns from half of the data, kept in a file."""
    folder = stage.folder("half", *key)
    found = trained.held_out(
        evidence, seed=stage.settings.seed, epochs=stage.settings.epochs,
        folder=folder / "checkpoints", progress=stage.progress("Training on half of the data"),
    )  # fmt: skip
    return dataclasses.replace(evidence, held_out=found)


def _judged(stage, evidence, copy, decided):
    found, in_copy = {}, {}
    planted = [check for check in CHECKS if set(check.threats) & set(copy.threats)]
    for place, check in enumerate(CHECKS):
        found[check.name] = check.score(evidence)
        stage.tell("Checks", place + 1, len(CHECKS))
    for place, check in enumerate(planted):
        in_copy[check.name] = check.score(copy.evidence)
        stage.tell("Checks of the copy", place + 1, len(planted))
    judge = functools.partial(power.families, planted, found, in_copy, copy, labels=evidence.labels)
    families = judge()
    judgement = assemble.Judgement(CHECKS, found, families)
    if decided is not None and decided.decisions:
        known = assemble.known(judgement, evidence.ids, decided)
        families = judge(known=known)
    return judgement._replace(families=families)


class _Pictures(NamedTuple):
    """Images as people should see them: at most 96 pixels wide; the small one if it is gone."""

    source: Source
    rows: np.ndarray
    evidence: Evidence

    def __call__(self, row: int) -> np.ndarray:
        try:
            return self.source.image(int(self.rows[row]), 96)
        except (OSError, ValueError):
            return np.asarray(self.evidence.images[row])


def _worth(stage, report, judgement, evidence, key):
    flags = np.zeros(len(evidence.labels), bool)
    flags[[finding.row for finding in report.findings if finding.open]] = True
    trusted = evidence.trusted
    result = measure_worth(
        evidence.images, evidence.labels,
        None if trusted is None else Dataset(trusted.images, trusted.labels),
        {"flagged": flags} if flags.any() else {},
        num_classes=evidence.num_classes, seed=stage.settings.seed,
        folder=stage.folder("worth", *key, hashlib.sha256(flags.tobytes()).hexdigest()),
        progress=stage.progress("Retraining with and without"),
    )  # fmt: skip
    return WorthRecord(
        rows=tuple(
            WorthRow(row.name, row.title, row.mean, row.low, row.high, row.n) for row in result.rows
        ),
        action=result.action,
        reason=" ".join((result.reason, *result.notes)),
    )
