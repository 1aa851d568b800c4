"""What a layer costs on this CPU, computed sparsely and densely: the model behind the choice of ``auto``.

A product takes the longer of its multiply-adds at the measured rate of its kernel and of its weights at the bandwidth
of the memory, plus what a call costs at all. Sparse kernels multiply the selected share and read the groups that some
row selected; the dense one does everything and its result is read once more. Code, light path, gate and selection are
the same on both sides and left out.

The constants are those of :mod:`midl.ops.cpu_calibration` where this machine was measured, else built in for the
instruction set. Nothing is measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

__all__ = ["BUILT_IN", "ROWS", "Constants", "Rates", "built_in", "predict", "sparse_wins"]

# Rows of the calls that rates are measured at.
ROWS = (1, 8, 64, 256)
_CLEARLY = 1.15
_RATES = {
    ("linear", "float32"): "float32",
    ("linear", "bfloat16"): "bfloat16",
    ("conv2d", "float32"): "convolution_float32",
    ("conv2d", "bfloat16"): "convolution_bfloat16",
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Multiply-adds per nanosecond of one dtype's kernels at each of ``ROWS`` rows.

    Sparse kernels count what they must: the products of the selected groups.
    """

    dense: tuple[float, ...]
    single: tuple[float, ...]
    """Groups of one neuron."""
    groups_of_16: tuple[float, ...]
    groups_of_32: tuple[float, ...]

    def sparse(self, rows: int, group_size: int) -> float:
        """Return the rate for groups of ``group_size``: that of the next smaller groups that were measured."""
        if group_size >= 32:
            return _between(self.groups_of_32, rows)
        if group_size >= 16:
            return _between(self.groups_of_16, rows)
        # Between one neuron and 16 the lanes fill up.
        single, wide = _between(self.single, rows), _between(self.groups_of_16, rows)
        return single + (wide - single) * math.log2(group_size) / 4


@dataclasses.dataclass(frozen=True, eq=False)
class Constants:
    """What the model knows of a machine and a number of threads."""

    source: str
    """Where the numbers are from, for people."""
    float32: Rates
    bfloat16: Rates
    convolution_float32: Rates
    convolution_bfloat16: Rates
    bandwidth: float
    """Bytes per nanosecond, read from memory."""
    dense_call: float
    """Nanoseconds of a dense product so small that nothing else counts."""
    cache: float
    """Bytes of weights that may still lie in the cache at the next call."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Constants:
        """Build constants from :meth:`to_dict`'s result."""
        rates = {
            dtype: Rates(**{form: tuple(map(float, values)) for form, values in fields[dtype].items()})
            for dtype in _RATES.values()
        }
        return cls(**{**fields, **rates})


def predict(
    constants: Constants, op: str, dtype: str, rows: int, depth: int, neurons: int, k: int, group_size: int,
    span: int = 1,
) -> tuple[float, float]:  # fmt: skip
    """Return the nanoseconds of a call by the sparse kernels and densely, without what both have to do.

    >>> rates = Rates(dense=(5,) * 4, single=(1,) * 4, groups_of_16=(2,) * 4, groups_of_32=(4,) * 4)
    >>> constants = Constants("made up", *[rates] * 4, bandwidth=10.0, dense_call=1e3, cache=1e9)
    >>> sparse, dense = predict(constants, "linear", "float32", 64, 1024, 1024, k=8, group_size=32)
    >>> round(dense / sparse, 1)
    3.2

    Args:
        constants: of the machine.
        op: ``"linear"`` or ``"conv2d"``.
        dtype: ``"float32"`` or ``"bfloat16"``.
        rows: rows of the input, or output pixels.
        depth: of a neuron, d, or the size of its window.
        neurons: n.
        k: groups that a row selects.
        group_size: neurons of a group.
        span: neighbouring rows that share a selection.
    """
    rates, width = getattr(constants, _RATES[op, dtype]), 4 if dtype == "float32" else 2
    products, share = rows * neurons * depth, k * group_size / neurons
    weight = neurons * depth * width
    read = weight / constants.bandwidth if weight > constants.cache else 0.0
    wanted = 1 - (1 - share) ** math.ceil(rows / span)
    sparse = max(share * products / rates.sparse(rows, group_size), wanted * read)
    dense = max(products / _between(rates.dense, rows), read) + constants.dense_call
    # Written by the product, read by the pass that mixes it: from memory once the cache is full of it.
    mixed = 8 * rows * neurons
    return sparse, dense + (mixed / constants.bandwidth if mixed > constants.cache else 0.0)


@functools.lru_cache(maxsize=4096)
def sparse_wins(
    constants: Constants, op: str, dtype: str, rows: int, depth: int, neurons: int, k: int, group_size: int, span: int
) -> bool:
    """Return whether to take the sparse kernels, by :func:`predict`; remembers its answers.

    Dense must be clearly faster: a wrong choice for it costs more than a small gain is worth.
    """
    sparse, dense = predict(constants, op, dtype, rows, depth, neurons, k, group_size, span)
    return sparse <= _CLEARLY * dense


def _between(rates: tuple[float, ...], rows: int) -> float:
    """Return the rate at ``rows``: linear in the logarithm between the measured ones, constant outside."""
    for i in range(1, len(ROWS)):
        if rows < ROWS[i]:
            share = math.log(max(rows, 1) / ROWS[i - 1]) / math.log(ROWS[i] / ROWS[i - 1])
            return rates[i - 1] + share * (rates[i] - rates[i - 1])
    return rates[-1]


def built_in(instruction_set: str) -> Constants:
    """Return the constants for machines that nobody has measured.

    >>> built_in("amx") is built_in("avx2")
    False
    """
    return _BUILT_IN_TILES if instruction_set == "amx" else BUILT_IN


# For machines that nobody has measured: medians of six runs of `midl info --measure` on a Zen 3 (AVX2) with 2 threads.
# Choices depend on the ratios of these numbers alone, which differ less between machines than the numbers do.
BUILT_IN = Constants(
    source="built in (`midl info --measure` measures this machine)",
    float32=Rates(
        dense=(8.5, 16.0, 42.0, 60.0),
        single=(15.0, 31.0, 36.0, 38.0),
        groups_of_16=(14.5, 47.0, 70.0, 78.0),
        groups_of_32=(19.0, 41.0, 65.0, 67.0),
    ),
    bfloat16=Rates(
        dense=(9.0, 9.3, 9.5, 9.5),
        single=(11.5, 22.0, 23.5, 23.0),
        groups_of_16=(12.0, 37.0, 47.0, 48.0),
        groups_of_32=(12.0, 36.0, 48.0, 51.0),
    ),
    # One thread of a Zen 4 kept to AVX2, its rates in proportion to the above.
    convolution_float32=Rates(
        dense=(12.0, 33.0, 53.0, 65.0),
        single=(5.0, 22.0, 30.0, 31.0),
        groups_of_16=(12.5, 40.0, 64.0, 69.0),
        groups_of_32=(13.0, 45.0, 65.0, 69.0),
    ),
    convolution_bfloat16=Rates(
        dense=(7.0, 9.3, 9.6, 9.6),
        single=(1.6, 16.0, 21.0, 22.0),
        groups_of_16=(7.9, 31.0, 46.0, 48.0),
        groups_of_32=(8.3, 31.0, 46.0, 49.0),
    ),
    bandwidth=28.0,
    dense_call=4100.0,
    cache=2.0**21,
)

# Where tile registers multiply bfloat16, the dense kernels' too: `midl info --measure`, Emerald Rapids, 2 threads.
_BUILT_IN_TILES = Constants(
    source=BUILT_IN.source,
    float32=Rates(
        dense=(15.0, 65.0, 108.0, 130.0),
        single=(8.1, 31.0, 70.0, 78.0),
        groups_of_16=(12.0, 39.0, 103.0, 132.0),
        groups_of_32=(12.0, 38.0, 147.0, 171.0),
    ),
    bfloat16=Rates(
        dense=(11.0, 108.0, 475.0, 940.0),
        single=(12.0, 64.0, 348.0, 416.0),
        groups_of_16=(17.0, 97.0, 514.0, 520.0),
        groups_of_32=(27.0, 92.0, 534.0, 660.0),
    ),
    convolution_float32=Rates(
        dense=(11.0, 42.0, 100.0, 127.0),
        single=(3.0, 34.0, 66.0, 77.0),
        groups_of_16=(7.4, 38.0, 119.0, 144.0),
        groups_of_32=(9.7, 49.0, 139.0, 176.0),
    ),
    convolution_bfloat16=Rates(
        dense=(1.9, 14.0, 108.0, 363.0),
        single=(4.0, 47.0, 188.0, 448.0),
        groups_of_16=(9.5, 50.0, 329.0, 642.0),
        groups_of_32=(8.3, 58.0, 315.0, 942.0),
    ),
    bandwidth=24.0,
    dense_call=3300.0,
    cache=2.0**21,
)
