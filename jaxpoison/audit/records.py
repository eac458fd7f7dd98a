"""The records of an audit's report: frozen, checked when they are made, equal if all is equal."""

import collections
import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

from jaxpoison.audit import strict
from jaxpoison.audit.verdict import Kind
from jaxpoison.core import settings

KINDS: tuple[Kind, ...] = get_args(Kind)
Severity = Literal["high", "medium", "low"]
Decision = Literal["confirmed", "overruled", "fine"]
Advice = Literal["accept", "review", "quarantine", "inconclusive"]

# A path of Linux has 4,096 bytes, each of which may be escaped by four characters.
MOST_ID = 1 << 14
_MOST_SENTENCE = 1 << 16
_MOST_PICTURE = 1 << 22
_PICTURE = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")


@dataclasses.dataclass(frozen=True)
class Data:
    """The images that were audited.

    Attributes:
      source: where they come from: the path of a folder or a file, or "arrays".
      num_images: how many could be read.
      num_classes: K.
      class_names: names of the K classes.
      class_counts: images of each class; their sum is `num_images`.
      num_unreadable: images that could not be read.
      fingerprint: of the source (`Source.fingerprint`).
    """

    source: str
    num_images: int
    num_classes: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    num_unreadable: int
    fingerprint: str

    def __post_init__(self) -> None:
        settings.settle(self)
        strict.check_text("Data", MOST_ID, source=self.source)
        strict.check_text("Data", 200, fingerprint=self.fingerprint)
        for name in ("num_images", "num_classes", "num_unreadable"):
            settings.check_range(self, name, 0, whole=True)
        for class_name in self.class_names:
            strict.check_text("Data", MOST_ID, class_names=class_name)
        lengths = {"class_names": len(self.class_names), "class_counts": len(self.class_counts)}
        for name, length in lengths.items():
            if length != self.num_classes:
                raise ValueError(
                    f"Data: {name} has {length:,} entries for {self.num_classes:,} classes"
                )
        if min(self.class_counts, default=0) < 0 or sum(self.class_counts) != self.num_images:
            raise ValueError(
                f"Data: class_counts must add up to num_images, {self.num_images:,}; "
                f"got {sum(self.class_counts):,}"
            )


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """One check of the audit.

    Attributes:
      name: of the check, for columns.
      title: for people.
      kind: what it looks for.
      status: whether it ran.
      reason: a sentence: why it did not run, or how its threshold was set; may be empty.
      cannot_see: a sentence: which faults leave no trace here.
      flagged: how many images it flagged.
      threshold: of its score, None for a check that decides by rule or did not run.
    """

    name: str
    title: str
    kind: Kind
    status: Literal["ran", "not run"]
    reason: str
    cannot_see: str
    flagged: int = 0
    threshold: float | None = None

    def __post_init__(self) -> None:
        settings.settle(self)
        owner = f"CheckResult {self.name!r}"
        strict.check_text(owner, 200, name=self.name, title=self.title)
        strict.check_text(owner, _MOST_SENTENCE, reason=self.reason, cannot_see=self.cannot_see)
        strict.check_choice(owner, KINDS, kind=self.kind)
        strict.check_choice(owner, ("ran", "not run"), status=self.status)
        settings.check_range(self, "flagged", 0, whole=True)
        if self.threshold is not None:
            settings.check_range(self, "threshold", -1e30, 1e30)
        if self.status == "not run" and not self.reason:
            raise ValueError(f"{owner}: reason is empty; say why it did not run")


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """The conclusion of a check on the whole set (`verdict.Whole`).

    Attributes:
      check: name of the check.
      flagged: whether something is wrong.
      score: in [0, 1], higher is worse.
      reason: a sentence with the figures that decide.
      picture: data URI of a picture that shows why, or None.
      caption: what the picture shows.
    """

    check: str
    flagged: bool
    score: float
    reason: str
    picture: str | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        settings.settle(self)
        owner = f"Conclusion of {self.check!r}"
        strict.check_text(owner, 200, check=self.check)
        strict.check_text(owner, _MOST_SENTENCE, reason=self.reason, caption=self.caption)
        settings.check_range(self, "score", 0, 1)
        _check_picture(owner, "picture", self.picture)


@dataclasses.dataclass(frozen=True)
class Power:
    """What the audit finds of one threat, planted into a copy of this data.

    Attributes:
      threat: name of the threat.
      title: for people, such as "Labels changed at random".
      planted: how many images were planted; 0 where the threat could not be planted.
      found: how many of them were flagged.
      false_alarms_per_thousand: flagged images out of a thousand that are not planted.
      checks: {name of a check: share of the planted that it alone found}.
      note: a sentence: what the figure does not say; may be empty.
      whole: whether it is a fault of the whole set: then copies are counted, not images.
    """

    threat: str
    title: str
    planted: int
    found: int
    false_alarms_per_thousand: float
    checks: dict[str, float]
    note: str = ""
    whole: bool = False

    def __post_init__(self) -> None:
        settings.settle(self)
        owner = f"Power against {self.threat!r}"
        strict.check_text(owner, 200, threat=self.threat, title=self.title)
        strict.check_text(owner, _MOST_SENTENCE, note=self.note)
        settings.check_range(self, "planted", 0, whole=True)
        settings.check_range(self, "found", 0, self.planted, whole=True)
        settings.check_range(self, "false_alarms_per_thousand", 0, 1000)
        shares = {name: settings.plain(share) for name, share in self.checks.items()}
        object.__setattr__(self, "checks", shares)
        _check_shares(owner, "checks", shares)


@dataclasses.dataclass(frozen=True)
class WorthRow:
    """What one action is worth: the change of accuracy on held-out trusted images.

    Attributes:
      name: of the action, such as "without".
      title: for people, such as "Without what was flagged".
      mean: in [-1, 1], against training on everything as it is.
      low, high: ends of its interval.
      n: number of trainings behind it.
    """

    name: str
    title: str
    mean: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        settings.settle(self)
        owner = f"WorthRow {self.name!r}"
        strict.check_text(owner, 200, name=self.name, title=self.title)
        settings.check_range(self, "n", 1, whole=True)
        for name in ("mean", "low", "high"):
            settings.check_range(self, name, -1, 1)
        if not self.low <= self.mean <= self.high:
            raise ValueError(
                f"{owner}: mean must be in its interval, got {self.mean} in "
                f"[{self.low}, {self.high}]"
            )


@dataclasses.dataclass(frozen=True)
class Worth:
    """Which action measured best.

    Attributes:
      rows: what each action is worth.
      action: the recommended one, for people.
      reason: a sentence.
    """

    rows: tuple[WorthRow, ...]
    action: str
    reason: str

    def __post_init__(self) -> None:
        settings.settle(self)
        strict.check_text("Worth", _MOST_SENTENCE, action=self.action, reason=self.reason)


@dataclasses.dataclass(frozen=True)
class CertificateRow:
    """What is left of the predictions of a vote, whatever `num_changes` images are.

    Attributes:
      num_changes: k, images that somebody may insert, remove or label otherwise.
      unchanged: share of the predictions that they cannot change.
      right: share of the predictions that are right and stay so.
    """

    num_changes: int
    unchanged: float
    right: float

    def __post_init__(self) -> None:
        settings.settle(self)
        settings.check_range(self, "num_changes", 1, whole=True)
        settings.check_range(self, "unchanged", 0, 1)
        settings.check_range(self, "right", 0, self.unchanged)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What no few images can change: a vote of classifiers, each trained on a part of the data.

    Attributes:
      num_parts: how many classifiers.
      num_images: images that were measured on.
      accuracy: of the vote, in [0, 1].
      rows: what is left of its predictions, for several numbers of changed images.
      reason: a sentence.
    """

    num_parts: int
    num_images: int
    accuracy: float
    rows: tuple[CertificateRow, ...]
    reason: str

    def __post_init__(self) -> None:
        settings.settle(self)
        settings.check_range(self, "num_parts", 1, whole=True)
        settings.check_range(self, "num_images", 1, whole=True)
        settings.check_range(self, "accuracy", 0, 1)
        strict.check_text("Certificate", _MOST_SENTENCE, reason=self.reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One image that was flagged.

    Attributes:
      id: of the image (`Evidence.ids`).
      row: of the image, counted over those that could be read.
      class_name: the label it was given; `class` in JSON.
      kind: the fault it is suspected of.
      severity: how much harm the fault does.
      confidence: in [0, 1], how sure it is.
      p_value: against the null of images without a fault, in [0, 1]; None if decided by rule.
      q_value: the same after Benjamini-Hochberg over the set.
      checks: names of the checks that flagged it.
      reasons: sentences a person can check.
      suggested: the class that the checks believe, or None.
      related: ids of images that are evidence, nearest first.
      decision: what a person has said of it, or None.
      thumbnail: data URI (`thumbnail`), or None.
    """

    id: str
    row: int
    class_name: str = dataclasses.field(metadata={"json": "class"})
    kind: Kind
    severity: Severity
    confidence: float
    p_value: float | None = None
    q_value: float | None = None
    checks: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    suggested: str | None = None
    related: tuple[str, ...] = ()
    decision: Decision | None = None
    thumbnail: str | None = None

    def __post_init__(self) -> None:
        settings.settle(self)
        owner = f"Finding {ascii(self.id)[:80]}"
        strict.check_text(owner, MOST_ID, id=self.id)
        strict.check_text(owner, MOST_ID, class_name=self.class_name, suggested=self.suggested)
        strict.check_choice(owner, KINDS, kind=self.kind)
        strict.check_choice(owner, get_args(Severity), severity=self.severity)
        strict.check_choice(owner, (None, *get_args(Decision)), decision=self.decision)
        settings.check_range(self, "row", 0, whole=True)
        settings.check_range(self, "confidence", 0, 1)
        for name in ("p_value", "q_value"):
            if getattr(self, name) is not None:
                settings.check_range(self, name, 0, 1)
        for name, most in (("checks", 200), ("reasons", _MOST_SENTENCE), ("related", MOST_ID)):
            for text in getattr(self, name):
                strict.check_text(owner, most, **{name: text})
        _check_picture(owner, "thumbnail", self.thumbnail)

    @property
    def open(self) -> bool:
        """Whether it counts: it was not overruled, and the image was not called fine."""
        return self.decision in (None, "confirmed")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image that is evidence about another one.

    Attributes:
      class_name: the label it was given; `class` in JSON.
      thumbnail: data URI.
    """

    class_name: str = dataclasses.field(metadata={"json": "class"})
    thumbnail: str

    def __post_init__(self) -> None:
        strict.check_text("Picture", MOST_ID, class_name=self.class_name)
        _check_picture("Picture", "thumbnail", self.thumbnail)


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, and why, in a sentence."""

    id: str
    reason: str

    def __post_init__(self) -> None:
        strict.check_text("Unreadable", MOST_ID, id=self.id)
        strict.check_text("Unreadable", _MOST_SENTENCE, reason=self.reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that an audit found.

    Attributes:
      data: the images that were audited.
      verdict: what to do with them, in a word.
      summary: sentences for people, the most important first.
      checks: all checks, those that did not run included.
      findings: at most one per image, most urgent first.
      problems: images that could not be read.
      wholes: conclusions on the whole set.
      power: what the audit finds of each threat, planted into a copy.
      worth: what the actions are worth, or None if nothing was trained for it.
      certificate: what no few images can change, or None if it was not asked for.
      ask: ids of findings whose confirmation is worth most, the most useful first.
      pictures: {id: picture} of images in `Finding.related`, as far as they are to be shown.
      config: the settings, as JSON has them.
      replay: the command that repeats the audit; may be empty.
    """

    data: Data
    verdict: Advice
    summary: tuple[str, ...] = ()
    checks: tuple[CheckResult, ...] = ()
    findings: tuple[Finding, ...] = ()
    problems: tuple[Unreadable, ...] = ()
    wholes: tuple[Conclusion, ...] = ()
    power: tuple[Power, ...] = ()
    worth: Worth | None = None
    certificate: Certificate | None = None
    ask: tuple[str, ...] = ()
    pictures: dict[str, Picture] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    replay: str = ""

    def __post_init__(self) -> None:
        settings.settle(self)
        strict.check_choice("Report", get_args(Advice), verdict=self.verdict)
        for sentence in self.summary:
            strict.check_text("Report", _MOST_SENTENCE, summary=sentence)
        strict.check_text("Report", _MOST_SENTENCE, replay=self.replay)
        strict.check_json("Report", "config", self.config)
        object.__setattr__(self, "config", strict.plain(self.config))
        _check_unique("checks", (check.name for check in self.checks))
        _check_unique("findings", (finding.id for finding in self.findings))
        _check_unique("findings' rows", (finding.row for finding in self.findings))
        _check_unique("power", (power.threat for power in self.power))
        _check_names(self)
        if len(self.problems) != self.data.num_unreadable:
            raise ValueError(
                f"Report: {len(self.problems):,} problems, but data.num_unreadable is "
                f"{self.data.num_unreadable:,}"
            )

    @property
    def counts(self) -> dict[str, int]:
        """{kind: number} of open findings, unreadable files and flagged conclusions on the set."""
        found = collections.Counter(finding.kind for finding in self.findings if finding.open)
        found["file"] += len(self.problems)
        kinds = {check.name: check.kind for check in self.checks}
        found.update(kinds[whole.check] for whole in self.wholes if whole.flagged)
        return {kind: found[kind] for kind in KINDS}


def _check_picture(owner: str, name: str, uri: str | None) -> None:
    """Raises unless `uri` is None or a data URI of a picture."""
    strict.check_text(owner, _MOST_PICTURE, **{name: uri})
    if uri is not None and not _PICTURE.fullmatch(uri):
        raise ValueError(f"{owner}: {name} must be a data URI of PNG, JPEG or WebP in base64")


def _check_shares(owner: str, name: str, shares: dict[str, float]) -> None:
    """Raises unless `shares` maps short names to numbers in [0, 1]."""
    for key, share in shares.items():
        strict.check_text(owner, 200, **{name: key})
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"{owner}: {name}[{key!r}] must be in [0, 1], got {share!r}")


def _check_unique(name: str, keys: Iterable[Any]) -> None:
    """Raises ValueError if two entries of a report's list are the same one."""
    twin, times = next(iter(collections.Counter(keys).most_common(1)), (None, 0))
    if times > 1:
        raise ValueError(f"Report: {name} has {ascii(twin)[:80]} {times} times")


def _check_names(report: Report) -> None:
    """Raises ValueError if a report names a check, a class or a finding that it has not."""
    checks = {check.name for check in report.checks}
    classes = set(report.data.class_names)
    ids = {finding.id for finding in report.findings}
    named = [
        ("checks", checks, (name for finding in report.findings for name in finding.checks)),
        ("checks", checks, (conclusion.check for conclusion in report.wholes)),
        ("checks", checks, (name for power in report.power for name in power.checks)),
        ("data.class_names", classes, (finding.class_name for finding in report.findings)),
        ("data.class_names", classes, (f.suggested for f in report.findings if f.suggested)),
        ("data.class_names", classes, (p.class_name for p in report.pictures.values())),
        ("findings", ids, report.ask),
    ]
    for where, known, names in named:
        stranger = next((name for name in names if name not in known), None)
        if stranger is not None:
            raise ValueError(f"Report: {ascii(stranger)[:80]} is named, but is not in {where}")
    highest = max((finding.row for finding in report.findings), default=-1)
    if highest >= report.data.num_images:
        raise ValueError(f"Report: row {highest} of {report.data.num_images:,} images")
