"""Registration of ``midl::ffn`` and its backward: schema, dispatch, fake kernel, autograd rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from midl.ops import native, reference_ffn  # noqa: F401 - registers the reference implementation
from midl.ops.dispatch import invoke, is_plain_inference, resolve
from midl.ops.eager import make_eager
from midl.ops.linear import option, refuse_second_derivative
from midl.ops.native_call import call_ffn_op_prepared

__all__ = ["ffn"]

_WEIGHTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? value_weight, Tensor? value_bias, Tensor down_weight, "
    "Tensor? down_bias, Tensor light_down, Tensor light_up, Tensor light_hidden, Tensor light_bias, "
    "Tensor gate_weight, Tensor gate_bias"
)
_TENSORS = 13
_RESULTS = ", ".join(["Tensor"] * _TENSORS)

torch.library.define(
    "midl::ffn",
    f"({_WEIGHTS}, Tensor? noise, int k, int group_size, str activation, str interpolation, str ste, "
    "float? threshold=None) -> (Tensor, Tensor)",
)
torch.library.define(
    "midl::ffn_backward",
    f"(Tensor grad_y, Tensor selected, {_WEIGHTS}, int group_size, str activation, str interpolation, str ste, "
    f"bool[] needs, bool padded=False) -> ({_RESULTS})",
)


def _forward(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    run = resolve("ffn", x, weight=weight, k=args[12], group_size=args[13], threshold=option(args, 17))
    y, selected = invoke(run, x, weight, *args)
    return y, selected


def _forward_dispatched(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, noise, k, group_size, activation, interpolation, _ste = args[: _TENSORS + 5]
    if noise is None:
        choices = native.Choices(k, group_size, 1, interpolation, option(args, _TENSORS + 5))
        prepared = call_ffn_op_prepared(x, tensors, choices, activation)
        if prepared is not None:
            return prepared
    return _forward(x, *args)


torch.library.impl("midl::ffn", "CompositeExplicitAutograd", _forward_dispatched)


def _backward(grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    run = resolve(
        "ffn_backward", x, weight=weight, k=selected.shape[-1], group_size=args[11], ste=args[14],
        padded=bool(option(args, 16)),
    )  # fmt: skip
    return tuple(g.contiguous() for g in invoke(run, grad_y, selected, x, weight, *args))


torch.library.impl("midl::ffn_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("midl::ffn")
def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], args[3].shape[0]))
    return y, x.new_empty((*x.shape[:-1], args[12]), dtype=torch.int32)


@torch.library.register_fake("midl::ffn_backward")
def _fake_backward(grad_y: Tensor, selected: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, needs = args[:_TENSORS], args[-1] if isinstance(args[-1], (list, tuple)) else args[-2]
    return tuple(t.new_empty(t.shape) if need else args[0].new_empty(0) for t, need in zip(inputs, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _noise, _k, group_size, activation, interpolation, ste, threshold = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.options, ctx.padded = (group_size, activation, interpolation, ste), threshold is not None


def _autograd(ctx: Any, grad_y: Tensor, _grad_selected: Any) -> tuple[Any, ...]:
    selected, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_TENSORS])
    run = _backward if is_plain_inference(grad_y, tensors[1]) else torch.ops.midl.ffn_backward
    grads = run(grad_y, selected, *tensors, *ctx.options, needs, ctx.padded)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 7)


torch.library.register_autograd("midl::ffn", _autograd, setup_context=_setup_context)
torch.library.register_autograd("midl::ffn_backward", refuse_second_derivative)

ffn = make_eager("ffn", torch.ops.midl.ffn, _forward, _setup_context, _autograd)
