"""report.html: all that an audit found, as one page that opens from disk and fetches nothing.

Names of files and classes are hostile: Jinja2 escapes all text, characters that would not be seen
or would turn the line around are shown as escapes, and a Content-Security-Policy lets no script
run but the page's own, by its hash.
"""

import base64
import collections
import dataclasses
import hashlib
import importlib.resources
import json
import shlex
import unicodedata
from collections.abc import Iterable
from typing import Any

from jaxpoison.audit.records import KINDS, Finding, Power, Report, Worth
from jaxpoison.core.extras import require
from jaxpoison.evaluation.statistics import wilson

# What a kind of finding is called: of one image, and over a column of counts.
_KIND_NAMES = {
    "file": ("File", "Files"),
    "copy": ("Copy", "Copies"),
    "label": ("Wrong label", "Wrong labels"),
    "poison": ("Suspected poison", "Suspected poisons"),
    "shortcut": ("Shortcut", "Shortcuts"),
}
_RANKS = {"high": 3, "medium": 2, "low": 1}
_MOST_CLASSES = 50
_MOST_PROBLEMS = 200
_MOST_RELATED = 6
# Joiners, which emoji and some scripts need.
_HARMLESS = "\u200c\u200d"


@dataclasses.dataclass(frozen=True)
class _ClassRow:
    """One line of the overview of classes: its images, and its open findings by kind."""

    name: str
    images: int
    found: dict[str, int]

    @property
    def flagged(self) -> int:
        return sum(self.found.values())

    @property
    def share(self) -> float:
        return self.flagged / self.images if self.images else 0.0


def html(report: Report, *, folder: str = ".", most: int = 300) -> str:
    """Returns the page.

    Args:
      report: what to show.
      folder: the report's folder as the user gave it, for the commands that the page shows.
      most: how many findings are drawn; those to be confirmed first always are.

    Raises:
      ImportError: without Jinja2 (extra `audit`).
    """
    environment, style, script = page_environment("report")
    drawn = _drawn(report, most)
    classes = _classes(report)
    return environment.get_template("report.html.jinja").render(
        report=report,
        folder=folder,
        clean_folder=folder.removesuffix("-audit") + "-clean",
        # By a command that reads data from a path: not the demo, and not arrays.
        repeatable=report.replay.startswith("jaxpoison audit "),
        style=style,
        script=script,
        policy=policy(style, script),
        headline=_headline(report),
        kinds=[(kind, *_KIND_NAMES[kind], report.counts[kind]) for kind in KINDS],
        kind_names=_KIND_NAMES,
        ranks=_RANKS,
        titles={check.name: check.title for check in report.checks},
        drawn=drawn,
        asked=_asked(report, drawn),
        undrawn=_undrawn(report, drawn),
        classes=classes[:_MOST_CLASSES],
        num_classes_left=max(0, len(classes) - _MOST_CLASSES),
        class_kinds=[kind for kind in KINDS if any(row.found.get(kind) for row in classes)],
        largest_share=max((row.share for row in classes), default=0) or 1,
        power=[(power, *_power_words(power)) for power in report.power],
        blind=[power.title for power in report.power if _is_blind(power)],
        power_checks=_power_checks(report.power),
        worth_scale=_worth_scale(report.worth),
        problems=report.problems[:_MOST_PROBLEMS],
        most_related=_MOST_RELATED,
        config=_shown(json.dumps(report.config, indent=2, ensure_ascii=False), keep="\n"),
    )


def page_environment(name: str) -> tuple[Any, Any, Any]:
    """Returns (Jinja2's environment, style, script) of a page; NAME.html.jinja is its template.

    The style is report.css, followed by NAME.css where that is another file; the script is NAME.js,
    empty if there is none. Names and texts of templates go through the filter `shown`.

    Raises:
      ImportError: without Jinja2 (extra `audit`).
    """
    jinja2 = require("jinja2", extra="audit")
    template = f"{name}.html.jinja"
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({template: _source(template)}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": _shown,
        "exact": lambda text: json.dumps(text),
        "count": "{:,}".format,
        "percent": _percent,
        "points": lambda change: f"{100 * change:+.1f}".replace("-", "\u2212"),
        "begin": lambda text: text[:1].upper() + text[1:],
        "quoted": lambda text: _shown(shlex.quote(text)),
    }
    style = "".join(map(_source, dict.fromkeys(["report.css", f"{name}.css"])))
    markup = jinja2.utils.markupsafe.Markup
    return environment, markup(style), markup(_source(f"{name}.js"))


def _source(name: str) -> str:
    """Returns a file that lies next to this one; nothing if there is none."""
    path = importlib.resources.files("jaxpoison.audit").joinpath(name)
    return path.read_text("utf-8") if path.is_file() else ""


def policy(style: str, script: str) -> str:
    """Returns a Content-Security-Policy that allows this style, this script and data URIs."""
    hashes = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    style_hash, script_hash = hashes
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; "
        f"script-src 'sha256-{script_hash}'; base-uri 'none'; form-action 'none'"
    )


def _shown(text: str, keep: str = "") -> str:
    """Returns text with what cannot be seen, or turns the line around, as escapes."""
    return "".join(
        character
        if character in keep
        or character in _HARMLESS
        or unicodedata.category(character) not in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
        else character.encode("unicode_escape").decode()
        for character in text
    )


def _percent(share: float) -> str:
    """Returns a share for people: 97%, 3.2%, never 100% for less or 0% for more."""
    percent = 100 * share
    if 0 < percent < 0.1:
        return "< 0.1%"
    if percent < 10:
        return f"{percent:.1f}".removesuffix(".0") + "%"
    return f"{min(percent, 99.9):.1f}%" if 99.5 <= percent < 100 else f"{percent:.0f}%"


def _headline(report: Report) -> str:
    """Returns the verdict in one sentence."""
    total = report.data.num_images + report.data.num_unreadable
    found = sum(finding.open for finding in report.findings) + len(report.problems)
    images, are = f"{found:,} of {total:,} images", "is" if found == 1 else "are"
    wholes = sum(conclusion.flagged for conclusion in report.wholes)
    if report.verdict == "accept":
        return (
            f"Nothing was found that stands against training on these {total:,} images."
            if not found
            else f"Fit to train on; {images} {are} worth a look."
        )
    if report.verdict == "review":
        return f"Look at {images} before you train on this set."
    if report.verdict == "quarantine":
        if wholes and not found:
            return "Do not train on this set as it is: something is wrong with all of it."
        return f"Do not train on this set as it is: {images} {are} flagged."
    return "This audit cannot tell whether the set is fit to train on."


def _drawn(report: Report, most: int) -> list[Finding]:
    """Returns the findings on the page, in order: the first `most`, and those to confirm first."""
    asked = set(report.ask)
    return [f for rank, f in enumerate(report.findings) if rank < most or f.id in asked]


def _asked(report: Report, drawn: list[Finding]) -> list[tuple[int, Finding]]:
    """Returns (place on the page, finding) for those to be confirmed first and not yet decided."""
    places = {finding.id: place for place, finding in enumerate(drawn)}
    asked = ((places[id_], drawn[places[id_]]) for id_ in report.ask)
    return [(place, finding) for place, finding in asked if finding.decision is None]


def _undrawn(report: Report, drawn: list[Finding]) -> list[Finding]:
    """Returns decided findings that the page does not draw: a saved file keeps them."""
    ids = {finding.id for finding in drawn}
    return [f for f in report.findings if f.decision is not None and f.id not in ids]


def _classes(report: Report) -> list[_ClassRow]:
    """Returns the overview of classes, the worst first."""
    found = collections.Counter((f.class_name, f.kind) for f in report.findings if f.open)
    rows = [
        _ClassRow(name, images, {kind: found[name, kind] for kind in KINDS if found[name, kind]})
        for name, images in zip(report.data.class_names, report.data.class_counts, strict=True)
    ]
    return sorted(rows, key=lambda row: (-row.share, -row.images))


def _is_blind(power: Power) -> bool:
    """Whether the audit found next to nothing of a threat that was planted."""
    return power.planted > 0 and power.found < 0.1 * power.planted


def _power_words(power: Power) -> tuple[str, str, float, float]:
    """Returns (a word for styles, what the figure means, ends of the recall's interval)."""
    if not power.planted:
        return "untested", "Not planted here, so nothing is known.", 0.0, 1.0
    if power.whole and power.found == power.planted:
        return "strong", "A set like this is flagged as a whole.", 0.0, 1.0
    low, high = wilson(power.found, power.planted)
    rate = power.found / power.planted
    if _is_blind(power):
        word, words = "blind", "This audit could not have found this on your data."
    elif rate < 0.5:
        word, words = "weak", "Would have missed most of it."
    elif rate < 0.9:
        word, words = "fair", "Would have found most of it, not all."
    else:
        word, words = "strong", "Would have found nearly all of it."
    return word, words, low, high


def _power_checks(powers: Iterable[Power]) -> list[str]:
    """Returns names of the checks that some threat was tried on, in order of appearance."""
    return list(dict.fromkeys(name for power in powers for name in power.checks))


def _worth_scale(worth: Worth | None) -> float:
    """Returns the largest change of accuracy that the chart of the worth has to show."""
    ends = [abs(end) for row in (worth.rows if worth else ()) for end in (row.low, row.high)]
    return max([0.005, *ends]) * 1.05
