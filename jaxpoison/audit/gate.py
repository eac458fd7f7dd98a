"""Rules that fail a build: `poison>0`, `new:label>10`, `any>100`."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from jaxpoison.audit.records import KINDS, Report

_RULE = re.compile(r"(new:)?([a-z]+)>([0-9]{1,9})", re.ASCII)


class Rule(NamedTuple):
    """How many findings are too many.

    Attributes:
      kind: the kind that is counted, or "any".
      most: the largest number that passes.
      new: whether only what the baseline has not is counted.
    """

    kind: str
    most: int
    new: bool = False

    def __str__(self) -> str:
        return f"{'new:' * self.new}{self.kind}>{self.most}"


def parse(text: str) -> Rule:
    """Returns the rule that `text` spells: `[new:]KIND>N`.

    Raises:
      ValueError: if it is none; the message has the grammar and an example.
    """
    match = _RULE.fullmatch("".join(text.split()))
    kinds = (*KINDS, "any")
    if match is None or match[2] not in kinds:
        raise ValueError(
            f"{text!r} is no rule: expected [new:]KIND>N, such as poison>0 or new:label>10, where "
            f"KIND is one of {', '.join(kinds)} and N a whole number"
        )
    return Rule(match[2], int(match[3]), match[1] is not None)


def violated(
    rules: Iterable[Rule], report: Report, baseline: Report | None = None
) -> tuple[str, ...]:
    """Returns a sentence for each rule that a report violates, in order.

    What counts is what `Report.counts` counts: findings that nobody overruled, unreadable files,
    conclusions on the whole set. New is what the baseline does not have under the same name and
    kind.

    Args:
      rules: see `parse`.
      report: what was found now.
      baseline: what was found before; needed for rules on what is new.

    Raises:
      ValueError: if a rule needs a baseline and there is none.
    """
    now = set(_counted(report))
    before = set(_counted(baseline)) if baseline is not None else None
    sentences = []
    for rule in rules:
        if rule.new and before is None:
            raise ValueError(f"the rule {rule} compares with a baseline: give the findings.json")
        counted = now - (before or set()) if rule.new else now
        number = sum(kind == rule.kind or rule.kind == "any" for kind, _, _ in counted)
        if number > rule.most:
            noun = "finding" if number == 1 else "findings"
            kind = "" if rule.kind == "any" else f" of kind {rule.kind}"
            sentences.append(f"{rule}: {number:,} {'new ' * rule.new}{noun}{kind}")
    return tuple(sentences)


def _counted(report: Report) -> Iterable[tuple[str, str, str]]:
    """Yields (kind, what it is, its name) of all that counts."""
    kinds = {check.name: check.kind for check in report.checks}
    for finding in report.findings:
        if finding.open:
            yield finding.kind, "image", finding.id
    for problem in report.problems:
        yield "file", "unreadable", problem.id
    for conclusion in report.wholes:
        if conclusion.flagged:
            yield kinds[conclusion.check], "whole", conclusion.check
