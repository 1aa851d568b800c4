"""Forward and backward pass of the convolution against nn.Conv2d's in both memory formats (float32)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import midl
from midl.lab.bench.cases.convolution import KERNEL, SHAPES, channels_last
from midl.lab.bench.cases.forward import ACTIVE
from midl.lab.bench.cases.training import check_training, prepare_step
from midl.lab.bench.contest import Contender, Contest, hold
from midl.lab.bench.midl_layers import contender_name, count_flops, implementation, make_conv2d, traffic
from midl.lab.bench.parity import Parity, compare_tensors
from midl.lab.bench.registry import Case, register
from midl.lab.bench.results import Row
from midl.lab.bench.session import Session, fresh_inputs

__all__ = ["convolution_training_case"]

_BATCH = 16


@register
def cases() -> Iterator[Case]:
    """Yield 3 x 3 convolutions, 64 to 256 channels on maps of 32^2 to 8^2, ``ste="selected"``."""
    for channels, size in SHAPES:
        yield convolution_training_case(channels, size, _BATCH, quick=channels == 128)


def convolution_training_case(channels: int, size: int, batch: int, *, quick: bool = False) -> Case:
    """Return the case of a 3 x 3 convolution that keeps its channels, a multiple of 32."""

    def measure(session: Session, case: Case) -> list[Row]:
        dtype, shape = torch.float32, (batch, channels, size, size)
        inputs, (grad_y, *_) = fresh_inputs(*shape, dtype=dtype), fresh_inputs(*shape, dtype=dtype)
        last = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        grad_last = grad_y.contiguous(memory_format=torch.channels_last)
        weight_bytes = channels * channels * KERNEL**2 * dtype.itemsize
        contest = Contest(session.keep_cold(3 * 2 * weight_bytes), session.peak_gflops(dtype))
        contest.add("nn.Conv2d", lambda: _dense(contest, "nn.Conv2d", inputs, grad_y, last=False))
        contest.add("channels last", lambda: _dense(contest, "channels last", last, grad_last, last=True))
        for kernel, group_size in itertools.product(session.kernels, (16, 32)):
            name = contender_name(kernel, G=group_size, active=ACTIVE)
            contest.add(name, functools.partial(_midl, contest, kernel, group_size, last, grad_last))
        return hold(contest, session, case)

    params = {"dtype": "float32", "channels": channels, "map": size, "kernel_size": KERNEL, "batch": batch}
    name = f"{channels}x{size}x{size}/batch{batch}"
    return Case("training/convolution", name, measure, quick, {**params, "ste": "selected"})


def _dense(contest: Contest, name: str, inputs: list[Tensor], grad_y: Tensor, *, last: bool) -> Contender:
    channels = inputs[0].shape[1]
    convs = [nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2) for _ in range(contest.cold.copies)]
    if last:
        convs = [channels_last(conv) for conv in convs]
    parameters = [list(conv.parameters()) for conv in convs]

    def check() -> Parity:
        conv, x = convs[0], inputs[0].clone().requires_grad_()
        y = conv(x)
        grads = torch.autograd.grad(y, (x, conv.weight), grad_y)
        expected = torch.ops.aten.convolution_backward(
            grad_y.contiguous(), x.detach().contiguous(), conv.weight.detach().contiguous(), None, [1, 1],
            [KERNEL // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False],
        )  # fmt: skip
        names = ("grad x", "grad weight")
        right = dict(zip(names, expected[:2], strict=True))
        return compare_tensors(dict(zip(names, grads, strict=True)), right, torch.float32)

    return Contender(
        name=name,
        role="dense" if last else "user",
        prepare=functools.partial(prepare_step, convs, parameters, inputs),
        call=lambda argument: argument[0](argument[1]).backward(grad_y),
        check=check,
    )


def _midl(contest: Contest, kernel: str, group_size: int, inputs: list[Tensor], grad_y: Tensor) -> Contender:
    batch, channels, height, width = inputs[0].shape
    choices: dict[str, Any] = {"active": ACTIVE, "group_size": group_size, "ste": "selected"}
    layers = [
        make_conv2d(channels, channels, KERNEL, torch.float32, **choices).requires_grad_().train()
        for _ in range(contest.cold.copies)
    ]
    parameters = [list(layer.parameters()) for layer in layers]

    def prepare(i: int) -> Any:
        midl.kernels(kernel)
        return prepare_step(layers, parameters, inputs, i)

    def run(argument: tuple[midl.MIDConv2d, Tensor]) -> None:
        argument[0](argument[1]).backward(grad_y)

    elements = inputs[0].numel()
    return Contender(
        name=contender_name(kernel, G=group_size, active=ACTIVE),
        role="midl",
        prepare=prepare,
        call=run,
        check=lambda: check_training(layers[0], inputs[0], grad_y, kernel),
        flops=count_flops(lambda: run(prepare(0))),
        # Weights are read forward and backward, their gradient is written.
        read_bytes=3 * traffic(layers[0], elements, elements, batch * height * width),
        implementation=implementation(layers[0], inputs[0], kernel, backward=True),
        params={"group_size": group_size, "active": ACTIVE, "rank": layers[0].rank, "kernels": kernel},
    )
