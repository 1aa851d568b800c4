"""Numbers as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midl.lab.statistics import Estimate

__all__ = ["count", "interval", "place_name", "plus_minus", "ratio_to_dense", "seconds", "signed", "size"]


def signed(value: float, digits: int = 2) -> str:
    """Return a difference with its sign.

    >>> signed(0.5), signed(-0.001)
    ('+0.50', '0.00')
    """
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def plus_minus(estimate: Estimate, digits: int = 2) -> str:
    """Return mean and standard deviation."""
    mean = f"{estimate.mean:.{digits}f}"
    return mean if estimate.sd is None else f"{mean} ± {estimate.sd:.{digits}f}"


def interval(estimate: Estimate, digits: int = 2) -> str:
    """Return a mean difference with Student's 95 % interval.

    >>> from midl.lab.statistics import estimate_mean
    >>> interval(estimate_mean([1.0, 2.0, 3.0]))
    '+2.00 [−0.48, +4.48]'
    """
    mean = signed(estimate.mean, digits)
    if estimate.low is None or estimate.high is None:
        return f"{mean} (one seed)"
    return f"{mean} [{signed(estimate.low, digits)}, {signed(estimate.high, digits)}]"


def count(value: float) -> str:
    """Return a count with a unit prefix.

    >>> count(3_723_264)
    '3.72 M'
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Return bytes with a binary prefix.

    >>> size(3 * 2**20)
    '3.0 MiB'
    """
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def place_name(place: Mapping[str, Any] | None) -> str:
    """Return where something was timed, from machine and threads.

    >>> place_name({"machine": {"cpu": "AMD EPYC", "instruction_set": "AVX2"}, "threads": 1})
    'AMD EPYC, AVX2, 1 thread'
    """
    place = place or {}
    machine, threads = place.get("machine") or {}, place.get("threads")
    counted = threads and f"{threads} thread{'' if threads == 1 else 's'}"
    return ", ".join(filter(None, (machine.get("cpu") or "unknown processor", machine.get("instruction_set"), counted)))


def ratio_to_dense(times: Mapping[str, float]) -> str:
    """Return the ratio of a timing to dense with its interval, if it has one.

    >>> ratio_to_dense({"ratio": 0.84, "ratio_low": 0.8, "ratio_high": 0.9})
    '0.84x [0.80, 0.90]'
    """
    bounds = f" [{times['ratio_low']:.2f}, {times['ratio_high']:.2f}]" if "ratio_low" in times else ""
    return f"{times['ratio']:.2f}x{bounds}"


def seconds(*values: float) -> str:
    """Return durations in the unit of the first, those after it as a range in parentheses.

    >>> seconds(0.00042), seconds(0.002, 0.0019, 0.0021)
    ('420 µs', '2.00 ms (1.90–2.10)')
    """
    scale, digits, unit = next(
        choice
        for choice in ((1.0, 1, "s"), (1e3, 2, "ms"), (1e6, 0, "µs"))
        if values[0] * choice[0] >= 1 or choice[0] == 1e6
    )
    first, *others = (f"{value * scale:.{digits}f}" for value in values)
    return f"{first} {unit}" + (f" ({'–'.join(others)})" if others else "")
