"""set_active on whole models."""

import pytest
import torch
from torch import nn

import midl
from midl.errors import MIDLError


def test_changes_every_layer_and_keeps_the_weights():
    model = nn.Sequential(midl.MIDLinear(16, 32, rank=2), nn.ReLU(), midl.MIDLinear(32, 64, rank=2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    midl.set_active(model, 0.25)
    with midl.record_activity(model) as activity:
        model(torch.randn(3, 16))
    assert [a.fraction_active for a in activity.values()] == [0.25, 0.25]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("active", [0, -0.1, 1.01, float("nan"), "0.5", True, None])
def test_a_value_outside_its_range_is_an_error_and_changes_nothing(active):
    model = nn.Sequential(midl.MIDLinear(16, 32, rank=2))
    with pytest.raises(MIDLError, match=r"set_active: active=.*expected a number in \(0, 1\]"):
        midl.set_active(model, active)
    assert model[0].active == 0.45


def test_a_model_without_mid_layers_is_an_error():
    with pytest.raises(MIDLError, match="set_active: the Linear has no MID-L layers"):
        midl.set_active(nn.Linear(2, 2), 0.5)


def two_layers(**choices):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    dense = midl.count_flops(model, torch.zeros(1, 32))
    midl.convert_(model, midl.MIDConfig(rank=4, **choices), overrides={"4": None})
    return model, dense


@pytest.mark.parametrize("ratio", [1.1, 1.4, 2.0, 2.6])
@pytest.mark.parametrize("group_size", [1, 8])
def test_a_flops_ratio_is_met_and_one_more_group_would_break_it(ratio, group_size):
    model, dense = two_layers(group_size=group_size)
    x = torch.randn(3, 32)
    midl.set_active(model, flops_ratio=ratio, example_inputs=x)
    assert 3 * dense / midl.count_flops(model, x) >= ratio
    for layer in (model[0], model[2]):  # as many groups in both: they cross a step together
        layer.active = (layer.num_selected + 1) / layer.num_groups
    assert 3 * dense / midl.count_flops(model, x) < ratio


def test_a_flops_ratio_keeps_the_layers_order_and_can_be_undone():
    model, _ = two_layers()
    model[0].active, model[2].active = 0.25, 0.75
    x = torch.randn(1, 32)
    own = 2 * (32 * 64 + 64 * 64 + 64 * 10) / midl.count_flops(model, x)
    midl.set_active(model, flops_ratio=2 * own, example_inputs=x)
    assert model[0].active < 0.25
    assert model[0].active < model[2].active < 0.75
    midl.set_active(model, flops_ratio=own * 0.999, example_inputs=x)
    assert model[0].active == pytest.approx(0.25, abs=1 / 32)
    assert model[2].active == pytest.approx(0.75, abs=1 / 32)


def test_a_flops_ratio_counts_convolutions_and_layers_called_twice():
    torch.manual_seed(0)
    shared = nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(16 * 64, 10))
    x = torch.randn(2, 16, 8, 8)
    dense = midl.count_flops(model, x)
    midl.convert_(model, midl.MIDConfig(rank=4), filter_fn=lambda m, name: name != "4")
    midl.set_active(model, flops_ratio=1.8, example_inputs=x)
    assert 1.8 <= dense / midl.count_flops(model, x) < 2.0


def test_a_ratio_that_cannot_be_met_names_the_nearest_and_changes_nothing():
    model, _ = two_layers(active=0.4)
    with pytest.raises(MIDLError, match=r"flops_ratio=50 cannot be met, expected at most (\d+\.\d+)") as caught:
        midl.set_active(model, flops_ratio=50, example_inputs=torch.zeros(1, 32))
    assert [m.active for m in (model[0], model[2])] == [0.4, 0.4]
    nearest = float(str(caught.value).split("at most ")[1].split()[0])
    midl.set_active(model, flops_ratio=nearest - 0.001, example_inputs=torch.zeros(1, 32))
    assert model[0].num_selected == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"active": 0.3, "flops_ratio": 2.0}, "expected one of them"),
        ({"flops_ratio": 0}, "flops_ratio=0, expected a number above 0"),
        ({"flops_ratio": "2"}, "flops_ratio='2', expected a number above 0"),
        ({"flops_ratio": 2.0}, "without example_inputs"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(arguments, message):
    model, _ = two_layers()
    with pytest.raises(MIDLError, match=message):
        midl.set_active(model, **arguments)
