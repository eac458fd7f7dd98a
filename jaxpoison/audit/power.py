"""Thresholds and power from canaries: which planted faults do these checks find on these data?

Thresholds for the data come from canaries and from the data, see `calibrate`; figures of power from
halves that judge each other, so that none is judged by itself. A check whose faults cannot be
planted decides by a rule or flags nothing: a split of images into halves, without known faults,
tells how often a score is exceeded by chance, and not which scores are those of faults.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxpoison.audit import calibrate
from jaxpoison.audit.checks import common
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.plant import SHORTCUTS, THREATS, Planted, Threat
from jaxpoison.audit.verdict import Check, NotRun, Scores

RATE = 0.2
"""False discovery rate of the findings of one threat."""
LEAST_POWER = 0.8
"""Probability that a canary scores above another image, below which a check has no say.

Not the recall at few false alarms: faults that are in the data already take the first places. With
less, what makes canaries stand out may be what makes a third of the honest images do so as well,
and no likelihood tells one from the other.
"""

BEYOND = 0.8
"""What a poison's p-value gives to standing out from other classes' images, see
`calibrate.beyond_other_classes`; the rest is for looking like canaries, in any number of classes.

A patch that shows less than planted ones do does not look like them and stands out all the same.
Poisons in several classes do not stand out from each other and may look like canaries."""

_LEAST_HALF = 12  # canaries

Found = Mapping[str, Scores | NotRun]


class Family(NamedTuple):
    """All checks of one threat on the data, read together.

    N rows.

    Attributes:
      threat: what was planted.
      recalls: {check: recall of canaries at 1% false alarms}, of every check that ran.
      each: {check: float64 [N], its own p-values}, of the checks that have a say.
      p: float64 [N], p-values; 1 where nothing has a say. For labels, of any of the threats that
        the same checks look for; for poisons, see `BEYOND`.
      q: float64 [N], of Benjamini and Hochberg.
      flagged: bool [N], q at most RATE.
      planted: number of canaries.
      found: number of canaries found, each with thresholds from the other half of them.
      others_flagged: of a thousand images of the copy that were not changed, how many were flagged;
        for poisons, of those that are not flagged in the data.
      share: estimated part of the data that is like the canaries.
    """

    threat: Threat
    recalls: dict[str, float]
    each: dict[str, np.ndarray]
    p: np.ndarray
    q: np.ndarray
    flagged: np.ndarray
    planted: int
    found: int
    others_flagged: float
    share: float


class Shortcut(NamedTuple):
    """What the checks of whole sets say of a copy with a shortcut.

    Attributes:
      threat: what was planted.
      flagged: {check: whether it flags the copy}, of every check that ran.
    """

    threat: Threat
    flagged: dict[str, bool]


def run(checks: Sequence[Check], evidence: Evidence) -> dict[str, Scores | NotRun]:
    """Returns what each check finds, by name."""
    return {check.name: check.score(evidence) for check in checks}


def families(
    checks: Sequence[Check],
    found: Found,
    in_copy: Found,
    planted: Planted,
    *,
    labels: np.ndarray | None = None,
    known: Mapping[str, np.ndarray] | None = None,
) -> tuple[Family, ...]:
    """Returns the verdict on each threat that has canaries.

    Args:
      checks: all checks.
      found: what they find in the data.
      in_copy: what they find in the copy.
      planted: the copy.
      labels: int [N], of the data. With them, scores for poisons are compared with what is usual
        in the class: canaries of poisons have one label, and whatever sets this class apart would
        pass for their mark.
      known: {kind of threat: float [N]}, what a person has said of images, see `calibrate.fit`.
    """
    known = {} if known is None else known
    names = np.unique(planted.threats)
    groups: dict[tuple[str, ...], list[Threat]] = {}
    for threat in THREATS:
        if threat.name in names:
            of_threat = _of_threat(threat, checks, found, in_copy)
            alone = threat.kind != "label" or not of_threat
            groups.setdefault((threat.name,) if alone else of_threat, []).append(threat)
    return tuple(
        family
        for group in groups.values()
        for family in _families(
            group, checks, found, in_copy, planted, labels, known.get(group[0].kind)
        )
    )


class Surest(NamedTuple):
    """Which family is surest of each image: that of the smallest q, then of the smallest p.

    p alone would not do: in every family some image is the most extreme one, whether the data have
    its threat or not.

    Attributes:
      q, p: float64 [N], of that family; 1 where none says anything.
      family: int [N], its place; -1 where none says anything.
    """

    q: np.ndarray
    p: np.ndarray
    family: np.ndarray


def surest(families: Sequence[Family], num_rows: int, kinds: np.ndarray | None = None) -> Surest:
    """Returns the family that is surest of each image.

    Args:
      families: to choose from.
      num_rows: N.
      kinds: text [N], of each image the kind of the threats that count; None if all do.
    """
    q, p, chosen = np.ones(num_rows), np.ones(num_rows), np.full(num_rows, -1)
    for place, family in enumerate(families):
        surer = (family.q < q) | ((family.q == q) & (family.p < p))
        if kinds is not None:
            surer &= kinds == family.threat.kind
        q, p = np.where(surer, family.q, q), np.where(surer, family.p, p)
        chosen[surer] = place
    return Surest(q, p, chosen)


def shortcuts(
    checks: Sequence[Check], copy_with: Callable[[float], Evidence]
) -> tuple[Shortcut, ...]:
    """Returns what checks of whole sets say of copies with shortcuts.

    Args:
      checks: all checks.
      copy_with: share of the images -> a copy with class-wise noise on it.
    """
    of_sets = [check for check in checks if "classwise" in check.threats]
    results = []
    for threat, share in SHORTCUTS.items():
        found = run(of_sets, copy_with(share))
        wholes = {
            name: scores.whole.flagged
            for name, scores in found.items()
            if isinstance(scores, Scores) and scores.whole is not None
        }
        results.append(Shortcut(threat, wholes))
    return tuple(results)


def _of_threat(threat, checks, found, in_copy):
    """Returns names of the checks that look for a threat and gave scores."""
    return tuple(
        check.name
        for check in checks
        if threat.name in check.threats
        and all(_has_scores(each[check.name]) for each in (found, in_copy))
    )


def _families(threats, checks, found, in_copy, planted, labels, known):
    """Returns the families of threats that the same checks look for, and that are read together."""
    of_threat = _of_threat(threats[0], checks, found, in_copy)
    data = _matrix(of_threat, found)
    copy = _matrix(of_threat, in_copy)
    poison = threats[0].kind == "poison" and labels is not None
    if poison:
        data, copy = _in_class(data, labels), _in_class(copy, planted.evidence.labels)
    canaries = [planted.rows[planted.threats == threat.name] for threat in threats]
    others = np.setdiff1d(np.arange(copy.shape[1]), planted.rows)
    among = copy[:, others]
    p = q = np.ones(data.shape[1])
    shares = [0.0] * len(threats)
    say = _with_a_say([copy[:, rows] for rows in canaries], among)
    enough = [k for k, rows in enumerate(canaries) if len(rows) > calibrate.LEAST]
    if enough and say:
        samples = [copy[say][:, canaries[k]] for k in enough]
        model = calibrate.fit(data[say], samples, among[say], known)
        for k, share in zip(enough, model.shares, strict=True):
            shares[k] = float(share)
        faults = np.zeros(len(p), bool) if known is None else known == 0
        if poison:
            p = _of_poisons(model, data[say], labels, faults)
        else:
            p = calibrate.p_values(model, data[say])
        p = np.where(faults, 1 / (len(p) + 1), p)
        q = calibrate.benjamini_hochberg(p) if poison else calibrate.q_values(model, p)
    of_classes = (planted.evidence.labels, q <= RATE) if poison else None
    all_found, others_flagged = _power(copy, canaries, others, of_classes)
    families = []
    for k, (threat, rows) in enumerate(zip(threats, canaries, strict=True)):
        own = {of_threat[j]: _own(data[j], copy[j, rows], among[j]) for j in say if k in enough}
        recalls = {
            name: calibrate.recall(scores, planted_there)
            for name, scores, planted_there in zip(of_threat, among, copy[:, rows], strict=True)
        }
        num_found, flagged = all_found[k], others_flagged
        by_rule = _by_rule(threat, checks, in_copy)
        if by_rule is not None:
            num_found = int(np.count_nonzero(by_rule[rows]))
            flagged = 1000 * float(np.mean(by_rule[others]))
        families.append(
            Family(threat, recalls, own, p, q, q <= RATE, len(rows), num_found, flagged, shares[k])
        )
    return families


def _of_poisons(model, scores, labels, faults):
    """Returns p-values [B] of poisons, of two ways to be found; see `BEYOND`.

    Args:
      model: of canaries.
      scores: [J, B].
      labels: int [B].
      faults: bool [B], images that surely have a fault.
    """
    odds = calibrate.fault_log_odds(model, scores)
    beyond = calibrate.beyond_other_classes(odds, labels, faults) / BEYOND
    if not model.there.any():  # nothing looks like canaries
        return np.minimum(beyond, 1)
    like = calibrate.p_values(model, scores) / (1 - BEYOND)
    return np.minimum(np.minimum(beyond, like), 1)


def _has_scores(found):
    """Whether a check gave scores that need a threshold."""
    return isinstance(found, Scores) and found.score is not None and found.flagged is None


def _matrix(names, found):
    """Returns float64 [J, N]; N is that of the checks that ran."""
    rows = next(
        len(array)
        for x in found.values()
        if isinstance(x, Scores)
        for array in (x.score, x.flagged)
        if array is not None
    )
    return np.array([found[name].score for name in names], float).reshape(len(names), rows)


def _in_class(scores, labels):
    """Returns scores [J, N], unbounded, less the median of the class; NaN stays NaN."""
    values = common.unbounded(scores)
    for row in values:  # none, where no check of a threat ran
        row[:] = calibrate.less_middle(row, labels)
    return values


def _by_rule(threat, checks, found):
    """Returns what the checks flag that decide by rule and know this threat; None if none does."""
    flags = [
        found[check.name].flagged
        for check in checks
        if threat.name in check.threats
        and isinstance(found[check.name], Scores)
        and found[check.name].flagged is not None
    ]
    return np.any(flags, axis=0) if flags else None


def _with_a_say(canaries, others):
    """Returns the places of checks that rank canaries of a threat above others [J, M] often enough.

    Args:
      canaries: of each threat, [J, C].
      others: [J, M].
    """
    return [
        j
        for j, scores in enumerate(others)
        if any(calibrate.superiority(of[j], scores) >= LEAST_POWER for of in canaries)
    ]


def _own(scores, canaries, among):
    """Returns the p-values of one check alone; 1 where it cannot judge."""
    model = calibrate.fit(scores[None], [canaries[None]], among[None])
    p = calibrate.p_values(model, scores[None])
    return np.where(np.isnan(scores), 1.0, p)


def _power(copy, canaries, others, of_classes):
    """Returns (canaries found of each threat, others flagged of a thousand).

    Nothing is judged by a threshold that it helped to set: each half of the canaries by models of
    the other half, and each half of the other images by the model of their other half (a half-split
    null). Where half of the canaries are too few for that the parts are smaller, and a canary
    counts as found among those of all parts: in its own alone, no p-value would be small enough.
    For poisons the null is other classes, without what was found in the data. Models take it that
    there are such faults: in the copy there are.

    Args:
      copy: scores [J, N].
      canaries: rows of each threat.
      others: rows of images that were not changed.
      of_classes: (labels int [N], found in the data bool [N]) for poisons, else None.
    """
    found, flagged = np.zeros(len(canaries), int), []
    is_honest = np.full(len(others), True) if of_classes is None else ~of_classes[1][others]
    num_parts = _num_parts([len(rows) for rows in canaries])
    parts = [
        _judged(copy, canaries, others, of_classes, part, num_parts) for part in range(num_parts)
    ]
    for part, (p_of_threats, p_of_others) in enumerate(parts):
        p = [*p_of_threats, p_of_others]
        if num_parts > 2:
            p += [x for k, (of_threats, _) in enumerate(parts) if k != part for x in of_threats]
        is_found = calibrate.benjamini_hochberg(np.concatenate(p)) <= RATE
        *of_threats, rest = np.split(is_found, np.cumsum([len(x) for x in p[:-1]]))[
            : len(found) + 1
        ]
        found += [np.count_nonzero(each) for each in of_threats]
        flagged.append(1000 * float(np.mean(rest[is_honest])))
    return [int(n) for n in found], float(np.mean(flagged))


def _judged(copy, canaries, others, of_classes, part, num_parts):
    """Returns p-values of a part of each threat's canaries, by models of the rest, and of others.

    Args:
      copy, canaries, others, of_classes: see `_power`.
      part, num_parts: which part, of how many.
    """
    judged = [rows[part::num_parts] for rows in canaries]
    fitted = [np.setdiff1d(*pair) for pair in zip(canaries, judged, strict=True)]
    fitted = [rows for rows in fitted if len(rows) >= calibrate.LEAST]
    there = np.ones(len(fitted), bool)
    say = _with_a_say([copy[:, rows] for rows in fitted], copy[:, others])
    samples = [copy[say][:, rows] for rows in fitted]
    rows, p = np.concatenate([*judged, others]), np.ones(copy.shape[1])
    if say and of_classes is not None:
        model = calibrate.fit(copy[say][:, others], samples, there=there)
        labels, faults = (x[rows] for x in of_classes)
        p[rows] = _of_poisons(model, copy[say][:, rows], labels, faults)
    elif say:
        splits = min(num_parts, 4)
        for k in range(splits):
            left_out = others[k::splits]
            model = calibrate.fit(
                copy[say][:, np.setdiff1d(others, left_out)], samples, there=there
            )
            some = np.concatenate([*(rows[k::splits] for rows in judged), left_out])
            p[some] = calibrate.p_values(model, copy[say][:, some])
    return [p[rows] for rows in judged], p[others]


def _num_parts(sizes):
    """Returns into how few parts canaries are cut: halves of `_LEAST_HALF`, or what models need."""

    def enough(parts, size):
        rest = size - -(-size // parts)
        return rest >= (_LEAST_HALF if parts == 2 else calibrate.LEAST)

    needed = [
        next(parts for parts in (2, 4, 8, size) if enough(parts, size))
        for size in sizes
        if size > calibrate.LEAST
    ]
    return max(needed, default=2)
