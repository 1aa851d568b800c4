"""The reference against an independent plain loop in float64: outputs to 1e-12, every gradient to 1e-10."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Options, assert_close_to_loop, plain_conv2d, plain_linear, random_tensors, with_gradients

import midl
from midl.ops.conv2d import conv2d
from midl.ops.linear import linear

RULES = list(itertools.product(("projection", "light"), ("sigmoid", "hard"), ("selected", "dense")))
rules = pytest.mark.parametrize(("gate", "interpolation", "ste"), RULES)


@pytest.fixture(autouse=True)
def _reference(poisoned_memory):
    midl.kernels("reference")


def check_linear(x_shape, n, options, gate, *, rank=3, span=1, bias=True, noise=None, edit=None):
    tensors = random_tensors(x_shape, (n, x_shape[-1]), rank, options.group_size, gate=gate, bias=bias)
    if edit is not None:
        edit(tensors)
    grad_y = torch.randn(*x_shape[:-1], n, dtype=torch.float64)
    o = options
    actual = with_gradients(
        linear, tensors, noise, o.k, o.group_size, span, o.interpolation, o.ste, grad_y=grad_y
    )  # fmt: skip
    assert_close_to_loop(actual, plain_linear(tensors, options, span, noise, grad_y))
    return actual


@rules
@pytest.mark.parametrize(("group_size", "n"), [(1, 8), (4, 16), (32, 96)])
@pytest.mark.parametrize("size", ["one", "some", "all"])
def test_linear_equals_the_loop_for_every_rule_group_size_and_k(gate, interpolation, ste, group_size, n, size):
    k = {"one": 1, "some": 2, "all": n // group_size}[size]
    check_linear((3, 5), n, Options(k, group_size, interpolation, ste), gate)


@rules
@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (7, 5), (7, 5, 6), (2, 0, 6), (0, 3, 6)])
def test_linear_equals_the_loop_for_every_batch(gate, interpolation, ste, shape):
    check_linear(shape, 12, Options(2, 4, interpolation, ste), gate)


@rules
@pytest.mark.parametrize(("positions", "span"), [(6, 3), (7, 3), (5, 5), (4, 9), (1, 2)])
def test_linear_equals_the_loop_when_neighbours_share_a_selection(gate, interpolation, ste, positions, span):
    check_linear((2, positions, 5), 12, Options(2, 3, interpolation, ste), gate, span=span)


@rules
def test_linear_equals_the_loop_without_bias(gate, interpolation, ste):
    check_linear((4, 5), 12, Options(2, 3, interpolation, ste), gate, bias=False)


@pytest.mark.parametrize("ste", ["selected", "dense"])
def test_linear_sends_ties_to_the_lowest_groups(ste):
    def equal_logits(tensors):
        tensors["gate_weight"].zero_()
        tensors["gate_bias"].fill_(0.3)

    actual = check_linear((3, 5), 12, Options(2, 2, "sigmoid", ste), "projection", edit=equal_logits)
    assert actual["selected"].tolist() == [[0, 1]] * 3


def test_linear_sends_partial_ties_to_the_lowest_of_the_equal_groups():
    def two_levels(tensors):
        tensors["gate_weight"].zero_()
        tensors["gate_bias"].copy_(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0]))

    actual = check_linear((2, 5), 6, Options(3), "projection", edit=two_levels)
    assert actual["selected"].tolist() == [[1, 3, 4]] * 2


@rules
def test_noise_moves_the_selection_and_enters_nothing_else(gate, interpolation, ste):
    noise = torch.randn(6, 8, dtype=torch.float64) * 10
    noisy = check_linear((6, 5), 16, Options(3, 2, interpolation, ste), gate, noise=noise)
    torch.manual_seed(0)
    torch.randn(6, 8, dtype=torch.float64)  # The same parameters as above.
    quiet = check_linear((6, 5), 16, Options(3, 2, interpolation, ste), gate)
    assert not torch.equal(noisy["selected"], quiet["selected"])


def check_conv2d(x_shape, weight_shape, options, gate, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), span=1):
    tensors = random_tensors(x_shape, weight_shape, 3, options.group_size, gate=gate)
    o, window = options, (stride, padding, dilation)
    with torch.no_grad():
        y, _ = conv2d(*tensors.values(), None, *window, o.k, o.group_size, span, o.interpolation, o.ste)
    grad_y = torch.randn_like(y)
    actual = with_gradients(
        conv2d, tensors, None, *window, o.k, o.group_size, span, o.interpolation, o.ste, grad_y=grad_y
    )  # fmt: skip
    assert_close_to_loop(actual, plain_conv2d(tensors, options, *window, span, None, grad_y))


@rules
@pytest.mark.parametrize("span", [1, 2, 0], ids=["position", "span 2", "image"])
def test_conv2d_equals_the_loop_for_every_rule_and_selection(gate, interpolation, ste, span):
    check_conv2d((2, 2, 4, 5), (8, 2, 3, 3), Options(2, 2, interpolation, ste), gate, padding=(1, 1), span=span)


@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((2, 4), (1, 2), (0, 1), (1, 1)),
        ((3, 2), (2, 1), (2, 0), (2, 3)),
        ((3, 3), (3, 1), (0, 2), (1, 2)),
    ],
)
def test_conv2d_equals_the_loop_for_every_window(gate, kernel, stride, padding, dilation):
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    for span in (1, 3, 0):
        check_conv2d((2, 2, 6, 7), (6, 2, *kernel), Options(2, 2, ste="dense"), gate, span=span, **window)


@pytest.mark.parametrize("span", [1, 2, 0], ids=["position", "span 2", "image"])
@pytest.mark.parametrize(("group_size", "k"), [(1, 1), (1, 8), (4, 1), (8, 1)])
def test_conv2d_equals_the_loop_for_every_group_size_and_k(group_size, k, span):
    check_conv2d((1, 2, 3, 5), (8, 2, 3, 3), Options(k, group_size), "projection", padding=(1, 1), span=span)


@pytest.mark.parametrize("span", [1, 2, 0], ids=["position", "span 2", "image"])
@pytest.mark.parametrize("gate", ["projection", "light"])
def test_conv2d_takes_an_empty_batch(gate, span):
    tensors = random_tensors((0, 2, 4, 5), (8, 2, 3, 3), 3, 2, gate=gate)
    rest = (None, (1, 1), (1, 1), (1, 1), 2, 2, span, "sigmoid", "selected")
    actual = with_gradients(conv2d, tensors, *rest, grad_y=torch.zeros(0, 8, 4, 5, dtype=torch.float64))
    assert actual["y"].shape == (0, 8, 4, 5)
    assert actual["selected"].shape == ((0, 1, 2) if span == 0 else (0, 4, -(-5 // span), 2))
    assert all(not actual[name].any() for name in tensors if tensors[name] is not None)


def test_only_needed_gradients_are_computed():
    tensors = random_tensors((3, 5), (8, 5), 2)
    for name in ("weight", "light_up"):
        tensors[name].requires_grad_()
    y, _ = linear(*tensors.values(), None, 2, 1, 1, "sigmoid", "selected")
    y.sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == ["weight", "light_up"]


def gradcheck(op, tensors, *rest):
    present = [name for name, t in tensors.items() if t is not None]

    def output(*values):
        return op(*({**tensors, **dict(zip(present, values, strict=True))}).values(), *rest)[0]

    assert torch.autograd.gradcheck(output, [tensors[name] for name in present], eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize(("shape", "span"), [((3, 4), 1), ((2, 5, 4), 2)])
def test_linear_sigmoid_with_ste_selected_is_the_exact_gradient(gate, shape, span):
    tensors = random_tensors(shape, (8, 4), 2, 2, gate=gate, requires_grad=True)
    gradcheck(linear, tensors, None, 2, 2, span, "sigmoid", "selected")


@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("span", [1, 2, 0], ids=["position", "span 2", "image"])
def test_conv2d_sigmoid_with_ste_selected_is_the_exact_gradient(gate, span):
    tensors = random_tensors((1, 2, 3, 3), (4, 2, 2, 3), 2, 2, gate=gate, requires_grad=True)
    gradcheck(conv2d, tensors, None, (1, 1), (1, 1), (1, 1), 1, 2, span, "sigmoid", "selected")


def test_with_every_group_selected_both_straight_through_rules_agree():
    tensors, grad_y = random_tensors((3, 5), (8, 5), 2), torch.randn(3, 8, dtype=torch.float64)
    selected, dense = (
        with_gradients(linear, tensors, None, 8, 1, 1, "sigmoid", ste, grad_y=grad_y) for ste in ("selected", "dense")
    )
    for name in tensors:
        assert torch.equal(selected[name], dense[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    tensors = random_tensors((5, 16), (32, 16), 4, 4, dtype=dtype)
    y, selected = linear(*tensors.values(), None, 3, 4, 1, "sigmoid", "selected")
    wide = {name: t.float() for name, t in tensors.items()}
    y32, selected32 = linear(*wide.values(), None, 3, 4, 1, "sigmoid", "selected")
    assert torch.equal(y, y32.to(dtype))
    assert torch.equal(selected, selected32)
