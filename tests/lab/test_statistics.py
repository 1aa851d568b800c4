"""Intervals: their coverage, their pairing, and what they say of few seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from midl.errors import MIDLError
from midl.lab.statistics import bootstrap_interval, estimate_mean, median_interval, paired_difference


def test_students_interval_is_scipys() -> None:
    values = [1.0, 2.5, 2.0, 4.0]
    estimate = estimate_mean(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx(expected)
    assert estimate.sd == pytest.approx(np.std(values, ddof=1))


def test_one_seed_has_no_interval_and_excludes_nothing() -> None:
    estimate = estimate_mean([3.0])
    assert (estimate.sd, estimate.low, estimate.high, estimate.bootstrap) == (None, None, None, None)
    assert not estimate.excludes_zero


def test_three_seeds_of_one_sign_need_not_exclude_zero() -> None:
    assert not estimate_mean([0.1, 0.2, 0.9]).excludes_zero
    assert estimate_mean([0.5, 0.55, 0.6]).excludes_zero
    assert estimate_mean([-0.5, -0.55, -0.6]).excludes_zero


def test_the_intervals_cover_the_mean_as_often_as_said() -> None:
    generator = np.random.default_rng(0)
    student = [estimate_mean(generator.normal(1, 1, 3).tolist()) for _ in range(300)]
    assert np.mean([e.low <= 1 <= e.high for e in student]) == pytest.approx(0.95, abs=0.04)  # type: ignore[operator]
    few = np.mean([e.bootstrap[0] <= 1 <= e.bootstrap[1] for e in student])  # type: ignore[index]
    assert few == pytest.approx(0.75, abs=0.08)
    many = [bootstrap_interval(generator.normal(1, 1, 100)) for _ in range(100)]
    assert np.mean([low <= 1 <= high for low, high in many]) == pytest.approx(0.95, abs=0.06)


def test_the_interval_of_the_median_covers_it_whatever_the_distribution() -> None:
    generator = np.random.default_rng(0)
    for size in (6, 11, 31):
        found = [median_interval(generator.lognormal(0, 1, size).tolist()) for _ in range(300)]
        assert np.mean([low <= 1 <= high for low, high in found]) >= 0.93  # type: ignore[misc]
    assert median_interval([1.0] * 5) is None
    assert median_interval([]) is None


def test_differences_are_paired_by_seed() -> None:
    ours, theirs = {0: 90.0, 1: 80.0, 3: 1.0}, {1: 79.0, 0: 88.0, 2: 5.0}
    difference = paired_difference(ours, theirs)
    assert difference is not None
    assert difference.values == (2.0, 1.0)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_no_values_is_an_error() -> None:
    with pytest.raises(MIDLError, match="values is empty"):
        estimate_mean([])
