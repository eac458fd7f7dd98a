"""The files of an audit: findings.json, .csv and .parquet, kept.txt and report.html.

`write` puts them into a folder, `read` takes findings.json from anywhere. The records that they
hold are in `records`.
"""

import base64
import contextlib
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from jaxpoison.audit import report as page
from jaxpoison.audit import strict
from jaxpoison.audit.records import KINDS as KINDS
from jaxpoison.audit.records import Certificate as Certificate
from jaxpoison.audit.records import CertificateRow as CertificateRow
from jaxpoison.audit.records import CheckResult as CheckResult
from jaxpoison.audit.records import Conclusion as Conclusion
from jaxpoison.audit.records import Data as Data
from jaxpoison.audit.records import Finding as Finding
from jaxpoison.audit.records import Picture as Picture
from jaxpoison.audit.records import Power as Power
from jaxpoison.audit.records import Report as Report
from jaxpoison.audit.records import Unreadable as Unreadable
from jaxpoison.audit.records import Worth as Worth
from jaxpoison.audit.records import WorthRow as WorthRow
from jaxpoison.core import files
from jaxpoison.core.extras import require

VERSION = 1
# What findings.json can need: 300 findings with thumbnails take 5 MB, 400,000 without 250.
MAX_BYTES = 1 << 29

# What spreadsheets take for the start of a formula, the full-width forms included.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def write(
    report: Report, folder: str | os.PathLike[str], *, ids: Iterable[str], most: int = 300
) -> None:
    """Writes a report's files: findings.json, .csv and .parquet, kept.txt and report.html.

    Each appears whole or not at all, findings.json last. Parquet needs pyarrow; without it there
    is no such file.

    Args:
      report: what was found.
      folder: made if it is not there; nothing outside of it is written.
      ids: of all images that could be read, in order; those without an open finding go to
        kept.txt, one a line. Line breaks in an id are written as escapes, as `\\n`.
      most: how many findings report.html draws.

    Raises:
      PermissionError, OSError: if the folder cannot be written to.
      ImportError: without Jinja2 (extra `audit`).
    """
    html = page.html(report, folder=os.fspath(folder), most=most)
    folder = files.check_writable(folder)
    dropped = {finding.id for finding in report.findings if finding.open}
    with files.replacing(folder / "kept.txt") as file:
        for id_ in ids:
            if id_ not in dropped:
                file.write(f"{one_line(id_)}\n".encode())
    files.write_text(folder / "report.html", html)
    files.write_text(folder / "findings.csv", _csv(report))
    _write_parquet(report, folder / "findings.parquet")
    files.write_text(folder / "findings.json", _json(report))


def read(path: str | os.PathLike[str]) -> Report:
    """Returns the report in a findings.json, or in a folder that has one.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: for anything that `write` would not have written; names the file and the field.
    """
    path = Path(path).expanduser()
    path = path / "findings.json" if path.is_dir() else path
    value = strict.load(path, "the findings of an audit", MAX_BYTES)
    version, counts = value.pop("version", None), value.pop("counts", None)
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"{path}: version must be {VERSION}, found {ascii(version)[:80]}; read it with the "
            "version of jaxpoison that wrote it, or repeat the audit"
        )
    report = strict.parse(Report, value, str(path))
    if counts != report.counts:
        raise ValueError(
            f"{path}: counts is not what its findings add up to, {report.counts}; decisions go "
            "into decisions.json, not into this file"
        )
    return report


def to_pandas(report: Report) -> Any:
    """Returns a DataFrame with one row for each finding, in order, without thumbnails.

    Columns are the fields of `Finding` by their names in JSON; `checks`, `reasons` and `related`
    hold lists.

    Raises:
      ImportError: without pandas (extra `audit`).
    """
    return require("pandas", extra="audit").DataFrame(_columns(report))


def thumbnail(image: np.ndarray, most: int = 96) -> str:
    """Returns an image as a data URI: PNG up to 64 pixels, shrunk to `most` and JPEG above.

    Args:
      image: uint8 [H, W, 3].
      most: largest height and width of large images.

    Raises:
      ValueError: for another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    picture, buffer = Image.fromarray(image), io.BytesIO()
    kind = "png" if max(picture.size) <= 64 else "jpeg"
    if kind == "jpeg":
        picture.thumbnail((most, most))
    picture.save(buffer, kind, quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _json(report: Report) -> str:
    """Returns findings.json: a line for each finding, in ASCII."""
    value = {"version": VERSION, **strict.plain(report), "counts": report.counts}
    findings = value.pop("findings")
    head = json.dumps(value, indent=1, allow_nan=False)[:-2]
    lines = ",\n  ".join(json.dumps(finding, allow_nan=False) for finding in findings)
    return f'{head},\n "findings": [\n  {lines}\n ]\n}}\n'


def _columns(report: Report) -> dict[str, list[Any]]:
    """Returns {name in JSON: values} over findings, without thumbnails."""
    rows = [strict.plain(finding) for finding in report.findings]
    names = [field.metadata.get("json", field.name) for field in dataclasses.fields(Finding)]
    return {name: [row[name] for row in rows] for name in names if name != "thumbnail"}


def _csv(report: Report) -> str:
    """Returns findings.csv."""
    return table(_columns(report))


def table(columns: Mapping[str, Iterable[Any]]) -> str:
    """Returns columns as CSV: no cell that a spreadsheet would take for a formula."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\r\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([_cell(value) for value in row])
    return lines.getvalue()


def _cell(value: Any) -> Any:
    """Returns a value for CSV; text that could be a formula gets an apostrophe in front."""
    text = "; ".join(value) if isinstance(value, list) else value
    if isinstance(text, str):
        text = text.replace("\0", "\\0")
        return f"'{text}" if text.lstrip(" \u00a0").startswith(_FORMULA) else text
    return text


def _write_parquet(report: Report, path: Path) -> None:
    """Writes the findings' columns, or removes what an earlier run left, if pyarrow is missing."""
    try:
        arrow = cast(Any, require("pyarrow", extra="audit"))
        parquet = cast(Any, require("pyarrow.parquet", extra="audit"))
    except ImportError:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return
    texts = arrow.list_(arrow.string())
    kinds = {"row": arrow.int64(), "checks": texts, "reasons": texts, "related": texts}
    kinds |= dict.fromkeys(("confidence", "p_value", "q_value"), arrow.float64())
    columns = _columns(report)
    schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in columns])
    with files.replacing(path) as file:
        parquet.write_table(arrow.table(columns, schema=schema), file)


def one_line(text: str) -> str:
    """Returns text with its line breaks escaped, as in Python."""
    breaks = [character for character in set(text) if len(f"x{character}x".splitlines()) > 1]
    for character in breaks:
        text = text.replace(character, ascii(character)[1:-1])
    return text
