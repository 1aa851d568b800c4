"""``midl::ffn`` by native kernels: everything in one call, a group's hidden units for the rows that selected it.

Weights that stay unchanged are packed once, on their second use, else panel by panel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.ops import huge_pages
from midl.ops.native_backward import only_needed, repeat_first
from midl.ops.native_packing import packed_once
from midl.ops.reference_ffn import ACTIVATIONS

__all__ = ["FFN_NAMES", "PACKED_NAMES", "ffn", "ffn_backward", "ffn_on_panels", "pack_ffn"]

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
        x.dtype == torch.bfloat16, rows.data_ptr(), rows.stride(0), rows.shape[0], rows.shape[1], hidden, n, rank,
        groups, k, -math.inf if threshold is None else threshold, *parameters, _address(noise), _address(panels),
        interpolation == "hard", ACTIVATIONS.index(activation), y.data_ptr(), selected.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, selected


def ffn_backward(
    kernels: Any, grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    value_weight: Tensor | None, value_bias: Tensor | None, down_weight: Tensor, light_down: Tensor, light_up: Tensor,
    light_hidden: Tensor, gate_weight: Tensor, gate_bias: Tensor, activation: str, interpolation: str,
    needs: list[bool], padded: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of the thirteen tensors for ``ste="selected"``, empty where not needed.

    The kernel goes through the selected hidden units; products of light path and gate are torch's. All is float32: half
    precision is widened first.
    """
    if x.dtype != torch.float32:
        given = (
            grad_y, x, weight, bias, value_weight, value_bias, down_weight, light_down, light_up, light_hidden,
            gate_weight, gate_bias,
        )  # fmt: skip
        wide_grad_y, *wide = (None if t is None else t.float() for t in given)
        rest: tuple[Any, ...] = (*wide, activation, interpolation, needs, padded)
        grads = ffn_backward(kernels, wide_grad_y, selected, *rest)  # type: ignore[arg-type]
        return tuple(g.to(x.dtype) for g in grads)
    groups, k = gate_weight.shape[0], selected.shape[-1]
    rows, grad = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1]).contiguous()
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    code = F.linear(rows, light_down)
    chosen = selected.reshape(-1, k).contiguous()
    index = repeat_first(chosen, chosen).long() if padded else chosen.long()
    gate = F.linear(code, gate_weight, gate_bias).gather(1, index).sigmoid_()

    def new(needed: bool, *shape: int) -> Tensor | None:
        return huge_pages.empty_where_mapped(shape, x.dtype) if needed else None

    hidden, depth, n, gated = *weight.shape, len(down_weight), value_weight is not None
    grad_x, grad_x_of_value = new(needs[0], *rows.shape), new(needs[0] and gated, *rows.shape)
    grad_weight, grad_value_weight = new(needs[1], hidden, depth), new(needs[3] and gated, hidden, depth)
    grad_down = new(needs[5], hidden, n)
    grad_bias, grad_value_bias, grad_light_hidden = (torch.empty_like(light_hidden) for _ in range(3))
    grad_chosen = torch.zeros_like(gate)
    # Kept alive by name until the call returns: only addresses go to the kernel.
    parameters = [
        None if t is None else t.contiguous()
        for t in (weight, bias, value_weight, value_bias, down_weight, light_hidden)
    ]
    kernels.ffn_backward(
        grad.data_ptr(), rows.data_ptr(), rows.stride(0), rows.shape[0], depth, hidden, n, groups, k,
        *map(_address, parameters), chosen.data_ptr(), gate.data_ptr(), interpolation == "hard",
        ACTIVATIONS.index(activation), *map(_address, (grad_x, grad_x_of_value, grad_weight, grad_value_weight)),
        _address(grad_down), grad_bias.data_ptr(), grad_value_bias.data_ptr(), grad_light_hidden.data_ptr(),
        grad_chosen.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip

    shares = torch.ones_like(gate) if interpolation == "hard" else gate
    grad_chosen = grad_chosen.sub_((grad * F.linear(code, light_up)).sum(-1, keepdim=True), alpha=1 / groups)
    grad_chosen.mul_(gate * (1 - gate))
    if padded:
        shares, grad_chosen = (torch.where(chosen < 0, 0, t) for t in (shares, grad_chosen))
    grad_logits = code.new_zeros(len(rows), groups).scatter_add_(1, index, grad_chosen)
    grad_light = grad * torch.sub(1, shares.sum(-1, keepdim=True), alpha=1 / groups)
    grad_code = torch.addmm(grad_logits @ gate_weight, grad_light, light_up)
    if grad_x is not None:
        grad_x = grad_x if grad_x_of_value is None else grad_x.add_(grad_x_of_value)
        grad_x = grad_x.addmm_(grad_code, light_down).view(x.shape)
    grad_offset = grad.sum(0)
    out = (
        grad_x, grad_weight, grad_bias, grad_value_weight, grad_value_bias,
        None if grad_down is None else grad_down.T.contiguous(), grad_offset,
        grad_code.T @ rows if needs[7] else None, grad_light.T @ code if needs[8] else None, grad_light_hidden,
        grad_offset.clone(), grad_logits.T @ code if needs[11] else None, grad_logits.sum(0),
    )  # fmt: skip
    return only_needed(list(out), needs, x)


def pack_ffn(
    kernels: Any, weight: Tensor, value_weight: Tensor | None, down_weight: Tensor, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor, *, clean: bool = False,
) -> Tensor:  # fmt: skip
    """Return new panels of contiguous weights; their padding is zero with ``clean``, else whatever was there."""
    (hidden, depth), (groups, rank) = weight.shape, gate_weight.shape
    sizes = (weight.dtype == torch.bfloat16, depth, hidden, len(down_weight), rank, groups)
    panels = huge_pages.empty(kernels.packed_ffn_size(*sizes, value_weight is not None), weight.dtype)
    if clean:
        panels.zero_()
    matrices = (weight, value_weight, down_weight, light_down, light_up, gate_weight)
    kernels.pack_ffn(*sizes, *map(_address, matrices), panels.data_ptr(), torch.get_num_threads())
    return panels


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
