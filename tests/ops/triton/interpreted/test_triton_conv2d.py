"""The Triton kernels of midl::conv2d against the reference: outputs, selections and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TENSORS, error_ratio, random_tensors, with_gradients

import midl
from midl.ops.conv2d import conv2d

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")

LIMITS = {torch.float32: 2e-6, torch.float16: 2 * 2**-12, torch.bfloat16: 2 * 2**-9}
"""Twice what rounding once costs: the halves keep 11 and 8 bits."""


def check(
    image: tuple[int, ...] = (2, 5, 5, 4), n: int = 48, rank: int = 6, group_size: int = 16, k: int = 2, *,
    kernel: tuple[int, int] = (3, 3), stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1), span: int = 1, dtype: torch.dtype = torch.float32, **choices: Any,
) -> None:  # fmt: skip
    interpolation = choices.pop("interpolation", "sigmoid")
    tensors = random_tensors(image, (n, image[1], *kernel), rank, group_size, dtype=dtype, **choices)
    rest = (None, stride, padding, dilation, k, group_size, span, interpolation, "selected")
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    with midl.kernels("reference"):
        y, _ = conv2d(*wide.values(), *rest)
        grad_y = torch.randn(y.shape).to(dtype)
        expected = with_gradients(conv2d, wide, *rest, grad_y=grad_y.double())
    with midl.kernels("triton"):
        actual = with_gradients(conv2d, tensors, *rest, grad_y=grad_y)
    assert torch.equal(actual["selected"], expected["selected"])
    for name in ("y", *(name for name in TENSORS if name in expected)):
        limit = LIMITS[dtype] * (1 + 2 * expected[name].numel() ** -0.5)  # The error of a few numbers scatters.
        error = error_ratio(actual[name], expected[name])
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
def test_output_and_gradients_match_the_reference(dtype: torch.dtype) -> None:
    check(dtype=dtype)


@pytest.mark.parametrize("span", [0, 3])
def test_positions_that_share_a_selection(span: int, poisoned_memory: None) -> None:
    check((2, 5, 4, 5), span=span, gate="light")


def test_stride_padding_and_dilation_of_each_axis() -> None:
    check((1, 3, 9, 8), kernel=(3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), interpolation="hard")


def test_channels_last_images_and_filters() -> None:
    tensors = random_tensors((2, 5, 4, 4), (48, 5, 3, 3), 6, 16, dtype=torch.float32)
    rest = (None, [1, 1], [1, 1], [1, 1], 2, 16, 1, "sigmoid", "selected")
    with midl.kernels("triton"):
        plain, _ = conv2d(*tensors.values(), *rest)
        last = [
            t if t is None or t.dim() < 4 else t.contiguous(memory_format=torch.channels_last) for t in tensors.values()
        ]
        y, _ = conv2d(*last, *rest)
    assert torch.equal(y, plain)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_no_images_at_all() -> None:
    layer = midl.MIDConv2d(3, 32, 3, rank=4, group_size=16)
    with midl.kernels("triton"):
        y = layer(torch.randn(0, 3, 8, 8))
        y.sum().backward()
    assert y.shape == (0, 32, 6, 6)
    assert layer.weight.grad is not None
    assert layer.weight.grad.count_nonzero() == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "gate"), [(1, "projection"), (17, "light"), (100, "projection")])
def test_odd_sizes(dtype: torch.dtype, channels: int, gate: str) -> None:
    check((1, channels, 5, 13), 51, 9, 17, 2, dtype=dtype, gate=gate)
    check((3, channels, 1, 1), 20, 9, 1, 9, dtype=dtype, gate=gate, span=0)
    check((1, channels, 9, 9), 36, 1, 3, 5, dtype=dtype, gate=gate, stride=(2, 3), kernel=(5, 1), span=2)
