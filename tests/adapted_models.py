"""Small dense models to adapt, and whether one is still what it was."""

import torch
from torch import nn


def mlp():
    return nn.Sequential(
        nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10)
    )  # fmt: skip


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.SiLU(),
        nn.Flatten(), nn.Linear(32 * 16, 5),
    )  # fmt: skip


def state_of(model):
    return {name: (id(module), module.training) for name, module in model.named_modules()}, {
        name: (id(t), t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())
    }


def assert_unchanged(model, state):
    modules, tensors = state_of(model)
    assert modules == state[0]
    assert {name: key for name, (key, _) in tensors.items()} == {name: key for name, (key, _) in state[1].items()}
    for name, (_, value) in tensors.items():
        assert torch.equal(value, state[1][name][1]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
