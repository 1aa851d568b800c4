"""Tile sizes of the Triton kernels: a short list chosen from shapes, so that nothing is tuned at run time.

As compiled for compute capability 8, every tile fits 99 KB of shared memory, what a block gets on L4 and RTX 4090.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["FEW_ROWS", "MAX_GROUPS", "Tile", "full_path_tile", "next_power_of_two", "product_tile"]

FEW_ROWS = 8
"""Up to this many rows the weights' bytes decide, and each row's panels are read by themselves."""

MAX_GROUPS = 8192
"""Most groups that the selection kernel holds in registers."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows x columns of a program, fan-in per step, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def next_power_of_two(value: int) -> int:
    """Return the smallest power of two that is at least ``value``.

    >>> next_power_of_two(107)
    128
    """
    return 1 << max(0, value - 1).bit_length()


def _tile(m: int, n: int, dtype: torch.dtype, precision: str) -> Tile:
    if dtype == torch.float32 and precision == "ieee":
        # No Tensor Cores: every accumulator and operand is a register, so tiles are smaller and threads more.
        m, n = min(m, 64), min(n, 64)
        return Tile(m, n, k=16, warps=8 if m * n >= 4096 else 4, stages=3)
    k = 64 if dtype.itemsize == 2 else 32
    if m * n == 128 * 128:
        k //= 2  # The operands of a longer step would spill on sm_80.
    return Tile(m, n, k, warps=8 if m * n >= 64 * 128 else 4, stages=3)


def full_path_tile(rows_per_group: float, group_size: int, dtype: torch.dtype, precision: str) -> Tile:
    """Return the tile of the grouped product: ``rows_per_group`` rows on average meet ``group_size`` neurons.

    >>> full_path_tile(115.2, 64, torch.float16, "ieee")
    Tile(m=64, n=64, k=64, warps=4, stages=3)
    """
    m = 16 if rows_per_group <= 32 else 64 if rows_per_group <= 192 else 128
    widest = 64 if m == 16 else 128  # Few rows: more programs rather than wider ones.
    return _tile(m, min(widest, max(16, next_power_of_two(group_size))), dtype, precision)


def product_tile(rows: int, columns: int, dtype: torch.dtype, precision: str, *, widest: int = 64) -> Tile:
    """Return the tile of a plain product of ``rows`` by ``columns``; ``widest`` bounds both of its sides.

    >>> product_tile(4096, 4096, torch.float16, "ieee", widest=128)
    Tile(m=128, n=128, k=32, warps=8, stages=3)
    """
    m = 16 if rows <= 32 else 64 if rows < 1024 else widest
    return _tile(m, min(m if m == widest else 64, max(16, next_power_of_two(columns))), dtype, precision)


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, as TRITON_INTERPRET=1 asks for at import."""
    import triton

    from midl.ops.triton.products import project_kernel

    return not isinstance(project_kernel, triton.JITFunction)
