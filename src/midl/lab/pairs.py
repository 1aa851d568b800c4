"""Timing in pairs: what else a shared machine does, and what its caches hold, meets both sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from midl.lab.bench.machine import last_level_cache
from midl.lab.statistics import median_interval

__all__ = ["Call", "time_in_pairs"]

Call = Callable[[], object]

_WARMUP = 3  # layers without gradients pack their weights when they are seen unchanged
_SHORT = 0.02  # seconds; a longer call loses nothing that can be measured by a cold start


def time_in_pairs(
    calls: Mapping[str, tuple[Call, Call]], rounds: int, *, least: int = 11, seconds: float = 90
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return the times of calls, and their ratios to the first.

    In each round every other call is timed in a pair with the first, each in front every second time. Weights are
    cold: before a call shorter than 20 ms twice the last-level cache is read, then its twin runs, which does the same
    with weights of its own, so that code, but not weights, is warm. Call and twin take turns, so that nothing
    hangs on where the weights of one happen to lie.

    Args:
        calls: name to a call and its twin.
        rounds: at most.
        least: after so many rounds and ``seconds`` no round begins.
        seconds: see ``least``.

    Returns:
        Name to ``median``, ``low`` and ``high`` (quartiles; seconds), and ``ratio``, ``ratio_low`` and ``ratio_high``:
        the median of the ratios within pairs and its 95 % interval (:func:`midl.lab.statistics.median_interval`; left
        out with fewer than 6 rounds). All three are 1 for the first.
    """
    swept = torch.zeros(2 * last_level_cache() // 4)
    timers = {name: _timer(call, twin, swept) for name, (call, twin) in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    first, *others = calls
    ratios: dict[str, list[float]] = {name: [] for name in others}
    begun = time.perf_counter()
    for i in range(rounds):
        if i >= least and time.perf_counter() - begun > seconds:
            break
        for name in others or [first]:
            pair = {n: timers[n]() for n in ((first, name) if i % 2 else (name, first))}
            for n, taken in pair.items():
                samples[n].append(taken)
            if name != first:
                ratios[name].append(pair[name] / pair[first])
    unity = {"ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}
    return {name: _quartiles(samples[name]) | (unity if name == first else _ratio(ratios[name])) for name in calls}


def _timer(call: Call, twin: Call, swept: torch.Tensor) -> Callable[[], float]:
    for _ in range(_WARMUP):
        twin()
        call()
    short = _time(call) < _SHORT

    def timer() -> float:
        nonlocal call, twin
        call, twin = twin, call
        if short:
            swept.sum()
            twin()
        return _time(call)

    return timer


def _time(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def _ratio(values: list[float]) -> dict[str, float]:
    interval = median_interval(values)
    bounds = {} if interval is None else {"ratio_low": interval[0], "ratio_high": interval[1]}
    return {"ratio": statistics.median(values), **bounds}
