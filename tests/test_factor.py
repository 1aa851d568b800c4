"""factor_: layers that are their light path alone become two plain thin layers; nothing else changes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import midl
from midl.errors import CheckpointError, MIDLError
from midl.serving import factor_


def make(**choices: object) -> nn.Sequential:
    torch.manual_seed(0)
    conv = {"rank": 4, "group_size": 4, **choices}
    return nn.Sequential(
        midl.MIDConv2d(3, 8, 3, active=0, **conv), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        midl.MIDLinear(8 * 36, 32, active=0, rank=6), nn.ReLU(), midl.MIDLinear(32, 16, active=0.5, rank=3),
    ).eval()  # fmt: skip


def dense() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 32), nn.ReLU(),
        nn.Linear(32, 16),
    ).eval()  # fmt: skip


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


def test_the_same_output_and_gradients_from_fewer_plain_parameters(x):
    model = make()
    expected, down, before = model(x), model[4].light_down, sum(p.numel() for p in model.parameters())
    expected.square().sum().backward()
    gradient = down.grad.clone()
    unused = model[0].weight.numel() + model[4].weight.numel()
    gates = sum(p.numel() for i in (0, 4) for p in (model[i].gate_weight, model[i].gate_bias))

    assert factor_(model) == ["0", "4"]
    assert factor_(model) == []
    torch.testing.assert_close(model(x), expected)
    assert [type(m) for m in (*model[0], *model[4])] == [nn.Conv2d, nn.Conv2d, nn.Linear, nn.Linear]
    assert type(model[6]) is midl.MIDLinear
    assert sum(p.numel() for p in model.parameters()) == before - unused - gates
    assert model[4].down.weight is down
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(down.grad, gradient)


@pytest.mark.parametrize("padding", [0, 2, "same"])
@pytest.mark.parametrize(
    "choices", [{}, {"padding_mode": "reflect"}, {"dilation": 2}, {"bias": False}, {"kernel_size": (2, 4)}]
)
def test_convolutions_of_every_kind(padding, choices):
    torch.manual_seed(0)
    sizes = {"in_channels": 3, "out_channels": 8, "kernel_size": 3, "padding": padding} | choices
    model = nn.Sequential(midl.MIDConv2d(**sizes, active=0, rank=4, group_size=4)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 8)
    expected = model(x)
    assert factor_(model) == ["0"]
    torch.testing.assert_close(model(x), expected)
    assert (model[0].up.bias is None) == (choices.get("bias") is False)


def test_saved_and_loaded_into_every_kind_of_model(tmp_path, x):
    model = make()
    midl.save(model, tmp_path / "whole")
    factor_(model)
    midl.save(model, tmp_path / "factors")
    expected = model(x)
    assert (tmp_path / "factors").stat().st_size < 0.6 * (tmp_path / "whole").stat().st_size
    converted = dense()
    midl.convert_(converted, midl.MIDConfig(rank=2, group_size=4))
    other_rank = make(rank=2)
    factor_(other_rank)
    shared = copy.deepcopy(model)
    weight = shared[4].down.weight
    for target in (dense(), converted, make(), shared):
        midl.load_(target, tmp_path / "factors")
        assert torch.equal(target.eval()(x), expected)
        assert [type(target[i]).__name__ for i in (0, 4, 6)] == ["Factors", "Factors", "MIDLinear"]
        assert target[4].config == model[4].config
    assert shared[4].down.weight is weight
    # There is no full weight to go back to.
    before = {name: t.clone() for name, t in other_rank.state_dict().items()}
    for path in ("factors", "whole"):
        with pytest.raises(CheckpointError, match="the model has a Factors there; expected a"):
            midl.load_(other_rank, tmp_path / path)
    midl.save(dense(), tmp_path / "dense")
    with pytest.raises(CheckpointError, match="lacks"):
        midl.load_(other_rank, tmp_path / "dense")
    assert all(torch.equal(t, before[name]) for name, t in other_rank.state_dict().items())


def test_only_files_with_factors_need_the_newer_format(tmp_path):
    def version(path):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return json.loads(header["__metadata__"]["midl"])["version"]

    model = make()
    midl.save(model, tmp_path / "model")
    assert version(tmp_path / "model") == 1
    factor_(model)
    midl.save(model, tmp_path / "model")
    assert version(tmp_path / "model") == 2


def test_layers_that_would_lose_something_stay():
    model = make()
    model[0].register_forward_hook(lambda module, inputs, output: None)
    nn.utils.parametrizations.weight_norm(model[4], "light_down")
    assert factor_(model) == []


def test_a_shared_layer_stays_shared_and_frozen_stays_frozen():
    layer = midl.MIDLinear(8, 8, active=0, rank=2).requires_grad_(False)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert factor_(model) == ["a"]
    assert model["a"] is model["b"]
    assert not any(p.requires_grad for p in model.parameters())
    conv = nn.Sequential(midl.MIDConv2d(3, 8, 3, active=0, rank=2).requires_grad_(False))
    factor_(conv)
    assert not any(p.requires_grad for p in conv.parameters())


def test_an_adapted_model_counts_exports_and_converts_on(x):
    torch.manual_seed(0)
    model = dense()
    midl.adapt(model, torch.randn(64, 3, 8, 8), budget=2.0, group_size=4)
    expected, flops = model(x), midl.count_flops(model, x)
    names = factor_(model)
    assert names
    torch.testing.assert_close(model(x), expected)
    assert midl.count_flops(model, x) == flops
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (midl.MIDLinear(8, 8, active=0, rank=2), r"model is itself a MIDLinear .* nn\.Sequential\(model\)"),
        ([1], "model is a list, expected torch.nn.Module"),
    ],
)
def test_what_cannot_be_replaced_is_an_error(model, message):
    with pytest.raises(MIDLError, match=message):
        factor_(model)
