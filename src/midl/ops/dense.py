"""The ``dense`` implementation: every neuron by torch's own dense kernels in the input's precision, then masked.

The choice where a dense kernel wins and where no sparse kernel exists. Where the native kernels are there, one pass of
theirs makes the layer's output from the dense product; elsewhere code, logits and selection are the reference's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.ops import native, reference, reference_ffn
from midl.ops.dispatch import Implementation, register
from midl.ops.native_conv2d import image_geometry
from midl.ops.reference import accumulate_dtype
from midl.selection import topk_groups

__all__ = ["convolution", "linear"]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, noise: Tensor | None, k: int, group_size: int, span: int, interpolation: str, ste: str,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)`` of the linear op; see :mod:`midl.ops` for the arguments."""
    if native.takes(x, weight):
        return native.linear(
            x, weight, bias, light_down, light_up, gate_weight, gate_bias, noise, k, group_size, span, interpolation,
            ste, threshold, F.linear(x, weight),
        )  # fmt: skip
    up = accumulate_dtype(x)
    y, selected = reference.interpolate(
        F.linear(x.to(up), light_down.to(up)), F.linear(x, weight).to(up), bias, light_up, gate_weight, gate_bias,
        noise, k, group_size, span, interpolation, threshold,
    )  # fmt: skip
    return y.to(x.dtype), selected


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, noise: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    k: int, group_size: int, span: int, interpolation: str, ste: str,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)`` of the convolution op; see :mod:`midl.ops` for the arguments."""
    if native.takes(x, weight) and x.numel() and min(image_geometry(x, weight, stride, padding, dilation)[1:]) > 0:
        return native.convolution(
            x, weight, bias, light_down, light_up, gate_weight, gate_bias, noise, stride, padding, dilation, k,
            group_size, span, interpolation, ste, threshold,
            F.conv2d(x, weight, None, stride, padding, dilation).contiguous(memory_format=torch.channels_last),
        )  # fmt: skip
    up = accumulate_dtype(x)
    code = F.conv2d(x.to(up), light_down.to(up), None, stride, padding, dilation)
    full = F.conv2d(x, weight, None, stride, padding, dilation).to(up)
    y, selected = reference.interpolate_image(
        code, full, bias, light_up, gate_weight, gate_bias, noise, k, group_size, span, interpolation, threshold
    )
    return y.to(x.dtype), selected


def _ffn(
    x: Tensor, weight: Tensor, bias: Tensor | None, value_weight: Tensor | None, value_bias: Tensor | None,
    down_weight: Tensor, down_bias: Tensor | None, light_down: Tensor, light_up: Tensor, light_hidden: Tensor,
    light_bias: Tensor, gate_weight: Tensor, gate_bias: Tensor, noise: Tensor | None, k: int, group_size: int,
    activation: str, interpolation: str, ste: str, threshold: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    up = accumulate_dtype(x)
    hidden = reference_ffn.activate(F.linear(x, weight, bias), activation)
    if value_weight is not None:
        hidden = hidden * F.linear(x, value_weight, value_bias)
    y, selected = reference_ffn.select_and_project(
        F.linear(x.to(up), light_down.to(up)), hidden.to(up), down_weight, down_bias, light_up, light_hidden,
        light_bias, gate_weight, gate_bias, noise, k, group_size, interpolation, threshold,
        native.topk_groups if up == torch.float32 and native.takes(x, weight) else topk_groups,
    )  # fmt: skip
    return y.to(x.dtype), selected


def _unsupported(op: str, x: Tensor, **_: object) -> str | None:
    if x.device.type == "cpu" and x.dtype == torch.float16:
        return "float16 products on a CPU are computed in float32, as the reference does"
    return None


register(
    Implementation(
        "dense",
        {
            "linear": linear,
            "linear_backward": reference.linear_backward,
            "conv2d": convolution,
            "conv2d_backward": reference.conv2d_backward,
            "ffn": _ffn,
            "ffn_backward": reference_ffn.ffn_backward,
        },
        unsupported=_unsupported,
    )
)
