"""What a person said of findings: decisions.json, which the report's page saves.

`confirmed`: the finding is right. `overruled`: it is wrong, the image stays. `fine`: image and
label are right, the next audit trusts the image.
"""

import dataclasses
import json
import os
from typing import Any, Literal, get_args

from jaxpoison.audit import strict
from jaxpoison.audit.records import MOST_ID, Decision, Report
from jaxpoison.core import files

_WHAT = "the decisions on an audit"
_MAX_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decisions:
    """Decisions on the findings of one audit.

    Attributes:
      fingerprint: of the data that was audited (`records.Data.fingerprint`).
      decisions: {id of an image: decision}.
      version: of the file.
    """

    fingerprint: str
    decisions: dict[str, Decision]
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        strict.check_text("Decisions", 200, fingerprint=self.fingerprint)
        for id_, decision in self.decisions.items():
            strict.check_text("Decisions", MOST_ID, id=id_)
            strict.check_choice(f"Decision on {ascii(id_)[:80]}", get_args(Decision), it=decision)

    @property
    def fine(self) -> tuple[str, ...]:
        """Ids of the images that the next audit can trust."""
        return tuple(id_ for id_, decision in self.decisions.items() if decision == "fine")


def read(path: str | os.PathLike[str]) -> Decisions:
    """Returns the decisions in a file that may come from anywhere.

    Raises:
      FileNotFoundError, IsADirectoryError: if there is no file.
      ValueError: for anything that is no such file; names the file and what is wrong.
    """
    return strict.parse(Decisions, strict.load(path, _WHAT, _MAX_BYTES), os.fspath(path))


def write(decisions: Decisions, path: str | os.PathLike[str]) -> None:
    """Writes decisions as the report's page saves them; the file appears whole or not at all."""
    value: dict[str, Any] = strict.plain(decisions)
    files.write_text(path, json.dumps(value, indent=1) + "\n")


def of(report: Report) -> Decisions:
    """Returns the decisions that a report holds."""
    made: dict[str, Decision] = {
        finding.id: finding.decision for finding in report.findings if finding.decision is not None
    }
    return Decisions(fingerprint=report.data.fingerprint, decisions=made)


def check_same(decisions: Decisions, fingerprint: str) -> None:
    """Raises ValueError if the decisions are about data of another fingerprint."""
    if decisions.fingerprint != fingerprint:
        raise ValueError(
            f"the decisions are about data of fingerprint {decisions.fingerprint[:16]!r}..., the "
            f"report about {fingerprint[:16]!r}...: the data changed in between. "
            "Audit the data as it was, or, if the images that were decided on are unchanged, put "
            "the report's fingerprint into the file of decisions"
        )


def merge(report: Report, decisions: Decisions) -> Report:
    """Returns the report with the decisions on its findings.

    What was overruled or called fine no longer counts (`Report.counts`). Decisions on images
    without a finding change nothing. A decision replaces an earlier one.

    Raises:
      ValueError: if the decisions are about other data.
    """
    check_same(decisions, report.data.fingerprint)
    found = tuple(
        dataclasses.replace(finding, decision=decisions.decisions.get(finding.id, finding.decision))
        for finding in report.findings
    )
    return dataclasses.replace(report, findings=found)
