"""Training under autocast: float32 weights, GradScaler, stable selections and the accuracy of float32."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midl
from midl.lab.data import load
from midl.lab.gpu.mixed_precision import Autocast, compare_precisions


def small_network() -> nn.Sequential:
    return nn.Sequential(
        midl.MIDLinear(16, 64, active=0.5, rank=4, group_size=16), nn.ReLU(), midl.MIDLinear(64, 32, rank=4), nn.ReLU(),
        nn.Linear(32, 4),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_scaled_step_moves_float32_weights(dtype: torch.dtype) -> None:
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = [p.detach().clone() for p in model.parameters()]
    loss = F.cross_entropy(Autocast(model, dtype)(torch.randn(32, 16)), torch.randint(4, (32,)))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**12
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_scaler_skips_a_step_that_overflows() -> None:
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = [p.detach().clone() for p in model.parameters()]
    loss = F.cross_entropy(Autocast(model, torch.float16)(torch.randn(32, 16)), torch.randint(4, (32,)))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**30
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_logits_in_float32_keep_close_groups_apart() -> None:
    """Two groups whose logits differ by less than bfloat16 resolves: the larger is still the one selected."""
    layer = midl.MIDLinear(4, 32, active=0.5, rank=1, group_size=16, bias=False)
    with torch.no_grad():
        layer.light_down.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
        layer.gate_weight.copy_(torch.tensor([[1.0], [1.0078125]]))  # neighbours in bfloat16
        layer.gate_bias.copy_(torch.tensor([0.0078125, 0.0]))
    # The code, 1 + 2^-8, is no bfloat16 number; rounded to 1 or 1.0078125, the logits would tie or swap.
    x = torch.tensor([[1.0, 2.0**-8, 0.0, 0.0]])
    with midl.record_activity(layer) as activity, torch.autocast("cpu", torch.bfloat16):
        layer(x)
    logits = (1 + 2.0**-8) * torch.tensor([1.0, 1.0078125]) + torch.tensor([0.0078125, 0.0])
    assert logits.argmax() == 1
    assert activity[""].usage.tolist() == [0.0, 1.0]


def test_training_under_autocast_learns_as_well_on_digits() -> None:
    full, half = compare_precisions(load("digits"), hidden=(64,), epochs=40, seed=0)
    assert full > 90
    assert half > full - 2


@pytest.mark.slow
@pytest.mark.skipif("MIDL_DATA" not in os.environ, reason="MIDL_DATA names no local mirror")
def test_training_under_autocast_reaches_float32_on_mnist() -> None:
    full, half = compare_precisions(load("mnist"), hidden=(256, 256), epochs=4, seed=0)
    assert half >= full - 0.2
