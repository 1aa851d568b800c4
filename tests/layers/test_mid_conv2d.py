"""MIDConv2d: nn.Conv2d's geometry, the formula at the layer, and pixels that harm only what sees them."""

from __future__ import annotations

import pytest
import torch
from helpers import Options, assert_close_to_loop, plain_conv2d
from torch import nn

import midl
from midl import MIDConv2d
from midl.layers.base import observers

GEOMETRY = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": (0, 2)},
    {"kernel_size": (2, 5), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (3, 2)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "stride": 2},
    {"kernel_size": (4, 2), "padding": "same", "padding_mode": "replicate"},
]
SELECTS = [{}, {"span": 2}, {"select": "image"}]


@pytest.fixture(autouse=True, params=["reference", "auto"])
def _kernels(request):
    midl.kernels(request.param)


@pytest.fixture
def selections():
    seen = []

    def observe(layer, selected):
        seen.append(selected)

    observers.append(observe)
    yield seen
    observers.remove(observe)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_with_all_groups_active_and_hard_it_is_the_dense_layer(geometry, bias):
    dense = nn.Conv2d(3, 8, bias=bias, dtype=torch.float64, **geometry)
    layer = MIDConv2d.from_conv2d(dense, active=1.0, interpolation="hard", rank=2, ste="dense")
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), dense(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), dense(x[0]), rtol=1e-12, atol=1e-12)
    grad_y = torch.randn_like(y)
    (ours,), (theirs,) = (torch.autograd.grad(out, dense.weight, grad_y) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("select", SELECTS, ids=str)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize(
    "geometry", [{"kernel_size": (2, 4), "padding": "same"}, {"kernel_size": 3, "stride": 2, "padding": 1}], ids=str
)
def test_layer_equals_the_loop(selections, select, gate, geometry):
    layer = MIDConv2d(2, 8, rank=3, group_size=2, gate=gate, active=0.5, dtype=torch.float64, **geometry, **select)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    same = geometry.get("padding") == "same"
    padded = nn.functional.pad(x.detach(), (1, 2, 0, 1)) if same else x.detach()
    names = ("weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias")
    tensors = {"x": padded, **dict.fromkeys(names)}
    tensors.update({name: p.detach() for name, p in layer.named_parameters()})
    c = layer.config
    span = 0 if c.select == "image" else c.span
    options = Options(layer.num_selected, c.group_size, c.interpolation, c.ste)
    loop = plain_conv2d(tensors, options, layer.stride, (0, 0) if same else (1, 1), (1, 1), span, None, grad_y)
    if same:  # The gradient of the padding is nobody's.
        loop["x"] = loop["x"][:, :, :-1, 1:-2]
    grads = {name: p.grad for name, p in layer.named_parameters()}
    assert_close_to_loop({"y": y.detach(), "selected": selections[-1], "x": x.grad, **grads}, loop)


@pytest.mark.parametrize("select", SELECTS, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 6, 7), (1, 3, 6, 7), (3, 6, 7)])
def test_any_batch_also_empty_and_a_single_image(select, shape):
    layer = MIDConv2d(3, 8, 3, padding=1, rank=2, **select)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-3], 8, 6, 7)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("select", SELECTS, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_the_layout_of_the_input_changes_nothing(select, layout):
    layer = MIDConv2d(3, 8, 3, padding=1, rank=2, group_size=2, **select)
    x = {
        "channels_last": torch.randn(2, 3, 6, 7).to(memory_format=torch.channels_last),
        "transposed": torch.randn(2, 3, 7, 6).mT,
        "strided": torch.randn(2, 6, 6, 14)[:, ::2, :, ::2],
        "expanded": torch.randn(2, 1, 6, 1).expand(2, 3, 6, 7),
    }[layout]
    results = []
    for value in (x, x.contiguous()):
        value = value.detach().requires_grad_()
        y = layer(value)
        results.append((y, *torch.autograd.grad(y.square().sum(), [value, *layer.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("select", SELECTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_is_train_without_noise_bit_for_bit(select, dtype):
    layer = MIDConv2d(3, 8, 3, padding=1, rank=2, noise=2.0, dtype=dtype, **select)
    quiet = MIDConv2d(3, 8, 3, padding=1, rank=2, dtype=dtype, **select)
    quiet.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 7, dtype=dtype)
    expected = quiet(x)
    assert torch.equal(layer.eval()(x), expected)
    assert not torch.equal(layer.train()(x), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_pixel_harms_only_the_outputs_that_see_it(value):
    layer, x = MIDConv2d(3, 8, 3, padding=1, rank=2), torch.randn(2, 3, 9, 9)
    clean = layer(x)
    x[1, 2, 4, 5] = value
    y = layer(x)
    seen = torch.zeros(2, 9, 9, dtype=torch.bool)
    seen[1, 3:6, 4:7] = True
    harmed = ~y.isfinite().all(1)
    assert torch.equal(harmed, seen)
    clear = ~seen.unsqueeze(1).expand_as(y)
    torch.testing.assert_close(y[clear], clean[clear], rtol=1e-5, atol=1e-6)


def test_a_bad_image_harms_only_itself_when_an_image_is_one_block():
    layer, x = MIDConv2d(3, 8, 3, padding=1, rank=2, select="image"), torch.randn(3, 3, 5, 5)
    clean = layer(x)
    x[1, 0, 0, 0] = float("nan")
    y = layer(x)
    torch.testing.assert_close(y[[0, 2]], clean[[0, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("select", "shape"), [({}, (2, 6, 7)), ({"span": 3}, (2, 6, 3)), ({"select": "image"}, (2, 1))]
)
def test_exactly_k_groups_per_block(selections, select, shape):
    layer = MIDConv2d(3, 8, 3, padding=1, rank=2, group_size=2, active=0.5, **select)
    nn.init.constant_(layer.gate_bias, float("-inf"))
    layer(torch.randn(2, 3, 6, 7))
    assert selections[-1].shape == (*shape, 2)
    assert selections[-1].flatten(0, -2).unique(dim=0).tolist() == [[0, 1]]
