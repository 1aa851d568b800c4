"""``midl::conv2d`` by the native kernels: output pixels are rows, and no patch is copied (native/convolution.hpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from midl.ops.native_packing import pack, packed_panels

__all__ = ["conv2d"]


def conv2d(
    kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor,
    gate_weight: Tensor | None, gate_bias: Tensor | None, noise: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], k: int, group_size: int, span: int, interpolation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)``, y channels-last; ``span=0`` makes each image one block."""
    geometry, height, width = _geometry(x, weight, stride, padding, dilation)
    batch, n, groups = x.shape[0], weight.shape[0], weight.shape[0] // group_size
    y = x.new_empty((batch, height, width, n))
    positions = width if span else height * width
    choices = (batch, height, -(-width // span), k) if span else (batch, 1, k)
    selected = x.new_empty(choices, dtype=torch.int32)
    rows = batch * height * width
    if rows == 0:
        return y.permute(0, 3, 1, 2), selected

    by_panels = kernels.wants_weight_panels(rows, groups, k, group_size)
    weight, light_down = _without_gaps(weight), _without_gaps(light_down)
    light_up = light_up.contiguous()
    gate_weight = None if gate_weight is None else gate_weight.contiguous()
    light, wide = packed_panels(
        kernels, weight, light_down, light_up, gate_weight, group_size, light=True, wide=by_panels, matrix=_matrix
    )
    plain = None if by_panels else _matrix(weight)
    if light is None:
        matrices = [_matrix(t) for t in (weight, light_down, light_up, gate_weight) if t is not None]
        light, wide = pack(kernels, *matrices, group_size=group_size, light=True, wide=by_panels)
    bias, gate_bias, noise = _floats(bias), _floats(gate_bias), _floats(noise)
    kernels.convolution_forward(
        x.dtype == torch.bfloat16, x.data_ptr(), geometry, rows, n, light_down.shape[0], groups, k, positions,
        span or positions, _address(plain), _address(bias), gate_weight is not None, _address(gate_bias),
        _address(noise), _address(light), _address(wide), interpolation == "hard", y.data_ptr(), selected.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y.permute(0, 3, 1, 2), selected


def _geometry(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[list[int], int, int]:
    """Return the fields of ``Images`` (native/kernels.hpp), and height and width of the output."""
    kernel = weight.shape[2:]
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return [*x.shape[1:], *x.stride(), *kernel, *stride, *padding, *dilation, height, width], height, width


def _without_gaps(filters: Tensor) -> Tensor:
    if filters.is_contiguous(memory_format=torch.channels_last):
        return filters
    return filters.contiguous()


def _matrix(t: Tensor) -> Tensor:
    """Return filters (n, C, kh, kw) as float32 rows in the order kernel row, kernel column, channel; matrices as is."""
    return (t.permute(0, 2, 3, 1).flatten(1) if t.dim() == 4 else t).float().contiguous()


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
