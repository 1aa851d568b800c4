"""The study's comparisons by hand, and one small run."""

import json
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

import midl
from midl.lab.adapt_study import __main__ as command
from midl.lab.adapt_study.low_rank import factorise
from midl.lab.adapt_study.oracle import select_by_oracle
from midl.lab.adapt_study.study import Settings, run_study


def test_the_oracle_selects_what_changes_the_next_layers_input_most():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    midl.convert_(model, midl.MIDConfig(rank=1, active=0.5, gate="light", interpolation="hard"), overrides={"2": None})
    layer, x = model[0], torch.randn(20, 6)
    light = x @ (layer.light_up @ layer.light_down).T + layer.bias
    full = x @ layer.weight.T + layer.bias
    change = (full.relu() - light.relu()).square() * model[2].weight.square().sum(0)
    expected = light.clone()
    for row in range(20):
        best = change[row].topk(2).indices
        expected[row, best] = full[row, best]
    gated = layer(x)
    with select_by_oracle(model):
        torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer(x), gated)


def test_factorising_meets_the_budget_of_the_whole_model():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x = torch.randn(100, 32)
    before = midl.count_flops(model, x)
    factorise(model, ["0", "2"], [x], 2.0)
    assert 2.0 <= before / midl.count_flops(model, x) < 2.1
    assert model(x).shape == (100, 10)


@pytest.mark.slow
def test_a_small_run_writes_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(
        command, "run_study", lambda data, settings, keep: run_study(data, Settings((1.5,), (8,), 2, 1), keep)
    )
    out = tmp_path / "study.json"
    monkeypatch.setattr(sys, "argv", ["adapt_study", "digits", "--epochs", "2", "--out", str(out)])
    command.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["flops_ratio"] >= 1.5
    assert all(10 < row[name] <= 100 for name in ("dense", "adapted", "oracle", "distilled", "plain", "low_rank"))
