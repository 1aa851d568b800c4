"""Registration of ``midl::conv2d`` and its backward: schema, dispatch, fake kernel, autograd rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from midl.ops import native, reference
from midl.ops.dispatch import invoke, is_plain_inference, resolve
from midl.ops.eager import make_eager
from midl.ops.linear import fake_backward, lay_out, option, refuse_second_derivative
from midl.ops.native_call import call_op_prepared

__all__ = ["conv2d"]

_WEIGHTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor light_down, Tensor light_up, Tensor? gate_weight, Tensor? gate_bias"
)
_WINDOW = "int[2] stride, int[2] padding, int[2] dilation"
_SEVEN = ", ".join(["Tensor"] * 7)

torch.library.define(
    "midl::conv2d",
    f"({_WEIGHTS}, Tensor? noise, {_WINDOW}, int k, int group_size, int span, str interpolation, str ste, "
    "float? threshold=None) -> (Tensor, Tensor)",
)
torch.library.define(
    "midl::conv2d_backward",
    f"(Tensor grad_y, Tensor selected, {_WEIGHTS}, {_WINDOW}, int group_size, int span, str interpolation, str ste, "
    f"bool[] needs, bool padded=False) -> ({_SEVEN})",
)


def output_size(size: Any, kernel: int, stride: int, padding: int, dilation: int) -> Any:
    """Return the output positions of a convolution along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_positions(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> tuple[Any, Any]:
    """Return height and width of the output."""
    height, width = (
        output_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)
    )
    return height, width


def _forward(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    run = resolve(
        "conv2d", x, weight=weight, k=args[9], group_size=args[10], span=args[11], threshold=option(args, 14),
        positions=output_positions(x, weight, *args[6:9]),
    )  # fmt: skip
    y, selected = invoke(run, x, weight, *args)
    return y, selected


def _forward_dispatched(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, noise, stride, padding, dilation, k, group_size, span, interpolation, _ste = args[:15]
    if noise is None:
        choices = native.Choices(k, group_size, span, interpolation, option(args, 15))
        prepared = call_op_prepared(x, tensors, choices, (tuple(stride), tuple(padding), tuple(dilation)))
        if prepared is not None:
            return prepared
    return _forward(x, *args)


torch.library.impl("midl::conv2d", "CompositeExplicitAutograd", _forward_dispatched)


def _backward(grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, *args: Any) -> reference.Grads:
    run = resolve(
        "conv2d_backward", x, weight=weight, k=selected.shape[-1], group_size=args[8], span=args[9], ste=args[11],
        padded=bool(option(args, 13)),
    )  # fmt: skip
    return lay_out(invoke(run, grad_y, selected, x, weight, *args), (x, weight, *args[:5]))


torch.library.impl("midl::conv2d_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("midl::conv2d")
def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, k, _, span = args[6:12]
    height, width = output_positions(x, weight, stride, padding, dilation)
    # Channels-last, as the implementations return it.
    y = x.new_empty((x.shape[0], height, width, weight.shape[0])).permute(0, 3, 1, 2)
    shape = (x.shape[0], height, (width + span - 1) // span, k) if span else (x.shape[0], 1, k)
    return y, x.new_empty(shape, dtype=torch.int32)


torch.library.register_fake("midl::conv2d_backward", fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _noise, stride, padding, dilation, _k, group_size, span, interpolation, ste, threshold = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.options = (stride, padding, dilation, group_size, span, interpolation, ste)
    ctx.padded = threshold is not None


def _autograd(ctx: Any, grad_y: Tensor, _grad_selected: Any) -> tuple[Any, ...]:
    selected, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:7])
    run = _backward if is_plain_inference(grad_y, tensors[1]) else torch.ops.midl.conv2d_backward
    grads = run(grad_y, selected, *tensors, *ctx.options, needs, ctx.padded)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 10)


torch.library.register_autograd("midl::conv2d", _autograd, setup_context=_setup_context)
torch.library.register_autograd("midl::conv2d_backward", refuse_second_derivative)

conv2d = make_eager("conv2d", torch.ops.midl.conv2d, _forward, _setup_context, _autograd)
