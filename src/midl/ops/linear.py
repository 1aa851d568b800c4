"""Registration of ``midl::linear`` and its backward: schema, dispatch, fake kernel, autograd rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from midl.errors import KernelError
from midl.ops import native, reference
from midl.ops.dispatch import invoke, is_plain_inference, resolve
from midl.ops.eager import make_eager
from midl.ops.native_call import call_op_prepared

__all__ = ["linear"]

_WEIGHTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor light_down, Tensor light_up, Tensor? gate_weight, Tensor? gate_bias"
)
_SEVEN = ", ".join(["Tensor"] * 7)

torch.library.define(
    "midl::linear",
    f"({_WEIGHTS}, Tensor? noise, int k, int group_size, int span, str interpolation, str ste, "
    "float? threshold=None) -> (Tensor, Tensor)",
)
torch.library.define(
    "midl::linear_backward",
    f"(Tensor grad_y, Tensor selected, {_WEIGHTS}, int group_size, int span, str interpolation, str ste, "
    f"bool[] needs, bool padded=False) -> ({_SEVEN})",
)


def option(args: tuple[Any, ...], index: int) -> Any:
    """Return the op's last argument, at ``index``; torch leaves it out where it is the default."""
    return args[index] if len(args) > index else None


def _forward(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    run = resolve("linear", x, weight=weight, k=args[6], group_size=args[7], span=args[8], threshold=option(args, 11))
    y, selected = invoke(run, x, weight, *args)
    return y, selected


def _forward_dispatched(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, noise, k, group_size, span, interpolation, _ste = args[:12]
    if noise is None:
        choices = native.Choices(k, group_size, span, interpolation, option(args, 12))
        prepared = call_op_prepared(x, tensors, choices)
        if prepared is not None:
            return prepared
    return _forward(x, *args)


torch.library.impl("midl::linear", "CompositeExplicitAutograd", _forward_dispatched)


def _backward(grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, *args: Any) -> reference.Grads:
    run = resolve(
        "linear_backward", x, weight=weight, k=selected.shape[-1], group_size=args[5], span=args[6], ste=args[8],
        padded=bool(option(args, 10)),
    )  # fmt: skip
    return lay_out(invoke(run, grad_y, selected, x, weight, *args), (x, weight, *args[:5]))


torch.library.impl("midl::linear_backward", "CompositeExplicitAutograd", _backward)


def layout_of(t: Tensor) -> torch.memory_format:
    """Return channels-last for images and filters that are, else the plain layout."""
    last = t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def lay_out(grads: reference.Grads, inputs: tuple[Tensor | None, ...]) -> reference.Grads:
    """Return the gradients in the layout that :func:`fake_backward` promises: the inputs' where that has no gaps."""
    return tuple(  # type: ignore[return-value]
        g.contiguous() if t is None or g.dim() != 4 else g.contiguous(memory_format=layout_of(t))
        for g, t in zip(grads, inputs, strict=True)
    )


@torch.library.register_fake("midl::linear")
def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    k, span = args[6], args[8]
    blocks = x.shape[-2] if span == 1 else (x.shape[-2] + span - 1) // span
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty((*x.shape[:-2], blocks, k), dtype=torch.int32)


@torch.library.register_fake("midl::linear_backward")
def fake_backward(grad_y: Tensor, selected: Tensor, *args: Any) -> reference.Grads:
    """Return empty gradients of the inputs' shapes (shared with the convolution)."""
    inputs, needs = args[:7], args[-1] if isinstance(args[-1], (list, tuple)) else args[-2]
    return tuple(  # type: ignore[return-value]
        torch.empty_like(t, memory_format=layout_of(t)) if need else args[0].new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _noise, _k, group_size, span, interpolation, ste, threshold = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.options, ctx.padded = (group_size, span, interpolation, ste), threshold is not None


def _autograd(ctx: Any, grad_y: Tensor, _grad_selected: Any) -> tuple[Any, ...]:
    selected, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:7])
    run = _backward if is_plain_inference(grad_y, tensors[1]) else torch.ops.midl.linear_backward
    grads = run(grad_y, selected, *tensors, *ctx.options, needs, ctx.padded)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 7)


def refuse_second_derivative(ctx: Any, *_grads: Any) -> None:
    """Autograd rule of the backward ops; without it torch would treat their gradients as constants."""
    raise KernelError("midl: second derivatives of MID-L layers are not implemented, expected create_graph=False")


torch.library.register_autograd("midl::linear", _autograd, setup_context=_setup_context)
torch.library.register_autograd("midl::linear_backward", refuse_second_derivative)

linear = make_eager("linear", torch.ops.midl.linear, _forward, _setup_context, _autograd)
