"""``midl::linear`` and its backward on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from midl.ops.triton.backward import Grads, backward
from midl.ops.triton.forward import forward, project
from midl.ops.triton.launch import on_device
from midl.ops.triton.rows import linear_rows, precision

__all__ = ["contiguous", "linear", "linear_backward", "zero_grads"]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, noise: Tensor | None, k: int, group_size: int, span: int, interpolation: str, ste: str,
    threshold: None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)`` of the linear op; see :mod:`midl.ops` for the arguments."""
    blocks = -(-x.shape[-2] // span)
    n = weight.shape[0]
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], n)), x.new_empty((*x.shape[:-2], blocks, k), dtype=torch.int32)
    with on_device(x):
        y, selected = forward(
            linear_rows(x, span), weight.contiguous(), contiguous(bias), light_down.contiguous(),
            light_up.contiguous(), gate_weight, gate_bias, contiguous(noise), k, group_size,
            interpolation == "hard", _precision(x),
        )  # fmt: skip
    return y.view(*x.shape[:-1], n), selected.view(*x.shape[:-2], blocks, k)


def linear_backward(
    grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, group_size: int, span: int,
    interpolation: str, ste: str, needs: list[bool], padded: bool = False,
) -> Grads:  # fmt: skip
    """Return the gradients of the seven tensors from x to gate_bias, empty where not needed."""
    if x.numel() == 0:
        return zero_grads((x, weight, bias, light_down, light_up, gate_weight, gate_bias), needs)
    rows = linear_rows(x, span)
    down = light_down.contiguous()

    def through_filters(grad_code: Tensor) -> tuple[Tensor, Tensor]:
        # Into float32, where the groups' parts wait: torch's product would round to half precision in between.
        grad_x = project(linear_rows(grad_code, 1), down.T.contiguous(), _precision(x)).sum(0)
        return grad_x, grad_code.T @ rows.x

    with on_device(x):
        grads = backward(
            grad_y.reshape(rows.count, -1).contiguous(), selected.reshape(rows.blocks, -1).contiguous(), rows,
            weight.contiguous(), contiguous(bias), down, light_up.contiguous(), gate_weight, gate_bias, group_size,
            interpolation == "hard", needs, _precision(x), through_filters,
        )  # fmt: skip
    return (grads[0].view_as(x) if needs[0] else grads[0], *grads[1:])


def zero_grads(inputs: tuple[Tensor | None, ...], needs: list[bool]) -> Grads:
    """Return the gradients of a call without rows."""
    x = inputs[0]
    assert x is not None
    return tuple(  # type: ignore[return-value]
        torch.zeros_like(t) if need and t is not None else x.new_empty(0) for t, need in zip(inputs, needs, strict=True)
    )


def contiguous(t: Tensor | None) -> Tensor | None:
    """Return ``t`` in contiguous memory, copied if it must be."""
    return None if t is None else t.contiguous()


def _precision(x: Tensor) -> str:
    # Not backends.cuda.matmul.allow_tf32: reading it fails once a program has used torch's newer switch.
    return precision(x.dtype, torch.get_float32_matmul_precision() != "highest")
