"""``midl::ffn`` by native kernels: everything in one call, a group's hidden units for the rows that selected it.

Weights that stay unchanged are packed once, on their second use, else panel by panel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from midl.ops import huge_pages
from midl.ops.native_packing import packed_once
from midl.ops.reference_ffn import ACTIVATIONS

__all__ = ["FFN_NAMES", "PACKED_NAMES", "ffn", "ffn_on_panels", "pack_ffn"]

FFN_NAMES = (
    "weight", "bias", "value_weight", "value_bias", "down_weight", "down_bias", "light_down", "light_up",
    "light_hidden", "light_bias", "gate_weight", "gate_bias",
)  # fmt: skip
"""The parameters, in the op's and the kernel's order."""

PACKED_NAMES = ("weight", "value_weight", "down_weight", "light_down", "light_up", "gate_weight")
"""Those that panels are made of, in the order in which their states are kept."""


def ffn(
    kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, value_weight: Tensor | None,
    value_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None, light_down: Tensor, light_up: Tensor,
    light_hidden: Tensor, light_bias: Tensor, gate_weight: Tensor, gate_bias: Tensor, noise: Tensor | None, k: int,
    activation: str, interpolation: str, threshold: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)`` of the FFN op."""
    if noise is not None:
        noise = noise.to(torch.float32).contiguous()
    matrices = (weight, value_weight, down_weight, light_down, light_up, gate_weight)
    panels = None
    if all(t is None or t.is_contiguous() for t in matrices):
        tensors = tuple(t for t in matrices if t is not None)
        group_size = len(weight) // len(gate_weight)
        panels = packed_once(kernels, tensors, group_size, lambda: pack_ffn(kernels, *matrices))
    # Kept alive by name until the call returns: only addresses go to the kernel.
    parameters = [
        None if t is None else t.contiguous()
        for t in (
            weight, bias, value_weight, value_bias, down_weight, down_bias, light_down, light_up, light_hidden,
            light_bias, gate_weight, gate_bias,
        )
    ]  # fmt: skip
    return _call(
        kernels, x, (len(weight), len(down_weight), len(light_down), len(gate_weight)), map(_address, parameters),
        noise, panels, k, activation, interpolation, threshold,
    )  # fmt: skip


def ffn_on_panels(
    kernels: Any, x: Tensor, panels: Tensor, parameters: dict[str, Any], k: int, activation: str, interpolation: str,
    threshold: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`ffn` without noise from panels alone, where those of ``parameters`` that they copy are mere shapes."""
    sizes = tuple(len(parameters[name]) for name in ("weight", "down_weight", "light_down", "gate_weight"))
    vectors = {
        name: None if parameters[name] is None else parameters[name].contiguous()
        for name in ("bias", "value_bias", "down_bias", "light_hidden", "light_bias", "gate_bias")
    }
    # Never read: the panels take their place.
    instead = {name: None if parameters[name] is None else panels for name in PACKED_NAMES}
    addresses = [_address({**vectors, **instead}[name]) for name in FFN_NAMES]
    return _call(kernels, x, sizes, addresses, None, panels, k, activation, interpolation, threshold)


def _call(
    kernels: Any, x: Tensor, sizes: tuple[int, ...], parameters: Iterable[int], noise: Tensor | None,
    panels: Tensor | None, k: int, activation: str, interpolation: str, threshold: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call the kernel; ``sizes`` are those of hidden units, outputs, code and groups, ``parameters`` addresses."""
    hidden, n, rank, groups = sizes
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    y = huge_pages.empty_where_mapped((*x.shape[:-1], n), x.dtype)
    selected = x.new_empty((*x.shape[:-1], k), dtype=torch.int32)
    kernels.ffn_forward(
        rows.data_ptr(), rows.stride(0), rows.shape[0], rows.shape[1], hidden, n, rank, groups, k,
        -math.inf if threshold is None else threshold, *parameters, _address(noise), _address(panels),
        interpolation == "hard", ACTIVATIONS.index(activation), y.data_ptr(), selected.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, selected


def pack_ffn(
    kernels: Any, weight: Tensor, value_weight: Tensor | None, down_weight: Tensor, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor, *, clean: bool = False,
) -> Tensor:  # fmt: skip
    """Return new panels of contiguous weights; their padding is zero with ``clean``, else whatever was there."""
    (hidden, depth), (groups, rank) = weight.shape, gate_weight.shape
    sizes = (depth, hidden, len(down_weight), rank, groups)
    panels = huge_pages.empty(kernels.packed_ffn_size(*sizes, value_weight is not None), weight.dtype)
    if clean:
        panels.zero_()
    matrices = (weight, value_weight, down_weight, light_down, light_up, gate_weight)
    kernels.pack_ffn(*sizes, *map(_address, matrices), panels.data_ptr(), torch.get_num_threads())
    return panels


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
