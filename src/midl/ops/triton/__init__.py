"""The ``triton`` implementation of midl's ops: GPU kernels, checked on the CPU by Triton's interpreter.

``TRITON_INTERPRET=1`` in the environment before triton is first imported runs the same kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from midl.ops.dispatch import Implementation, register

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
    op: str, x: Tensor, *, weight: Tensor, k: int, group_size: int, ste: str = "selected", **_: object
) -> str | None:
    if x.device.type != "cuda" and not (interpreted() and x.device.type == "cpu"):
        return f"x is on {x.device}, expected a CUDA device"
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


def _interpreter_multiplies_bfloat16() -> bool:
    """Return False: Triton 3.9 does not. The tests repair their interpreter and this answer with it."""
    return False


register(
    Implementation(
        "triton",
        _ops,
        unavailable=_unavailable,
        unsupported=_unsupported,
    )
)
