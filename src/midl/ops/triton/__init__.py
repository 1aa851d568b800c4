"""The ``triton`` implementation of midl's ops: GPU kernels, checked on the CPU by Triton's interpreter.

``TRITON_INTERPRET=1`` in the environment before triton is first imported runs the same kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from midl.ops.dispatch import Implementation, register
from midl.ops.gpu_cost import Call, Device, device_of, predicted_speedup

__all__: list[str] = []

_ops: dict[str, Callable[..., Any]] = {}
_installed = importlib.util.find_spec("triton") is not None
if _installed:
    from midl.ops.triton.configs import MAX_GROUPS, interpreted
    from midl.ops.triton.conv2d import conv2d, conv2d_backward
    from midl.ops.triton.linear import linear, linear_backward

    _ops = {
        "linear": linear,
        "linear_backward": linear_backward,
        "conv2d": conv2d,
        "conv2d_backward": conv2d_backward,
    }

DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def _unavailable() -> str | None:
    if not _installed:
        return "triton is not installed: pip install 'midl[gpu]'"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device"
    return None


def _unsupported(
    op: str, x: Tensor, *, weight: Tensor, k: int, group_size: int, ste: str = "selected",
    threshold: float | None = None, padded: bool = False, **_: object,
) -> str | None:  # fmt: skip
    if x.device.type != "cuda" and not (interpreted() and x.device.type == "cpu"):
        return f"x is on {x.device}, expected a CUDA device"
    if threshold is not None or padded:
        return "a layer with a threshold: rows select different numbers of groups, expected threshold=None"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, expected float32, float16 or bfloat16"
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not _interpreter_multiplies_bfloat16():
        return "Triton's interpreter multiplies bfloat16 as bit patterns"
    if weight.shape[0] // group_size > MAX_GROUPS:
        return f"{weight.shape[0] // group_size} groups, expected at most {MAX_GROUPS}"
    if op.endswith("_backward"):
        if ste == "dense":
            return "ste='dense' needs every neuron, expected 'selected'"
        if torch.are_deterministic_algorithms_enabled():
            return "the gradient of x is summed by atomics, torch.use_deterministic_algorithms forbids that"
    return None


def _prefer(op: str, x: Tensor, *, weight: Tensor, k: int, group_size: int, **_: object) -> bool:
    """Return whether the cost model expects these kernels to beat a dense product on x's GPU."""
    if x.device.type != "cuda":
        return False
    width, fan_in = weight.shape[0], weight[0].numel()
    rows = x.numel() // x.shape[1 if op.startswith("conv2d") else -1]
    # The call does not say the rank. What it costs hardly moves the decision: take a tenth of the dense product.
    rank = max(1, round(0.1 * fan_in * width / (fan_in + width)))
    tf32 = torch.get_float32_matmul_precision() != "highest"
    call = Call(rows, fan_in, width, group_size, k, rank, x.dtype, tf32)
    return predicted_speedup(call, _device(x.device), backward=op.endswith("_backward")) > 1


@functools.cache
def _device(device: torch.device) -> Device:
    return device_of(torch.cuda.get_device_name(device))


def _interpreter_multiplies_bfloat16() -> bool:
    """Return False: Triton 3.9 does not. The tests repair their interpreter and this answer with it."""
    return False


register(
    Implementation(
        "triton",
        _ops,
        unavailable=_unavailable,
        unsupported=_unsupported,
        prefer=_prefer,
    )
)
