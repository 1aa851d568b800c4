"""Autocast: as for torch's own layers, forward in half precision, gradients in the parameters' precision."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import error_ratio

import midl
from midl import MIDConv2d, MIDLinear

CASES = {
    "linear": (lambda **f: MIDLinear(16, 32, rank=4, **f), (9, 16)),
    "linear span": (lambda **f: MIDLinear(16, 32, rank=4, span=2, gate="light", **f), (2, 9, 16)),
    "conv2d": (lambda **f: MIDConv2d(4, 8, 3, padding=1, rank=4, **f), (2, 4, 6, 6)),
    "conv2d image": (lambda **f: MIDConv2d(4, 8, 3, padding="same", rank=4, select="image", **f), (2, 4, 6, 6)),
}
case = pytest.mark.parametrize("case", list(CASES))
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True, params=["reference", "auto"])
def _kernels(request):
    midl.kernels(request.param)


@case
@half
def test_forward_is_that_of_a_half_precision_layer(case, dtype):
    build, shape = CASES[case]
    layer, x = build(), torch.randn(shape)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, copy.deepcopy(layer).to(dtype)(x.to(dtype)))


@case
@half
def test_gradients_are_in_the_parameters_precision_and_near_float32(case, dtype):
    build, shape = CASES[case]
    # Every group selected: otherwise rounding may select others, and gradients would rightly differ.
    layer, x = build(active=1.0), torch.randn(shape, requires_grad=True)
    grad_y = torch.randn(layer(x).shape)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    y.backward(grad_y.to(dtype))
    ours = [x.grad, *(p.grad for p in layer.parameters())]
    assert {g.dtype for g in ours} == {torch.float32}
    theirs = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad_y)
    assert all(error_ratio(a, b) < 0.03 for a, b in zip(ours, theirs, strict=True))


@case
def test_inputs_may_already_be_half_precision(case):
    build, shape = CASES[case]
    with torch.autocast("cpu", torch.bfloat16):
        assert build()(torch.randn(shape, dtype=torch.bfloat16)).dtype == torch.bfloat16


@case
def test_float64_layers_are_left_alone(case):
    build, shape = CASES[case]
    layer, x = build(dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, layer(x))


def test_autocast_switched_off_inside_is_off():
    layer, x = MIDLinear(16, 32, rank=4), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32
