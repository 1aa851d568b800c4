"""Every refusal of the layers names the argument, what came and what was expected."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from midl import MIDConv2d, MIDLinear
from midl.errors import DTypeError, MIDLError


def refused(build, *parts, error=MIDLError):
    with pytest.raises(error) as caught:
        build()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("size", [0, -3, 2.5, "8", True, None])
@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_linear_sizes(name, size):
    sizes = {"in_features": 16, "out_features": 32, name: size}
    refused(lambda: MIDLinear(**sizes), f"MIDLinear: {name}={size!r}, expected a positive int")


@pytest.mark.parametrize("size", [0, -3, 2.5])
@pytest.mark.parametrize("name", ["in_channels", "out_channels"])
def test_conv2d_sizes(name, size):
    sizes = {"in_channels": 16, "out_channels": 32, name: size}
    refused(lambda: MIDConv2d(**sizes, kernel_size=3), f"MIDConv2d: {name}={size!r}, expected a positive int")


@pytest.mark.parametrize("active", [-0.5, 1.5, float("nan"), "all"])
def test_active_outside_its_range(active):
    expected = f"active={active!r}, expected a number in [0, 1]"
    refused(lambda: MIDLinear(16, 32, active=active), expected)
    layer = MIDLinear(16, 32, rank=4)
    refused(lambda: setattr(layer, "active", active), f"MIDLinear: {expected}")
    assert layer.active == 0.45


def test_a_group_size_that_does_not_divide():
    refused(lambda: MIDLinear(16, 1000, group_size=48), "MIDLinear: group_size=48 does not divide out_features=1000")
    refused(lambda: MIDConv2d(16, 50, 3, group_size=4), "MIDConv2d: group_size=4 does not divide out_channels=50")
    refused(lambda: MIDLinear(16, 32, group_size=64), "group_size=64 does not divide out_features=32")


def test_a_rank_above_the_layers_own():
    refused(lambda: MIDLinear(16, 32, rank=17), "MIDLinear: rank=17, expected at most", "=16")
    refused(lambda: MIDConv2d(2, 64, 3, rank=19), "MIDConv2d: rank=19, expected at most", "=18")


def test_a_budget_that_no_rank_meets():
    refused(
        lambda: MIDLinear(64, 128, active=0.9), "MIDLinear: rank='auto'", "active=0.9", "flops_ratio=1.7",
        "expected at most active=0.5",
    )  # fmt: skip
    refused(lambda: MIDConv2d(8, 16, 3, active=0.9), "MIDConv2d: rank='auto'", "active=0.9")
    refused(lambda: MIDLinear(1, 1), "MIDLinear: rank='auto'", "no active at all")


def test_an_unknown_choice():
    refused(lambda: MIDLinear(16, 32, actve=0.3), "unknown field 'actve', expected one of", "'active'")


def test_one_choice_per_image_is_not_for_linear_layers():
    refused(lambda: MIDLinear(16, 32, select="image"), "MIDLinear: select='image'", "expected 'position'")


def test_span_with_one_choice_per_image():
    refused(lambda: MIDConv2d(16, 32, 3, span=2, select="image"), "span=2 with select='image', expected 1")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_parameter_dtype_that_is_no_real_number(dtype):
    refused(lambda: MIDLinear(16, 32, dtype=dtype), f"MIDLinear: dtype={dtype}, expected a floating", error=DTypeError)


def test_grouped_convolutions():
    refused(lambda: MIDConv2d(16, 32, 3, groups=2), "MIDConv2d: groups=2, expected 1")
    refused(lambda: MIDConv2d.from_conv2d(nn.Conv2d(16, 16, 3, groups=16)), "MIDConv2d: groups=16, expected 1")


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("kernel_size", 0, "at least 1"),
        ("kernel_size", (3, 3, 3), "a pair of ints"),
        ("kernel_size", 1.5, "a pair of ints"),
        ("stride", 0, "at least 1"),
        ("stride", (1, "2"), "a pair of ints"),
        ("dilation", (0, 1), "at least 1"),
        ("padding", -1, "at least 0"),
        ("padding", "full", "'same' or 'valid'"),
        ("padding_mode", "mirror", "('zeros', 'reflect', 'replicate', 'circular')"),
    ],
)
def test_the_window_of_a_convolution(argument, value, expected):
    arguments = {"kernel_size": 3, argument: value}
    refused(lambda: MIDConv2d(16, 32, **arguments), f"MIDConv2d: {argument}={value!r}, expected", expected)


def test_padding_same_with_a_stride():
    refused(
        lambda: MIDConv2d(16, 32, 3, stride=2, padding="same"),
        "MIDConv2d: stride=(2, 2) with padding='same', expected stride 1",
    )


@pytest.mark.parametrize("shape", [(3, 15), (15,), (2, 0, 17)])
def test_input_of_the_wrong_width(shape):
    refused(
        lambda: MIDLinear(16, 32, rank=4)(torch.randn(shape)),
        f"MIDLinear: input of shape {shape} has {shape[-1]} features, expected 16",
    )


def test_input_without_dimensions():
    refused(lambda: MIDLinear(1, 32, rank=1)(torch.tensor(1.0)), "MIDLinear: input is 0-dimensional, expected (..., 1)")


def test_images_of_the_wrong_shape():
    layer = MIDConv2d(4, 8, 3, rank=2)
    refused(lambda: layer(torch.randn(2, 3, 8, 8)), "MIDConv2d: input of shape (2, 3, 8, 8) has 3 channels, expected 4")
    refused(lambda: layer(torch.randn(8, 8)), "MIDConv2d: input of shape (8, 8), expected (B, 4, H, W)")
    refused(lambda: layer(torch.randn(2, 4, 2, 8)), "(2, 4, 2, 8) is smaller than kernel_size=(3, 3)")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(MIDLinear(16, 32, rank=4), (3, 16)), (MIDConv2d(4, 8, 3, rank=2), (1, 4, 5, 5))],
    ids=["linear", "conv2d"],
)
class TestInput:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_of_another_precision(self, layer, shape, dtype):
        x = torch.zeros(shape, dtype=dtype)
        refused(lambda: layer(x), f"input has dtype {dtype}, expected torch.float32", error=DTypeError)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
    def test_of_integers_also_under_autocast(self, layer, shape, dtype):
        x = torch.zeros(shape, dtype=dtype)
        message = f"input has dtype {dtype}, expected torch.float32"
        refused(lambda: layer(x), message, error=DTypeError)
        with torch.autocast("cpu", torch.bfloat16):
            refused(lambda: layer(x), message, error=TypeError)

    @pytest.mark.parametrize("value", [[1.0] * 16, 3.0, None, "x"])
    def test_that_is_no_tensor(self, layer, shape, value):
        refused(lambda: layer(value), f"input is a {type(value).__name__}, expected a torch.Tensor")

    def test_on_another_device(self, layer, shape):
        refused(lambda: layer(torch.zeros(shape, device="meta")), "input is on meta, expected cpu like the weight")


def test_conversion_of_something_else():
    refused(lambda: MIDLinear.from_linear(nn.Conv2d(4, 8, 3)), "MIDLinear.from_linear: linear is a Conv2d, expected")
    refused(
        lambda: MIDConv2d.from_conv2d(nn.Linear(4, 8)), "MIDConv2d.from_conv2d: conv is a Linear, expected nn.Conv2d"
    )


def test_every_error_is_a_value_error_that_starts_with_its_owner():
    with pytest.raises(ValueError, match=re.escape("MIDLinear: ")):
        MIDLinear(0, 8)
