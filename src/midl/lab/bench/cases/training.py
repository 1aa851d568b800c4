"""Forward and backward pass of the linear layer against nn.Linear's and the compiled one's (float32)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import midl
from midl.lab.bench.cases.forward import ACTIVE
from midl.lab.bench.contest import Contender, Contest, hold
from midl.lab.bench.dense import compile_trainable, free_compiled
from midl.lab.bench.midl_layers import (
    check_forward,
    contender_name,
    count_flops,
    implementation,
    make_linear,
    run_observed,
    traffic,
)
from midl.lab.bench.parity import Parity, compare_tensors
from midl.lab.bench.registry import Case, register
from midl.lab.bench.results import Row
from midl.lab.bench.session import Session, fresh_inputs

__all__ = ["check_training", "prepare_step", "training_case"]

_GROUP_SIZES = (1, 32)


@register
def cases() -> Iterator[Case]:
    """Yield (d, n) in {1024, 4096}^2 at batch 128 and 512, groups of 1 and 32, ``ste="selected"``."""
    for d, n in itertools.product((1024, 4096), repeat=2):
        for batch in (128, 512):
            yield training_case(d, n, batch, quick=(d, n, batch) == (1024, 4096, 128))


def training_case(d: int, n: int, batch: int, *, quick: bool = False) -> Case:
    """Return the case of a (d, n) layer; widths are multiples of 32."""

    def measure(session: Session, case: Case) -> list[Row]:
        dtype = torch.float32
        inputs, (grad_y, *_) = fresh_inputs(batch, d, dtype=dtype), fresh_inputs(batch, n, dtype=dtype)
        contenders = 2 if session.compile else 1
        contest = Contest(session.keep_cold(3 * contenders * d * n * dtype.itemsize), session.peak_gflops(dtype))
        contest.add("nn.Linear", lambda: _dense(contest, "nn.Linear", n, inputs, grad_y, lambda layer: layer))
        if session.compile:
            compiled = functools.partial(compile_trainable, example=inputs[0])
            contest.add("compiled", lambda: _dense(contest, "compiled", n, inputs, grad_y, compiled))
        for kernel, size in itertools.product(session.kernels, _GROUP_SIZES):
            name = contender_name(kernel, G=size, active=ACTIVE)
            contest.add(name, functools.partial(_midl, contest, kernel, n, size, inputs, grad_y))
        rows = hold(contest, session, case)
        if session.compile:
            free_compiled()
        return rows

    params = {"dtype": "float32", "in_features": d, "out_features": n, "batch": batch, "ste": "selected"}
    return Case("training/float32", f"{d}x{n}/batch{batch}", measure, quick, params)


def prepare_step(layers: list[Any], parameters: list[list[nn.Parameter]], inputs: list[Tensor], i: int) -> Any:
    """Return a layer without gradients, as after an optimiser step, and a fresh input that wants one."""
    for parameter in parameters[i % len(layers)]:
        parameter.grad = None
        with torch.no_grad():
            # Touches nothing but raises the version: what is cached per version must be made again, as in training.
            parameter[:0].zero_()
    return layers[i % len(layers)], inputs[i % len(inputs)].clone().requires_grad_()


def _dense(
    contest: Contest, name: str, n: int, inputs: list[Tensor], grad_y: Tensor, of_layer: Callable[[nn.Linear], Any]
) -> Contender:
    layers = [nn.Linear(inputs[0].shape[1], n) for _ in range(contest.cold.copies)]
    calls, parameters = [of_layer(layer) for layer in layers], [list(layer.parameters()) for layer in layers]

    def check() -> Parity:
        layer, x = layers[0], inputs[0].clone().requires_grad_()
        y = calls[0](x)
        y.backward(grad_y)
        weight, bias = layer.weight, layer.bias
        assert x.grad is not None
        assert weight.grad is not None
        assert bias.grad is not None
        outputs = {"y": y.detach(), "grad x": x.grad, "grad weight": weight.grad, "grad bias": bias.grad}
        with torch.no_grad():
            expected = (F.linear(x, weight, bias), grad_y @ weight, grad_y.T @ x, grad_y.sum(0))
        return compare_tensors(outputs, dict(zip(outputs, expected, strict=True)), torch.float32)

    return Contender(
        name=name,
        role="user" if name == "nn.Linear" else "dense",
        prepare=functools.partial(prepare_step, calls, parameters, inputs),
        call=lambda argument: argument[0](argument[1]).backward(grad_y),
        check=check,
    )


def _midl(contest: Contest, kernel: str, n: int, group_size: int, inputs: list[Tensor], grad_y: Tensor) -> Contender:
    batch, d = inputs[0].shape
    layers = [
        make_linear(d, n, torch.float32, active=ACTIVE, group_size=group_size, ste="selected").requires_grad_().train()
        for _ in range(contest.cold.copies)
    ]
    parameters = [list(layer.parameters()) for layer in layers]

    def prepare(i: int) -> Any:
        midl.kernels(kernel)
        return prepare_step(layers, parameters, inputs, i)

    def run(argument: tuple[midl.MIDLinear, Tensor]) -> None:
        argument[0](argument[1]).backward(grad_y)

    return Contender(
        name=contender_name(kernel, G=group_size, active=ACTIVE),
        role="midl",
        prepare=prepare,
        call=run,
        check=lambda: check_training(layers[0], inputs[0], grad_y, kernel),
        flops=count_flops(lambda: run(prepare(0))),
        # Weights are read forward and backward, their gradient is written.
        read_bytes=3 * traffic(layers[0], batch * d, batch * n, batch),
        implementation=implementation(layers[0], inputs[0], kernel, backward=True),
        params={"group_size": group_size, "active": ACTIVE, "rank": layers[0].rank, "kernels": kernel},
    )


def check_training(layer: midl.MIDLinear | midl.MIDConv2d, x: Tensor, grad_y: Tensor, kernel: str) -> Parity:
    """Compare the output and every gradient, the gradients for the contender's own selection."""
    forward = check_forward(layer, x, kernel)
    if not forward.ok:
        return forward
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with midl.kernels(kernel):
        y, selected = run_observed(layer, x, kernel)
        y.backward(grad_y)
    names = ("weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias")
    parameters = [getattr(layer, name) for name in names]
    c = layer.config
    window = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, midl.MIDConv2d) else ()
    run = torch.ops.midl.conv2d_backward if window else torch.ops.midl.linear_backward
    with torch.no_grad(), midl.kernels("reference"):
        expected = run(
            grad_y, selected, x, *parameters, *window, c.group_size, c.span, c.interpolation, c.ste, [True] * 7
        )
    outputs = dict(zip(("x", *names), [t.grad for t in (x, *parameters)], strict=True))
    backward = compare_tensors(outputs, dict(zip(outputs, expected, strict=True)), x.dtype)
    return max(forward, backward, key=lambda parity: parity.error)
