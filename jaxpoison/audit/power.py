"""Thresholds and power from canaries: which planted faults do these checks find on these data?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxpoison.audit import calibrate
from jaxpoison.audit.evidence import Evidence
from jaxpoison.audit.plant import THREATS, Planted, Threat
from jaxpoison.audit.verdict import Check, NotRun, Scores

RATE = 0.1
"""False discovery rate of the findings of one threat."""
LEAST_POWER = 0.1
"""Recall at 1% false alarms below which a check has no say about a threat."""

Found = Mapping[str, Scores | NotRun]


class Calibration(NamedTuple):
    """How the checks of one threat are read.

    Attributes:
      names: of the checks that have a say.
      weights: float [J], their recall of canaries at 1% false alarms.
      nulls: of each check.
      combined: null of the combined score.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    nulls: tuple[calibrate.Null, ...]
    combined: calibrate.Null


class Family(NamedTuple):
    """All checks of one threat on the data, read together.

    N rows.

    Attributes:
      threat: what was planted.
      recalls: {check: recall of canaries at 1% false alarms}, of every check that ran.
      p: float64 [N], p-values; 1 where nothing has a say.
      q: float64 [N], of Benjamini and Hochberg.
      flagged: bool [N], q at most RATE.
      planted: number of canaries.
      found: number of canaries found, each with thresholds from the other half of them.
      others_flagged: of a thousand images of the copy that were not changed, how many were flagged.
      share: upper bound on the part of the data that is like the canaries.
    """

    threat: Threat
    recalls: dict[str, float]
    p: np.ndarray
    q: np.ndarray
    flagged: np.ndarray
    planted: int
    found: int
    others_flagged: float
    share: float


def run(checks: Sequence[Check], evidence: Evidence) -> dict[str, Scores | NotRun]:
    """Returns what each check finds, by name."""
    return {check.name: check.score(evidence) for check in checks}


def families(
    checks: Sequence[Check], found: Found, in_copy: Found, planted: Planted
) -> tuple[Family, ...]:
    """Returns the verdict on each threat that has canaries.

    Args:
      checks: all checks.
      found: what they find in the data.
      in_copy: what they find in the copy.
      planted: the copy.
    """
    names = np.unique(planted.threats)
    return tuple(
        _family(threat, checks, found, in_copy, planted)
        for threat in THREATS
        if threat.name in names
    )


def _family(threat, checks, found, in_copy, planted):
    of_threat = [
        check.name
        for check in checks
        if threat.name in check.threats
        and all(isinstance(each[check.name], Scores) for each in (found, in_copy))
    ]
    data = _matrix(of_threat, found)
    copy = _matrix(of_threat, in_copy)
    canaries = planted.rows[planted.threats == threat.name]
    others = np.setdiff1d(np.arange(copy.shape[1]), planted.rows)
    recalls = {
        name: calibrate.recall(scores[others], scores[canaries])
        for name, scores in zip(of_threat, copy, strict=True)
    }
    p, q, share = np.ones(data.shape[1]), np.ones(data.shape[1]), 0.0
    calibration = fit(of_threat, data, copy[:, canaries], recalls)
    if calibration is not None:
        p = read(calibration, of_threat, data)
        q, share = calibrate.benjamini_hochberg(p), calibration.combined.share
    num_found, others_flagged = _power(of_threat, copy, canaries, others)
    by_rule = _by_rule(threat, checks, in_copy)
    if by_rule is not None:
        num_found = int(np.count_nonzero(by_rule[canaries]))
        others_flagged = 1000 * float(np.mean(by_rule[others]))
    return Family(threat, recalls, p, q, q <= RATE, len(canaries), num_found, others_flagged, share)


def _matrix(names, found):
    """Returns float64 [J, N]; N is that of the checks that ran."""
    rows = next(
        len(x.score if x.score is not None else x.flagged)
        for x in found.values()
        if isinstance(x, Scores) and (x.score is not None or x.flagged is not None)
    )
    return np.array([found[name].score for name in names], float).reshape(len(names), rows)


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


def fit(
    names: Sequence[str], scores: np.ndarray, canaries: np.ndarray, recalls: Mapping[str, float]
) -> Calibration | None:
    """Returns how to read checks, or None if none of them finds the canaries.

    Args:
      names: of the J checks.
      scores: float [J, N], of the images to be judged.
      canaries: float [J, C].
      recalls: of canaries at 1% false alarms, by name.
    """
    chosen = [j for j, name in enumerate(names) if recalls[name] >= LEAST_POWER]
    if not chosen:
        return None
    nulls = tuple(calibrate.fit_null(scores[j], canaries[j]) for j in chosen)
    weights = np.array([recalls[names[j]] for j in chosen])

    def combined(x):
        p = [calibrate.p_values(null, x[j]) for null, j in zip(nulls, chosen, strict=True)]
        return calibrate.combine(np.array(p), weights)

    both = calibrate.fit_null(combined(scores), combined(canaries))
    return Calibration(tuple(names[j] for j in chosen), weights, nulls, both)


def read(calibration: Calibration, names: Sequence[str], scores: np.ndarray) -> np.ndarray:
    """Returns p-values [N] of scores [J, N] of the checks `names`; 1 where none can judge."""
    p = [
        calibrate.p_values(null, scores[names.index(name)])
        for name, null in zip(calibration.names, calibration.nulls, strict=True)
    ]
    score = calibrate.combine(np.array(p), calibration.weights)
    return np.nan_to_num(calibrate.p_values(calibration.combined, score), nan=1.0)


def _power(names, copy, canaries, others):
    """Returns (canaries found, others flagged of a thousand); halves judge each other."""
    found, flagged = 0, []
    for half in range(2):
        fitted, judged = canaries[half::2], canaries[1 - half :: 2]
        recalls = {
            name: calibrate.recall(scores[others], scores[fitted])
            for name, scores in zip(names, copy, strict=True)
        }
        calibration = fit(names, copy[:, others], copy[:, fitted], recalls)
        if calibration is None:
            flagged.append(0.0)
            continue
        rows = np.concatenate([judged, others])
        q = calibrate.benjamini_hochberg(read(calibration, names, copy[:, rows]))
        found += int(np.count_nonzero(q[: len(judged)] <= RATE))
        flagged.append(1000 * float(np.mean(q[len(judged) :] <= RATE)))
    return found, float(np.mean(flagged))
