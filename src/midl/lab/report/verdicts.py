"""Verdicts on claims: by fixed rules, from numbers with intervals."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping

from midl.lab.statistics import Estimate

__all__ = [
    "MARGIN",
    "RULES",
    "SEEDS",
    "Verdict",
    "combine",
    "judge_better",
    "judge_bound",
    "judge_faster",
    "judge_not_worse",
]

MARGIN = 0.5
"""Points of accuracy that count as no loss."""

SEEDS = 3
"""What a verdict needs at least: intervals of two values are narrow by luck too often to be believed."""

RULES = (
    f"As good: holds if the mean paired difference is at least 0 and Student's 95 % interval stays above -{MARGIN} "
    "points; does not hold if the whole interval is below 0. Better: holds if the whole interval is above 0, does not "
    "hold if it is below 0. Faster: the 95 % interval of the median ratio to dense, timed in pairs, lies below 1; does "
    "not if it lies above. Every network is timed in its fastest form, eager, compiled with frozen weights or packed "
    "for serving (MID-L alone), batch normalisation folded into the layers in front; where a text says that eager "
    "alone was timed, nothing was folded, and dense would be faster compiled at some sizes. "
    "Counted numbers (active neurons, FLOPs, bytes) need no interval and are not rounded. "
    f"Everything between is undecided; fewer than {SEEDS} seeds decide nothing."
)
"""The rules in words."""


class Verdict(enum.Enum):
    """What the numbers say of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"
    MISSING = "not run"


def judge_not_worse(difference: Estimate | None, margin: float = MARGIN) -> Verdict:
    """Judge the claim that a difference is not below zero, give or take ``margin``.

    >>> from midl.lab.statistics import estimate_mean
    >>> judge_not_worse(estimate_mean([0.1, 0.0, 0.2])).value
    'holds'
    """
    if difference is None:
        return Verdict.MISSING
    low, high = _bounds(difference)
    if difference.mean >= 0 and low >= -margin:
        return Verdict.HOLDS
    return Verdict.FAILS if high < 0 else Verdict.UNDECIDED


def judge_better(*differences: Estimate | None) -> Verdict:
    """Judge the claim that every difference is above zero."""
    if any(difference is None for difference in differences):
        return Verdict.MISSING
    bounds = [_bounds(difference) for difference in differences if difference is not None]
    if any(high < 0 for _, high in bounds):
        return Verdict.FAILS
    return Verdict.HOLDS if all(low > 0 for low, _ in bounds) else Verdict.UNDECIDED


def judge_bound(value: float | None, *, least: float | None = None, most: float | None = None) -> Verdict:
    """Judge the claim that a counted number keeps a bound."""
    if value is None:
        return Verdict.MISSING
    kept = (least is None or value >= least) and (most is None or value <= most)
    return Verdict.HOLDS if kept else Verdict.FAILS


def judge_faster(times: Mapping[str, float] | None) -> Verdict:
    """Judge the claim that we take less time than dense, from what :func:`midl.lab.pairs.time_in_pairs` returns."""
    if not times:
        return Verdict.MISSING
    if "ratio_low" not in times:
        return Verdict.UNDECIDED
    if times["ratio_high"] < 1:
        return Verdict.HOLDS
    return Verdict.FAILS if times["ratio_low"] > 1 else Verdict.UNDECIDED


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on all data sets together: it holds if it holds on each that was run, fails if on any.

    >>> combine([Verdict.HOLDS, Verdict.MISSING, Verdict.HOLDS]).value
    'holds'
    """
    run = [verdict for verdict in verdicts if verdict is not Verdict.MISSING]
    for verdict in (Verdict.FAILS, Verdict.UNDECIDED, Verdict.HOLDS):
        if verdict in run:
            return verdict
    return Verdict.MISSING


def _bounds(difference: Estimate) -> tuple[float, float]:
    """Return Student's interval, without bounds where there are too few seeds."""
    if difference.low is None or difference.high is None or len(difference.values) < SEEDS:
        return -math.inf, math.inf
    return difference.low, difference.high
