"""What canaries say: which checks have a say, what is flagged, and how much would be found."""

import types

import numpy as np
import pytest

from jaxpoison.audit import assemble, power
from jaxpoison.audit.plant import THREATS, Planted
from jaxpoison.audit.verdict import Check, NotRun, Scores

NUM = 4_000


def check(name, threats=("flip",), kind="label"):
    return Check(name, name.title(), kind, "Nothing.", lambda evidence: evidence, threats)


def scored(values, flagged=None):
    return Scores(np.float32(values), lambda row: f"row {row}", flagged)


def planted(count=40, threat="flip"):
    rows = np.arange(100, 100 + count)
    return Planted(None, rows, np.array([threat] * count))


def normal(seed, high=(), shift=6.0, num=NUM):
    """Returns scores [num] of which the rows `high` are shifted."""
    values = np.random.default_rng(seed).standard_normal(num)
    values[list(high)] += shift
    return 1 / (1 + np.exp(-values))


BOTH = (check("good"), check("useless"))


def family(found, in_copy, checks=BOTH, copy=None):
    (only,) = power.families(checks, found, in_copy, copy or planted())
    return only


def test_the_extreme_image_of_a_threat_that_is_not_there_comes_after_all_faults():
    faulty, odd = range(3_000, 3_030), 1_234
    copy = Planted(None, np.arange(100, 180), np.array(["patch"] * 40 + ["collision"] * 40))
    checks = check("marks", ("patch",), "poison"), check("near", ("collision",), "poison")
    there, not_there = power.families(
        checks,
        {"marks": scored(normal(0, faulty)), "near": scored(normal(1, [odd], shift=9.0))},
        {
            "marks": scored(normal(2, [*faulty, *copy.rows[:40]])),
            "near": scored(normal(3, [odd, *copy.rows[40:]], shift=9.0)),
        },
        copy,
    )
    assert not_there.p[odd] == min(np.min(there.p), np.min(not_there.p))  # by p alone it is first
    q, p, surest = power.surest((there, not_there), NUM)
    order = np.lexsort((p, q))
    places = np.argsort(order)
    found = [row for row in faulty if there.flagged[row]]
    assert len(found) > 25 and places[odd] > max(places[found])
    np.testing.assert_array_equal(q, np.minimum(there.q, not_there.q))
    assert set(surest[found]) == {0}
    none = power.surest((), 3)
    np.testing.assert_array_equal(none, [[1, 1, 1], [1, 1, 1], [-1, -1, -1]])
    of_labels = power.surest((there, not_there), NUM, np.full(NUM, "label"))
    assert np.all(of_labels.family == -1)


def test_faults_are_flagged_and_others_are_not():
    faulty = range(3_000, 3_050)
    copy = planted(count=100)
    result = family(
        {"good": scored(normal(0, faulty)), "useless": scored(normal(1))},
        {"good": scored(normal(2, [*faulty, *copy.rows])), "useless": scored(normal(3))},
        copy=copy,
    )
    assert result.threat is THREATS[0]
    assert np.mean(result.flagged[list(faulty)]) > 0.85
    assert np.mean(np.delete(result.flagged, list(faulty))) < 0.003
    assert result.share == pytest.approx(50 / NUM, rel=0.3)
    assert (result.planted, result.found) == (100, pytest.approx(94, abs=6))
    assert result.recalls["good"] > 0.6 and result.recalls["useless"] < 0.1
    assert list(result.each) == ["good"]


def test_scores_of_the_copy_may_have_another_scale():
    faulty, copy = range(3_000, 3_050), planted(count=100)
    found = {"good": scored(normal(0, faulty)), "useless": scored(normal(1))}
    there = normal(2, [*faulty, *copy.rows])
    results = [
        family(found, {"good": scored(scale * there), "useless": scored(normal(3))}, copy=copy)
        for scale in (1.0, 0.25)
    ]
    np.testing.assert_allclose(results[0].p, results[1].p, rtol=1e-3)
    assert results[1].flagged[list(faulty)].mean() > 0.85


@pytest.mark.parametrize(
    ("in_one_class", "alike", "wanted"), [(True, False, 0.8), (False, False, 0), (False, True, 0.5)]
)
def test_poisons_stand_out_in_a_class_or_look_like_canaries(in_one_class, alike, wanted):
    """Canaries that are above all else look like nothing in the data."""
    pair = [check(name, ("patch",), "poison") for name in ("mark", "sight")]
    labels = np.random.default_rng(5).integers(0, 5, NUM)
    faulty = slice(3_000, 3_100)
    if in_one_class:
        labels[faulty] = 2
    copy = planted(count=40, threat="patch")
    copy = copy._replace(evidence=types.SimpleNamespace(labels=labels))

    def both(seed, high, shift):
        rows = [*range(3_000, 3_100), *high]
        shifts = np.array([3.5] * 100 + [shift] * len(high))
        return {
            name: scored(normal(seed + place, rows, shifts))
            for place, name in enumerate(("mark", "sight"))
        }

    in_copy = both(2, copy.rows, 3.5 if alike else 12.0)
    (found,) = power.families(pair, both(0, [], 0), in_copy, copy, labels=labels)
    assert np.delete(found.flagged, np.r_[faulty]).mean() < 0.008
    if wanted:
        assert found.flagged[faulty].mean() > wanted
    else:  # each class has some, which are in the others' null
        assert not found.flagged.any()


def test_a_poison_that_no_check_could_look_for_is_nowhere():
    copy = planted(count=40, threat="patch")
    copy = copy._replace(evidence=types.SimpleNamespace(labels=np.zeros(NUM, int)))
    pair = [check("mark", ("patch",), "poison"), check("other", ("blend",), "poison")]
    found = {"mark": NotRun("too small"), "other": scored(normal(0))}
    (family_,) = power.families(pair, found, found, copy, labels=np.zeros(NUM, int))
    assert family_.found == 0 and not family_.flagged.any() and len(family_.p) == NUM


def test_kinds_of_wrong_labels_are_read_together():
    """Mistakes alone are in the data; with thresholds of flips, none would be found."""
    both = [check(name, ("flip", "mistake")) for name in ("far", "near")]
    rows = np.arange(100, 200)
    copy = Planted(None, rows, np.array(["flip"] * 50 + ["mistake"] * 50))
    faulty = range(3_000, 3_300)

    def scores(seed, flips, mistakes):
        return {
            "far": scored(normal(seed, [*flips, *mistakes], 3.0)),
            "near": scored(normal(seed + 1, flips, 5.0)),
        }

    found, in_copy = scores(0, [], faulty), scores(2, rows[:50], [*faulty, *rows[50:]])
    flip, mistake = power.families(both, found, in_copy, copy)
    assert (flip.threat.name, mistake.threat.name) == ("flip", "mistake")
    np.testing.assert_array_equal(flip.q, mistake.q)
    assert flip.share < 0.002 and mistake.share == pytest.approx(300 / NUM, rel=0.4)
    assert flip.found > mistake.found > 10 and (flip.planted, mistake.planted) == (50, 50)
    assert flip.others_flagged == mistake.others_flagged
    honest = np.delete(mistake.flagged, list(faulty))
    assert mistake.flagged[list(faulty)].mean() > 0.3
    assert honest.sum() <= 0.3 * mistake.flagged.sum()


def test_clean_data_stay_clean():
    copy = planted()
    result = family(
        {"good": scored(normal(0)), "useless": scored(normal(1))},
        {"good": scored(normal(2, copy.rows)), "useless": scored(normal(3))},
    )
    assert result.flagged.sum() <= 1
    assert result.others_flagged < 2
    assert result.found >= 36


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *(("label", count) for count in (40, 17, 14, 8)),
        *(("poison", count) for count in (40, 23, 17, 14, 9, 8)),
    ],
)
def test_power_is_measured_with_as_few_canaries_as_a_model_needs(kind, count):
    """Half of 14 canaries are too few for a model, which is no reason to say that none is found."""
    faulty, labels = range(300, 320), np.arange(400) // 100
    threat = {"label": "flip", "poison": "patch"}[kind]
    copy = planted(count, threat)._replace(evidence=types.SimpleNamespace(labels=labels))
    (result,) = power.families(
        (check("good", (threat,), kind),),
        {"good": scored(normal(0, faulty, num=400))},
        {"good": scored(normal(2, [*faulty, *copy.rows], num=400))},
        copy,
        labels=labels,
    )
    # With 8 there is no model for the data either: then nothing is found, and power says so.
    wanted = count if count > 8 else 0
    assert (result.planted, result.found) == (count, pytest.approx(wanted, abs=0.15 * count))
    if kind == "poison":
        assert (result.flagged[list(faulty)].mean() > 0.5) == (wanted > 0)


def test_where_no_check_finds_canaries_nothing_is_flagged_and_the_power_is_zero():
    result = family(
        {"good": scored(normal(0)), "useless": scored(normal(1))},
        {"good": scored(normal(2)), "useless": scored(normal(3))},
    )
    assert not result.flagged.any() and result.found == 0 and result.others_flagged == 0
    np.testing.assert_array_equal(result.p, 1)


def test_a_useless_check_changes_nothing():
    found = {"good": scored(normal(0, range(50))), "useless": scored(normal(1))}
    copy = {"good": scored(normal(2, planted().rows)), "useless": scored(normal(3))}
    both = family(found, copy)
    alone = family(found, copy, checks=(check("good"),))
    np.testing.assert_allclose(both.p, alone.p)


def test_a_check_that_did_not_run_has_no_say():
    found = {"good": scored(normal(0, range(50))), "useless": NotRun("No network.")}
    copy = {"good": scored(normal(2, planted().rows)), "useless": NotRun("No network.")}
    assert list(family(found, copy).recalls) == ["good"]


def test_two_weak_checks_find_more_than_one():
    copy = planted(count=60)
    faulty = range(3_000, 3_060)

    def run(names):
        found = {n: scored(normal(i, faulty, 2.5)) for i, n in enumerate(names)}
        rows = [*faulty, *copy.rows]
        there = {n: scored(normal(9 + i, rows, 2.5)) for i, n in enumerate(names)}
        result = family(found, there, checks=tuple(map(check, names)), copy=copy)
        return result.flagged[list(faulty)].mean()

    assert run(["a", "b", "c", "d"]) > run(["a"]) + 0.2


def test_what_sets_a_class_apart_is_no_mark_of_a_poison():
    """Canaries of poisons have one label. A check that ranks this label high finds no poison."""
    labels = np.arange(NUM) % 10
    rows = np.flatnonzero(labels == 3)[:40]
    copy = Planted(types.SimpleNamespace(labels=labels), rows, np.array(["patch"] * 40))
    of_class, poisoned = normal(0, np.flatnonzero(labels == 3), 3), normal(1, rows, 6)
    checks = (check("class", ("patch",), "poison"), check("good", ("patch",), "poison"))
    for score, found in ((of_class, 0), (poisoned, 40)):
        there = {"class": scored(of_class), "good": scored(score)}
        clean = {"class": scored(of_class), "good": scored(normal(2))}
        (result,) = power.families(checks, clean, there, copy, labels=labels)
        assert abs(result.found - found) <= 2 and not result.flagged.any()
        assert list(result.each) == (["good"] if found else [])
    (blind,) = power.families(checks[:1], clean, there, copy)
    assert blind.flagged.sum() > 150  # what it would be without


def decided(mode, seed):
    """Returns the recall of faults after decisions on twelve findings, or on none.

    The faults are harder to see than the canaries are, so that few are found at first.
    """
    random, canaries = np.random.default_rng(seed), np.arange(40)
    faulty = np.arange(NUM) >= NUM - 80
    data = random.standard_normal(NUM) + 3 * faulty
    there = random.standard_normal(NUM) + 3 * faulty
    there[canaries] = random.standard_normal(40) + 3.6
    copy = Planted(None, canaries, np.array(["flip"] * 40))
    # In [0, 1] and in the same order, as scores are.
    found, in_copy = ({"good": scored(1 / (1 + np.exp(-x)))} for x in (data, there))

    def judged(known=None):
        return power.families((check("good"),), found, in_copy, copy, known=known)

    (first,) = judged()
    if mode == "none":
        return first.flagged[faulty].mean()
    rows = np.flatnonzero(first.flagged)
    rows = rows[np.argsort(first.q[rows], kind="stable")]
    if mode == "least certain":
        places = {f"{row}": row for row in rows}
        asked = [
            types.SimpleNamespace(id=f"{row}", class_name=f"{row % 10}", q_value=first.q[row])
            for row in rows
        ]
        rows = [places[id_] for id_ in assemble._ask(asked)]
    known = np.full(NUM, np.nan)
    known[rows[:12]] = ~faulty[rows[:12]]
    (second,) = judged({"label": known})
    return second.flagged[faulty].mean()


def test_decisions_on_the_images_that_the_page_asks_for_gain_most():
    none, surest, asked = (
        np.mean([decided(mode, seed) for seed in range(12)])
        for mode in ("none", "surest", "least certain")
    )
    assert asked > surest + 0.02 and surest > none + 0.02


def test_a_rule_is_counted_as_it_flags():
    copy = planted(threat="copy")
    flags = np.zeros(NUM, bool)
    flags[copy.rows[:30]] = True
    flags[:4] = True
    rule = check("rule", threats=("copy",))
    result = family(
        {"rule": scored(np.zeros(NUM), np.zeros(NUM, bool))},
        {"rule": scored(np.zeros(NUM), flags)},
        checks=(rule,),
        copy=copy,
    )
    assert (result.found, result.planted) == (30, 40)
    assert result.others_flagged == pytest.approx(4 * 1000 / (NUM - 40))
    assert not result.flagged.any()


def test_only_threats_that_were_planted_have_a_family():
    empty = Planted(None, np.empty(0, int), np.empty(0, "U9"))
    assert power.families((check("good"),), {"good": scored(normal(0))}, {}, empty) == ()
