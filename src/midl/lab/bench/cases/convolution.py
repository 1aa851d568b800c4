"""Forward pass of the convolution against nn.Conv2d, plain and compiled, in both memory formats and precisions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import midl
from midl.lab.bench.cases.forward import ACTIVE
from midl.lab.bench.contest import Contender, Contest, dense_contender, hold
from midl.lab.bench.dense import compile_frozen, free_compiled
from midl.lab.bench.midl_layers import (
    check_forward,
    contender_name,
    count_flops,
    implementation,
    make_conv2d,
    traffic,
)
from midl.lab.bench.parity import Parity, compare_tensors
from midl.lab.bench.registry import Case, register
from midl.lab.bench.results import Row
from midl.lab.bench.session import Session, fresh_inputs

__all__ = ["KERNEL", "SHAPES", "channels_last"]

KERNEL = 3
SHAPES = ((64, 32), (128, 16), (256, 8), (256, 16))  # channels and side of the map


@register
def cases() -> Iterator[Case]:
    """Yield 3 x 3 convolutions, 64 to 256 channels on maps of 32^2 to 8^2, batch 1, 16 and 128."""
    for dtype in (torch.float32, torch.bfloat16):
        for channels, size in SHAPES:
            for batch in (1, 16, 128):
                if channels * size * batch <= 256 * 8 * 128:  # the largest would take a minute of its own
                    quick = (channels, batch, dtype) == (128, 16, torch.float32)
                    yield _case(channels, size, batch, dtype, quick=quick)


def _case(channels: int, size: int, batch: int, dtype: torch.dtype, *, quick: bool) -> Case:
    def measure(session: Session, case: Case) -> list[Row]:
        shape = (batch, channels, size, size)
        with torch.no_grad():
            inputs = fresh_inputs(*shape, dtype=dtype)
            last = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
            contenders = 3 if session.compile else 2
            round_bytes = contenders * channels * channels * KERNEL**2 * dtype.itemsize
            contest = Contest(session.keep_cold(round_bytes), session.peak_gflops(dtype))
            contest.add("nn.Conv2d", lambda: _dense(contest, "nn.Conv2d", inputs, lambda conv: conv))
            contest.add("channels last", lambda: _dense(contest, "channels last", last, channels_last))
            if session.compile:
                name = "compiled, channels last, frozen"
                contest.add(name, lambda: _dense(contest, name, last, functools.partial(_compiled, example=last[0])))
            for kernel, group_size in itertools.product(session.kernels, (8, 16, 32)):
                name_ours = contender_name(kernel, G=group_size, active=ACTIVE)
                contest.add(name_ours, functools.partial(_midl, contest, kernel, group_size, last))
            rows = hold(contest, session, case)
        if session.compile:
            free_compiled()
        return rows

    name_of_dtype = str(dtype).removeprefix("torch.")
    params = {"dtype": name_of_dtype, "channels": channels, "map": size, "kernel_size": KERNEL, "batch": batch}
    return Case(f"convolution/{name_of_dtype}", f"{channels}x{size}x{size}/batch{batch}", measure, quick, params)


def channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    """Return ``conv`` itself, its weight moved to channels-last memory."""
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _compiled(conv: nn.Conv2d, example: Tensor) -> Callable[..., Any]:
    return compile_frozen(channels_last(conv), example)


def _dense(contest: Contest, name: str, inputs: list[Tensor], of_layer: Callable[[nn.Conv2d], Any]) -> Contender:
    channels, copies = inputs[0].shape[1], contest.cold.copies
    convs = [
        nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, dtype=inputs[0].dtype).eval().requires_grad_(False)
        for _ in range(copies)
    ]
    calls = [of_layer(conv) for conv in convs]

    def check() -> Parity:
        conv, x = convs[0], inputs[0]
        assert conv.bias is not None
        expected = nn.functional.conv2d(x, conv.weight, conv.bias, padding=KERNEL // 2)
        return compare_tensors({"y": calls[0](x)}, {"y": expected}, x.dtype)

    return dense_contender(name, "nn.Conv2d", calls, inputs, check)


def _midl(contest: Contest, kernel: str, group_size: int, inputs: list[Tensor]) -> Contender:
    batch, channels, height, width = inputs[0].shape
    copies = contest.cold.copies
    layers = [
        make_conv2d(channels, channels, KERNEL, inputs[0].dtype, active=ACTIVE, group_size=group_size)
        for _ in range(copies)
    ]

    def prepare(i: int) -> tuple[midl.MIDConv2d, Tensor]:
        midl.kernels(kernel)
        return layers[i % copies], inputs[i % len(inputs)].clone()

    elements = inputs[0].numel()
    return Contender(
        name=contender_name(kernel, G=group_size, active=ACTIVE),
        role="midl",
        prepare=prepare,
        call=lambda argument: argument[0](argument[1]),
        check=lambda: check_forward(layers[0], inputs[0], kernel),
        flops=count_flops(lambda: layers[0](inputs[0])),
        read_bytes=traffic(layers[0], elements, elements, batch * height * width),
        implementation=implementation(layers[0], inputs[0], kernel),
        params={"group_size": group_size, "active": ACTIVE, "rank": layers[0].rank, "kernels": kernel},
    )
