"""From verdicts to a report: at most one finding per image, most urgent first."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxpoison.audit import decisions, findings, power
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.records import (
    Advice,
    Certificate,
    CheckResult,
    Conclusion,
    Data,
    Finding,
    Picture,
    Power,
    Report,
    Severity,
    Unreadable,
    Worth,
)
from jaxpoison.audit.verdict import Check, Kind, NotRun, Scores

DRAWN = 300
"""Findings with pictures."""
_SPEAKS = 0.05
"""A check's own p-value up to which its sentence is part of a finding."""
_ASKED = 12
_SEVERITY: Mapping[Kind, Severity] = {
    "poison": "high",
    "shortcut": "high",
    "label": "medium",
    "copy": "low",
    "file": "low",
}
_KINDS: tuple[Kind, ...] = ("poison", "shortcut", "label", "copy", "file")


class Judgement(NamedTuple):
    """What the checks say.

    Attributes:
      checks: all of them.
      found: what each finds in the data.
      families: verdicts on the threats that were planted.
      shortcuts: what is said of copies with a shortcut.
    """

    checks: Sequence[Check]
    found: power.Found
    families: Sequence[power.Family]
    shortcuts: Sequence[power.Shortcut] = ()


def flagged_by_rule(judgement: Judgement, kind: Kind) -> np.ndarray | None:
    """Returns bool [N]: flagged by a check of this kind that decides by rule; None if none ran."""
    flags = [
        scores.flagged
        for check in judgement.checks
        if check.kind == kind
        and isinstance(scores := judgement.found[check.name], Scores)
        and scores.flagged is not None
    ]
    return np.any(flags, axis=0) if flags else None


def kinds(judgement: Judgement, num_rows: int) -> np.ndarray:
    """Returns for each image the kind of its finding, '' for none.

    A rule that speaks of labels (one image under two labels) decides first; then the threat that
    is surest, see `power.Surest`; then the other rules.
    """
    out = np.full(num_rows, "", "U8")
    for kind in ("file", "copy"):
        flags = flagged_by_rule(judgement, kind)
        if flags is not None:
            out[flags] = kind
    surest = power.surest(judgement.families, num_rows)
    flagged = np.flatnonzero(surest.q <= power.RATE)
    out[flagged] = [judgement.families[place].threat.kind for place in surest.family[flagged]]
    flags = flagged_by_rule(judgement, "label")
    if flags is not None:
        out[flags] = "label"
    return out


def known(
    judgement: Judgement, ids: np.ndarray, decided: decisions.Decisions
) -> dict[str, np.ndarray]:
    """Returns what people have said of images, for `power.families`: {kind: float [N]}.

    A finding that was confirmed has a fault of its kind; one that was overruled, or called fine,
    has none of any kind.
    """
    said = np.array([decided.decisions.get(str(id_), "") for id_ in ids])
    found = kinds(judgement, len(ids))
    honest = np.where(np.isin(said, ["overruled", "fine"]), 1.0, np.nan)
    return {
        kind: np.where((said == "confirmed") & (found == kind), 0.0, honest)
        for kind in {family.threat.kind for family in judgement.families}
    }


def report(
    judgement: Judgement,
    evidence: Evidence,
    problems: Sequence[Unreadable],
    *,
    source: str,
    fingerprint: str,
    picture: Callable[[int], np.ndarray],
    worth: Worth | None = None,
    config: dict[str, object] | None = None,
    replay: str = "",
) -> Report:
    """Returns the report.

    Args:
      judgement: what the checks say of the N images.
      evidence: of them.
      problems: images that could not be read.
      source: where the images come from, for people.
      fingerprint: of the source.
      picture: row -> uint8 [H, W, 3], the image as people should see it.
      worth: what the actions are worth, if that was measured.
      config: the settings of the audit, as JSON has them.
      replay: the command that repeats the audit.
    """
    all_kinds = kinds(judgement, len(evidence.labels))
    surest = power.surest(judgement.families, len(all_kinds), all_kinds)
    # A finding by rule alone is certain.
    q = np.where(surest.q <= power.RATE, surest.q, 0.0)
    found = []
    for place, row in enumerate(_in_order(judgement, all_kinds, q, surest.p).tolist()):
        flagged = surest.q[row] <= power.RATE
        family = judgement.families[int(surest.family[row])] if flagged else None
        drawn = picture if place < DRAWN else None
        found.append(_finding(judgement, evidence, row, all_kinds[row], family, drawn))
    related = {id_ for finding in found[:DRAWN] for id_ in finding.related}
    place = {str(id_): row for row, id_ in enumerate(evidence.ids) if id_ in related}
    wholes = _conclusions(judgement)
    table = (
        *map(_power, judgement.families),
        *(_power_of_set(each) for each in judgement.shortcuts if each.flagged),
    )
    verdict, summary = advice(evidence, found, wholes, table, len(problems))
    return Report(
        data=Data(
            source=source,
            num_images=len(evidence.labels),
            num_classes=evidence.num_classes,
            class_names=evidence.class_names,
            class_counts=tuple(
                int(n) for n in np.bincount(evidence.labels, minlength=evidence.num_classes)
            ),
            num_unreadable=len(problems),
            fingerprint=fingerprint,
        ),
        verdict=verdict,
        summary=summary,
        checks=tuple(_result(judgement, check, found) for check in judgement.checks),
        findings=tuple(found),
        problems=tuple(problems),
        wholes=wholes,
        power=table,
        worth=worth,
        ask=_ask(found),
        pictures={
            id_: Picture(
                class_name=evidence.class_names[evidence.labels[row]],
                thumbnail=findings.thumbnail(picture(row)),
            )
            for id_, row in place.items()
        },
        config=dict(config or {}),
        replay=replay,
    )


def _in_order(judgement, all_kinds, q, p):
    """Returns rows with a finding: one image under two labels, then by severity, q and p."""
    rows = np.flatnonzero(all_kinds != "")
    by_rule = flagged_by_rule(judgement, "label")
    rank = np.array([_KINDS.index(kind) for kind in all_kinds[rows]], int)
    if by_rule is not None:
        rank = np.where(by_rule[rows], -1, rank)
    return rows[np.lexsort((p[rows], q[rows], rank))]


def _finding(judgement, evidence, row, kind, family, picture):
    """Returns the finding on a row; `family` is surest of it, None if a rule alone speaks."""
    speaking = _speaking(judgement, row, kind)
    found = [judgement.found[name] for name in speaking]
    suggested = _suggested(found, evidence, row)
    reasons = tuple(scores.reason(row) for scores in found)
    if family is not None and kind == "poison":
        reasons = (f"Like images with this planted: {family.threat.title}.", *reasons)
    related = next((scores.related(row) for scores in found if scores.related is not None), ())
    by_rule = any(scores.flagged is not None and scores.flagged[row] for scores in found)
    return Finding(
        id=str(evidence.ids[row]),
        row=row,
        class_name=evidence.class_names[evidence.labels[row]],
        kind=kind,
        severity="high" if kind == "label" and by_rule else _SEVERITY[kind],
        confidence=1.0 if family is None else float(1 - family.q[row]),
        p_value=None if family is None else float(family.p[row]),
        q_value=None if family is None else float(family.q[row]),
        checks=tuple(speaking),
        reasons=reasons,
        suggested=suggested,
        related=tuple(str(evidence.ids[other]) for other in related[:5]),
        thumbnail=None if picture is None else findings.thumbnail(picture(row)),
    )


def _speaking(judgement, row, kind):
    """Returns names of the checks that speak against an image, the most certain first."""
    rules = [
        check.name
        for check in judgement.checks
        if isinstance(scores := judgement.found[check.name], Scores)
        and scores.flagged is not None
        and scores.flagged[row]
    ]
    p = {}
    for family in judgement.families:
        if family.flagged[row] and family.threat.kind == kind:
            for name, values in family.each.items():
                if values[row] <= _SPEAKS:
                    p[name] = min(p.get(name, 1.0), values[row])
    return [*rules, *sorted(p, key=lambda name: p[name])]


def _suggested(found, evidence, row):
    """Returns the class that most of the checks believe, or None."""
    votes = [
        int(scores.suggested[row])
        for scores in found
        if scores.suggested is not None and scores.suggested[row] >= 0
    ]
    votes = [label for label in votes if label != evidence.labels[row]]
    return evidence.class_names[max(votes, key=votes.count)] if votes else None


def _conclusions(judgement):
    return tuple(
        Conclusion(
            check=check.name,
            flagged=whole.flagged,
            score=float(whole.score),
            reason=whole.reason,
            picture=None if whole.picture is None else findings.thumbnail(whole.picture, 512),
            caption=whole.caption,
        )
        for check in judgement.checks
        if isinstance(scores := judgement.found[check.name], Scores)
        and (whole := scores.whole) is not None
    )


def _result(judgement, check, found):
    scores = judgement.found[check.name]
    if isinstance(scores, NotRun):
        return CheckResult(
            check.name, check.title, check.kind, "not run", scores.reason, check.cannot_see
        )
    recalls = {
        family.threat.title: family.recalls[check.name]
        for family in judgement.families
        if check.name in family.recalls
    }
    if recalls:
        best = max(recalls, key=lambda title: recalls[title])
        reason = (
            f"At one false alarm in a hundred it finds {100 * recalls[best]:.0f}% of the images "
            f"with this planted: {best}."
        )
        if not any(check.name in family.each for family in judgement.families):
            reason += " It ranks them too low to have a say in the findings."
    elif scores.whole is not None:
        reason = "Decides by rule, on the whole set."
    elif check.threats:
        reason = "Nothing could be planted to calibrate it, so it flags nothing."
    else:
        reason = "Decides by rule."
    return CheckResult(
        check.name, check.title, check.kind, "ran", reason, check.cannot_see,
        flagged=sum(check.name in finding.checks for finding in found),
    )  # fmt: skip


def _power(family):
    return Power(
        threat=family.threat.name,
        title=family.threat.title,
        planted=family.planted,
        found=family.found,
        false_alarms_per_thousand=family.others_flagged,
        checks={name: float(recall) for name, recall in family.recalls.items()},
        note="" if family.recalls else "No check that ran looks for it.",
    )


def _power_of_set(shortcut):
    return Power(
        threat=shortcut.threat.name,
        title=shortcut.threat.title,
        planted=1,
        found=int(any(shortcut.flagged.values())),
        false_alarms_per_thousand=0.0,
        checks={name: float(flagged) for name, flagged in shortcut.flagged.items()},
        whole=True,
    )


def _ask(found):
    """Returns ids of the least certain findings, few of each class.

    What the tail of honest images holds of a finding is the probability that it is one; a decision
    takes that away or makes it whole, for all images that score less. Of the least certain it is
    the most.
    """
    uncertain = sorted(
        (finding for finding in found[:DRAWN] if finding.q_value is not None),
        key=lambda finding: -finding.q_value,
    )
    asked, of_class = [], {}
    for finding in uncertain:
        of_class[finding.class_name] = of_class.get(finding.class_name, 0) + 1
        if of_class[finding.class_name] <= 3 and len(asked) < _ASKED:
            asked.append(finding.id)
    return tuple(asked)


def advice(
    evidence: Evidence,
    found: Sequence[Finding],
    wholes: Sequence[Conclusion],
    table: Sequence[Power],
    num_unreadable: int,
) -> tuple[Advice, tuple[str, ...]]:
    """Returns what to do with the data, and why in sentences.

    Quarantine: the set as a whole is flagged, or poisons are at least 0.5% of it. Inconclusive:
    nothing was found, and most of what was planted would not have been either. Review: there are
    findings. Accept: none.
    """
    counts = {kind: sum(f.kind == kind and f.open for f in found) for kind in _KINDS}
    parts = [f"{counts[kind]:,} {_NAMES[kind]}" for kind in _KINDS if counts[kind]]
    images = f"{len(evidence.labels):,} images in {evidence.num_classes:,} classes"
    summary = [f"{images}: {', '.join(parts) if parts else 'nothing found'}."]
    bad = [whole for whole in wholes if whole.flagged]
    summary += [whole.reason for whole in bad]
    found_of = sum(row.found for row in table if not row.whole)
    planted = sum(row.planted for row in table if not row.whole)
    if planted:
        summary.append(
            f"Of {planted:,} faults planted into a copy of these data, the audit found "
            f"{found_of:,}."
        )
        missed = [row.title for row in table if row.planted and 2 * row.found < row.planted]
        if missed:
            summary.append(f"It would have missed most of: {'; '.join(missed)}.")
    else:
        summary.append(
            "Nothing could be planted into a copy of these data, so how much the audit would find "
            "is not known."
        )
    if num_unreadable:
        summary.append(f"{num_unreadable:,} files could not be read.")
    if bad or counts["poison"] >= max(1, 0.005 * len(evidence.labels)):
        return "quarantine", tuple(summary)
    if any(counts[kind] for kind in ("poison", "label", "copy", "file")):
        return "review", tuple(summary)
    if not planted or 2 * found_of < planted:
        return "inconclusive", tuple(summary)
    return "accept", tuple(summary)


_NAMES: Mapping[Kind, str] = {
    "poison": "that look poisoned",
    "shortcut": "with a shortcut",
    "label": "that look mislabeled",
    "copy": "copies",
    "file": "out of place",
}


def with_worth(whole: Report, worth: Worth) -> Report:
    """Returns the report with what the actions are worth."""
    return dataclasses.replace(whole, worth=worth, summary=(*whole.summary, worth.reason))


def with_certificate(whole: Report, certificate: Certificate) -> Report:
    """Returns the report with what no few images can change."""
    summary = (*whole.summary, certificate.reason)
    return dataclasses.replace(whole, certificate=certificate, summary=summary)
