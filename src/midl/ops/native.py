"""The ``native`` implementation: fused CPU kernels (native/), for float32 and bfloat16.

Weights that stay unchanged from call to call are packed once (:mod:`midl.ops.native_packing`).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from midl.errors import KernelError
from midl.ops import reference
from midl.ops.dispatch import Implementation, register
from midl.ops.native_backward import linear_backward
from midl.ops.native_conv2d import conv2d
from midl.ops.native_packing import packed_panels

__all__ = ["instruction_set", "supported_instruction_sets", "topk_groups", "use_instruction_set"]

# Groups of fewer neurons take the dense backward.
_BACKWARD_GROUP = 8
# Rows of a call from which packing inside the kernel costs next to nothing.
_ROWS_THAT_PACK_THEMSELVES = 2048

try:
    # torch first: the kernels then share its OpenMP runtime.
    from midl import _native

    _missing: str | None = None
except ImportError as error:
    _missing = f"the extension midl._native is not built ({error}); reinstall midl with a C++20 compiler"


def instruction_set() -> str:
    """Return the instruction set in use: the best that this CPU has, or what the variable ``MIDL_CPU`` says.

    >>> instruction_set() in supported_instruction_sets()
    True
    """
    return _native.instruction_set()


def supported_instruction_sets() -> list[str]:
    """Return the instruction sets of this build that this CPU runs, least capable first.

    ``avx512-emulated`` is the 16-lane code compiled for AVX2: for tests, never chosen automatically.

    >>> "baseline" in supported_instruction_sets()
    True
    """
    return _native.supported_instruction_sets()


def use_instruction_set(name: str) -> None:
    """Use the kernels compiled for one instruction set, in the whole process.

    >>> before = instruction_set()
    >>> use_instruction_set("baseline")
    >>> use_instruction_set(before)

    Raises:
        KernelError: not one of :func:`supported_instruction_sets`.
    """
    try:
        _native.use_instruction_set(name)
    except ValueError as error:
        raise KernelError(f"use_instruction_set: name={error}") from None


if _missing is None and (forced := os.environ.get("MIDL_CPU")):
    if forced not in supported_instruction_sets():
        raise KernelError(
            f"MIDL_CPU={forced!r} is not an instruction set that this CPU runs, expected one of "
            f"{supported_instruction_sets()}"
        )
    use_instruction_set(forced)


def topk_groups(scores: Tensor, k: int) -> Tensor:
    """:func:`midl.selection.topk_groups` for float32 scores on the CPU, by threshold search.

    >>> topk_groups(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 2)
    tensor([[1, 3]], dtype=torch.int32)
    """
    scores = scores.contiguous()
    selected = scores.new_empty((*scores.shape[:-1], k), dtype=torch.int32)
    groups = scores.shape[-1]
    _native.topk(scores.data_ptr(), scores.numel() // groups, groups, k, selected.data_ptr(), torch.get_num_threads())
    return selected


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """Return a tensor whose rows have unit stride, and the stride between them."""
    if t.dim() == 2 and t.stride(1) == 1:
        return t, t.stride(0)
    return t.contiguous(), t.shape[-1]


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, noise: Tensor | None, k: int, group_size: int, span: int, interpolation: str, ste: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, stride = _rows(x)
    n, depth = weight.shape
    *batch, positions, _ = x.shape
    y = x.new_empty((*batch, positions, n))
    blocks = positions if span == 1 else -(-positions // span)
    selected = x.new_empty((*batch, blocks, k), dtype=torch.int32)
    # Kept alive by name until the call returns: where a copy had to be made, only its address goes to the kernel.
    weight, light_down, light_up = weight.contiguous(), light_down.contiguous(), light_up.contiguous()
    bias, gate_weight, gate_bias = _dense(bias), _dense(gate_weight), _dense(gate_bias)
    if noise is not None:
        noise = noise.to(torch.float32).contiguous()
    rows = y.numel() // n
    keeps = rows < _ROWS_THAT_PACK_THEMSELVES
    light, wide = packed_panels(
        _native, weight, light_down, light_up, gate_weight, group_size, light=keeps,
        wide=keeps and _native.wants_weight_panels(rows, n // group_size, k, group_size),
    )  # fmt: skip
    _native.linear_forward(
        x.dtype == torch.bfloat16, x.data_ptr(), stride, rows, depth, n, light_down.shape[0],
        n // group_size, k, positions, span, weight.data_ptr(), _address(bias), light_down.data_ptr(),
        light_up.data_ptr(), _address(gate_weight), _address(gate_bias), _address(noise),
        _address(light), _address(wide), interpolation == "hard",
        y.data_ptr(), selected.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, selected


def _linear_backward(
    grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, group_size: int, span: int,
    interpolation: str, ste: str, needs: list[bool],
) -> reference.Grads:  # fmt: skip
    if ste == "dense" or group_size < _BACKWARD_GROUP or x.numel() == 0:
        # Every neuron's value or gradient is wanted, or groups too narrow to beat torch's matrix products.
        return reference.linear_backward(
            grad_y, selected, x, weight, bias, light_down, light_up, gate_weight, gate_bias, group_size, span,
            interpolation, ste, needs,
        )  # fmt: skip
    return linear_backward(
        _native, grad_y, selected, x, weight, bias, light_down, light_up, gate_weight, gate_bias, group_size, span,
        interpolation, needs,
    )  # fmt: skip


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, noise: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    k: int, group_size: int, span: int, interpolation: str, ste: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return conv2d(
        _native, x, weight, bias, light_down, light_up, gate_weight, gate_bias, noise, stride, padding, dilation, k,
        group_size, span, interpolation,
    )  # fmt: skip


def _dense(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _unavailable() -> str | None:
    return _missing


def _unsupported(op: str, x: Tensor, *, weight: Tensor, **_: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, expected the CPU"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x has dtype {x.dtype}, expected float32 or bfloat16"
    if weight.dtype != x.dtype:
        return f"weight has dtype {weight.dtype}, expected {x.dtype} like x"
    return None


register(
    Implementation(
        "native",
        {"linear": _linear, "linear_backward": _linear_backward, "conv2d": _conv2d},
        unavailable=_unavailable,
        unsupported=_unsupported,
    )
)
