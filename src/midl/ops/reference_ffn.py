"""The specification of ``midl::ffn`` in plain torch; :mod:`midl.ops` has the arguments, docs/formula.md the words.

Shapes: x (..., d); code z (..., r); hidden units h and their gradients (..., m); gate logits s (..., N) with
N = m / group_size; output (..., n). Half-precision inputs are computed in float32 and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.errors import MIDLError
from midl.ops.dispatch import add_ops
from midl.ops.reference import accumulate_dtype
from midl.selection import selection_mask, topk_groups

__all__ = ["ACTIVATIONS", "activate", "ffn", "ffn_backward", "select_and_project"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def ffn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    light_down: Tensor,
    light_up: Tensor,
    light_hidden: Tensor,
    light_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    noise: Tensor | None,
    k: int,
    group_size: int,
    activation: str,
    interpolation: str,
    ste: str,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, selected)`` of the FFN op."""
    up = accumulate_dtype(x)
    xu = x.to(up)
    hidden = activate(_linear(xu, weight, bias), activation)
    if value_weight is not None:
        hidden = hidden * _linear(xu, value_weight, value_bias)
    y, selected = select_and_project(
        xu @ light_down.to(up).T, hidden, down_weight, down_bias, light_up, light_hidden, light_bias, gate_weight,
        gate_bias, noise, k, group_size, interpolation, threshold,
    )  # fmt: skip
    return y.to(x.dtype), selected


def ffn_backward(
    grad_y: Tensor,
    selected: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    light_down: Tensor,
    light_up: Tensor,
    light_hidden: Tensor,
    light_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    group_size: int,
    activation: str,
    interpolation: str,
    ste: str,
    needs: list[bool],
    padded: bool = False,
) -> tuple[Tensor, ...]:
    """Return the gradients of the thirteen tensors from x to gate_bias, empty where not needed."""
    up = accumulate_dtype(x)
    xu, g = x.to(up), grad_y.to(up)
    code = xu @ light_down.to(up).T
    before = _linear(xu, weight, bias)
    active = activate(before, activation)
    value = torch.ones_like(active) if value_weight is None else _linear(xu, value_weight, value_bias)
    mixed = _mix(code, active * value, selected, light_up, light_hidden, gate_weight, gate_bias, interpolation)

    grad_mixed = g @ down_weight.to(up)
    grad_hidden = torch.where(mixed.mask, grad_mixed * mixed.share, 0)
    # The mask is a constant; a group's gate has the gradient of its full minus its light contribution.
    full_minus_light = (grad_mixed * mixed.difference).unflatten(-1, (-1, group_size)).sum(-1)
    full_minus_light = full_minus_light - (g * mixed.light).sum(-1, keepdim=True) / gate_bias.shape[0]
    grad_logits = full_minus_light * mixed.gate * (1 - mixed.gate)
    if ste == "selected":
        grad_logits = torch.where(selection_mask(selected, gate_bias.shape[0]), grad_logits, 0)
    grad_light = g * mixed.light_share

    grad_code = grad_light @ light_up.to(up) + grad_logits @ gate_weight.to(up)
    grad_before = torch.where(mixed.mask, _activate_backward(grad_hidden * value, before, activation), 0)
    grad_x = grad_before @ weight.to(up) + grad_code @ light_down.to(up)
    grad_value = torch.where(mixed.mask, grad_hidden * active, 0)
    if value_weight is not None:
        grad_x = grad_x + grad_value @ value_weight.to(up)
    out = (
        grad_x,
        _outer(grad_before, xu), _rows(grad_before).sum(0),
        _outer(grad_value, xu), _rows(grad_value).sum(0),
        _outer(g, mixed.hidden), _rows(g).sum(0),
        _outer(grad_code, xu),
        _outer(grad_light, code),
        -_rows(grad_hidden).sum(0), _rows(g).sum(0),
        _outer(grad_logits, code), _rows(grad_logits).sum(0),
    )  # fmt: skip
    return tuple(t.to(x.dtype) if need else x.new_empty(0) for t, need in zip(out, needs, strict=True))


def select_and_project(
    code: Tensor,
    hidden: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    light_up: Tensor,
    light_hidden: Tensor,
    light_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    noise: Tensor | None,
    k: int,
    group_size: int,
    interpolation: str,
    threshold: float | None = None,
    choose: Callable[[Tensor, int, float | None], Tensor] = topk_groups,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, selected)`` from code (..., r) and all hidden units (..., m): gate, selection, down-projection.

    ``choose`` may be a faster :func:`midl.selection.topk_groups`.
    """
    logits = _linear(code, gate_weight, gate_bias)
    selected = choose(logits if noise is None else logits + noise.to(logits.dtype), k, threshold)
    mixed = _mix(code, hidden, selected, light_up, light_hidden, gate_weight, gate_bias, interpolation)
    y = _linear(mixed.hidden, down_weight, down_bias) + mixed.light_share * mixed.light + light_bias.to(code.dtype)
    return y, selected


class _Mix(NamedTuple):
    """Full and light values mixed by the selection."""

    hidden: Tensor
    """What the down-projection multiplies: share * (h - light_hidden) for selected units, else 0, (..., m)."""
    difference: Tensor
    """h - light_hidden, (..., m)."""
    mask: Tensor
    """Selected units, (..., m)."""
    share: Tensor
    """Weight of a unit if selected: its group's gate, or 1, (..., m)."""
    gate: Tensor
    """sigmoid(s), (..., N)."""
    light: Tensor
    """The low-rank map's output, (..., n)."""
    light_share: Tensor
    """The part of ``light`` that stands for groups not (wholly) selected, (..., 1)."""


def _mix(
    code: Tensor,
    hidden: Tensor,
    selected: Tensor,
    light_up: Tensor,
    light_hidden: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    interpolation: str,
) -> _Mix:
    num_groups = gate_bias.shape[0]
    gate = _linear(code, gate_weight, gate_bias).sigmoid()
    groups = selection_mask(selected, num_groups)
    share = gate if interpolation == "sigmoid" else torch.ones_like(gate)
    light_share = 1 - torch.where(groups, share, 0).mean(-1, keepdim=True)
    size = hidden.shape[-1] // num_groups
    mask, share = (t.repeat_interleave(size, dim=-1) for t in (groups, share))
    difference = hidden - light_hidden.to(code.dtype)
    mixed = torch.where(mask, share * difference, 0)
    return _Mix(mixed, difference, mask, share, gate, code @ light_up.to(code.dtype).T, light_share)


def activate(t: Tensor, activation: str) -> Tensor:
    """Return the activation function ``activation``, one of ``ACTIVATIONS``, of ``t``."""
    if activation == "relu":
        return t.relu()
    if activation == "silu":
        return F.silu(t)
    return F.gelu(t, approximate=_approximate(activation))


def _activate_backward(grad: Tensor, t: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.where(t > 0, grad, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, t)
    return torch.ops.aten.gelu_backward(grad, t, approximate=_approximate(activation))


def _approximate(activation: str) -> str:
    if activation not in ("gelu", "gelu_tanh"):
        raise MIDLError(f"midl::ffn: activation={activation!r}, expected one of {ACTIVATIONS}")
    return "tanh" if activation == "gelu_tanh" else "none"


def _linear(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(t, weight.to(t.dtype), None if bias is None else bias.to(t.dtype))


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _outer(grad: Tensor, t: Tensor) -> Tensor:
    """Return the gradient of a weight, (outputs, inputs), from those of its outputs."""
    return _rows(grad).T @ _rows(t)


add_ops("reference", {"ffn": ffn, "ffn_backward": ffn_backward})
