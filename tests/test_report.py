"""The report of an audit: its files, its page, decisions, cleaning and gates."""

import csv
import json
from pathlib import Path

import audited
import numpy as np
import pytest

from jaxpoison.audit import findings


@pytest.fixture(scope="module")
def report():
    return audited.sample(12, hostile=True)


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    ids = [finding.id for finding in report.findings]
    findings.write(report, folder, ids=[*ids, "kept.png", "two\nlines.png"])
    return folder


def test_json_round_trip(report, folder):
    assert findings.read(folder) == report
    assert findings.read(folder / "findings.json") == report
    assert (folder / "findings.json").read_text().isascii()


def test_kept_has_one_image_a_line(folder):
    assert (folder / "kept.txt").read_text().splitlines() == ["kept.png", "two\\nlines.png"]


def test_no_cell_of_the_csv_is_a_formula(report, folder):
    with (folder / "findings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.findings)
    assert not any(cell.startswith(tuple("=+-@\t\r")) for row in rows for cell in row.values())
    assert rows[5]["id"] == "'" + report.findings[5].id
    assert rows[0]["id"] == report.findings[0].id


def test_tables(report, folder):
    pandas, parquet = pytest.importorskip("pandas"), pytest.importorskip("pyarrow.parquet")
    frame = findings.to_pandas(report)
    assert list(frame["id"]) == [finding.id for finding in report.findings]
    stored = parquet.read_table(folder / "findings.parquet").to_pylist()
    assert [row["id"] for row in stored] == list(frame["id"])
    assert [tuple(row["checks"]) for row in stored] == [f.checks for f in report.findings]
    assert pandas.isna(frame["p_value"][2]) and "thumbnail" not in frame


def test_counts_leave_out_what_was_overruled(report):
    assert report.counts == {
        "file": 2, "copy": 3, "label": 6, "poison": 3, "shortcut": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version must be 1"),
        (("version",), True, "version must be 1"),
        (("verdict",), "fine", "verdict: expected one of 'accept'"),
        (("extra",), 1, "unknown field 'extra'"),
        (("findings", 0, "confidence"), 1.5, r"confidence must be in \[0, 1\]"),
        (("findings", 0, "confidence"), "1", "confidence: expected a number, found '1'"),
        (("findings", 0, "confidence"), True, "confidence: expected a number, found True"),
        (("findings", 0, "row"), 1.0, "row: expected a whole number"),
        (("findings", 0, "row"), 10**9, "of 2,500 images"),
        (("findings", 0, "row"), 10**500, "of 2,500 images"),
        (("findings", 0, "id"), "\ud800", "UTF-8 cannot hold"),
        (("findings", 0, "thumbnail"), "https://example.org/a.png", "must be a data URI"),
        (("findings", 0, "thumbnail"), "data:image/svg+xml;base64,AAAA", "must be a data URI"),
        (("findings", 0, "checks"), ["nothing"], "'nothing' is named, but is not in checks"),
        (("findings", 0, "class"), "unicorn", "is not in data.class_names"),
        (("findings", 0, "decision"), "maybe", "decision: expected one of"),
        (("findings", 0, "related"), "cat", "related: expected a list, found 'cat'"),
        (("findings",), {}, "findings: expected a list, found an object"),
        (("ask",), ["cat/none.png"], "is not in findings"),
        (("counts", "poison"), 0, "counts is not what its findings add up to"),
        (("data", "class_counts"), [2500], "class_counts has 1 entries for 10 classes"),
        (("data", "num_unreadable"), 3, "data.num_unreadable is 3"),
        (("power", 0, "found"), 51, r"found must be in \[0, 50\]"),
        (("power", 0, "checks"), {"neighbors": 2}, r"must be in \[0, 1\]"),
        (("worth", "rows", 0, "low"), 0.5, "mean must be in its interval"),
        (("certificate", "rows", 0, "right"), 0.95, r"right must be in \[0, 0.93\]"),
        (("wholes", 0, "flagged"), 0, "flagged: expected true or false"),
        (("problems", 0), [], "expected an object, found a list"),
    ],
)
def test_wrong_files_are_refused(folder, tmp_path, path, value, message):
    content = json.loads((folder / "findings.json").read_text())
    target = content
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    wrong = tmp_path / "findings.json"
    wrong.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        findings.read(wrong)
    assert str(wrong) in str(caught.value)


def test_damaged_files_are_refused(folder, tmp_path):
    content, wrong = (folder / "findings.json").read_bytes(), tmp_path / "findings.json"
    damaged = [
        b"", content[:-3], content[: len(content) // 2], b"[" * 100_000, b"[]", b"{}", b"\xff\xfe",
        b'{"version": 1, "version": 1}', b'{"version": NaN}', b"9" * 5000,
        content.replace(b'"confidence": ', b'"confidence": 1e999, "none": ', 1),
    ]  # fmt: skip
    for bytes_ in damaged:
        wrong.write_bytes(bytes_)
        with pytest.raises(ValueError, match=r"findings\.json"):
            findings.read(wrong)
    with pytest.raises(FileNotFoundError, match="expected the findings of an audit"):
        findings.read(tmp_path / "none.json")


def test_what_cannot_be_is_no_report(report):
    finding = report.findings[0]
    with pytest.raises(ValueError, match="2 times"):
        audited.changed(report, findings=(finding, finding))
    with pytest.raises(ValueError, match="say why it did not run"):
        findings.CheckResult("a", "A", "label", "not run", "", "")
    with pytest.raises(ValueError, match="severity must be one of 'high', 'medium', 'low'"):
        audited.changed(finding, severity="huge")
    with pytest.raises(ValueError, match="which JSON has not"):
        audited.changed(report, config={"rate": float("nan")})


def test_numbers_of_numpy_are_numbers(report):
    finding = audited.changed(
        report.findings[0], confidence=np.float32(0.5), row=np.int64(3), checks=["neighbors"]
    )
    assert type(finding.confidence) is float and type(finding.row) is int
    assert finding.checks == ("neighbors",)


def test_thumbnails():
    rng = np.random.default_rng(0)
    small = findings.thumbnail(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8))
    large = findings.thumbnail(rng.integers(0, 256, (900, 300, 3)).astype(np.uint8))
    assert small.startswith("data:image/png") and large.startswith("data:image/jpeg")
    assert len(large) < 20_000
    with pytest.raises(ValueError, match=r"image must be uint8 \[H, W, 3\]"):
        findings.thumbnail(np.zeros((4, 4), np.uint8))


def test_page_escapes_names(report, folder):
    page = (folder / "report.html").read_text()
    assert "<script>alert" not in page and "<b>'24" not in page and "\u202e" not in page
    assert "{{ 7*7 }}" in page and "&lt;script&gt;alert(1)" in page and "\\u202e" in page
    assert page.count("<script") == 1


def test_page_of_an_empty_report(tmp_path):
    data = findings.Data("arrays", 1, 1, ("only",), (1,), 0, "")
    empty = findings.Report(data=data, verdict="accept")
    findings.write(empty, tmp_path, ids=["row 0"])
    assert findings.read(tmp_path) == empty
    page = (tmp_path / "report.html").read_text()
    assert "No image was flagged" in page and "no threats were planted" in page
    assert (tmp_path / "kept.txt").read_text() == "row 0\n"


def test_page_draws_the_first_and_those_to_confirm(report, tmp_path):
    page = audited.page(report, tmp_path, most=2)
    assert page.count('class="finding ') == 2 + len(report.ask)
    assert page.count('class="undrawn"') == 1  # the decision on one that is not drawn is kept


def test_page_says_what_could_not_be_found(folder):
    page = (folder / "report.html").read_text()
    assert "This audit could not have found" in page and "NOT RUN" in page
    assert "Feature collisions with clean labels" in page


def test_page_says_which_shortcuts_it_would_flag(report, folder, tmp_path):
    flagged = "A set like this is flagged as a whole."
    page = (folder / "report.html").read_text()
    assert page.count(flagged) == 1 and "not flagged" not in page
    power = [audited.changed(p, found=0) if p.whole else p for p in report.power]
    page = audited.page(audited.changed(report, power=power), tmp_path)
    assert flagged not in page and page.count("not flagged") == 1
    assert "<li>A faint pattern for each class</li>" in page


def test_page_of_data_without_a_path_shows_no_command_that_needs_one(report, tmp_path):
    page = audited.page(audited.changed(report, replay="jaxpoison demo"), tmp_path)
    assert "jaxpoison clean" not in page and "--decisions" not in page
    assert "jaxpoison demo" in page


def test_page_shows_commands_that_a_shell_reads_as_they_are_meant(report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = audited.page(report, Path("my photos-audit"))
    assert "jaxpoison clean &#39;my photos-audit&#39; --out &#39;my photos-clean&#39;" in page
