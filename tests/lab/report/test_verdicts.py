"""Verdicts: no verdict without an interval, and none against it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midl.lab.report.verdicts import Verdict, combine, judge_better, judge_bound, judge_faster, judge_not_worse
from midl.lab.statistics import estimate_mean

HOLDS, FAILS, UNDECIDED, MISSING = Verdict.HOLDS, Verdict.FAILS, Verdict.UNDECIDED, Verdict.MISSING


@pytest.mark.parametrize(
    ("values", "as_good", "better"),
    [
        ([0.3, 0.31, 0.32], HOLDS, HOLDS),
        ([0.0, 0.1, 0.2], HOLDS, UNDECIDED),
        ([0.0, 0.5, 2.0], UNDECIDED, UNDECIDED),  # better on average, but it could be far worse
        ([-0.1, 0.0, 0.05], UNDECIDED, UNDECIDED),
        ([-0.3, -0.31, -0.32], FAILS, FAILS),
        ([5.0], UNDECIDED, UNDECIDED),  # one or two seeds decide nothing
        ([5.0, 5.0], UNDECIDED, UNDECIDED),
        ([-5.0], UNDECIDED, UNDECIDED),
    ],
)
def test_accuracy_verdicts(values: list[float], as_good: Verdict, better: Verdict) -> None:
    assert judge_not_worse(estimate_mean(values)) is as_good
    assert judge_better(estimate_mean(values)) is better


def test_what_was_not_run_has_no_verdict() -> None:
    assert judge_not_worse(None) is judge_better(None) is judge_bound(None, least=1) is judge_faster(None) is MISSING
    assert judge_better(estimate_mean([1.0, 1.1, 1.2]), None) is MISSING


def test_better_than_two_needs_both() -> None:
    above, unclear, below = (estimate_mean(v) for v in ([1.0, 1.1, 1.2], [-1.0, 1.0, 1.0], [-1.0, -1.1, -1.2]))
    assert judge_better(above, above) is HOLDS
    assert judge_better(above, unclear) is UNDECIDED
    assert judge_better(above, below) is FAILS


def test_bounds() -> None:
    assert judge_bound(1.7, least=1.7) is HOLDS
    assert judge_bound(1.69, least=1.7) is FAILS
    assert judge_bound(45, most=45) is HOLDS
    assert judge_bound(45.3, most=45) is FAILS


def test_faster_needs_an_interval_of_the_ratio_below_one() -> None:
    assert judge_faster({"ratio": 0.8, "ratio_low": 0.7, "ratio_high": 0.9}) is HOLDS
    assert judge_faster({"ratio": 0.8, "ratio_low": 0.7, "ratio_high": 1.0}) is UNDECIDED
    assert judge_faster({"ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.3}) is FAILS
    assert judge_faster({"ratio": 0.5}) is UNDECIDED  # too few rounds


def test_all_together() -> None:
    assert combine([HOLDS, HOLDS, MISSING]) is HOLDS
    assert combine([HOLDS, UNDECIDED]) is UNDECIDED
    assert combine([UNDECIDED, FAILS, HOLDS]) is FAILS
    assert combine([MISSING]) is combine([]) is MISSING


@settings(max_examples=40)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_a_verdict_never_contradicts_its_mirror_image(values: list[float]) -> None:
    there, back = judge_better(estimate_mean(values)), judge_better(estimate_mean([-v for v in values]))
    assert (there is HOLDS) == (back is FAILS)
    if there is HOLDS:
        assert judge_not_worse(estimate_mean(values)) is HOLDS
    if there is FAILS:
        assert judge_not_worse(estimate_mean(values)) is FAILS
