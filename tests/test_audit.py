"""The audit from end to end, on real images: a pass, canaries, a report, the command."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxpoison import cli
from jaxpoison.audit import _audit, assemble, findings, foreign, measure, plant, power
from jaxpoison.audit import command as cli_command
from jaxpoison.data import load_embedded
from jaxpoison.data.readers import Source, open_source

QUICK = _audit.Settings(quick=True)
SOME = np.random.default_rng(0).standard_normal((3 * 8 * 8, 16)).astype(np.float32)


def project(images):
    """A linear embedding of 8x8 pixels, in place of a network: a second, not half a minute."""
    small = jax.image.resize(images, (images.shape[0], 8, 8, 3), "linear")
    features = (small.reshape(images.shape[0], 192) - 0.5) @ SOME
    return features / jax.numpy.linalg.norm(features, axis=1, keepdims=True)


projected = jax.jit(project)


def embedding():
    return measure.Embedding(
        "projection", lambda images: np.asarray(projected(np.float32(images) / 255)), project
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The foreign witness of audits in this process; the command in a process has the real one."""
    monkeypatch.setattr(_audit, "foreign", embedding)


COMMAND = [sys.executable, "-m", "jaxpoison"]
ROOT = {"PYTHONPATH": str(Path(__file__).parents[1])}


def as_a_user(arguments, place):
    """Runs the command in a process with the environment of a user, not of these tests."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_FLAGS"))
    }
    return command(arguments, place, environment)


def command(arguments, place, environment=os.environ):
    """Runs the command in a process; with the settings of these tests it compiles quickly."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=place,
        env=dict(environment) | ROOT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return load_embedded("cifar10").train.take(np.arange(300))


@pytest.fixture
def source(images):
    return Source.from_arrays(images.images, images.labels)


@pytest.fixture
def evidence(source, tmp_path):
    return measure.measure(source, embedding(), tmp_path / "pass")[0]


def test_evidence_is_that_of_the_images(images, evidence):
    np.testing.assert_array_equal(evidence.images, images.images)
    np.testing.assert_array_equal(evidence.labels, images.labels)
    np.testing.assert_array_equal(evidence.sizes, 32)
    np.testing.assert_allclose(evidence.embedding, embedding().embed(images.images), atol=1e-6)
    assert len(np.unique(evidence.digests, axis=0)) == 300
    assert list(evidence.ids[:2]) == ["row 0", "row 1"]


class Killed(Exception):
    pass


def test_a_pass_that_was_killed_goes_on(images, source, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "BATCH", 64)
    whole, _, _ = measure.measure(source, embedding(), tmp_path / "whole")
    seen = []

    def kill(done, total):
        seen.append(done)
        if done == 128:
            raise Killed

    with pytest.raises(Killed):
        measure.measure(source, embedding(), tmp_path / "part", progress=kill)
    part, _, _ = measure.measure(
        source, embedding(), tmp_path / "part", progress=lambda done, total: seen.append(done)
    )
    assert seen == [64, 128, 192, 256, 300]
    for field in dataclasses.fields(whole):
        if isinstance(getattr(whole, field.name), np.ndarray):
            np.testing.assert_array_equal(getattr(whole, field.name), getattr(part, field.name))


def test_perceptual_hashes_survive_a_change_of_brightness_and_not_of_the_image():
    pictures = load_embedded("cifar10").test.images[:200]
    hashes = measure.perceptual_hashes(pictures)
    darker = measure.perceptual_hashes(np.uint8(0.8 * pictures))
    bits = np.bitwise_count(hashes ^ darker).sum(1)
    assert np.median(bits) <= 2
    others = np.bitwise_count(hashes ^ np.roll(hashes, 1, axis=0)).sum(1)
    assert np.median(others) > 40


def test_a_hash_is_which_area_is_brighter():
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None], (32, 32, 3))
    (left_to_right, top_to_bottom), (flipped, _) = measure.perceptual_hashes(
        np.stack([ramp, ramp[:, ::-1]])
    )
    assert left_to_right == 2**64 - 1 and flipped == 0 and top_to_bottom == 0


@pytest.fixture
def read(source):
    return _audit._Reader(source, np.arange(300))


@pytest.fixture
def planted(evidence, read):
    return plant.plant(evidence, plant.canaries(evidence, read, embedding()))


def test_canaries_are_what_they_are_called(images, evidence, planted):
    copy = planted.evidence
    names, counts = np.unique(planted.threats, return_counts=True)
    count = len(evidence.labels) // (4 * len(plant.THREATS))
    expected = dict.fromkeys([t.name for t in plant.THREATS], count)
    largest = np.bincount(evidence.labels).max()
    expected["wave"] = min(count, largest // 4)
    assert dict(zip(names, counts, strict=True)) == expected
    assert len(set(planted.rows)) == len(planted.rows)
    rows = {name: planted.rows[planted.threats == name] for name in names}
    old, new = evidence.labels, copy.labels
    assert np.all(new[rows["flip"]] != old[rows["flip"]])
    np.testing.assert_array_equal(copy.images[rows["flip"]], evidence.images[rows["flip"]])
    mistaken = rows["mistake"]
    np.testing.assert_array_equal(copy.images[mistaken], evidence.images[mistaken])
    believed = foreign.predictions(evidence).probabilities
    assert np.all(believed[mistaken].argmax(1) == old[mistaken])
    assert np.all(new[mistaken] != old[mistaken])
    # Doubtful images, and the classes that they are taken for.
    sure = believed[np.arange(len(old)), old]
    assert sure[mistaken].mean() < sure[believed.argmax(1) == old].mean()
    others = believed[mistaken].sum(1) - believed[mistaken, old[mistaken]]
    assert np.mean(believed[mistaken, new[mistaken]] / others) > 1 / 9
    target = np.bincount(old).argmax()
    for name in ("patch", "blend"):
        assert np.all(new[rows[name]] == target) and np.all(old[rows[name]] != target)
    corner = copy.images[rows["patch"][::3]][:, 28:31, 28:31]
    assert np.all(corner == np.where(np.indices((3, 3)).sum(0) % 2 == 0, 255, 0)[..., None])
    colored = copy.images[rows["patch"][1::3]][:, 1:4, 28:31]
    assert len(np.unique(colored.reshape(-1, 3), axis=0)) == 1
    moved = np.abs(np.int32(copy.images[rows["patch"]]) - evidence.images[rows["patch"]])
    assert moved[:, 4:28].max() == moved[:, :, :1].max() == 0
    assert (moved > 0).any(axis=(1, 2, 3)).all()
    blended = np.abs(np.int32(copy.images[rows["blend"]]) - evidence.images[rows["blend"]])
    assert blended.mean() > 5 and blended.max() <= 0.15 * 255 + 1
    waved = np.int32(copy.images[rows["wave"]]) - evidence.images[rows["wave"]]
    assert np.all(old[rows["wave"]] == target) and np.all(new[rows["wave"]] == target)
    assert np.abs(waved).max() == 16 and np.all(waved[..., 0].min((1, 2)) < -8)
    # The same wave on all of them, but for pixels that are as dark or bright as can be.
    inside = np.all((evidence.images[rows["wave"]] > 16) & (evidence.images[rows["wave"]] < 239), 0)
    assert inside.any() and np.ptp(waved[:, inside], axis=0).max() == 0
    # A copy is the same as an image of another class, to the last bit and in all evidence.
    digests = {bytes(d): label for d, label in zip(evidence.digests, old, strict=True)}
    for row in rows["copy"]:
        assert digests[bytes(copy.digests[row])] != new[row]


def test_collisions_stay_within_few_pixel_values(evidence, planted):
    rows = planted.rows[planted.threats == "collision"]
    copy = planted.evidence
    np.testing.assert_array_equal(copy.labels[rows], evidence.labels[rows])
    moved = np.int32(copy.images[rows]) - evidence.images[rows]
    assert 0 < np.abs(moved).max() <= 16


def test_collisions_come_close_to_their_goals(images):
    start, goals = images.images[:40], images.images[100:140]
    moved = plant.collide(embedding(), start, goals)
    aims, before, after = (embedding().embed(x) for x in (goals, start, moved))
    assert np.all((aims * after).sum(1) > (aims * before).sum(1))
    assert np.mean((aims * after).sum(1)) > np.mean((aims * before).sum(1)) + 0.1


def test_the_rest_of_the_copy_and_the_original_are_as_they_were(images, evidence, planted):
    others = np.setdiff1d(np.arange(300), planted.rows)
    for name in ("labels", "images", "embedding", "digests", "hashes"):
        np.testing.assert_array_equal(
            getattr(planted.evidence, name)[others], getattr(evidence, name)[others]
        )
    np.testing.assert_array_equal(evidence.images, images.images)


@pytest.mark.parametrize("rows", [np.arange(15), np.zeros(1, int)])
def test_nothing_is_planted_where_there_is_no_room(images, tmp_path, rows):
    source = Source.from_arrays(images.images[rows], images.labels[rows])
    found = measure.measure(source, embedding(), tmp_path)[0]
    changes = plant.canaries(found, lambda rows: images.images[rows], embedding())
    assert len(changes.rows) == 0 and len(plant.plant(found, changes).rows) == 0


def test_class_wise_noise_is_one_pattern_for_a_class(images):
    moved = np.int32(plant.classwise(images.images, images.labels)) - images.images
    inside = (images.images > 8) & (images.images < 247)
    for label in range(10):
        mine, seen = moved[images.labels == label], inside[images.labels == label]
        pattern = np.sign(mine.sum(0))
        np.testing.assert_array_equal(mine[seen], np.broadcast_to(8 * pattern, mine.shape)[seen])


def test_class_wise_noise_on_larger_images_is_that_on_small_ones(images):
    large = images.images.repeat(3, axis=1).repeat(3, axis=2)
    moved = plant.classwise(large, images.labels, share=0.5)
    np.testing.assert_array_equal(
        measure.shrink(moved, 32), plant.classwise(images.images, images.labels, share=0.5)
    )


def test_a_copy_with_a_shortcut_is_a_sample_with_noise(images, evidence, read, monkeypatch):
    monkeypatch.setattr(plant, "MOST_WITH_SHORTCUT", 100)
    copy = plant.with_shortcut(evidence, read, embedding(), 0.5)
    assert len(copy.labels) == 100 and copy.trained is None
    rows = [list(evidence.ids).index(id_) for id_ in copy.ids]
    np.testing.assert_array_equal(copy.labels, images.labels[rows])
    changed = (copy.images != images.images[rows]).any(axis=(1, 2, 3))
    assert 30 < changed.sum() < 70
    np.testing.assert_allclose(copy.embedding, embedding().embed(copy.images), atol=1e-6)
    assert len(np.unique(copy.digests, axis=0)) == 100


def folder_of(images, place, count=120):
    """Writes class folders of PNG files."""
    for row in range(count):
        path = place / f"class{images.labels[row]}" / f"{row:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[row]).save(path)
    return place


def state(place):
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def folder(images, tmp_path):
    place = folder_of(images, tmp_path / "photos")
    for label, name in ((images.labels[0], "a"), ((images.labels[0] + 1) % 10, "b")):
        path = place / f"class{label}" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(images.images[0]).save(path)
    (place / "class0" / "broken.jpg").write_bytes(b"")
    return place


def test_the_command_audits_a_folder_and_cleans_it(folder, tmp_path):
    """As a user does it, in a process of its own; the data stay as they are."""
    before, out = state(folder), tmp_path / "out"
    audit = ["audit", str(folder), "--out", str(out), "--quick"]
    result = as_a_user(audit, tmp_path)
    assert result.returncode == 0, result.stderr
    assert state(folder) == before
    report = findings.read(out)
    assert report.data.num_images == 122 and report.data.num_unreadable == 1
    assert report.problems[0].id == "class0/broken.jpg"
    kinds = {finding.id.split("/")[1]: finding.kind for finding in report.findings}
    assert kinds["a.png"] == "copy" and kinds["b.png"] == "label"
    assert "report.html" in result.stdout and (out / "report.html").stat().st_size > 10_000
    kept = (out / "kept.txt").read_text().splitlines()
    assert len(kept) == 122 - sum(finding.open for finding in report.findings)

    result = as_a_user(["clean", str(out), "--out", str(tmp_path / "clean")], tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(state(tmp_path / "clean")) == sorted(kept)

    gate = ["--baseline", str(out / "findings.json"), "--fail-on", "new:label>0"]
    assert as_a_user([*audit, *gate], tmp_path).returncode == 0
    assert as_a_user([*audit, "--fail-on", "label>0"], tmp_path).returncode == 1


def test_the_configuration_replays_the_audit(folder, tmp_path):
    assert cli.main(["audit", str(folder), "--out", str(tmp_path / "a"), "--quick"]) == 0
    config = tmp_path / "a" / "config.json"
    assert cli.main(["audit", "--config", str(config), "--out", str(tmp_path / "b")]) == 0
    first, second = (json.loads((tmp_path / x / "findings.json").read_text()) for x in "ab")
    assert first == second


# What is in the cache at the moment of a kill.
MOMENTS = {
    "while images are read": "measure-*/state.npy",
    "before anything is trained": "planted-*/canaries.npz",
    "while the copy's network is trained": "copy-*/checkpoints/1",
}


def test_a_command_that_is_killed_anywhere_goes_on(images, tmp_path):
    """SIGKILL at several moments, then the same command: the findings are those of one run."""
    photos = folder_of(images, tmp_path / "photos", 150)
    before, home = state(photos), tmp_path / "home"
    home.mkdir()
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(home))
    environment = dict(os.environ) | ROOT | places
    arguments = ["audit", str(photos), "--no-worth", "--epochs", "2", "--out"]

    def killed(moment):
        """Kills the command once there is such a file; returns whether it was at work then."""
        process = subprocess.Popen(
            [*COMMAND, *arguments, "cut"], cwd=tmp_path, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not any((tmp_path / "cut").glob(f"cache/{moment}")):
            time.sleep(0.01)
        process.kill()
        return process.wait() == -signal.SIGKILL

    for moment in MOMENTS.values():
        assert killed(moment)
        assert not (tmp_path / "cut" / "findings.json").exists()
    for out in ("cut", "whole"):
        subprocess.run(
            [*COMMAND, *arguments, out], cwd=tmp_path, env=environment, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    cut, whole = ((tmp_path / out / "findings.json").read_text() for out in ("cut", "whole"))
    assert cut == whole
    assert state(photos) == before and not list(home.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "home", "photos", "whole"]


def test_arrays_go_in_and_pandas_come_out(images):
    result = _audit.audit(images.images, images.labels, settings=QUICK)
    frame = result.to_pandas()
    assert len(frame) == len(result.report.findings) and "q_value" in frame
    assert result.flagged.shape == (300,)
    assert not isinstance(result.evidence.images, np.memmap)


def test_a_certificate_is_a_line_of_the_report(images, monkeypatch):
    trusted = load_embedded("cifar10").validation.take(np.arange(50))
    settings = dataclasses.replace(QUICK, certify=5)
    result = _audit.audit(
        images.images, images.labels, trusted=(trusted.images, trusted.labels), settings=settings
    )
    found = result.report.certificate
    assert (found.num_parts, found.num_images) == (5, 50)
    assert found.reason in result.report.summary and "50 trusted images" in found.reason
    # Whitening depends on all images; what is certified must not.
    monkeypatch.setattr(_audit.witness, "whitening", lambda embedding: lambda rows: rows[:, ::-1])
    again = _audit.audit(
        images.images, images.labels, trusted=(trusted.images, trusted.labels), settings=settings
    )
    assert again.report.certificate == found
    options = cli_command.audit_parser().parse_args(["photos", "--certify", "5"])
    assert cli_command._settings(options).certify == 5
    assert cli_command._command(options)[-4:] == ["--certify", "5", "--seed", "0"]


def test_the_example_of_the_guide():
    guide = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
    names = {}
    exec(compile(block, "docs/audit.md", "exec"), names)  # this repository's own text
    assert len(names["clean"]) == 300 - names["result"].flagged.sum()
    assert len(names["findings"]) == len(names["result"].report.findings)


def test_the_whole_audit_with_trusted_images(images, tmp_path, monkeypatch):
    """All stages, small: two epochs, so nothing is claimed of what they find."""
    told = []
    settings = dataclasses.replace(_audit.Settings(), epochs=2, worth=False)
    trusted = load_embedded("cifar10").validation.take(np.arange(50))
    result = _audit.audit(
        images.images, images.labels, trusted=(trusted.images, trusted.labels),
        settings=settings, folder=tmp_path, tell=lambda stage, *_: told.append(stage),
    )  # fmt: skip
    assert list(dict.fromkeys(told))[:4] == [
        "Reading images", "Reading trusted images", "Planting known faults into a copy",
        "Training on the data",
    ]  # fmt: skip
    assert result.evidence.trained.margins.shape == (2, 300)
    assert result.evidence.trusted.trained.features.shape == (50, 128)
    threats = [*plant.THREATS, *plant.SHORTCUTS]
    assert [power.threat for power in result.report.power] == [t.name for t in threats]
    assert [power.whole for power in result.report.power][-3:] == [False, True, True]
    assert result.report.power[-1].found == 1  # noise on all images is found on 300 of them
    assert {check.status for check in result.report.checks} <= {"ran", "not run"}
    # What was planted is kept as well.
    monkeypatch.setattr(plant, "canaries", None)
    again = _audit.audit(
        images.images, images.labels, trusted=(trusted.images, trusted.labels),
        settings=settings, folder=tmp_path,
    )  # fmt: skip
    assert again.report == result.report
    # Other trusted images: nothing is trained or planted again.
    told.clear()
    fewer = trusted.take(np.arange(20))
    other = _audit.audit(
        images.images, images.labels, trusted=(fewer.images, fewer.labels),
        settings=settings, folder=tmp_path, tell=lambda stage, *_: told.append(stage),
    )  # fmt: skip
    assert not any(stage.startswith("Training") for stage in told)
    np.testing.assert_array_equal(other.evidence.trained.margins, result.evidence.trained.margins)
    assert len(other.evidence.trusted.trained.features) == 20


def test_one_class_and_one_image_are_answered(images):
    for rows in (np.flatnonzero(images.labels == images.labels[0]), np.zeros(1, int)):
        result = _audit.audit(images.images[rows], images.labels[rows])
        assert result.report.verdict in ("inconclusive", "review")
        assert not result.report.power


def test_trusted_images_of_other_classes_are_an_error(images):
    with pytest.raises(ValueError, match="classes that the data have not"):
        _audit.audit(
            images.images, images.labels, settings=QUICK,
            trusted=(images.images[:2], np.array(["owl", "hen"])),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "nowhere"], "nowhere does not exist"),
        (["audit", ".", "--fail-on", "poison"], "is no rule"),
        (["audit", ".", "--network", "mycode"], "MODULE:FUNCTION"),
        (["audit", ".", "--out", "inside"], "inside of the data"),
    ],
)
def test_bad_arguments_are_told_before_any_work(arguments, message, images, tmp_path, monkeypatch):
    folder_of(images, tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)
    assert not (tmp_path / "inside").exists()


def test_an_image_has_one_finding_and_labels_by_rule_come_first(source, tmp_path, images):
    doubled = np.concatenate([images.images, images.images[:3]])
    labels = np.append(images.labels, (images.labels[:3] + 1) % 10)
    result = _audit.audit(doubled, labels, settings=QUICK)
    rows = [finding.row for finding in result.report.findings]
    assert len(rows) == len(set(rows))
    assert {0, 1, 2, 300, 301, 302} <= set(rows[:8])
    assert all(result.report.findings[place].severity == "high" for place in range(6))
    all_kinds = assemble.kinds(result.judgement, len(labels))
    assert sorted(rows) == list(np.flatnonzero(all_kinds != ""))


def test_findings_come_by_severity_and_then_by_the_confidence_that_they_show(images):
    """Threats of one kind, and of two, that disagree on which image is the most extreme."""
    result = _audit.audit(images.images, images.labels, settings=QUICK)
    rng, num, families = np.random.default_rng(0), len(images.labels), []
    for place, threat in enumerate(plant.THREATS):
        p = rng.random(num) ** (2 + place)
        q = np.minimum(p * (1 + 9 * rng.random()), 1)
        families.append(power.Family(threat, {}, {}, p, q, q <= power.RATE, 40, 20, 0.0, 0.1))
    judgement = result.judgement._replace(families=tuple(families))
    report = assemble.report(
        judgement, result.evidence, (), source="arrays", fingerprint="0",
        picture=lambda row: images.images[row],
    )  # fmt: skip
    kinds = assemble.kinds(judgement, num)
    assert {"label", "poison"} <= set(kinds)
    for kind in ("label", "poison"):
        found = [f for f in report.findings if f.kind == kind and f.q_value is not None]
        shown = [finding.confidence for finding in found]
        assert len(shown) > 10 and shown == sorted(shown, reverse=True)
        for finding in found:
            own = [f for f in families if f.threat.kind == kind]
            least = min((f.q[finding.row], f.p[finding.row]) for f in own)
            assert (finding.q_value, finding.p_value) == least
            assert least[0] == min(f.q[finding.row] for f in families)


def test_a_table_and_a_folder_are_read_alike(folder):
    assert open_source(folder).class_names[0] == "class0"


MYCODE = """
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxpoison.network import from_linen


class Linen(nn.Module):
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(nn.relu(nn.Dense(8)(x.mean(axis=(1, 2)))))


class NNX(nnx.Module):
    def __init__(self):
        self.inner = nnx.Linear(3, 8, rngs=nnx.Rngs(0))
        self.outer = nnx.Linear(8, 10, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x.mean(axis=(1, 2)))))


def linen(classes=10):
    model = Linen(classes)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def other_weights():
    return Linen(), linen(5)[1]


def no_weights():
    return Linen(), {}


def model_alone():
    return Linen()


def five():
    return linen(5)


def three():
    return 1, 2, 3


def number():
    return 7
"""


@pytest.fixture
def mycode(tmp_path):
    (tmp_path / "mycode.py").write_text(MYCODE)
    return tmp_path


@pytest.mark.parametrize("name", ["linen", "NNX"])
def test_a_network_of_the_users_own_takes_the_place_of_training(name, images, mycode):
    folder_of(images, mycode / "photos", 100)
    result = command(["audit", "photos", "--network", f"mycode:{name}", "--no-worth"], mycode)
    assert result.returncode == 0, result.stderr
    assert "Training" not in result.stdout
    report = findings.read(mycode / "photos-audit")
    ran = {check.name for check in report.checks if check.status == "ran"}
    assert {"margins", "witnesses", "spectral"} <= ran
    # Without BatchNorm there are no statistics of layers.
    assert "characteristic" not in ran


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:load", "No module named 'nowhere'; run the command where nowhere.py is"),
        ("mycode:nothing", "mycode has no function 'nothing'"),
        ("mycode:jnp", "mycode has no function 'jnp'"),
        ("mycode:three", "it returns 3 values, not two"),
        ("mycode:number", "a int is no network"),
        ("mycode:model_alone", "has no variables"),
        ("mycode:no_weights", "the variables do not fit the network"),
        ("mycode:other_weights", "the variables do not fit the network"),
        ("mycode:five", "tells 5 classes apart, the data have 10"),
    ],
)
def test_networks_that_do_not_fit_are_refused_at_the_door(
    name, message, images, mycode, monkeypatch
):
    folder_of(images, mycode / "photos", 100)
    monkeypatch.chdir(mycode)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mycode", raising=False)
    with pytest.raises(SystemExit, match=re.escape(message)):
        cli.main(["audit", "photos", "--network", name])
    assert not (mycode / "photos-audit").exists()
