"""Modules that a model also keeps in lists and dicts, and models that torch.compile wrapped."""

import pytest
import torch
from torch import nn

import midl
from midl.errors import MIDLError


class InOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.order = [self.first]
        self.by_name = {"second": self.second}

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return self.by_name["second"](x)


def test_lists_and_dicts_follow_the_conversion_and_back():
    model, x = InOrder(), torch.randn(4, 64)
    expected = model(x)
    midl.convert_(model, midl.MIDConfig(active=0.25, group_size=16))
    assert model.order[0] is model.first
    assert model.by_name["second"] is model.second
    assert not torch.allclose(model(x), expected)
    midl.revert_(model)
    assert torch.equal(model(x), expected)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def test_compiled_models_are_adapted_saved_and_loaded_as_what_they_wrap(tmp_path):
    x = torch.randn(64, 32)
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    report = midl.adapt(compiled, x, 1.2)
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    midl.save(compiled, tmp_path / "model.safetensors")
    loaded = torch.compile(mlp(), backend="eager")
    assert midl.load_(loaded, tmp_path / "model.safetensors") is loaded
    assert torch.allclose(loaded(x), model(x), atol=1e-6)


def test_autocast_does_not_hand_adapt_old_weights():
    x = torch.randn(256, 32)
    plain, cast = mlp(), mlp()
    midl.adapt(plain, x, 1.2)
    with torch.autocast("cpu", torch.bfloat16):
        midl.adapt(cast, x, 1.2)
    expected = mlp()(x)
    errors = [(model(x) - expected).square().mean() / expected.var() for model in (plain, cast)]
    assert errors[1] < 1.2 * errors[0] + 0.01


def test_adapt_leaves_no_gradients_and_gives_them_back_on_an_error():
    model, x = mlp(), torch.randn(64, 32)
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(MIDLError, match="budget=50"):
        midl.adapt(model, x, 50)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    midl.adapt(model, [x], 1.2, epochs=1)
    assert all(p.grad is None for p in model.parameters())


def test_adapt_gives_the_reason_of_every_layer_that_multiplies():
    weight_norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), weight_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 64))
    report = midl.adapt(model, torch.randn(64, 32), 1.1)
    assert "parametrized" in {layer.name: layer for layer in report.layers}["2"].detail
