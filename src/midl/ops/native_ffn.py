"""``midl::ffn`` by native kernels: code, gate and light path as matrix products, selection and hidden units fused.

The kernel goes through the rows group by group and keeps the hidden units of its rows in scratch memory: no more than
one panel of them exists at a time. Weights that stay unchanged are packed once, on their second use, else panel by
panel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.ops import huge_pages
from midl.ops.native_packing import packed_once
from midl.ops.reference_ffn import ACTIVATIONS

__all__ = ["ffn", "prefers_ffn"]

# Narrower groups leave most lanes of a panel of their own empty.
_GROUP_WORTH_A_PANEL = 8


def ffn(
    kernels: Any, choose: Callable[[Tensor, int, float | None], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None,
    value_weight: Tensor | None, value_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None,
    light_down: Tensor, light_up: Tensor, light_hidden: Tensor, light_bias: Tensor, gate_weight: Tensor,
    gate_bias: Tensor, noise: Tensor | None, k: int, activation: str, interpolation: str,
    threshold: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)`` of the FFN op; ``choose`` is the native Top-k."""
    n, hidden = down_weight.shape
    groups = gate_bias.shape[0]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    code = F.linear(rows, light_down)
    logits = F.linear(code, gate_weight, gate_bias)
    selected = choose(logits if noise is None else logits + noise.to(logits.dtype).view_as(logits), k, threshold)
    offset = light_bias if down_bias is None else light_bias + down_bias
    shares: Tensor | None = None
    if interpolation == "sigmoid":
        chosen = selected.long()
        shares = logits.gather(-1, chosen if threshold is None else chosen.clamp_(min=0)).sigmoid()
        if threshold is not None:
            shares = torch.where(selected < 0, 0, shares)
        light_share = torch.sub(1, shares.sum(-1, keepdim=True), alpha=1 / groups)
        y = F.linear(code * light_share, light_up, offset)
    elif threshold is not None:
        light_share = torch.sub(1, (selected >= 0).sum(-1, keepdim=True, dtype=x.dtype), alpha=1 / groups)
        y = F.linear(code * light_share, light_up, offset)
    else:
        y = torch.addmm(offset, code, light_up.t(), alpha=1 - k / groups)
    # Kept alive by name until the call returns: only addresses go to the kernel.
    panels = _panels(kernels, weight, value_weight, down_weight, groups)
    parameters = [
        None if t is None else t.contiguous()
        for t in (weight, bias, value_weight, value_bias, down_weight, panels, light_hidden, selected, shares)
    ]
    kernels.ffn_forward(
        rows.data_ptr(), rows.stride(0), rows.shape[0], rows.shape[1], hidden, n, groups, k,
        *[0 if t is None else t.data_ptr() for t in parameters], ACTIVATIONS.index(activation), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y.view(*x.shape[:-1], n), selected.view(*x.shape[:-1], k)


def _panels(
    kernels: Any, weight: Tensor, value_weight: Tensor | None, down_weight: Tensor, groups: int
) -> Tensor | None:  # fmt: skip
    """Return the panels kept of the three weights; None where there are none (yet)."""
    tensors = tuple(t for t in (weight, value_weight, down_weight) if t is not None)
    if not all(t.is_contiguous() for t in tensors):
        return None
    hidden, depth = weight.shape
    sizes = (depth, hidden, down_weight.shape[0], groups)

    def make() -> Tensor:
        panels = huge_pages.empty(kernels.packed_ffn_size(*sizes, value_weight is not None), weight.dtype)
        kernels.pack_ffn(
            *sizes, weight.data_ptr(), 0 if value_weight is None else value_weight.data_ptr(), down_weight.data_ptr(),
            panels.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return panels

    return packed_once(kernels, tensors, hidden // groups, make)


def prefers_ffn(group_size: int) -> bool:
    """Return whether the kernel beats dense products with a mask."""
    return group_size >= _GROUP_WORTH_A_PANEL
