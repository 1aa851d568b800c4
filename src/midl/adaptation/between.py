"""Errors of many ways to run a layer from measurements of a few.

What a way leaves out of a layer's own output is known without running the model. The error of the model's output
follows it by a factor that changes little from one way to the next: the factor is measured at a few ways, and between
them its logarithm is interpolated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

__all__ = ["fill_grid", "fill_line"]

# Shares of the largest that are nothing but rounding.
_NOTHING = 1e-6


def fill_line(left_out: Sequence[float], measure: Callable[[int], float]) -> list[float]:
    """Return the error of each way of a line, four of them measured.

    >>> measured = []
    >>> def measure(i):
    ...     measured.append(i)
    ...     return 10 / 2**i
    >>> [round(error, 6) for error in fill_line([1 / 2**i for i in range(7)], measure)][:3]
    [10.0, 5.0, 2.5]
    >>> measured
    [0, 2, 4, 6]

    Args:
        left_out: what each way leaves out, in any unit; neighbours differ least.
        measure: called with an index; returns the error, NaN or Inf where the way cannot be computed. Then all are
            measured.
    """
    if not left_out:
        return []
    return fill_grid([left_out], lambda _, i: measure(i), columns=4)[0]


def fill_grid(
    left_out: Sequence[Sequence[float]], measure: Callable[[int, int], float], *, rows: int = 3, columns: int = 3
) -> list[list[float]]:
    """Return the error at (row, column) of a grid of ways, those where ``rows`` and ``columns`` cross measured.

    >>> left_out = [[8.0, 6.0, 4.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0, 0.5]]
    >>> errors = fill_grid(left_out, lambda i, j: 10 * left_out[i][j])
    >>> [round(error, 6) for error in errors[1]]
    [40.0, 30.0, 20.0, 10.0, 5.0]

    Args:
        left_out: what each way leaves out, in any unit; 0: nothing, so no error. All rows are equally long.
        measure: called with row and column; returns the error, NaN or Inf where the way cannot be computed. Then all
            are measured.
        rows: to measure, at most, the first and the last among them.
        columns: the same.
    """
    if not left_out or not left_out[0]:
        return [[] for _ in left_out]
    everywhere = [range(len(left_out)), range(len(left_out[0]))]
    errors = {at: measure(*at) for at in itertools.product(*map(_some, everywhere, (rows, columns)))}
    nothing = _NOTHING * max(map(max, left_out))
    factors: dict[int, dict[int, float]] = {}  # their logarithms, by row and column
    for (i, j), error in errors.items():
        if left_out[i][j] > nothing:
            factors.setdefault(i, {})[j] = math.log(max(error, 1e-30) / left_out[i][j])
    known = bool(factors) and all(map(math.isfinite, errors.values()))
    for i, j in itertools.product(*everywhere):
        if (i, j) in errors:
            continue
        if not known:
            errors[i, j] = measure(i, j)
        elif left_out[i][j] <= nothing:
            errors[i, j] = 0.0
        else:
            factor = _between({row: _between(line, j) for row, line in factors.items()}, i)
            errors[i, j] = left_out[i][j] * math.exp(factor)
    return [[errors[i, j] for j in everywhere[1]] for i in everywhere[0]]


def _some(places: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of the places, evenly spread, with both ends."""
    last = len(places) - 1
    return sorted({round(i * last / max(1, count - 1)) for i in range(count)})


def _between(known: Mapping[int, float], at: int) -> float:
    """Return the value at a place, linear between the known ones and constant beyond them."""
    below = max((place for place in known if place <= at), default=min(known))
    above = min((place for place in known if place >= at), default=max(known))
    if above <= below:
        return known[below]
    return known[below] + (at - below) / (above - below) * (known[above] - known[below])
