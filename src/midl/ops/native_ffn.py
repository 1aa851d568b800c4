"""``midl::ffn`` by native kernels: everything in one call, a group's hidden units for the rows that selected it.

Weights that stay unchanged are packed once, on their second use, else panel by panel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from midl.ops import huge_pages
from midl.ops.native_packing import packed_once
from midl.ops.reference_ffn import ACTIVATIONS

__all__ = ["PACKED_NAMES", "ffn"]

PACKED_NAMES = ("weight", "value_weight", "down_weight", "light_down", "light_up", "gate_weight")
"""The parameters that panels are made of, in the order in which their states are kept."""


def ffn(
    kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, value_weight: Tensor | None,
    value_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None, light_down: Tensor, light_up: Tensor,
    light_hidden: Tensor, light_bias: Tensor, gate_weight: Tensor, gate_bias: Tensor, noise: Tensor | None, k: int,
    activation: str, interpolation: str, threshold: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)`` of the FFN op."""
    n, hidden = down_weight.shape
    groups, rank = gate_weight.shape
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if noise is not None:
        noise = noise.to(torch.float32).contiguous()
    y = huge_pages.empty_where_mapped((*x.shape[:-1], n), x.dtype)
    selected = x.new_empty((*x.shape[:-1], k), dtype=torch.int32)
    # Kept alive by name until the call returns: only addresses go to the kernel.
    panels = _panels(kernels, weight, value_weight, down_weight, light_down, light_up, gate_weight)
    parameters = [
        None if t is None else t.contiguous()
        for t in (
            weight, bias, value_weight, value_bias, down_weight, down_bias, light_down, light_up, light_hidden,
            light_bias, gate_weight, gate_bias, noise, panels,
        )
    ]  # fmt: skip
    kernels.ffn_forward(
        rows.data_ptr(), rows.stride(0), rows.shape[0], rows.shape[1], hidden, n, rank, groups, k,
        -math.inf if threshold is None else threshold, *[0 if t is None else t.data_ptr() for t in parameters],
        interpolation == "hard", ACTIVATIONS.index(activation), y.data_ptr(), selected.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, selected


def _panels(
    kernels: Any, weight: Tensor, value_weight: Tensor | None, down_weight: Tensor, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor,
) -> Tensor | None:  # fmt: skip
    """Return the panels kept of the weights; None where there are none (yet)."""
    matrices = (weight, value_weight, down_weight, light_down, light_up, gate_weight)
    tensors = tuple(t for t in matrices if t is not None)
    if not all(t.is_contiguous() for t in tensors):
        return None
    hidden, depth = weight.shape
    groups, rank = gate_weight.shape
    sizes = (depth, hidden, down_weight.shape[0], rank, groups)

    def make() -> Tensor:
        panels = huge_pages.empty(kernels.packed_ffn_size(*sizes, value_weight is not None), weight.dtype)
        kernels.pack_ffn(
            *sizes, *[0 if t is None else t.data_ptr() for t in matrices], panels.data_ptr(), torch.get_num_threads()
        )
        return panels

    return packed_once(kernels, tensors, hidden // groups, make)
