"""Statistics of repeated runs: means, spreads, paired differences and their intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from midl.errors import MIDLError

__all__ = ["Estimate", "bootstrap_interval", "bootstrap_mean", "estimate_mean", "median_interval", "paired_difference"]

_RESAMPLES = 2000
_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its uncertainty.

    Args:
        mean: of the values.
        sd: sample standard deviation; None for one value.
        low: of Student's 95 % interval of the mean; None for one value.
        high: likewise.
        bootstrap: the 95 % bootstrap interval; None for one value. Of few values it is too narrow, never wider than
            their range (of three values it covers the mean some three times in four), so nothing is decided by it.
        values: what the estimate is of.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    bootstrap: tuple[float, float] | None
    values: tuple[float, ...]

    @property
    def excludes_zero(self) -> bool:
        """Whether Student's interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Return mean, standard deviation and intervals of values that are one per seed.

    >>> e = estimate_mean([1.0, 2.0, 3.0])
    >>> e.mean, e.sd, round(e.low, 2), round(e.high, 2), e.bootstrap
    (2.0, 1.0, -0.48, 4.48, (1.0, 3.0))

    Raises:
        MIDLError: no values.
    """
    if not values:
        raise MIDLError("estimate_mean: values is empty, expected at least one")
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) == 1:
        return Estimate(mean, None, None, None, None, (mean,))
    sd = float(array.std(ddof=1))
    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(array) - 1)) * sd / math.sqrt(len(array))
    return Estimate(mean, sd, mean - half, mean + half, bootstrap_interval(array), tuple(array.tolist()))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Return the mean of ours minus theirs over the seeds that both have; None where there is none.

    >>> paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 1.5, 2: 9.0}).mean
    1.25

    Args:
        ours: seed to value.
        theirs: likewise.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return estimate_mean([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean; the same on every call.

    >>> low, high = bootstrap_interval(np.arange(100.0))
    >>> 42 < low < 46 < 53 < high < 57
    True
    """
    drawn = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the median from the order of the values alone, whatever their distribution.

    >>> median_interval([5.0, 1.0, 2.0, 6.0, 3.0, 4.0, 7.0, 8.0])
    (1.0, 8.0)

    It is exact for independent values, and at least 95 % (Conover, Practical Nonparametric Statistics, section 3.2).
    None for fewer than 6, of which no interval covers as much.
    """
    rank = int(stats.binom.ppf((1 - _LEVEL) / 2, len(values), 0.5)) if values else 0
    if not rank:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]


def bootstrap_mean(values: np.ndarray) -> dict[str, float]:
    """Return mean and bootstrap interval as JSON values: ``mean``, ``low``, ``high``."""
    low, high = bootstrap_interval(values)
    return {"mean": round(float(values.mean()), 5), "low": round(low, 5), "high": round(high, 5)}
