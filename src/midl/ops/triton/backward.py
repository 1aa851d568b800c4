"""The backward pass on the GPU for ``ste="selected"``: recompute code and gates, sort the rows, then each gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from midl.ops.triton import gate, gradients
from midl.ops.triton.configs import Tile, full_path_tile, product_tile
from midl.ops.triton.forward import SortedRows, cdiv, gate_parameters, logits_of, mean_code, project, sort_rows
from midl.ops.triton.launch import launch
from midl.ops.triton.rows import Rows

__all__ = ["backward"]

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
ThroughFilters = Callable[[Tensor], tuple[Tensor, Tensor]]


def backward(
    grad_y: Tensor, selected: Tensor, rows: Rows, weight: Tensor, bias: Tensor | None, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, group_size: int, hard: bool,
    needs: list[bool], input_precision: str, through_filters: ThroughFilters,
) -> Grads:  # fmt: skip
    """Return the gradients of x, weight, bias, light_down, light_up, gate_weight and gate_bias; empty if not needed.

    Args:
        grad_y: (rows, n), contiguous.
        selected: (blocks, k).
        through_filters: takes the code's gradient in x's dtype; returns those of x, dense (rows or pixels, channels),
            and of ``light_down``.
    """
    need_x, need_weight, need_bias, need_down, need_up, need_gate_weight, need_gate_bias = needs
    light_gate = gate_weight is None
    dtype, empty = rows.x.dtype, rows.x.new_empty(0)
    gate_weight, gate_bias = gate_parameters(bias, light_up, gate_weight, gate_bias, group_size)

    code = project(rows, light_down, input_precision).sum(0)
    block_code = mean_code(code, rows)
    gates = _gates_of(logits_of(block_code, gate_weight, gate_bias), selected)
    k = selected.shape[1]
    tile = full_path_tile(min(rows.count * k / gates.shape[1], 192), group_size, dtype, input_precision)
    call = _Call(
        grad_y, rows, weight, code, light_up, gates, sort_rows(gates, rows, k, tile.m), tile, group_size, hard,
        light_gate, input_precision,
    )  # fmt: skip

    grad_x = grad_down = empty
    grad_logits = torch.zeros_like(gates)
    if need_x or need_down or need_gate_weight or need_gate_bias or light_gate:
        # The code's gradient needs the logits', so x's groups come last in the arithmetic but first in time.
        parts = call.input_grad(grad_logits, need_x)
        if need_x or need_down:
            through_x, grad_down = through_filters(call.code_grad(grad_logits, gate_weight).to(dtype))
            if need_x:
                grad_x = parts.add_(through_x).to(dtype)
    grad_up, grad_bias = call.light_up_grad(grad_logits) if need_up or need_bias else (empty, empty)
    return (
        grad_x,
        call.weight_grad() if need_weight else empty,
        grad_bias if need_bias else empty,
        grad_down if need_down else empty,
        grad_up if need_up else empty,
        (grad_logits.T @ block_code).to(dtype) if need_gate_weight else empty,
        grad_logits.sum(0).to(dtype) if need_gate_bias else empty,
    )


def _gates_of(logits: Tensor, selected: Tensor) -> Tensor:
    """Return the gates (blocks, N) of the groups that the forward pass selected, -1 elsewhere."""
    gates = torch.full_like(logits, -1.0)
    entries = selected.numel()
    launch(
        gate.gates_of_selected_kernel, (cdiv(entries, 512),), logits, selected, gates, entries, logits.shape[1],
        selected.shape[1], BLOCK=512,
    )  # fmt: skip
    return gates


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the kernels of one backward pass share."""

    grad_y: Tensor
    rows: Rows
    weight: Tensor
    code: Tensor
    light_up: Tensor
    gates: Tensor
    ordered: SortedRows
    tile: Tile
    group_size: int
    hard: bool
    light_gate: bool
    precision: str

    @property
    def _sharing(self) -> tuple[int, int]:
        return self.rows.positions, self.rows.blocks_per_sequence

    def input_grad(self, grad_logits: Tensor, need_x: bool) -> Tensor:
        """Fill ``grad_logits`` and return the full path's gradient of x in float32, shaped (-1, channels)."""
        rows, tile = self.rows, self.tile
        grad_x = rows.x.new_zeros((rows.pixels, rows.channels) if need_x else 0, dtype=torch.float32)
        launch(
            gradients.input_grad_kernel, (self.ordered.max_tiles,), self.grad_y, rows.x, self.weight, self.code,
            self.light_up, self.gates, grad_x, grad_logits, *self.ordered, rows.channels, self.grad_y.shape[1],
            self.code.shape[1], self.gates.shape[1], rows.stride, *self._sharing, GROUP_SIZE=self.group_size,
            SPAN=rows.span, HARD=self.hard, NEED_X=need_x, TAPS=rows.taps, GEOMETRY=rows.geometry,
            PRECISION=self.precision, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            BLOCK_R=min(32, tile.k), warps=8 if tile.m > 16 else tile.warps, stages=2,
        )  # fmt: skip
        return grad_x

    def weight_grad(self) -> Tensor:
        """Return the gradient of the weight; a group that no row selected gets zeros."""
        rows, tile = self.rows, self.tile
        grad = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        launch(
            gradients.weight_grad_kernel,
            (self.gates.shape[1] * cdiv(self.group_size, tile.n), rows.taps * cdiv(rows.channels, 64)),
            self.grad_y, rows.x, self.gates, grad, self.ordered.rows, self.ordered.starts, rows.channels,
            self.grad_y.shape[1], self.gates.shape[1], rows.stride, *self._sharing, GROUP_SIZE=self.group_size,
            SPAN=rows.span, HARD=self.hard, TAPS=rows.taps, GEOMETRY=rows.geometry, PRECISION=self.precision,
            BLOCK_M=min(32, tile.k), BLOCK_N=tile.n, BLOCK_K=64, warps=4 if tile.n < 64 else 8, stages=2,
        )  # fmt: skip
        return grad

    def code_grad(self, grad_logits: Tensor, gate_weight: Tensor) -> Tensor:
        """Return the code's gradient (rows, r) in float32."""
        count, rank = self.code.shape
        grad = torch.empty_like(self.code)
        tile = product_tile(count, rank, self.light_up.dtype, self.precision)
        launch(
            gradients.code_grad_kernel, (cdiv(count, tile.m), cdiv(rank, tile.n)), self.grad_y, self.gates, grad_logits,
            self.light_up, gate_weight, grad, count, self.grad_y.shape[1], rank, self.gates.shape[1], *self._sharing,
            GROUP_SIZE=self.group_size, SPAN=self.rows.span, HARD=self.hard, LIGHT_GATE=self.light_gate,
            PRECISION=self.precision, BLOCK_M=tile.m, BLOCK_R=tile.n, BLOCK_K=min(32, tile.k), BLOCK_G=16,
            warps=8, stages=2,
        )  # fmt: skip
        return grad

    def light_up_grad(self, grad_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of ``light_up`` and of the bias."""
        (count, rank), n = self.code.shape, self.grad_y.shape[1]
        grad_up = torch.empty_like(self.light_up, memory_format=torch.contiguous_format)
        grad_bias = grad_up.new_empty(n)
        tile = product_tile(n, rank, self.light_up.dtype, self.precision)
        launch(
            gradients.light_up_grad_kernel, (cdiv(n, tile.m), cdiv(rank, tile.n)), self.grad_y, self.gates, grad_logits,
            self.code, grad_up, grad_bias, count, n, rank, self.gates.shape[1], *self._sharing,
            GROUP_SIZE=self.group_size, SPAN=self.rows.span, HARD=self.hard, LIGHT_GATE=self.light_gate,
            PRECISION=self.precision, BLOCK_M=min(32, tile.k), BLOCK_N=tile.m, BLOCK_R=tile.n, warps=8, stages=2,
        )  # fmt: skip
        return grad_up, grad_bias
