"""The specification of midl's ops in plain torch: every kernel is tested against these functions.

Shapes: x (..., T, d) for a linear layer, with T the positions that ``span`` runs along; code z (..., T, r); light path
l and full path f (..., T, n); gate logits s (..., B, N) with N = n / group_size and B = ceil(T / span) blocks of
positions that share one selection. For ``span=1`` a block is a position.

Half-precision inputs are computed in float32 and rounded once at the end, float32 and float64 in their own precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.ops.dispatch import Implementation, register
from midl.selection import selection_mask, topk_groups

__all__ = ["conv2d", "conv2d_backward", "gate_logits", "linear", "linear_backward"]

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    light_down: Tensor,
    light_up: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    noise: Tensor | None,
    k: int,
    group_size: int,
    span: int,
    interpolation: str,
    ste: str,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, selected)`` of the linear op; see :mod:`midl.ops` for the arguments."""
    up = accumulate_dtype(x)
    code = x.to(up) @ light_down.to(up).T
    full = x.to(up) @ weight.to(up).T
    y, selected = interpolate(
        code, full, bias, light_up, gate_weight, gate_bias, noise, k, group_size, span, interpolation, threshold
    )
    return y.to(x.dtype), selected


def linear_backward(
    grad_y: Tensor,
    selected: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    light_down: Tensor,
    light_up: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    group_size: int,
    span: int,
    interpolation: str,
    ste: str,
    needs: list[bool],
    padded: bool = False,
) -> Grads:
    """Return the gradients of the seven tensors from x to gate_bias, empty where not needed."""
    up = accumulate_dtype(x)
    xu, wu, du = x.to(up), weight.to(up), light_down.to(up)
    grads = _interpolate_backward(
        grad_y, selected, xu @ du.T, xu @ wu.T, bias, light_up, gate_weight, gate_bias, group_size, span,
        interpolation, ste,
    )  # fmt: skip
    rows = xu.reshape(-1, x.shape[-1])
    out = (
        grads.full @ wu + grads.code @ du,
        grads.full.reshape(-1, weight.shape[0]).T @ rows,
        grads.bias,
        grads.code.reshape(-1, light_down.shape[0]).T @ rows,
        grads.light_up,
        grads.gate_weight,
        grads.gate_bias,
    )
    return _only_needed(out, needs, x)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    light_down: Tensor,
    light_up: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    noise: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    k: int,
    group_size: int,
    span: int,
    interpolation: str,
    ste: str,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, selected)`` of the convolution op; ``span=0`` makes each image one block."""
    up = accumulate_dtype(x)
    code = F.conv2d(x.to(up), light_down.to(up), None, stride, padding, dilation)
    full = F.conv2d(x.to(up), weight.to(up), None, stride, padding, dilation)
    y, selected = interpolate_image(
        code, full, bias, light_up, gate_weight, gate_bias, noise, k, group_size, span, interpolation, threshold
    )
    return y.to(x.dtype), selected


def conv2d_backward(
    grad_y: Tensor,
    selected: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    light_down: Tensor,
    light_up: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    group_size: int,
    span: int,
    interpolation: str,
    ste: str,
    needs: list[bool],
    padded: bool = False,
) -> Grads:
    """Return the gradients of the seven tensors from x to gate_bias, empty where not needed."""
    up = accumulate_dtype(x)
    xu, wu, du = x.to(up), weight.to(up), light_down.to(up)
    code = F.conv2d(xu, du, None, stride, padding, dilation)
    full = F.conv2d(xu, wu, None, stride, padding, dilation)
    grads = _interpolate_backward(
        _to_positions(grad_y, span), selected, _to_positions(code, span), _to_positions(full, span), bias, light_up,
        gate_weight, gate_bias, group_size, span or full.shape[2] * full.shape[3], interpolation, ste,
    )  # fmt: skip
    grad_full, grad_code = _to_image(grads.full, full.shape), _to_image(grads.code, code.shape)

    def through(grad: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_filters, _ = torch.ops.aten.convolution_backward(
            grad, xu, filters, None, stride, padding, dilation, False, [0, 0], 1, [True, True, False]
        )
        return grad_x, grad_filters

    (x_full, grad_weight), (x_code, grad_down) = through(grad_full, wu), through(grad_code, du)
    out = (
        x_full + x_code, grad_weight, grads.bias, grad_down, grads.light_up, grads.gate_weight, grads.gate_bias,
    )  # fmt: skip
    return _only_needed(out, needs, x)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Return the precision the reference computes in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _only_needed(grads: Grads, needs: list[bool], x: Tensor) -> Grads:
    return tuple(g.to(x.dtype) if need else x.new_empty(0) for g, need in zip(grads, needs, strict=True))  # type: ignore[return-value]


def _to_positions(image: Tensor, span: int) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), or (B, H*W, C) when the image is one block."""
    positions = image.permute(0, 2, 3, 1)
    return positions if span else positions.flatten(1, 2)


def _to_image(positions: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of :func:`_to_positions` for an image of ``shape`` (B, C, H, W)."""
    batch, channels, height, width = shape
    return positions.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _block_mean(t: Tensor, span: int) -> Tensor:
    """(..., T, c) -> (..., ceil(T / span), c): the mean over each block's positions; the last block may be short."""
    if span == 1:
        return t
    return _block_sum(t, span) / _block_sizes(t, span)


def _block_sum(t: Tensor, span: int) -> Tensor:
    if span == 1:
        return t
    blocks = -(-t.shape[-2] // span)
    padded = F.pad(t, (0, 0, 0, blocks * span - t.shape[-2]))
    return padded.unflatten(-2, (blocks, span)).sum(-2)


def _block_sizes(t: Tensor, span: int) -> Tensor:
    return _block_sum(t.new_ones(t.shape[-2], 1), span)


def _to_neurons(groups: Tensor, positions: int, group_size: int, span: int) -> Tensor:
    """(..., blocks, N) -> (..., T, n): every position and neuron gets its block's and group's value."""
    neurons = groups.repeat_interleave(group_size, dim=-1)
    return neurons if span == 1 else neurons.repeat_interleave(span, dim=-2)[..., :positions, :]


def gate_logits(
    code: Tensor,
    bias: Tensor | None,
    light_up: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    group_size: int,
    span: int,
) -> Tensor:
    """(..., T, r) -> (..., blocks, N). The light gate (no gate weights) is the group mean of light path plus bias."""
    block_code = _block_mean(code, span)
    if gate_weight is not None and gate_bias is not None:
        return block_code @ gate_weight.to(code.dtype).T + gate_bias.to(code.dtype)
    light = block_code @ light_up.to(code.dtype).T
    if bias is not None:
        light = light + bias.to(code.dtype)
    return light.unflatten(-1, (-1, group_size)).mean(-1)


def interpolate(
    code: Tensor,
    full: Tensor,
    bias: Tensor | None,
    light_up: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    noise: Tensor | None,
    k: int,
    group_size: int,
    span: int,
    interpolation: str,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, selected)`` from code (..., T, r) and full path (..., T, n): light path, gate, selection, mix."""
    positions, num_groups = full.shape[-2], full.shape[-1] // group_size
    light = code @ light_up.to(code.dtype).T
    logits = gate_logits(code, bias, light_up, gate_weight, gate_bias, group_size, span)
    selected = topk_groups(logits if noise is None else logits + noise.to(logits.dtype), k, threshold)
    mask = selection_mask(selected, num_groups)
    mask = _to_neurons(mask, positions, group_size, span)
    mixed = full  # with a = 1, to the last bit
    if interpolation == "sigmoid":
        mixed = light + _to_neurons(logits.sigmoid(), positions, group_size, span) * (full - light)
    y = torch.where(mask, mixed, light)
    return (y if bias is None else y + bias.to(y.dtype)), selected


def interpolate_image(
    code: Tensor,
    full: Tensor,
    bias: Tensor | None,
    light_up: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    noise: Tensor | None,
    k: int,
    group_size: int,
    span: int,
    interpolation: str,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`interpolate` for images (B, r, H, W) and (B, n, H, W)."""
    y, selected = interpolate(
        _to_positions(code, span), _to_positions(full, span), bias, light_up, gate_weight, gate_bias, noise, k,
        group_size, span or full.shape[2] * full.shape[3], interpolation, threshold,
    )  # fmt: skip
    return _to_image(y, full.shape), selected


class _InterpolateGrads(NamedTuple):
    code: Tensor
    full: Tensor
    bias: Tensor
    light_up: Tensor
    gate_weight: Tensor
    gate_bias: Tensor


def _interpolate_backward(
    grad_y: Tensor,
    selected: Tensor,
    code: Tensor,
    full: Tensor,
    bias: Tensor | None,
    light_up: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    group_size: int,
    span: int,
    interpolation: str,
    ste: str,
) -> _InterpolateGrads:
    positions, n = full.shape[-2], full.shape[-1]
    grad_y, up = grad_y.to(code.dtype), light_up.to(code.dtype)
    light = code @ up.T
    gate = gate_logits(code, bias, light_up, gate_weight, gate_bias, group_size, span).sigmoid()
    mask = selection_mask(selected, n // group_size)
    neuron_mask = _to_neurons(mask, positions, group_size, span)
    weight = _to_neurons(gate if interpolation == "sigmoid" else torch.ones_like(gate), positions, group_size, span)

    grad_full = torch.where(neuron_mask, grad_y * weight, 0)
    grad_light = torch.where(neuron_mask, grad_y * (1 - weight), grad_y)
    grad_bias = grad_y.reshape(-1, n).sum(0)

    # The mask is a constant; the gate's gradient is (f - l), of every group or of the selected groups alone.
    grad_gate = _block_sum((grad_y * (full - light)).unflatten(-1, (-1, group_size)).sum(-1), span)
    grad_logits = grad_gate * gate * (1 - gate)
    if ste == "selected":
        grad_logits = torch.where(mask, grad_logits, 0)

    sizes = _block_sizes(code, span)
    if gate_weight is not None:
        block_grad = grad_logits @ gate_weight.to(code.dtype)
        grad_code = _to_neurons(block_grad / sizes, positions, 1, span)
        flat_logits = grad_logits.reshape(-1, grad_logits.shape[-1])
        flat_code = _block_mean(code, span).reshape(-1, code.shape[-1])
        grad_gate_weight, grad_gate_bias = flat_logits.T @ flat_code, flat_logits.sum(0)
    else:
        spread = (grad_logits / group_size).repeat_interleave(group_size, dim=-1)
        grad_light = grad_light + _to_neurons(spread / sizes, positions, 1, span)
        grad_bias = grad_bias + spread.reshape(-1, n).sum(0)
        grad_code = torch.zeros_like(code)
        grad_gate_weight = grad_gate_bias = code.new_empty(0)
    grad_code = grad_code + grad_light @ up
    grad_light_up = grad_light.reshape(-1, n).T @ code.reshape(-1, code.shape[-1])
    return _InterpolateGrads(grad_code, grad_full, grad_bias, grad_light_up, grad_gate_weight, grad_gate_bias)


register(
    Implementation(
        "reference",
        {
            "linear": linear,
            "linear_backward": linear_backward,
            "conv2d": conv2d,
            "conv2d_backward": conv2d_backward,
        },
    )
)
