# mypy: disable-error-code="no-untyped-def"
"""Rows sorted by selected group: a stable counting sort on the device.

Nothing here depends on the host knowing a count, and nothing uses atomics, so a launch can be captured in a CUDA graph
and the order is the same in every run. ``gates`` (blocks, N) marks a group that was not selected with -1.
"""

import triton
import triton.language as tl

from midl.ops.triton.products import block_of

__all__ = ["count_rows_kernel", "place_rows_kernel", "plan_tiles_kernel", "scan_chunks_kernel"]


@triton.jit
def selection_tile(
    gates_ptr, chunk, num_rows, num_groups, positions, blocks,
    SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Return rows, groups and which of a chunk's rows selected which of a tile of groups, as 0 or 1."""
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    block = block_of(rows, positions, blocks, SPAN).to(tl.int64)
    inside = (rows < num_rows)[:, None] & (groups < num_groups)[None, :]
    gates = tl.load(gates_ptr + block[:, None] * num_groups + groups[None, :], inside, -1.0)
    # A NaN gate was selected, so this must not be written as gates >= 0.
    return rows, groups, (gates != -1.0).to(tl.int32)


@triton.jit
def count_rows_kernel(
    gates_ptr, counts_ptr, num_rows, num_groups, positions, blocks,
    SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """counts[chunk, g] = rows of the chunk that selected g."""
    chunk = tl.program_id(0)
    _, groups, chosen = selection_tile(gates_ptr, chunk, num_rows, num_groups, positions, blocks, SPAN, CHUNK, GROUPS)
    tl.store(counts_ptr + chunk * num_groups + groups, tl.sum(chosen, 0), groups < num_groups)


@triton.jit
def scan_chunks_kernel(
    counts_ptr, before_ptr, totals_ptr, num_chunks, num_groups, CHUNKS: tl.constexpr, GROUPS: tl.constexpr
):
    """before[chunk, g] = rows of earlier chunks that selected g; totals[g] = rows that did at all."""
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    total = tl.zeros((GROUPS,), tl.int32)
    for start in range(0, num_chunks, CHUNKS):
        chunks = start + tl.arange(0, CHUNKS)
        offsets = chunks[:, None] * num_groups + groups[None, :]
        inside = (chunks < num_chunks)[:, None] & (groups < num_groups)[None, :]
        counts = tl.load(counts_ptr + offsets, inside, 0)
        tl.store(before_ptr + offsets, tl.cumsum(counts, 0) - counts + total[None, :], inside)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + groups, total, groups < num_groups)


@triton.jit
def plan_tiles_kernel(
    totals_ptr, starts_ptr, tile_group_ptr, tile_begin_ptr, num_tiles_ptr, num_groups,
    TILE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per group: where its rows start in the sorted list, and the tiles of TILE rows that cover them."""
    group = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    totals = tl.load(totals_ptr + groups, groups < num_groups, 0)
    tiles = (totals + (TILE - 1)) // TILE
    start = tl.sum(tl.where(groups < group, totals, 0), 0)
    first_tile = tl.sum(tl.where(groups < group, tiles, 0), 0)
    own_tiles = tl.sum(tl.where(groups == group, tiles, 0), 0)
    tl.store(starts_ptr + group, start)
    if group == num_groups - 1:
        tl.store(starts_ptr + num_groups, tl.sum(totals, 0))
        tl.store(num_tiles_ptr, tl.sum(tiles, 0))
    for i in range(0, own_tiles, BLOCK):
        tile = i + tl.arange(0, BLOCK)
        tl.store(tile_group_ptr + first_tile + tile, tl.zeros_like(tile) + group, tile < own_tiles)
        tl.store(tile_begin_ptr + first_tile + tile, start + tile * TILE, tile < own_tiles)


@triton.jit
def place_rows_kernel(
    gates_ptr, before_ptr, starts_ptr, rows_ptr, num_rows, num_groups, positions, blocks,
    SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Write each row into the list of every group that it selected, in ascending order."""
    chunk = tl.program_id(0)
    rows, groups, chosen = selection_tile(
        gates_ptr, chunk, num_rows, num_groups, positions, blocks, SPAN, CHUNK, GROUPS
    )  # fmt: skip
    real = groups < num_groups
    base = tl.load(starts_ptr + groups, real, 0) + tl.load(before_ptr + chunk * num_groups + groups, real, 0)
    place = base[None, :] + tl.cumsum(chosen, 0) - 1
    tl.store(rows_ptr + place, tl.zeros_like(place) + rows[:, None], chosen != 0)
