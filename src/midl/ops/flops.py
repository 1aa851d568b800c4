"""FLOP formulas of midl's ops for torch's FlopCounterMode: two per multiply-add, as torch counts.

Forward, per input row: r d (code) + r n (light path) + r N per selection block (projection gate) + k G d (selected
neurons). Backward: the work of the sparse rules, the recomputation of what is not saved included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from midl.ops import conv2d as _conv2d_op  # noqa: F401 - defines midl::conv2d
from midl.ops import linear as _linear_op  # noqa: F401 - defines midl::linear

__all__: list[str] = []

Shape = torch.Size


def _forward(
    positions: int, blocks: int, fan_in: int, n: int, rank: int, gate_weight: Shape | None, selected: int
) -> int:
    """Return FLOPs of one layer call: ``selected`` neurons take the full path at each of ``positions``."""
    gate = 0 if gate_weight is None else math.prod(gate_weight) * blocks
    return 2 * (positions * (rank * fan_in + rank * n + selected * fan_in) + gate)


def _backward(
    positions: int, blocks: int, fan_in: int, n: int, rank: int, gate_weight: Shape | None, selected: int,
    dense: bool, needs: list[bool],
) -> int:  # fmt: skip
    """Return FLOPs of a backward call: recompute code, light and full path, then each gradient asked for."""
    need_x, need_weight, _, need_down, need_up, need_gate, need_gate_bias = needs
    gate = 0 if gate_weight is None else math.prod(gate_weight) * blocks
    recomputed = positions * (rank * fan_in + rank * n + (n if dense else selected) * fan_in) + gate
    code_grad = positions * rank * n + gate
    return 2 * (
        recomputed
        + (need_x or need_down) * code_grad
        + need_x * positions * (selected * fan_in + rank * fan_in)
        + need_weight * positions * selected * fan_in
        + need_down * positions * rank * fan_in
        + need_up * positions * rank * n
        + (need_gate or need_gate_bias) * gate
    )


@register_flop_formula(torch.ops.midl.linear)
def _linear(
    x: Shape, weight: Shape, bias: Any, light_down: Shape, light_up: Shape, gate_weight: Shape | None,
    gate_bias: Any, noise: Any, k: int, group_size: int, *args: Any, out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    blocks = math.prod(out_shape[1][:-1])
    rank, fan_in = light_down
    return _forward(math.prod(x[:-1]), blocks, fan_in, weight[0], rank, gate_weight, k * group_size)


@register_flop_formula(torch.ops.midl.linear_backward)
def _linear_backward(
    grad_y: Shape, selected: Shape, x: Shape, weight: Shape, bias: Any, light_down: Shape, light_up: Shape,
    gate_weight: Shape | None, gate_bias: Any, group_size: int, span: int, interpolation: str, ste: str,
    needs: list[bool], *, out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    rank, fan_in = light_down
    return _backward(
        math.prod(x[:-1]), math.prod(selected[:-1]), fan_in, weight[0], rank, gate_weight,
        selected[-1] * group_size, ste == "dense", needs,
    )  # fmt: skip


@register_flop_formula(torch.ops.midl.conv2d)
def _conv2d(
    x: Shape, weight: Shape, bias: Any, light_down: Shape, light_up: Shape, gate_weight: Shape | None,
    gate_bias: Any, noise: Any, stride: Any, padding: Any, dilation: Any, k: int, group_size: int, *args: Any,
    out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    y, selected = out_shape
    fan_in = math.prod(light_down[1:])
    return _forward(
        y[0] * y[2] * y[3], math.prod(selected[:-1]), fan_in, y[1], light_down[0], gate_weight, k * group_size
    )


@register_flop_formula(torch.ops.midl.conv2d_backward)
def _conv2d_backward(
    grad_y: Shape, selected: Shape, x: Shape, weight: Shape, bias: Any, light_down: Shape, light_up: Shape,
    gate_weight: Shape | None, gate_bias: Any, stride: Any, padding: Any, dilation: Any, group_size: int, span: int,
    interpolation: str, ste: str, needs: list[bool], *, out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _backward(
        grad_y[0] * grad_y[2] * grad_y[3], math.prod(selected[:-1]), math.prod(light_down[1:]), weight[0],
        light_down[0], gate_weight, selected[-1] * group_size, ste == "dense", needs,
    )  # fmt: skip
