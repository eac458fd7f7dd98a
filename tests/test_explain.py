"""From a prediction to the training images behind it: real poisons on a small frozen network."""

import dataclasses
import functools
import json
import re

import chromium
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from audited import HOSTILE
from PIL import Image
from programs import ROOT

from jaxpoison import attacks, audit, cli, network, training
from jaxpoison.audit import _audit, _explain, views, worth
from jaxpoison.audit.measure import Embedding
from jaxpoison.data import Dataset, load_embedded, to_float
from jaxpoison.data.readers import open_source

POISONS = 6
BUDGET = 24 / 255
ATTACKS = {
    "feature_collision": attacks.feature_collision(epsilon=BUDGET, num_steps=60),
    "bullseye_polytope": attacks.bullseye_polytope(epsilon=BUDGET, num_steps=60),
    "head_gradient_matching": attacks.head_gradient_matching(
        epsilon=BUDGET, num_steps=60, restarts=1, draws=attacks.Draws()
    ),
}
MODEL = networks.classifier(networks.Tanh(48), num_classes=10)


@functools.cache
def clean():
    splits = load_embedded("cifar10")
    return splits.train.take(np.arange(200)), splits.validation


@functools.cache
def extractor():
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@functools.cache
def fit():
    return jax.jit(functools.partial(training.fit_head, num_classes=10))


def with_new_head(images, labels):
    features = network.features(MODEL, extractor(), images)
    head = fit()(jax.random.key(7), features, jnp.asarray(labels))
    return network.as_network(MODEL).with_head(extractor(), head)


@functools.cache
def poisoned(name):
    """Returns (poisoned set, variables of its victim) for a target that the clean head gets."""
    train, candidates = clean()
    before = network.predict(MODEL, with_new_head(*train[:2]), candidates.images)
    trials = attacks.draw_trials(
        jax.random.key(3), train, candidates, num_trials=1, num_poisons=POISONS,
        target_ids=np.flatnonzero(np.asarray(before) == candidates.labels),
    )  # fmt: skip
    victim = attacks.Victim(MODEL, extractor())
    (found,) = attacks.poison(jax.random.key(1), train, trials, ATTACKS[name], [victim])
    return found, with_new_head(found.images, found.labels)


@functools.cache
def explained(name):
    found, variables = poisoned(name)
    return audit.explain(
        MODEL, variables, Dataset(found.images, found.labels), found.target.images[0],
        found.target.label, key=jax.random.key(0), trusted=clean()[1].take(np.arange(100)),
    )  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_poisons_come_first_and_the_prediction_does_not_stand_without_them(name):
    found, _ = poisoned(name)
    result = explained(name)
    assert result.prediction == found.target.base_label and result.wanted == found.target.label
    poisons = np.flatnonzero(found.attack_id)
    assert np.isin(poisons, result.rows[: 2 * POISONS]).mean() >= 0.8
    as_is, without, at_random = result.removals
    assert as_is.changed == 0
    assert result.is_enough and without.changed > len(without.predictions) / 2
    assert at_random.changed < len(at_random.predictions) / 4
    assert at_random.num_removed == without.num_removed == result.num_causes
    assert without.probability.mean() > as_is.probability.mean()
    assert all(0 <= one.accuracy.min() <= one.accuracy.max() <= 1 for one in result.removals)


def test_the_named_are_the_smallest_prefix_of_1_2_4_that_changes_the_prediction():
    """By refits one by one, outside of the vmapped call."""
    found, variables = poisoned("feature_collision")
    result = explained("feature_collision")
    features = network.features(MODEL, variables, found.images)
    query = network.features(MODEL, variables, to_float(found.target.images))[0]
    _, fit_key, _ = jax.random.split(jax.random.key(0), 3)
    refit = jax.jit(functools.partial(training.fit_head, num_classes=10, recipe=_explain.REFIT))
    changes = []
    for size in (result.num_causes // 2, result.num_causes):
        keep = jnp.ones(len(found.labels), bool).at[result.rows[:size]].set(False)
        heads = [
            refit(key, features, jnp.asarray(found.labels), keep=keep)
            for key in jax.random.split(fit_key, 5)
        ]
        said = [int(jnp.argmax(query @ head["kernel"] + head["bias"])) for head in heads]
        changes.append(np.mean(np.array(said) != result.prediction))
    assert changes[0] <= 0.5 < changes[1]
    np.testing.assert_array_equal(result.removals[1].predictions, said)


def test_scores_equal_their_definitions_in_numpy():
    found, variables = poisoned("feature_collision")
    result = explained("feature_collision")
    features = np.asarray(network.features(MODEL, variables, found.images), np.float64)
    features = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    image = to_float(found.target.images[0])
    view_key, _, _ = jax.random.split(jax.random.key(0), 3)
    seen = jnp.concatenate([image[None], views.random_views(view_key, image, number=32)])
    queries = np.asarray(network.features(MODEL, variables, seen), np.float64)
    queries = np.concatenate([queries, np.ones((len(queries), 1))], axis=1)
    head = network.as_network(MODEL).head(variables)
    weights = np.concatenate([head["kernel"], np.asarray(head["bias"])[None]]).astype(np.float64)

    def errors(inputs, labels):
        logits = inputs @ weights
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return p, p - np.eye(10)[labels]

    p, g = errors(features, found.labels)
    gradients = np.einsum("nd,nk->ndk", features, g).reshape(len(g), -1)
    _, r = errors(queries, np.full(len(queries), found.target.label))
    asked = np.einsum("nd,nk->ndk", queries, r).reshape(len(r), -1)
    want = -gradients @ asked[0] / np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(result.renormalized, want, atol=2e-3 * np.abs(want).max())

    blocks = np.einsum("nk,kl->nkl", p, np.eye(10)) - np.einsum("nk,nl->nkl", p, p)
    hessian = np.einsum("nd,nkl,ne->dkel", features, blocks, features) / len(p)
    hessian = hessian.reshape(asked.shape[1], -1)
    damping = np.trace(hessian) / len(hessian)
    scores = -np.linalg.solve(hessian + damping * np.eye(len(hessian)), asked.T).T @ gradients.T
    np.testing.assert_allclose(result.influence, scores[0], atol=0.02 * np.abs(scores[0]).max())
    falls = np.sort(scores[0] - scores[1:], axis=0)[3]
    np.testing.assert_allclose(result.delta, falls, atol=0.02 * np.abs(scores[0]).max())
    ranks = [np.argsort(np.argsort(-score)) for score in (result.renormalized, result.delta)]
    assert np.all(np.diff(np.sum(ranks, axis=0)[result.rows]) >= 0)


def test_maps_are_what_a_step_in_a_pixel_does_to_a_gradient_step():
    """The change of <s, grad l> by a small change of an image, for the first of the ranking."""
    found, variables = poisoned("feature_collision")
    result = explained("feature_collision")
    assert result.maps.shape == result.top.shape == (12, 32, 32, 3)
    np.testing.assert_array_equal(result.top, found.images[result.rows[:12]])
    place = np.unravel_index(np.argmax(np.abs(result.maps[0])), (32, 32, 3))
    step = np.zeros((32, 32, 3), np.float32)
    step[place] = 1e-2
    image, row = to_float(result.top[0]), result.rows[0]
    changed = []
    for sign in (-1, 1):
        images = to_float(found.images).at[row].set(image + sign * step)
        features = network.features(MODEL, variables, images)
        net = network.as_network(MODEL)
        train = features, jnp.asarray(found.labels)
        queries = network.features(MODEL, variables, to_float(found.target.images))
        # H moves as well, by a 200th of an image; its share is below the tolerance.
        scores = _explain._scores(
            net.head(variables), jnp.tile(queries, (5, 1)), jnp.int32(result.wanted), *train
        )
        changed.append(float(scores.influence[row]))
    slope = (changed[1] - changed[0]) / 2e-2
    assert slope == pytest.approx(result.maps[0][place], rel=0.15)


def test_without_a_wanted_label_the_runner_up_takes_its_place():
    found, variables = poisoned("bullseye_polytope")
    dataset = Dataset(found.images, found.labels)
    result = audit.explain(
        MODEL, variables, dataset, found.target.images[0], key=jax.random.key(0), num_seeds=5
    )
    order = np.argsort(-result.probabilities)
    assert [result.prediction, result.wanted] == order[:2].tolist()
    assert not result.wanted_given
    assert all(np.isnan(one.accuracy).all() for one in result.removals)


def test_removals_at_random_take_the_same_labels_and_none_of_the_named():
    labels = np.repeat(np.arange(4), 10)
    named = np.array([0, 1, 2, 35])
    keeps = _explain._at_random(jax.random.key(0), labels, named, 6)
    assert keeps[:, named].all()
    for keep in keeps:
        np.testing.assert_array_equal(np.bincount(labels[~keep], minlength=4), [3, 0, 0, 1])
    assert len({keep.tobytes() for keep in keeps}) > 1


def test_views_are_images_and_each_is_another_one():
    image = to_float(clean()[0].images[0])
    seen = views.random_views(jax.random.key(0), image, number=16)
    assert seen.shape == (16, 32, 32, 3) and seen.dtype == jnp.float32
    assert float(seen.min()) >= 0 and float(seen.max()) <= 1
    assert len({np.asarray(view).tobytes() for view in seen}) == 16
    gray = views.random_views(jax.random.key(0), jnp.full((9, 7, 1), 0.5), number=64)
    # Of gray, only brightness, tint and noise are left.
    means = np.asarray(gray.mean(axis=(1, 2, 3)))
    assert np.abs(means - 0.5).max() < 0.23 and means.std() > 0.03
    assert float(gray.std(axis=(1, 2)).max()) < 0.05
    again = views.random_views(jax.random.key(0), image, number=16)
    np.testing.assert_array_equal(again, seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "image has shape"),
        ({"wanted": 10}, "from 0 to 9"),
        ({"wanted": "prediction"}, "predicts the wanted label"),
        ({"num_seeds": 1}, "num_seeds is 1"),
        ({"ids": ["a"]}, "ids has 1 entries; expected one for each of 200 training image"),
        ({"rows": 9}, "expected at least 10"),
    ],
)
def test_bad_arguments_are_told(change, message):
    found, variables = poisoned("feature_collision")
    rows = change.pop("rows", 200)
    given = {"image": found.target.images[0], "wanted": found.target.label, **change}
    if given["wanted"] == "prediction":
        given["wanted"] = found.target.base_label
    dataset = Dataset(found.images[:rows], found.labels[:rows])
    with pytest.raises(ValueError, match=message):
        audit.explain(MODEL, variables, dataset, key=jax.random.key(0), **given)


def test_the_example_of_the_guide(tmp_path, monkeypatch, capsys):
    """It finds the three mislabeled copies."""
    guide = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "docs/explain.md", "exec"), names)  # this repository's own text
    assert set(names["found"].rows[:3]) == {200, 201, 202}
    assert names["found"].is_enough and (tmp_path / "explanation" / "explanation.html").exists()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Files of an explanation with hostile names."""
    result = explained("feature_collision")
    ids = [f"{HOSTILE[row % len(HOSTILE)]}{row}" for row in range(len(result.ids))]
    names = ("<b>cat</b>", *(f"{name}" for name in range(1, 10)))
    folder = tmp_path_factory.mktemp("explanation")
    dataclasses.replace(result, ids=tuple(ids), class_names=names).save(folder)
    return folder


def test_files_hold_the_answer_and_hostile_names_are_text(page):
    result = explained("feature_collision")
    names = {path.name for path in page.iterdir()}
    assert names == {"explanation.html", "explanation.csv", "explanation.json"}
    html = (page / "explanation.html").read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "<b>cat" not in html and "\u202e" not in html
    assert html.count("data:image/png") == 1 + 2 * 12
    value = json.loads((page / "explanation.json").read_text())
    assert [cause["row"] for cause in value["causes"]] == result.causes.tolist()
    assert [one["name"] for one in value["removals"]] == ["as_is", "without", "random"]
    lines = (page / "explanation.csv").read_text().splitlines()
    assert not any(line.startswith("=") or ",=" in line for line in lines)
    frame = result.to_frame()
    assert len(frame) == 200 and frame["named"].sum() == result.num_causes
    assert frame["row"].tolist() == result.rows.tolist()
    assert frame["renormalized_influence"].is_monotonic_decreasing == (
        frame["renormalized_rank"].is_monotonic_increasing
    )


@pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium found: apt-get install chromium")
def test_the_page_in_a_browser(page, tmp_path):
    with chromium.Chromium(tmp_path / "profile") as browser:
        shown = browser.open(page / "explanation.html")
        assert not shown.errors and not shown.requests
        assert shown.evaluate("document.querySelectorAll('.causes > li').length") == 12
        assert shown.evaluate("document.querySelectorAll('tbody tr').length") == 3
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")


MYCODE = """
import jax
import jax.numpy as jnp
import flax.linen as nn

class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.tanh(nn.Dense(16)(x.reshape(x.shape[0], -1))))

def load():
    return Linen(), Linen().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
"""


PIXELS = np.random.default_rng(0).standard_normal((192, 16)).astype(np.float32)


def project(images):
    """A linear embedding of 64 pixels, in place of a network."""
    features = (images[:, ::4, ::4].reshape(len(images), 192) - 0.5) @ PIXELS
    return features / jnp.maximum(jnp.linalg.norm(features, axis=1, keepdims=True), 1e-6)


def embedding():
    return Embedding("projection", lambda images: np.asarray(project(to_float(images))), project)


@pytest.fixture(scope="module")
def projection():
    """The foreign witness of audits in this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_audit, "foreign", embedding)
        yield patch


def files_of(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def audited_folder(projection, tmp_path_factory):
    """A folder with the audit of 60 images by a network of the user's own."""
    place = tmp_path_factory.mktemp("audited")
    train = clean()[0]
    for row in range(60):
        path = place / "photos" / f"class{train.labels[row]}" / f"{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(train.images[row]).save(path)
    Image.fromarray(train.images[99]).save(place / "new.png")
    (place / "broken.png").write_bytes(b"\x89PNG")
    (place / "mycode.py").write_text(MYCODE)
    projection.chdir(place)
    projection.syspath_prepend(str(place))
    assert cli.main(["audit", "photos", "--network", "mycode:load", "--no-worth"]) == 0
    return place


def test_the_command_explains_a_file(audited_folder, monkeypatch, capsys):
    monkeypatch.chdir(audited_folder)
    before = files_of(audited_folder)
    assert cli.main(["explain", "photos-audit", "--image", "new.png", "--out", "why"]) == 0
    said = capsys.readouterr().out
    # The network is not the audit's, so only its last layer is fitted again.
    assert "why/explanation.html" in said and "refit" in said and "retrained" not in said
    after = files_of(audited_folder)
    assert {path.relative_to(audited_folder).as_posix() for path in after.keys() - before} == {
        f"why/explanation.{kind}" for kind in ("html", "json", "csv")
    }
    assert all(after[path] == content for path, content in before.items())


def test_an_audited_image_is_explained_by_the_others(audited_folder, monkeypatch):
    monkeypatch.chdir(audited_folder)
    id_ = next((audited_folder / "photos").rglob("*.png")).relative_to(audited_folder / "photos")
    assert cli.main(["explain", "photos-audit", "--image", id_.as_posix()]) == 0
    table = (audited_folder / "photos-audit" / "explanation" / "explanation.csv").read_text()
    assert id_.as_posix() not in table and table.count("\n") == 60  # a header, and 59 others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nothing.png"], "neither a file nor the id of an audited image"),
        (["--image", "broken.png"], "'broken.png' cannot be read"),
        (["--image", "new.png", "--wanted", "unicorn"], "'unicorn' is no class of the data"),
        (["--image", "new.png", "--out", "photos/why"], "inside of the data"),
    ],
)
def test_bad_arguments_of_the_command(arguments, message, audited_folder, monkeypatch):
    monkeypatch.chdir(audited_folder)
    with pytest.raises(SystemExit, match=message):
        cli.main(["explain", "photos-audit", *arguments])


def test_a_folder_without_a_network_or_of_other_images_is_refused(audited_folder):
    photos, folder = audited_folder / "photos", audited_folder / "photos-audit"
    with pytest.raises(ValueError, match="a quick audit, which trains no network"):
        _audit.reopen(open_source(photos), folder, _audit.Settings(quick=True))
    with pytest.raises(ValueError, match="has no trained network"):
        _audit.reopen(open_source(photos), folder, _audit.Settings())
    with pytest.raises(ValueError, match="has no cache of these images"):
        _audit.reopen(open_source(photos / "class0"), folder, _audit.Settings())


def test_the_audits_own_network_is_retrained(projection, tmp_path, monkeypatch):
    monkeypatch.setattr(worth, "FEWEST_STEPS", 4)
    train, candidates = clean()
    np.savez(tmp_path / "set.npz", images=train.images[:40], labels=train.labels[:40] % 2)
    Image.fromarray(candidates.images[0]).save(tmp_path / "new.png")
    monkeypatch.chdir(tmp_path)
    audits = ["audit", "set.npz", "--out", "set-audit", "--no-worth", "--epochs", "1"]
    assert cli.main(audits) == 0
    assert cli.main(["explain", "set-audit", "--image", "new.png", "--out", "why"]) == 0
    value = json.loads((tmp_path / "why" / "explanation.json").read_text())
    assert [(one["method"], one["name"]) for one in value["removals"]] == [
        (method, name)
        for method in ("refit", "retrained")
        for name in ("as_is", "without", "random")
    ]
    assert all(len(one["predictions"]) == 3 for one in value["removals"][3:])
