"""The ops as torch sees them: schema, fake kernels, autograd rules, layouts and second derivatives."""

from __future__ import annotations

import pytest
import torch
from helpers import error_ratio, random_tensors, with_gradients

import midl
from midl.errors import KernelError
from midl.ops.conv2d import conv2d
from midl.ops.linear import linear

ops = torch.ops.midl
WINDOW = ((1, 2), (2, 1), (1, 1))


@pytest.fixture(autouse=True)
def _kernels():
    midl.kernels("reference")


def linear_call(shape, gate, span, layout="contiguous", dtype=torch.float32, noisy=False):
    """Return arguments of midl::linear and of its backward op."""
    tensors = random_tensors(shape, (12, shape[-1]), 3, 2, gate=gate, dtype=dtype)
    if layout == "transposed":
        tensors["x"] = tensors["x"].mT.contiguous().mT
        tensors["weight"] = tensors["weight"].mT.contiguous().mT
    elif layout == "expanded":
        tensors["x"] = tensors["x"][..., :1, :].expand(shape)
    noise = torch.randn(*shape[:-2], -(-shape[-2] // span), 6) if noisy else None
    forward = (*tensors.values(), noise, 2, 2, span, "sigmoid", "selected")
    y, selected = linear(*forward)
    backward = (torch.randn_like(y), selected, *tensors.values(), 2, span, "sigmoid", "dense")
    return forward, (*backward, [t is not None for t in tensors.values()])


def conv2d_call(gate, span, memory_format=torch.contiguous_format, dtype=torch.float32):
    """Return arguments of midl::conv2d and of its backward op."""
    tensors = random_tensors((2, 3, 5, 6), (8, 3, 3, 2), 3, 2, gate=gate, dtype=dtype)
    tensors["x"] = tensors["x"].to(memory_format=memory_format)
    forward = (*tensors.values(), None, *WINDOW, 2, 2, span, "hard", "selected")
    y, selected = conv2d(*forward)
    backward = (torch.randn_like(y), selected, *tensors.values(), *WINDOW, 2, span, "hard", "dense")
    return forward, (*backward, [t is not None for t in tensors.values()])


def with_grad(args):
    return tuple(
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )


def check(op, args):
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    ("kernels", "gate", "shape", "span", "layout"),
    [
        ("reference", "projection", (7, 5), 1, "contiguous"),
        ("reference", "projection", (2, 7, 5), 3, "transposed"),
        ("reference", "light", (2, 7, 5), 1, "expanded"),
        ("dense", "projection", (7, 5), 1, "transposed"),
        ("dense", "light", (2, 7, 5), 3, "contiguous"),
    ],
)
def test_opcheck_linear(kernels, gate, shape, span, layout):
    midl.kernels(kernels)
    forward, backward = linear_call(shape, gate, span, layout)
    check(ops.linear.default, forward)
    check(ops.linear_backward.default, backward)


def test_opcheck_linear_with_gradients_noise_and_half_precision():
    forward, _ = linear_call((7, 5), "projection", 1, noisy=True)
    check(ops.linear.default, (*with_grad(forward[:7]), *forward[7:]))
    forward, backward = linear_call((7, 5), "light", 1, dtype=torch.bfloat16)
    check(ops.linear.default, (*with_grad(forward[:7]), *forward[7:]))
    check(ops.linear_backward.default, backward)


@pytest.mark.parametrize(
    ("kernels", "gate", "span", "memory_format"),
    [
        ("reference", "projection", 1, torch.channels_last),
        ("reference", "projection", 2, torch.contiguous_format),
        ("reference", "light", 0, torch.channels_last),
        ("dense", "projection", 1, torch.contiguous_format),
        ("dense", "light", 0, torch.contiguous_format),
    ],
)
def test_opcheck_conv2d(kernels, gate, span, memory_format):
    midl.kernels(kernels)
    forward, backward = conv2d_call(gate, span, memory_format)
    check(ops.conv2d.default, (*with_grad(forward[:7]), *forward[7:]))
    check(ops.conv2d_backward.default, backward)


def test_gradients_not_needed_are_empty_in_fake_and_real_backward():
    _, backward = linear_call((7, 5), "projection", 1)
    needs = [False, True, False, True, False, True, False]
    grads = ops.linear_backward(*backward[:-1], needs)
    assert [g.numel() > 0 for g in grads] == needs
    check(ops.linear_backward.default, (*backward[:-1], needs))


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
@pytest.mark.parametrize(("shape", "span"), [((7, 5), 1), ((2, 7, 5), 3)])
def test_layout_of_the_input_changes_nothing(layout, shape, span):
    forward, _ = linear_call(shape, "projection", span, layout, torch.float64)
    names = ("x", "weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias")
    tensors, rest = dict(zip(names, forward[:7], strict=True)), forward[7:]
    packed = {name: t.contiguous() for name, t in tensors.items()}
    grad_y = torch.randn(*shape[:-1], 12, dtype=torch.float64)
    # Also the incoming gradient of a sum, which is expanded.
    for grad in (grad_y, grad_y[..., :1].expand(*shape[:-1], 12)):
        ours = with_gradients(linear, tensors, *rest, grad_y=grad)
        theirs = with_gradients(linear, packed, *rest, grad_y=grad.contiguous())
        assert torch.equal(ours["selected"], theirs["selected"])
        assert all(error_ratio(ours[name], theirs[name]) < 1e-12 for name in ("y", *names))


def test_second_derivatives_are_refused_and_not_silently_wrong():
    forward, _ = linear_call((7, 5), "projection", 1)
    x = forward[0].requires_grad_()
    y, _ = linear(x, *forward[1:])
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(KernelError, match="second derivatives"):
        grad.sum().backward()


def test_the_selection_has_no_gradient():
    forward, _ = linear_call((7, 5), "projection", 1)
    y, selected = linear(*with_grad(forward[:7]), *forward[7:])
    assert y.requires_grad
    assert not selected.requires_grad
