"""record_activity: counts that can be checked by hand."""

import math

import pytest
import torch
from torch import nn

import midl
from midl.errors import MIDLError


def layer_that_selects(groups: list[int], num_groups: int = 4, group_size: int = 2) -> midl.MIDLinear:
    """Return a layer whose gate bias makes every input select ``groups``."""
    layer = midl.MIDLinear(
        3, num_groups * group_size, rank=1, group_size=group_size, active=len(groups) / num_groups, gate="projection"
    )
    with torch.no_grad():
        layer.gate_weight.zero_()
        layer.gate_bias.zero_()
        layer.gate_bias[groups] = 1.0
    return layer


def test_counts_usage_dead_and_always_on_groups():
    layer = layer_that_selects([1, 3])
    with midl.record_activity(layer) as activity:
        layer(torch.randn(5, 3))
        layer(torch.randn(2, 3))
    record = activity[""]
    assert record.choices == 7
    assert record.counts.tolist() == [0, 7, 0, 7]
    assert record.usage.tolist() == [0, 1, 0, 1]
    assert record.fraction_active == activity.fraction_active == 0.5
    assert record.dead.tolist() == [0, 2]
    assert record.always_on.tolist() == [1, 3]
    assert record.entropy == pytest.approx(1.0)
    assert "dead=2" in repr(activity)


def test_entropy_of_uniform_usage_is_log2_of_the_groups():
    layer = midl.MIDLinear(4, 4, rank=1, active=0.25)
    with torch.no_grad():
        layer.gate_bias.zero_()
    with midl.record_activity(layer) as activity:
        for chosen in range(4):
            with torch.no_grad():
                layer.gate_weight.zero_()
                layer.gate_bias.zero_()
                layer.gate_bias[chosen] = 1
            layer(torch.randn(3, 4))
    assert activity[""].entropy == pytest.approx(2.0)


def test_overall_fraction_weighs_layers_by_their_neurons():
    model = nn.Sequential(
        layer_that_selects([0], 4, 2), nn.ReLU(), nn.Linear(8, 3), layer_that_selects([0, 1, 2], 4, 8)
    )
    with midl.record_activity(model) as activity:
        model(torch.randn(6, 3))
    assert list(activity) == ["0", "3"]
    assert activity.fraction_active == pytest.approx((2 + 24) / (8 + 32))


def test_recording_ends_with_the_block_and_nests():
    layer = layer_that_selects([0])
    with midl.record_activity(layer) as outer:
        with midl.record_activity(layer) as inner:
            layer(torch.randn(1, 3))
        layer(torch.randn(1, 3))
    layer(torch.randn(1, 3))
    assert (inner[""].choices, outer[""].choices) == (1, 2)


def test_recording_ends_when_the_block_fails():
    layer = layer_that_selects([0])
    with pytest.raises(RuntimeError, match="boom"), midl.record_activity(layer) as activity:
        raise RuntimeError("boom")
    layer(torch.randn(1, 3))
    assert activity[""].choices == 0


def test_convolution_choices_are_positions_images_or_spans():
    x = torch.randn(2, 3, 4, 6)
    for choices, options in ((2 * 4 * 6, {}), (2, {"select": "image"}), (2 * 4 * 2, {"span": 4})):
        layer = midl.MIDConv2d(3, 8, 3, padding=1, rank=1, active=0.5, **options)
        with midl.record_activity(layer) as activity:
            layer(x)
        assert activity[""].choices == choices
        assert activity[""].fraction_active == 0.5


def test_before_the_first_input_fractions_are_nan():
    with midl.record_activity(layer_that_selects([0])) as activity:
        pass
    assert math.isnan(activity.fraction_active)
    assert math.isnan(activity[""].fraction_active)


def test_a_model_without_mid_layers_is_an_error():
    with pytest.raises(MIDLError, match="record_activity: the Linear has no MID-L layers"):
        midl.record_activity(nn.Linear(3, 3))
