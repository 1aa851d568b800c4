"""Measurements, on cases that can be counted by hand."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import midl
from midl.lab import measure
from midl.lab.bench.dense import can_compile
from midl.lab.data import Dataset
from midl.lab.data.dataset import Arrays
from midl.lab.measure import layer_flops, measure_accuracy, measure_latency, peak_bytes, saved_bytes
from midl.lab.models import MLP
from midl.ops.dispatch import unavailable_reason


def toy_dataset(labels: list[int]) -> Dataset:
    x = np.eye(4, dtype=np.float32)
    y = np.array(labels, dtype=np.int64)
    return Dataset.from_arrays("toy", 4, Arrays(x, y, x, y, np.zeros(4, np.float32), np.ones(4, np.float32)))


def test_accuracy_counts_the_rows_that_are_right() -> None:
    accuracy, activity = measure_accuracy(nn.Identity(), toy_dataset([0, 1, 2, 0]))
    assert accuracy == 75.0
    assert activity == {}


def test_activity_is_measured_and_the_mode_restored() -> None:
    model = nn.Sequential(midl.MIDLinear(4, 32, rank=2, group_size=2, active=0.3, noise=1.0), nn.Linear(32, 4)).train()
    accuracy, activity = measure_accuracy(model, toy_dataset([0, 1, 2, 3]))
    assert activity == {"0": 5 / 16}
    assert model.training
    assert accuracy == measure_accuracy(model, toy_dataset([0, 1, 2, 3]))[0]


def test_layer_flops_by_hand() -> None:
    model = MLP(8, (16, 32), 4).build()
    midl.convert_(model, midl.MIDConfig(rank=2, group_size=4, active=0.5), overrides={"head": None})
    flops = layer_flops(model, torch.zeros(3, 8), ["hidden1", "hidden2", "head"])
    # Per row: code r d, light path r n, gate r N, selected k G d; two per multiply-add.
    assert flops == {
        "hidden1": 3 * 2 * (2 * 8 + 2 * 16 + 2 * 4 + 2 * 4 * 8),
        "hidden2": 3 * 2 * (2 * 16 + 2 * 32 + 2 * 8 + 4 * 4 * 16),
        "head": 3 * 2 * 32 * 4,
    }
    assert midl.count_flops(model, torch.zeros(3, 8)) == sum(flops.values())


def test_saved_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    # Linear keeps its input; ReLU keeps its output, which is the next layer's input: one storage. No parameters.
    assert saved_bytes(model, torch.zeros(5, 8)) == 4 * 5 * (8 + 16)


def test_saved_bytes_of_a_mid_layer_are_input_and_selection() -> None:
    layer = midl.MIDLinear(8, 32, rank=2, group_size=4, active=0.5)
    assert saved_bytes(layer, torch.zeros(5, 8)) == 4 * 5 * 8 + 4 * 5 * 4  # float32 input, int32 index of 4 groups


def test_peak_bytes_by_hand() -> None:
    scalars = 2 * 4  # the loss and its gradient
    labels = torch.zeros(100, dtype=torch.long)
    held = 4 * 100 * 3 + 8 * 100 + 4 * (3 * 5 + 5)  # inputs, labels, parameters
    # Where the gradient of the logits is computed: the log-probabilities, their gradient and it; the logits are gone.
    assert peak_bytes(nn.Linear(3, 5), torch.zeros(100, 3), labels) == held + 3 * 4 * 100 * 5 + scalars
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    held = 4 * 5 * 8 + 8 * 5 + 4 * (8 * 16 + 16 + 16 * 4 + 4)
    # In ReLU's backward pass: its output, the gradients of both sides, and those of the last layer's parameters.
    at_relu = 3 * 4 * 5 * 16 + 4 * (16 * 4 + 4)
    assert peak_bytes(model, torch.zeros(5, 8), labels[:5].clone()) == held + at_relu + scalars
    assert all(p.grad is None for p in model.parameters())


def test_latency_tells_a_slow_model_from_a_quick_one() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.004)
            return x

    latency = measure_latency({"slow": Slow(), "quick": nn.Identity()}, torch.zeros(1), rounds=6)
    assert latency["quick"]["ratio_high"] < 1 == latency["slow"]["ratio"] == latency["slow"]["ratio_high"]
    assert latency["slow"]["median"] >= 0.004 > latency["quick"]["median"]
    assert latency["slow"]["low"] <= latency["slow"]["median"] <= latency["slow"]["high"]


@pytest.mark.parametrize(("seconds", "form"), [(0.0, "compiled"), (0.02, "eager")])
def test_each_model_is_timed_in_its_faster_form(monkeypatch: pytest.MonkeyPatch, seconds: float, form: str) -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.004)
            return x

    def compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], object]:
        return lambda x: time.sleep(seconds)

    monkeypatch.setattr(measure, "compile_frozen", compiled)
    latency = measure_latency({"one": Slow(), "other": Slow()}, torch.zeros(1), rounds=6, compiling=True)
    assert {times["form"] for times in latency.values()} == {form}
    assert (latency["one"]["median"] >= 0.004) == (form == "eager")
    assert "form" not in measure_latency({"one": Slow()}, torch.zeros(1), rounds=6)["one"]


@pytest.mark.skipif(unavailable_reason("native") is not None, reason="no native kernels")
def test_a_packed_model_is_a_form_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "compile_frozen", lambda model, x: lambda x: time.sleep(0.01))
    monkeypatch.setattr(measure, "_eager", lambda model, x: (lambda: time.sleep(0.005),) * 2)
    model = nn.Sequential(midl.MIDLinear(8, 32, rank=2, group_size=16)).eval()
    latency = measure_latency({"dense": nn.Linear(8, 8), "midl": model}, torch.zeros(3, 8), 6, compiling=True)
    assert {name: times["form"] for name, times in latency.items()} == {"dense": "eager", "midl": "packed"}
    assert type(model[0]) is midl.MIDLinear


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
def test_a_compiled_model_is_timed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), midl.MIDLinear(8, 32, rank=2)).eval()
    for times in measure_latency(
        {"dense": nn.Linear(8, 8), "midl": model}, torch.zeros(3, 8), 6, compiling=True
    ).values():
        assert times["median"] > 0
        assert times["form"] in ("eager", "packed", "compiled")
