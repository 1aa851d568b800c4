"""Gradients of the native convolution against the reference in float64, on every instruction set."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import TENSORS, error_ratio, instruction_sets_to_test
from helpers import random_tensors as draw_tensors
from hypothesis import given
from hypothesis import strategies as st

import midl
from midl.ops import reference
from midl.ops.dispatch import unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.ops import native, native_conv2d

pytestmark = pytest.mark.usefixtures("native_kernels")
SETS = instruction_sets_to_test()
# Root-mean-square error in units of the gradient's root-mean-square.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

random_tensors = functools.partial(draw_tensors, dtype=torch.float32)
backward = torch.ops.midl.conv2d_backward


def doubles(tensors):
    return [None if t is None else t.detach().double() for t in tensors.values()]


def pair(v):
    return [v, v] if isinstance(v, int) else list(v)


def check(
    tensors, k, group_size, *, stride=1, padding=1, dilation=1, span=1, rule="sigmoid", ste="selected", needs=None
):
    dtype, window = tensors["x"].dtype, [pair(v) for v in (stride, padding, dilation)]
    y, selected = reference.conv2d(*doubles(tensors), None, *window, k, group_size, span, rule, ste)
    grad_y = torch.randn_like(y).to(dtype)
    needs = [t is not None for t in tensors.values()] if needs is None else needs
    rest = (*window, group_size, span, rule, ste, needs)
    grads = backward(grad_y, selected, *tensors.values(), *rest)
    expected = reference.conv2d_backward(grad_y.double(), selected, *doubles(tensors), *rest)
    for name, need, actual, right in zip(TENSORS, needs, grads, expected, strict=True):
        assert actual.dtype == dtype
        assert actual.shape == (right.shape if need else (0,)), name
        if need:
            # The gate's gradients are sums that cancel.
            limit = LIMITS[dtype] * (10 if name.startswith("gate") else 1)
            assert error_ratio(actual, right) < limit, name
    return grads


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("rule", ["sigmoid", "hard"])
@pytest.mark.parametrize("group_size", [1, 3, 8, 16, 48])
def test_gradients_equal_the_reference(instruction_set, dtype, gate, rule, group_size):
    shape = (group_size * 6, 12, 3, 3)
    check(random_tensors((3, 12, 6, 7), shape, 7, group_size, gate=gate, dtype=dtype), 3, group_size, rule=rule)


WINDOWS = [
    ((1, 1), {"padding": 0}),
    ((1, 1), {"padding": 1, "stride": 2}),
    ((3, 3), {"padding": 0}),
    ((3, 3), {"stride": 2}),
    ((3, 3), {"dilation": 2, "padding": 2}),
    ((3, 3), {"dilation": 3, "padding": 0, "stride": 3}),
    ((2, 4), {"padding": (0, 1), "stride": (2, 1), "dilation": (1, 2)}),
    ((7, 1), {"padding": (3, 0), "stride": (4, 5)}),
]


@pytest.mark.parametrize("channels", [1, 3, 33, 64])
@pytest.mark.parametrize(("kernel", "window"), WINDOWS)
def test_any_window(instruction_set, channels, kernel, window):
    tensors = random_tensors((2, channels, 9, 11), (32, channels, *kernel), min(4, channels), 16)
    check(tensors, 1, 16, **window)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("group_size", [1, 2, 8])
def test_filters_of_one_pixel_on_images_with_channels_first(instruction_set, images, group_size):
    """Of one image, torch's product then has its columns side by side once it is a matrix."""
    check(random_tensors((images, 8, 10, 7), (16, 8, 1, 1), 2, group_size), 8 // group_size, group_size, padding=0)


@pytest.mark.parametrize("copied", [1, 1 << 30], ids=["image by image", "all at once"])
@pytest.mark.parametrize(("kernel", "window"), WINDOWS)
def test_gradients_of_filters_by_copied_windows(monkeypatch, kernel, window, copied):
    """Half precision with maps of up to 64 positions; the larger ones here go through the convolution."""
    monkeypatch.setattr(native_conv2d, "_WINDOW_BYTES", copied)
    window = [
        pair({"stride": 1, "padding": 1, "dilation": 1, **window}[name]) for name in ("stride", "padding", "dilation")
    ]
    small = []
    for size in ((4, 4), (9, 11), (13, 17)):
        image, filters = torch.randn(3, 5, *size).bfloat16(), torch.randn(32, 5, *kernel).bfloat16()
        if any(size[i] + 2 * window[1][i] <= window[2][i] * (kernel[i] - 1) for i in (0, 1)):
            continue
        products = native_conv2d._Convolutions(image.contiguous(memory_format=torch.channels_last), *window)
        wide = filters.float().requires_grad_()
        y = torch.nn.functional.conv2d(image.float(), wide, None, *window)
        grad = torch.randn_like(y).bfloat16()
        y.backward(grad.float())
        rows = grad.permute(0, 2, 3, 1).reshape(-1, 32)
        none, actual = products.backward(rows, filters, need_x=False, need_filters=True)
        assert none is None or none.numel() == 0
        assert actual.shape == filters.shape
        assert error_ratio(actual, wide.grad) < LIMITS[torch.bfloat16]
        small.append(y[0, 0].numel() <= native_conv2d._SMALL_MAP)
    assert any(small)


@pytest.mark.parametrize("channels", [1, 17, 100, 400])
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (20, 20)])
def test_channels_and_maps_that_fill_no_tile(instruction_set, channels, size):
    for group_size in (9, 32, 100):
        shape = (3 * group_size, channels, 3, 3)
        check(random_tensors((2, channels, *size), shape, 4, group_size), 2, group_size)


@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("span", [2, 3, 9, 0])
@pytest.mark.parametrize("size", [(4, 9), (30, 31)])
def test_neighbours_and_images_that_share_a_selection(instruction_set, gate, span, size):
    check(random_tensors((2, 6, *size), (48, 6, 3, 3), 4, 8, gate=gate), 2, 8, span=span)


@pytest.mark.parametrize("only", range(7))
@pytest.mark.parametrize("gate", ["projection", "light"])
def test_each_gradient_alone(only, gate):
    tensors = random_tensors((2, 5, 6, 6), (48, 5, 3, 3), 4, 8, gate=gate)
    if list(tensors.values())[only] is not None:
        check(tensors, 2, 8, needs=[i == only for i in range(7)])


def test_no_bias(instruction_set):
    for gate in ("projection", "light"):
        check(random_tensors((2, 9, 5, 5), (64, 9, 3, 3), 5, 16, gate=gate, bias=False), 2, 16)


@pytest.mark.parametrize("group_size", [1, 16])
def test_dense_straight_through(group_size):
    check(random_tensors((2, 9, 5, 5), (64, 9, 3, 3), 5, group_size), 2, group_size, ste="dense")


@pytest.mark.parametrize("last", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("route", [midl.MIDConv2d.forward, torch.compile(midl.MIDConv2d.forward, backend="aot_eager")])
def test_gradients_have_the_layout_of_what_they_are_the_gradients_of(last, route):
    layer = midl.MIDConv2d(20, 64, 3, group_size=16).to(memory_format=last)
    x = torch.randn(4, 20, 9, 9).contiguous(memory_format=last).requires_grad_()
    route(layer, x).sum().backward()
    for t in (x, layer.weight, layer.light_down):
        assert t.grad.is_contiguous(memory_format=last)
        assert not t.grad.isnan().any()


def test_inputs_that_are_not_contiguous(instruction_set):
    tensors = random_tensors((4, 20, 9, 9), (64, 20, 3, 3), 6, 16)
    wide = torch.randn(4, 21, 20, 19)
    for x in (
        tensors["x"].contiguous(memory_format=torch.channels_last),
        wide[:, :20, ::2, ::2][..., :9, :9],
        wide[:, :20, :9, :9].transpose(2, 3),
        wide[:1, :20, :9, :9].expand(4, 20, 9, 9),
    ):
        check({**tensors, "x": x}, 2, 16)
    check({**tensors, "weight": tensors["weight"].contiguous(memory_format=torch.channels_last)}, 2, 16)
    y = torch.randn(4, 64, 1, 1).expand(4, 64, 9, 9)
    _, selected = reference.conv2d(*tensors.values(), None, [1, 1], [1, 1], [1, 1], 2, 16, 1, "sigmoid", "selected")
    rest = ([1, 1], [1, 1], [1, 1], 16, 1, "sigmoid", "selected", [True] * 7)
    actual = backward(y, selected, *tensors.values(), *rest)
    assert torch.equal(actual[1], backward(y.contiguous(), selected, *tensors.values(), *rest)[1])


def test_empty_batch():
    grads = check(random_tensors((0, 5, 6, 6), (32, 5, 3, 3), 2, 8), 2, 8)
    assert not grads[1].any()


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_the_same_bits_for_any_number_of_threads(threads):
    tensors = random_tensors((7, 40, 13, 13), (128, 40, 3, 3), 12, 16)
    window = ([1, 1], [1, 1], [1, 1])
    _, selected = reference.conv2d(*tensors.values(), None, *window, 4, 16, 1, "sigmoid", "selected")
    grad_y = torch.randn(7, 128, 13, 13)
    grads = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        grads.append(backward(grad_y, selected, *tensors.values(), *window, 16, 1, "sigmoid", "selected", [True] * 7))
    for one, other in zip(grads[1], grads[2], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(grads[0][1], grads[1][1])


@given(
    batch=st.integers(1, 3), channels=st.integers(1, 40), height=st.integers(1, 12), width=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 8), group_size=st.integers(1, 40), share=st.floats(0, 1), span=st.integers(0, 4),
    gate=st.sampled_from(["projection", "light"]), rule=st.sampled_from(["sigmoid", "hard"]), bias=st.booleans(),
    name=st.sampled_from(SETS),
)  # fmt: skip
def test_gradients_of_any_layer_equal_the_reference(
    batch, channels, height, width, kernel, stride, padding, dilation, groups, group_size, share, span, gate, rule,
    bias, name,
):  # fmt: skip
    axes = zip((height, width), kernel, padding, dilation, strict=True)
    size = [max(s, d * (k - 1) + 1 - 2 * p) for s, k, p, d in axes]
    native.use_instruction_set(name)
    shape = (groups * group_size, channels, *kernel)
    tensors = random_tensors((batch, channels, *size), shape, 3, group_size, gate=gate, bias=bias)
    check(
        tensors, max(1, round(share * groups)), group_size, stride=stride, padding=padding, dilation=dilation,
        span=span, rule=rule,
    )  # fmt: skip


def test_a_network_trains_through_the_native_kernels_as_through_the_reference():
    def losses(name):
        torch.manual_seed(1)
        layers = [midl.MIDConv2d(3, 32, 3, padding=1, active=0.5, group_size=8, rank=4) for _ in range(1)]
        layers += [midl.MIDConv2d(32, 32, 3, stride=2, active=0.5, group_size=8)]
        model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x, target, out = torch.randn(4, 3, 8, 8), torch.randn(4, 32, 3, 3), []
        with midl.kernels(name):
            for _ in range(8):
                loss = (model(x) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                out.append(loss.item())
        return torch.tensor(out)

    torch.testing.assert_close(losses("native"), losses("reference"), rtol=1e-4, atol=1e-5)
