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

Found = Mapping[str, Scores | NotRun]


class Family(NamedTuple):
    """All checks of one threat on the data, read together.

    N rows.

    Attributes:
      threat: what was planted.
      recalls: {check: recall of canaries at 1% false alarms}, of every check that ran.
      each: {check: float64 [N], its own p-values}, of the checks that have a say.
      p: float64 [N], p-values; 1 where nothing has a say. For poisons, of the model of canaries
        and of how far pixels and networks agree, see `calibrate.agreement`.
      q: float64 [N], of Benjamini and Hochberg, each way by itself.
      flagged: bool [N], q at most RATE.
      planted: number of canaries.
      found: number of canaries found, each with thresholds from the other half of them.
      others_flagged: of a thousand images of the copy that were not changed, how many were flagged.
      share: upper bound on the part of the data that is like the canaries.
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
    return tuple(
        _family(threat, checks, found, in_copy, planted, labels, known.get(threat.kind))
        for threat in THREATS
        if threat.name in names
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
    out = Surest(np.ones(num_rows), np.ones(num_rows), np.full(num_rows, -1))
    for place, family in enumerate(families):
        surer = (family.q < out.q) | ((family.q == out.q) & (family.p < out.p))
        if kinds is not None:
            surer &= kinds == family.threat.kind
        for values, own in zip(out, (family.q, family.p, place), strict=True):
            values[surer] = own[surer] if isinstance(own, np.ndarray) else own
    return out


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


def _family(threat, checks, found, in_copy, planted, labels, known):
    of_threat = [
        check.name
        for check in checks
        if threat.name in check.threats
        and all(_has_scores(each[check.name]) for each in (found, in_copy))
    ]
    data = _matrix(of_threat, found)
    copy = _matrix(of_threat, in_copy)
    if threat.kind == "poison" and labels is not None:
        data, copy = _in_class(data, labels), _in_class(copy, planted.evidence.labels)
    canaries = planted.rows[planted.threats == threat.name]
    others = np.setdiff1d(np.arange(copy.shape[1]), planted.rows)
    recalls = {
        name: calibrate.recall(scores[others], scores[canaries])
        for name, scores in zip(of_threat, copy, strict=True)
    }
    each, share = {}, 0.0
    p = q = np.ones(data.shape[1])
    say = _with_a_say(copy[:, canaries], copy[:, others])
    poison = threat.kind == "poison" and labels is not None
    sources = _sources(checks, of_threat) if poison else []
    if len(canaries) >= calibrate.LEAST and say:
        planted_among = copy[:, canaries], copy[:, others]
        planted_there, among = (x[say] for x in planted_among)
        model = calibrate.fit(data[say], planted_there, among, known)
        p, share = calibrate.p_values(model, data[say]), model.share
        if known is not None:
            p = np.where(known == 0, 1 / (len(p) + 1), p)
        q = calibrate.q_values(model, p)
        if sources:
            agreed = _agreed(model, data[say], sources, say, labels)
            p, q = _either(p, agreed), _either(q, calibrate.benjamini_hochberg(agreed))
        each = {of_threat[j]: _own(data[j], *(x[j] for x in planted_among)) for j in say}
    there = planted.evidence.labels if sources else None
    num_found, others_flagged = _power(copy, canaries, others, sources, there)
    by_rule = _by_rule(threat, checks, in_copy)
    if by_rule is not None:
        num_found = int(np.count_nonzero(by_rule[canaries]))
        others_flagged = 1000 * float(np.mean(by_rule[others]))
    return Family(
        threat, recalls, each, p, q, q <= RATE, len(canaries), num_found, others_flagged, share
    )


def _sources(checks, names):
    """Returns the places of scores by what they are made of: pixels, or what networks see."""
    reads = {check.name: check.reads for check in checks}
    kinds = sorted(set(reads.values()))
    return [[j for j, name in enumerate(names) if reads[name] == kind] for kind in kinds]


def _agreed(model, scores, sources, say, labels):
    """Returns p-values of how far sources agree, see `calibrate.agreement`; 1 where one speaks.

    Of every source the sum of its scores, weighted as in the model.
    """
    weighted = model.weights[:, None] * calibrate.normal_scores(model.references, scores)
    places = dict(zip(say, weighted, strict=True))
    heavy = {j for j, weight in zip(say, model.weights, strict=True) if weight > 0}
    speaking = [[j for j in of if j in heavy] for of in sources]
    values = [np.sum([places[j] for j in of], axis=0) for of in speaking if of]
    if len(values) < 2:
        return np.ones(scores.shape[1])
    return calibrate.agreement(np.array(values), labels)


def _either(first, second):
    """Returns the smaller value of each image, twice: of two ways to be found each counts half.

    The first alone where the second has nothing to say.
    """
    return first if np.all(second == 1) else np.minimum(2 * np.minimum(first, second), 1)


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
    for label in np.unique(labels):
        mine = labels == label
        for row in values:
            known = row[mine & ~np.isnan(row)]
            row[mine] -= np.median(known) if len(known) else 0.0
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
    """Returns the places of checks that rank canaries [J, C] above others [J, M] often enough."""
    pairs = zip(canaries, others, strict=True)
    return [j for j, pair in enumerate(pairs) if calibrate.superiority(*pair) >= LEAST_POWER]


def _own(scores, canaries, among):
    """Returns the p-values of one check alone; 1 where it cannot judge."""
    model = calibrate.fit(scores[None], canaries[None], among[None])
    p = calibrate.p_values(model, scores[None])
    return np.where(np.isnan(scores), 1.0, p)


def _power(copy, canaries, others, sources, labels):
    """Returns (canaries found, others flagged of a thousand).

    Nothing is judged by a threshold that it helped to set: each half of the canaries by models of
    the other half, and each half of the other images by the model of their other half (a half-split
    null).
    """
    found, flagged = 0, []
    for half in range(2):
        fitted, judged = canaries[half::2], canaries[1 - half :: 2]
        say = _with_a_say(copy[:, fitted], copy[:, others])
        if len(fitted) < calibrate.LEAST or not say:
            flagged.append(0.0)
            continue
        p = np.empty(copy.shape[1])
        for part in range(2):
            model = calibrate.fit(copy[say][:, others[part::2]], copy[say][:, fitted])
            rows = np.concatenate([judged[1 - part :: 2], others[1 - part :: 2]])
            p[rows] = calibrate.p_values(model, copy[say][:, rows])
        rows = np.concatenate([judged, others])
        q = calibrate.benjamini_hochberg(p[rows])
        if sources:
            model = calibrate.fit(copy[say][:, others], copy[say][:, fitted])
            agreed = _agreed(model, copy[say][:, rows], sources, say, labels[rows])
            q = _either(q, calibrate.benjamini_hochberg(agreed))
        found += int(np.count_nonzero(q[: len(judged)] <= RATE))
        flagged.append(1000 * float(np.mean(q[len(judged) :] <= RATE)))
    return found, float(np.mean(flagged))
