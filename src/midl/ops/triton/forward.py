"""The forward pass on the GPU: code, gate, selection, sorting, light path, full path of the selected groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from midl.ops.triton import few_rows, gate, products, sort
from midl.ops.triton.configs import FEW_ROWS, Tile, full_path_tile, next_power_of_two, product_tile
from midl.ops.triton.launch import launch
from midl.ops.triton.rows import Rows

__all__ = ["SortedRows", "forward", "gate_parameters", "logits_of", "project", "sort_rows"]

# Programs that fill the GPUs we name (40 to 144 multiprocessors), so that a split of the fan-in is worth its sum.
_ENOUGH_PROGRAMS = 256
_CHUNK = 64
# More groups than this are too many for one program to compute the logits of.
_FUSED_GROUPS = 1024


class SortedRows(NamedTuple):
    """Rows sorted by selected group, and the tiles that cover them."""

    rows: Tensor
    starts: Tensor
    tile_group: Tensor
    tile_begin: Tensor
    num_tiles: Tensor

    @property
    def max_tiles(self) -> int:
        """Upper bound of the tiles, known without the device."""
        return self.tile_group.shape[0]


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def splits_for(programs: int, steps: int) -> int:
    """Return into how many parts to cut a fan-in of ``steps`` steps so that enough programs run; at most 8."""
    splits = 1
    while splits < 8 and programs * splits * 2 <= _ENOUGH_PROGRAMS and steps >= splits * 4:
        splits *= 2
    return splits


def project(rows: Rows, filters: Tensor, input_precision: str) -> Tensor:
    """Return x @ filters.T in float32, (splits, rows, width): sum the first axis."""
    width = filters.shape[0]
    tile = product_tile(rows.count, width, rows.x.dtype, input_precision, widest=128)
    grid = (cdiv(rows.count, tile.m), cdiv(width, tile.n))
    steps = cdiv(rows.channels, tile.k) * rows.taps
    splits = splits_for(grid[0] * grid[1], steps)
    out = rows.x.new_empty((splits, rows.count, width), dtype=torch.float32)
    launch(
        products.project_kernel, (*grid, splits), rows.x, filters, out, rows.count, rows.channels, width, rows.stride,
        cdiv(steps, splits), TAPS=rows.taps, GEOMETRY=rows.geometry, PRECISION=input_precision,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out


def gate_parameters(
    bias: Tensor | None, light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """Return gate weight (N, r) and bias (N). The light gate is the projection by the groups' mean of light_up."""
    if gate_weight is not None and gate_bias is not None:
        return gate_weight.contiguous(), gate_bias.contiguous()
    mean = light_up.unflatten(0, (-1, group_size)).mean(1, dtype=torch.float32)
    if bias is None:
        return mean, mean.new_zeros(mean.shape[0])
    return mean, bias.unflatten(0, (-1, group_size)).mean(1, dtype=torch.float32)


def mean_code(code: Tensor, rows: Rows) -> Tensor:
    """Return the code's mean over each selection block, (blocks, r)."""
    if rows.span == 1:
        return code
    sequences = code.view(-1, rows.positions, code.shape[1])
    whole = rows.positions // rows.span * rows.span
    means = sequences[:, :whole].unflatten(1, (-1, rows.span)).mean(2)
    if whole < rows.positions:
        means = torch.cat([means, sequences[:, whole:].mean(1, keepdim=True)], 1)
    return means.flatten(0, 1)


def logits_of(block_code: Tensor, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
    """Return the gate logits (blocks, N) in float32."""
    blocks, rank = block_code.shape
    groups = gate_weight.shape[0]
    logits = block_code.new_empty((blocks, groups))
    tile = product_tile(blocks, groups, torch.float32, "ieee")
    launch(
        gate.gate_logits_kernel, (cdiv(blocks, tile.m), cdiv(groups, tile.n)), block_code, gate_weight, gate_bias,
        logits, blocks, groups, rank, PRECISION="ieee", BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_R=tile.k,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return logits


def select(logits: Tensor, noise: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return the gates (blocks, N), -1 where not selected, and the selected groups (blocks, k)."""
    blocks, groups = logits.shape
    gates = torch.empty_like(logits)
    selected = logits.new_empty((blocks, k), dtype=torch.int32)
    width = next_power_of_two(groups)
    rows = max(1, min(16, 2048 // width))
    launch(
        gate.select_groups_kernel, (cdiv(blocks, rows),), logits, noise, gates, selected, blocks, groups, k,
        HAS_NOISE=noise is not None, ROWS=rows, GROUPS=width, warps=4 if width <= 2048 else 8,
    )  # fmt: skip
    return gates, selected


def sort_rows(gates: Tensor, rows: Rows, k: int, tile_rows: int) -> SortedRows:
    """Return the rows sorted by the groups that they selected, without asking the device for a count."""
    groups = gates.shape[1]
    entries = rows.count * k
    max_tiles = entries // tile_rows + min(groups, entries)

    def integers(*shape: int) -> Tensor:
        return gates.new_empty(shape, dtype=torch.int32)

    chunks = cdiv(rows.count, _CHUNK)
    counts, before, totals = integers(chunks, groups), integers(chunks, groups), integers(groups)
    out = SortedRows(integers(entries), integers(groups + 1), integers(max_tiles), integers(max_tiles), integers(1))
    width = min(32, max(16, next_power_of_two(groups)))
    selection = (rows.count, groups, rows.positions, rows.blocks_per_sequence)
    chunk = {"SPAN": rows.span, "CHUNK": _CHUNK, "GROUPS": width}
    grid = (chunks, cdiv(groups, width))
    launch(sort.count_rows_kernel, grid, gates, counts, *selection, **chunk)
    launch(
        sort.scan_chunks_kernel, (grid[1],), counts, before, totals, chunks, groups, CHUNKS=_CHUNK, GROUPS=width
    )  # fmt: skip
    launch(
        sort.plan_tiles_kernel, (groups,), totals, *out[1:], groups,
        TILE=tile_rows, GROUPS=next_power_of_two(groups), BLOCK=32,
    )  # fmt: skip
    launch(sort.place_rows_kernel, grid, gates, before, out.starts, out.rows, *selection, **chunk)
    return out


def forward(
    rows: Rows, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, noise: Tensor | None, k: int, group_size: int, hard: bool, input_precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y (rows, n) and the selected groups (blocks, k); weights are contiguous (n, fan-in) and (r, fan-in)."""
    gate_weight, gate_bias = gate_parameters(bias, light_up, gate_weight, gate_bias, group_size)
    if rows.count <= FEW_ROWS and rows.span == 1 and rows.taps == 1:
        return _few_rows(rows, weight, bias, light_down, light_up, gate_weight, gate_bias, noise, k, group_size, hard)
    code = project(rows, light_down, input_precision)
    code = code.sum(0) if code.shape[0] > 1 else code[0]
    gates, selected = select(logits_of(mean_code(code, rows), gate_weight, gate_bias), noise, k)
    y = _light_path(code, light_up, bias, rows.x.dtype, input_precision)
    tile = full_path_tile(rows.count * k / gates.shape[1], group_size, rows.x.dtype, input_precision)
    ordered = sort_rows(gates, rows, k, tile.m)
    _full_path(y, rows, weight, bias, code, light_up, gates, ordered, tile, group_size, hard, input_precision)
    return y, selected


def _light_path(code: Tensor, light_up: Tensor, bias: Tensor | None, dtype: torch.dtype, precision: str) -> Tensor:
    count, (n, rank) = code.shape[0], light_up.shape
    y = code.new_empty((count, n), dtype=dtype)
    tile = product_tile(count, n, dtype, precision, widest=128)
    launch(
        products.light_path_kernel, (cdiv(count, tile.m), cdiv(n, tile.n)), code, light_up, bias, y, count, n, rank,
        HAS_BIAS=bias is not None, PRECISION=precision, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_R=tile.k,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return y


def _full_path(
    y: Tensor, rows: Rows, weight: Tensor, bias: Tensor | None, code: Tensor, light_up: Tensor, gates: Tensor,
    ordered: SortedRows, tile: Tile, group_size: int, hard: bool, input_precision: str,
) -> None:  # fmt: skip
    launch(
        products.full_path_kernel, (ordered.max_tiles, cdiv(group_size, tile.n)),
        rows.x, weight, bias, code, light_up, gates, y, *ordered,
        rows.channels, y.shape[1], code.shape[1], gates.shape[1], rows.stride, rows.positions, rows.blocks_per_sequence,
        GROUP_SIZE=group_size, SPAN=rows.span, HARD=hard, HAS_BIAS=bias is not None, TAPS=rows.taps,
        GEOMETRY=rows.geometry, PRECISION=input_precision, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        BLOCK_R=min(32, tile.k), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _few_rows(
    rows: Rows, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor,
    gate_bias: Tensor, noise: Tensor | None, k: int, group_size: int, hard: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and the selected groups in four launches: code, gate and selection, panels, interpolation."""
    (n, rank), groups = light_up.shape, gate_weight.shape[0]
    code = _panels(rows, light_down, None, rank, rank, 1)
    if groups <= _FUSED_GROUPS:
        gates, selected = _select_code(code, gate_weight, gate_bias, noise, k)
    else:
        code = code.sum(0, keepdim=True)
        gates, selected = select(logits_of(code[0], gate_weight, gate_bias), noise, k)
    full = _panels(rows, weight, selected, n, k * group_size, group_size)
    y = rows.x.new_empty((rows.count, n))
    launch(
        few_rows.interpolate_rows_kernel, (rows.count, cdiv(n, 32)), code, light_up, bias, gates, full, y, rows.count,
        n, rank, groups, CODE_SPLITS=code.shape[0], SPLITS=full.shape[0], GROUP_SIZE=group_size, HARD=hard,
        HAS_BIAS=bias is not None, BLOCK_N=32, BLOCK_R=64, warps=4,
    )  # fmt: skip
    return y, selected


def _select_code(
    code: Tensor, gate_weight: Tensor, gate_bias: Tensor, noise: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Return gates and selected groups from the code's splits in one launch."""
    (splits, rows, rank), groups = code.shape, gate_weight.shape[0]
    gates = code.new_empty((rows, groups))
    selected = code.new_empty((rows, k), dtype=torch.int32)
    width = next_power_of_two(groups)
    launch(
        gate.select_code_kernel, (rows,), code, gate_weight, gate_bias, noise, gates, selected, rows, groups, rank, k,
        SPLITS=splits, HAS_NOISE=noise is not None, GROUPS=width, BLOCK_R=min(64, max(8, 8192 // width)), warps=8,
    )  # fmt: skip
    return gates, selected


def _panels(rows: Rows, weight: Tensor, selected: Tensor | None, width: int, entries: int, group_size: int) -> Tensor:
    """Return x @ weight.T of the selected neurons, (splits, rows, width) in float32; the rest is not written."""
    block_k = 256 if rows.x.dtype.itemsize == 2 else 128
    block_n = 8
    steps = cdiv(rows.channels, block_k)
    splits = splits_for(rows.count * cdiv(entries, block_n), steps)
    out = rows.x.new_empty((splits, rows.count, width), dtype=torch.float32)
    launch(
        few_rows.panels_kernel, (rows.count, cdiv(entries, block_n), splits), rows.x, weight, selected, out, rows.count,
        rows.channels, width, rows.stride, 0 if selected is None else selected.shape[1],
        cdiv(steps, splits) * block_k, GATHER=selected is not None, GROUP_SIZE=group_size, BLOCK_N=block_n,
        BLOCK_K=block_k, warps=4, stages=3,
    )  # fmt: skip
    return out
