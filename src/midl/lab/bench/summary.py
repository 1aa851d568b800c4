"""Geometric means and worst cells of the rows, and how one row reads; shared by the console and the page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from midl.lab.bench.results import Row
from midl.lab.bench.timing import geometric_mean

__all__ = ["Summary", "format_ratio", "format_roofline", "format_seconds", "summarise"]


@dataclass(frozen=True)
class Summary:
    """One contender over the cells of one group; the ratios are baseline time over ours, above 1 is faster."""

    group: str
    contender: str
    cells: int
    refused: int
    over_user: float | None
    over_best: float | None
    worst_over_best: float | None
    worst_case: str


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Return a summary per group and contender, in the rows' order; rows of memory have none."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.memory is None:
            cells.setdefault((row.group, row.contender), []).append(row)
    return [_summary(group, contender, members) for (group, contender), members in cells.items()]


def _summary(group: str, contender: str, rows: list[Row]) -> Summary:
    over_user = [row.over_user["median"] for row in rows if row.over_user]
    over_best = {row.case: row.over_best["median"] for row in rows if row.over_best}
    worst = min(over_best, key=lambda case: over_best[case], default="")
    return Summary(
        group=group,
        contender=contender,
        cells=len(rows),
        refused=sum(row.refused for row in rows),
        over_user=geometric_mean(over_user) if over_user else None,
        over_best=geometric_mean(over_best.values()) if over_best else None,
        worst_over_best=over_best.get(worst),
        worst_case=worst.removeprefix(f"{group}/"),
    )


def format_seconds(seconds: float) -> str:
    """Return a time with three digits and its unit.

    >>> format_seconds(0.0123), format_seconds(4.56e-5)
    ('12.3 ms', '45.6 µs')
    """
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:#.3g}".rstrip(".") + f" {unit}"
    raise AssertionError


def format_ratio(spread: dict[str, float] | None) -> str:
    """Return the median ratio and its quartiles.

    >>> format_ratio({"median": 1.7, "q1": 1.6, "q3": 1.85})
    '1.70 (1.60–1.85)'
    """
    return "" if spread is None else f"{spread['median']:.2f} ({spread['q1']:.2f}–{spread['q3']:.2f})"


def format_roofline(row: Row) -> str:
    """Return the achieved rate and the share of the ceiling that binds, and of what was read beside it."""
    if row.roofline is None:
        return ""
    line = row.roofline
    rate = f"{line['gflops']:.3g} GFLOP/s" if line["bound"] == "compute" else f"{line['gbs']:.3g} GB/s"
    paired = "" if row.of_read is None else f", {100 * row.of_read['median']:.0f} % of a plain read's speed"
    return f"{rate}, {100 * line['share']:.0f} % of {line['bound']}{paired}"
