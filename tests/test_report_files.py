"""What is done with a report: decisions, a copy without what was flagged, rules for builds."""

import json
import os

import audited
import numpy as np
import pytest
from PIL import Image

from jaxpoison.audit import clean, decisions, findings, gate
from jaxpoison.data import readers

FINGERPRINT = "ab" * 32


class Folder:
    """Files in folders of their classes, as `data.readers` gives them."""

    def __init__(self, root, names, class_names=("cat", "dog"), ids=None):
        self.root, self.names = root, names
        self.ids = tuple(
            ids or (os.fsencode(name).decode(errors="backslashreplace") for name in names)
        )
        self.class_names = class_names
        self.labels = np.array(["/dog/" in f"/{name}" for name in names], np.int32)

    def path(self, row):
        return self.root / self.names[row]

    def fingerprint(self):
        return FINGERPRINT


class Arrays(Folder):
    def path(self, row):
        return None


def small(source, root, flagged=(), decided=None, problems=()):
    """Returns a report on a source in which some rows are flagged as poison."""
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    problems = tuple(findings.Unreadable(id_, "It is empty.") for id_ in problems)
    return findings.Report(
        data=findings.Data(
            str(root), len(source.ids), len(source.class_names), source.class_names,
            tuple(counts.tolist()), len(problems), FINGERPRINT,
        ),
        verdict="review",
        findings=tuple(
            findings.Finding(
                id=source.ids[row], row=row, kind="poison", severity="high", confidence=0.9,
                class_name=source.class_names[source.labels[row]],
                decision=(decided or {}).get(row),
            )
            for row in flagged
        ),
        problems=problems,
    )  # fmt: skip


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "photos"
    names = ["cat/a b.png", "cat/deep/c.png", "dog/=x<y>.png", "dog/d\udcff.png", "dog/e.png"]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number]) * 1000)
    return Folder(root, names)


def written(report, tmp_path):
    folder = tmp_path / "photos-audit"
    findings.write(report, folder, ids=())
    return folder


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_decisions_round_trip(tmp_path):
    report = audited.sample(12, hostile=True)
    made = decisions.Decisions(
        fingerprint=report.data.fingerprint, decisions=dict.fromkeys(audited.HOSTILE, "fine")
    )
    decisions.write(made, tmp_path / "decisions.json")
    assert decisions.read(tmp_path / "decisions.json") == made
    merged = decisions.merge(report, made)
    assert decisions.of(merged) == made and made.fine == audited.HOSTILE
    assert sum(merged.counts.values()) == 12 - len(audited.HOSTILE) + 2
    assert decisions.of(report).decisions == {report.findings[2].id: "confirmed"}
    # Decisions are kept in the report's own file as well.
    findings.write(merged, tmp_path, ids=[finding.id for finding in merged.findings])
    assert findings.read(tmp_path) == merged
    assert len((tmp_path / "kept.txt").read_text().splitlines()) == len(audited.HOSTILE)


def test_decisions_on_other_data_are_refused():
    report = audited.sample(2)
    with pytest.raises(ValueError, match="the data changed in between"):
        decisions.merge(report, decisions.Decisions(fingerprint="other", decisions={}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "missing field 'fingerprint'"),
        ({"version": 2, "fingerprint": "", "decisions": {}}, "version: expected one of 1; found 2"),
        ({"version": True, "fingerprint": "", "decisions": {}}, "version: expected one of 1"),
        ({"version": 1, "fingerprint": 1, "decisions": {}}, "fingerprint: expected text"),
        ({"version": 1, "fingerprint": "", "decisions": []}, "decisions: expected an object"),
        ({"version": 1, "fingerprint": "", "decisions": {"a": "b"}}, "expected one of 'confirmed'"),
        ({"version": 1, "fingerprint": "", "decisions": {"\ud800": "fine"}}, "UTF-8 cannot hold"),
        ({"version": 1, "fingerprint": "", "decisions": {}, "x": 1}, "unknown field 'x'"),
        ([1], "expected an object, found a list"),
    ],
)  # fmt: skip
def test_wrong_decisions_are_refused(tmp_path, content, message):
    file = tmp_path / "decisions.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        decisions.read(file)
    assert str(file) in str(caught.value)


def test_clean_copies_what_is_not_flagged(source, tmp_path):
    report = small(source, source.root, flagged=(0, 2, 4), decided={2: "overruled", 4: "confirmed"})
    before = {name: (source.root / name).read_bytes() for name in source.names}
    out = tmp_path / "photos-clean"
    result = clean.clean(written(report, tmp_path), out, source=source)
    assert result == clean.Cleaned(out, kept=3, left_out=2, copied=True)
    assert files_below(out) == ["cat/deep/c.png", "dog/=x<y>.png", "dog/d\udcff.png"]
    for name in files_below(out):
        assert (out / name).read_bytes() == before[name]
        assert (out / name).stat().st_ino != (source.root / name).stat().st_ino
        assert (out / name).stat().st_mtime == (source.root / name).stat().st_mtime
    assert {name: (source.root / name).read_bytes() for name in source.names} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "photos", "photos-audit", "photos-clean"
    ]  # fmt: skip


def test_clean_leaves_out_unreadable_files(source, tmp_path):
    report = small(source, source.root, problems=("dog/e.png", "cat/empty/"))
    result = clean.clean(written(report, tmp_path), tmp_path / "out", source=source)
    assert (result.kept, result.left_out) == (4, 1)


def test_clean_of_arrays_is_a_list(source, tmp_path):
    arrays = Arrays(source.root, source.names, ids=("r 0", "r 1", "r 2", "two\nlines", "r 4"))
    report = small(arrays, "arrays", flagged=(1,))
    out = tmp_path / "made" / "out"
    result = clean.clean(written(report, tmp_path), out, source=arrays)
    assert not result.copied and files_below(out) == ["kept.txt"]
    assert (out / "kept.txt").read_text() == "r 0\nr 2\ntwo\\nlines\nr 4\n"


def test_clean_of_folders_as_they_are_read(tmp_path):
    """With names that are escaped, a part of a data set, and an unreadable file."""
    root = tmp_path / "photos"
    names = ["train/cat/a\n1.png", "train/cat/b.png", "train/dog/c\udcff\\.png", "train/dog/d.png"]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 9, 3), number, np.uint8)).save(root / name)
    (root / "train/dog/empty.png").touch()
    (root / "test/cat").mkdir(parents=True)
    source = readers.open_source(root, split="train")
    for _ in source.batches(8, 4):
        pass
    problems = [problem.id for problem in source.problems]
    assert problems == ["train/dog/empty.png"] and len(source.ids) == 5
    report = small(source, root, flagged=(1,), problems=problems)
    data = audited.changed(report.data, fingerprint=source.fingerprint())
    report = audited.changed(report, data=data)
    # As a later command opens it: no pass has found the unreadable file yet.
    again = readers.open_source(root, split="train")
    result = clean.clean(written(report, tmp_path), tmp_path / "out", source=again)
    assert (result.kept, result.left_out, result.copied) == (3, 2, True)
    assert files_below(tmp_path / "out") == [names[0], names[2], names[3]]
    for name in files_below(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (root / name).read_bytes()


@pytest.mark.parametrize("kind", ["climbing", "absolute"])
def test_tables_cannot_make_it_write_elsewhere(source, tmp_path, kind):
    """Ids of tables are paths that anybody may have written: absolute, or climbing out."""
    (tmp_path / "table").mkdir()
    above = "../photos" if kind == "climbing" else str(source.root)
    names = [f"{above}/{name}" for name in source.names[:3]]
    table = Folder(tmp_path / "table", [*names, f"{above}/dog/e.png"])
    assert table.path(0).read_bytes() == b"\0" * 1000
    result = clean.clean(
        written(small(table, "table.csv"), tmp_path), tmp_path / "out", source=table
    )
    assert not result.copied and files_below(tmp_path / "out") == ["kept.txt"]
    assert len(files_below(tmp_path)) == 5 + 1 + 5  # the data, the list, the report


def test_clean_refuses_to_touch_the_data(source, tmp_path):
    report = written(small(source, source.root), tmp_path)
    link = tmp_path / "link"
    link.symlink_to(source.root)
    for out in (source.root, source.root / "new", source.root / "cat" / "new", link, link / "new"):
        with pytest.raises(ValueError, match="lies in the data"):
            clean.clean(report, out, source=source)
    with pytest.raises(ValueError, match="or around it"):
        clean.clean(report, tmp_path, source=source)
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        clean.clean(report, full, source=source)
    with pytest.raises(FileExistsError, match="is a file"):
        clean.clean(report, file, source=source)
    assert (full / "mine.txt").read_text() == file.read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert clean.clean(report, empty, source=source).kept == 5


def test_clean_follows_no_link_out_of_the_data(source, tmp_path):
    report = written(small(source, source.root), tmp_path)
    secret = tmp_path / "secret.png"
    secret.write_text("secret")
    (source.root / "dog/e.png").unlink()
    (source.root / "dog/e.png").symlink_to(secret)
    with pytest.raises(ValueError, match="is a link out of the data"):
        clean.clean(report, tmp_path / "out", source=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "photos", "photos-audit", "secret.png"
    ]  # fmt: skip


def test_clean_refuses_other_data(source, tmp_path):
    report = written(small(source, source.root, flagged=(4,)), tmp_path)
    fewer = Folder(source.root, source.names[:3])
    with pytest.raises(ValueError, match="which the data does not have"):
        clean.clean(report, tmp_path / "out", source=fewer)
    fewer.fingerprint = lambda: "other"
    with pytest.raises(ValueError, match="it changed since the audit"):
        clean.clean(report, tmp_path / "out", source=fewer)


def test_rules_are_read_and_spelled():
    for text in ("poison>0", "new:label>10", "any>100", "new:any>0"):
        assert str(gate.parse(text)) == text
    assert gate.parse(" new: poison > 3 ") == gate.Rule("poison", 3, new=True)
    for text in ("", "poison", "poison>=1", "poison>-1", "cat>1", "old:poison>1", "poison>1.5",
                 "poison>١", "poison>0 label>0", "poison>1" + "0" * 20):  # fmt: skip
        with pytest.raises(ValueError, match=r"is no rule: expected \[new:\]KIND>N"):
            gate.parse(text)


def test_rules_count(source):
    old = small(source, source.root, flagged=(0, 1))
    now = small(source, source.root, flagged=(1, 2, 3), decided={3: "fine"}, problems=("z.png",))

    def violated(*rules, baseline=old):
        return gate.violated(map(gate.parse, rules), now, baseline)

    assert violated("poison>1", "poison>2", "label>0") == ("poison>1: 2 findings of kind poison",)
    assert violated("new:poison>0") == ("new:poison>0: 1 new finding of kind poison",)
    assert violated("new:poison>1", "new:label>0") == ()
    assert violated("file>0", "any>2") == ("file>0: 1 finding of kind file", "any>2: 3 findings")
    with pytest.raises(ValueError, match="new:any>0 compares with a baseline"):
        violated("new:any>0", baseline=None)


def test_a_conclusion_on_the_whole_set_counts():
    report = audited.sample(1)
    whole = audited.changed(report.wholes[0], flagged=True)
    flagged = audited.changed(report, wholes=(whole,))
    assert gate.violated([gate.parse("shortcut>0")], report) == ()
    assert gate.violated([gate.parse("new:shortcut>0")], flagged, report)
    assert flagged.counts["shortcut"] == 1
