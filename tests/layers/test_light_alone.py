"""active=0: a layer that is its light path alone, wherever a layer can be used."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midl
from midl.adaptation import calibrate_threshold
from midl.budget import spread_active
from midl.errors import MIDLError
from midl.serving import pack_


def _linear(**choices: object) -> midl.MIDLinear:
    torch.manual_seed(0)
    return midl.MIDLinear(20, 48, **{"active": 0, "rank": 5, "group_size": 16, **choices}).eval()


def _wanted(layer: midl.MIDLinear, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.light_down.T @ layer.light_up.T + layer.bias


@pytest.mark.parametrize("shape", [(20,), (7, 20), (2, 3, 20), (0, 20)])
@pytest.mark.parametrize("span", [1, 2])
def test_linear_output_and_gradients_are_those_of_the_light_path(shape, span):
    layer, x = _linear(span=span), torch.randn(shape, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, _wanted(layer, x))
    y.square().sum().backward()
    assert x.grad is not None
    assert layer.light_down.grad is not None
    assert layer.bias.grad is not None
    assert layer.weight.grad is None
    assert layer.gate_weight.grad is None


@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("choices", [{}, {"padding_mode": "reflect"}, {"select": "image"}, {"dilation": 2}])
def test_conv2d_output_is_that_of_the_light_path(padding, choices):
    torch.manual_seed(0)
    layer = midl.MIDConv2d(3, 8, 3, padding=padding, active=0, rank=4, group_size=4, **choices).eval()
    dense = layer.to_conv2d()
    full = (layer.light_up @ layer.light_down.flatten(1)).view_as(dense.weight)
    dense.weight = nn.Parameter(full)
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), dense(x[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(4, 19), "input of shape .4, 19. has 19 features, expected 20"),
        (torch.randn(4, 20).double(), "input has dtype torch.float64, expected torch.float32"),
        (torch.zeros(4, 20, dtype=torch.int64), "input has dtype torch.int64"),
        (torch.tensor(1.0), "input is 0-dimensional"),
        ([1.0] * 20, "input is a list"),
    ],
)
def test_linear_refuses_what_it_refuses_with_a_full_path(x, message):
    for layer in (_linear(), _linear(active=0.5)):
        with pytest.raises(MIDLError, match=message):
            layer(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 4, 9, 9), "has 4 channels, expected 3"),
        (torch.randn(3, 9), "expected .B, 3, H, W. or"),
        (torch.randn(2, 3, 2, 9), "smaller than kernel_size"),
        (torch.randn(2, 3, 9, 9).double(), "input has dtype torch.float64"),
        (None, "input is a NoneType"),
    ],
)
def test_conv2d_refuses_what_it_refuses_with_a_full_path(x, message):
    for active in (0, 0.5):
        layer = midl.MIDConv2d(3, 8, 3, active=active, rank=4, group_size=4)
        with pytest.raises(MIDLError, match=message):
            layer(x)


@torch.no_grad()
def test_a_budget_comes_and_goes_between_prepared_calls():
    layer, x = _linear(active=0.5), torch.randn(4, 20)
    before = [layer(x) for _ in range(3)][-1]
    layer.active = 0
    for _ in range(3):
        torch.testing.assert_close(layer(x), _wanted(layer, x))
    layer.active = 0.5
    torch.testing.assert_close(layer(x), before)


def test_nobody_is_active_and_the_light_path_is_what_is_counted():
    layer = _linear()
    with midl.record_activity(layer) as activity:
        layer(torch.randn(10, 20))
    assert activity.fraction_active == 0
    assert activity[""].choices == 10
    assert midl.count_flops(layer, torch.randn(1, 20)) == 2 * 5 * (20 + 48)
    assert layer.num_selected == 0


def test_it_is_saved_loaded_copied_compiled_and_reverted(tmp_path):
    model, x = nn.Sequential(_linear(), nn.ReLU()), torch.randn(6, 20)
    midl.save(model, tmp_path / "model.safetensors")
    loaded = midl.load_(nn.Sequential(nn.Linear(20, 48), nn.ReLU()), tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded[0].active == 0
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    weight = model[0].weight
    midl.revert_(model)
    assert model[0].weight is weight


def test_budgets_of_whole_models_leave_it_as_it_is():
    layers = [_linear(active=0.25, group_size=2), _linear()]
    spread_active(layers, 0.5)
    assert [layer.active for layer in layers] == [0.5, 0]
    spread_active(layers[1:], 0.5)
    assert layers[1].active == 0
    model = nn.Sequential(midl.MIDLinear(20, 64, active=0.75, rank=2), midl.MIDLinear(64, 32, active=0, rank=4))
    midl.set_active(model, flops_ratio=2.0, example_inputs=torch.zeros(1, 20))
    assert 0 < model[0].active < 0.75
    assert model[1].active == 0
    assert midl.count_flops(model, torch.zeros(1, 20)) <= 20 * 64 + 64 * 32


def test_nothing_to_choose_has_no_threshold_and_is_not_packed():
    model = nn.Sequential(_linear(active=0.5), midl.MIDLinear(48, 32, active=0, rank=4, group_size=16)).eval()
    report = calibrate_threshold(model, torch.randn(64, 20))
    assert [layer.name for layer in report.layers] == ["0"]
    assert model[1].threshold is None
    assert pack_(model) == ["0"]
    with pytest.raises(MIDLError, match="has no MID-L layers that select"):
        calibrate_threshold(model[1], torch.randn(64, 48))


def test_what_cannot_be_without_a_full_path_says_so():
    for make in (
        lambda: midl.MIDFFN(8, 32, active=0, rank=2),
        lambda: setattr(midl.MIDFFN(8, 32, rank=2), "active", 0),
        lambda: midl.set_active(_linear(), 0),
    ):
        with pytest.raises(MIDLError, match=r"active=0, expected a number in \(0, 1\]"):
            make()
    with pytest.raises(MIDLError, match=r"threshold=0\.5 with active=0, expected None"):
        midl.MIDConfig(active=0, threshold=0.5)


@torch.no_grad()
def test_autocast_casts_as_it_does_for_dense_layers():
    layer, x = _linear(), torch.randn(4, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    down, up, bias = (t.bfloat16() for t in (layer.light_down, layer.light_up, layer.bias))
    torch.testing.assert_close(y, F.linear(F.linear(x.bfloat16(), down), up, bias))
