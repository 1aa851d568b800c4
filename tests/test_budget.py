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
