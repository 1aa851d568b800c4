"""calibrate_threshold: the wanted average is realised, on every kind of layer, and errors change nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import midl
from midl import MIDFFN, MIDConv2d, MIDLinear
from midl.adaptation import calibrate_threshold
from midl.errors import MIDLError
from midl.layers.logits import layer_logits
from midl.ops.dispatch import kernels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def mlp(**choices):
    return nn.Sequential(
        MIDLinear(16, 128, rank=6, group_size=4, **choices), nn.ReLU(), MIDLinear(128, 128, rank=8, **choices),
        nn.ReLU(), nn.Linear(128, 4),
    )  # fmt: skip


@pytest.mark.parametrize("active", [0.1, 0.25, 0.45, 0.9, 1.0])
def test_the_wanted_average_is_realised(active):
    model, data = mlp(), torch.randn(2000, 16)
    report = calibrate_threshold(model, data, active)
    with midl.record_activity(model) as activity:
        model(data)
    for found, name in zip(report.layers, ("0", "2"), strict=True):
        layer = model.get_submodule(name)
        assert found.name == name
        assert found.active == layer.num_selected / layer.num_groups
        assert found.most == layer.num_slots / layer.num_groups == pytest.approx(min(1, 2 * active), abs=0.02)
        assert found.realised == pytest.approx(found.active, abs=0.004)
        assert found.threshold == layer.threshold
        assert activity[name].fraction_active == pytest.approx(found.realised, abs=1e-9)
        assert found.low == activity[name].quantile(0.05)
        assert found.high == activity[name].quantile(0.95)
        assert active == 1 or found.low < found.active < found.high
    assert report.realised == pytest.approx(activity.fraction_active)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (
            lambda **c: MIDConv2d(3, 64, 3, padding="same", padding_mode="reflect", rank=4, group_size=2, **c),
            (64, 3, 6, 7),
        ),
        (lambda **c: MIDConv2d(3, 64, 3, rank=4, group_size=2, span=3, **c), (64, 3, 6, 7)),
        (lambda **c: MIDConv2d(3, 64, 3, rank=4, group_size=2, select="image", **c), (500, 3, 6, 7)),
        (lambda **c: MIDLinear(8, 64, rank=4, gate="light", span=3, group_size=2, **c), (200, 7, 8)),
        (lambda **c: MIDLinear(8, 64, rank=4, noise=3.0, **c), (50, 7, 8)),
        (lambda **c: MIDFFN(8, 64, 8, rank=4, group_size=2, **c), (50, 7, 8)),
    ],
    ids=["conv2d", "span", "image", "sequence", "noise", "ffn"],
)
def test_every_kind_of_layer_realises_its_own_average(layer, shape):
    model, data = nn.Sequential(layer(active=0.25)), torch.randn(shape)
    found = calibrate_threshold(model, data, samples=1000).layers[0]
    assert found.realised == pytest.approx(0.25, abs=0.003)
    assert found.low < found.high <= found.most == 0.5
    assert model.training


@pytest.mark.parametrize(
    "build", [lambda: MIDConv2d(3, 16, 3, rank=4, select="image"), lambda: MIDFFN(5, 16, 4, rank=2)]
)
def test_the_logits_are_those_the_layer_selects_by(build):
    layer = build()
    x = torch.randn((6, 3, 5, 5) if isinstance(layer, MIDConv2d) else (6, 5))
    with kernels("reference"), midl.record_activity(layer) as activity:
        layer(x)
    chosen = layer_logits(layer, x).topk(layer.num_selected).indices
    assert activity[""].counts.tolist() == torch.bincount(chosen.flatten(), minlength=16).tolist()


def test_a_second_calibration_starts_from_the_budget_and_not_from_the_most():
    model, data = mlp(active=0.2), torch.randn(600, 16)
    first = calibrate_threshold(model, data)
    assert calibrate_threshold(model, data) == first
    assert calibrate_threshold(model, data, most=1.0).layers[0].most == 1.0


def test_back_to_a_fixed_number_the_model_is_as_it_was():
    model, data = mlp(active=0.2), torch.randn(300, 16)
    before = [model[0].config, model[2].config]
    expected = model(data)
    calibrate_threshold(model, data)
    assert not torch.equal(model(data), expected)
    model[0].threshold = model[2].threshold = None
    assert [model[0].config, model[2].config] == before
    assert torch.equal(model(data), expected)
    calibrate_threshold(model, data)
    midl.set_active(model, 0.2)
    assert [model[0].config, model[2].config] == before


def test_infinite_and_equal_logits_give_finite_thresholds():
    for fill in (0.0, -math.inf, math.inf, math.nan):
        model = nn.Sequential(MIDLinear(8, 64, rank=4, active=0.3))
        with torch.no_grad():
            model[0].gate_weight.zero_()
            model[0].gate_bias.fill_(fill)
        found = calibrate_threshold(model, torch.randn(100, 8)).layers[0]
        assert math.isfinite(found.threshold)
        assert found.realised in (1 / 64, found.most)


def test_layers_without_a_choice_or_without_data_stay_fixed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.single = MIDLinear(8, 64, rank=2), MIDLinear(64, 16, rank=2, group_size=16, active=0.4)
            self.unused = MIDLinear(8, 64, rank=2)

        def forward(self, x):
            return self.single(self.used(x))

    model = Model()
    report = calibrate_threshold(model, torch.randn(100, 8))
    used, single, unused = report.layers
    assert (used.threshold is not None, single.threshold, unused.threshold) == (True, None, None)
    assert single.realised == 1.0
    assert math.isnan(unused.realised)
    text = str(report)
    assert "unused  none" in text
    assert "whole model:" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.0}, r"active=0.0, expected a number in \(0, 1\]"),
        ({"active": 0.5, "most": 0.4}, r"most=0.4, expected a number from active=0.5 to 1"),
        ({"most": 1.5}, r"most=1.5, expected a number from active=0.45 to 1"),
        ({"most": "all"}, r"most='all', expected"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(MIDLError, match=f"calibrate_threshold: {message}"):
        calibrate_threshold(mlp(), torch.randn(10, 16), **options)


def test_what_cannot_be_calibrated_is_left_as_it_was():
    with pytest.raises(MIDLError, match="the Linear has no MID-L layers"):
        calibrate_threshold(nn.Linear(2, 3), torch.randn(4, 2))
    model = mlp(threshold=0.5, most=0.7)
    before = copy.deepcopy(model)
    with pytest.raises(MIDLError, match="does not take the data"):
        calibrate_threshold(model, [torch.randn(4, 16), torch.randn(4, 15)], 0.3)
    assert [model[0].config, model[2].config] == [before[0].config, before[2].config]
    assert not model[0]._forward_pre_hooks
    assert not midl.layers.base.observers


def test_adapt_ends_with_thresholds_that_spend_the_budget_on_average():
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    data = torch.randn(800, 16) * torch.rand(800, 1)
    fixed = midl.adapt(copy.deepcopy(model), data, 1.3)
    report = midl.adapt(model, data, 1.3, threshold=True)
    assert fixed.thresholds is None
    assert report.flops_ratio >= 1.3
    assert report.thresholds.layers
    for found in report.thresholds.layers:
        assert found.realised == pytest.approx(found.active, abs=0.02)
        assert found.low < found.high
        assert model.get_submodule(found.name).threshold == found.threshold
    assert report.error != report.error_initialised
    assert str(report.thresholds) in str(report)
