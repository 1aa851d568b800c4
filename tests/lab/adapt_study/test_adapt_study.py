"""The study's comparisons by hand, and small runs that are stopped and go on."""

import dataclasses
import json
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

import midl
from midl.errors import MIDLError
from midl.lab.adapt_study import __main__ as command
from midl.lab.adapt_study import ablation, elastic, latency, study, threshold
from midl.lab.adapt_study.low_rank import factorise
from midl.lab.adapt_study.oracle import select_by_oracle
from midl.lab.adapt_study.render import render
from midl.lab.adapt_study.study import Settings, run_study
from midl.lab.adapt_study.subject import subject_for
from midl.lab.data import load
from midl.lab.measure import measure_accuracy


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
    with select_by_oracle(model, x):
        torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer(x), gated)
    assert not layer.training or layer.config.noise == 0


def test_the_oracle_sees_through_normalisation_in_a_convolutional_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)
    ).eval()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 3)
        model[1].running_mean.normal_()
    midl.convert_(model, midl.MIDConfig(rank=2, active=0.5, group_size=2), overrides={"4": None})
    layer, x = model[0], torch.randn(5, 3, 6, 6)
    code = torch.nn.functional.conv2d(x, layer.light_down, padding=1)
    light = torch.einsum("brhw,nr->bnhw", code, layer.light_up)
    full = torch.nn.functional.conv2d(x, layer.weight, padding=1)
    change = (model[1](full).relu() - model[1](light).relu()).square()
    change = (change * model[4].weight.square().sum(0)).unflatten(1, (4, 2)).sum(2)
    chosen = torch.zeros_like(change).scatter_(1, change.topk(2, 1).indices, 1.0)
    logits = torch.einsum("brhw,gr->bghw", code, layer.gate_weight) + layer.gate_bias[:, None, None]
    weight = (chosen * logits.sigmoid()).repeat_interleave(2, 1)
    with select_by_oracle(model, x):
        torch.testing.assert_close(layer(x), light + weight * (full - light))


@pytest.mark.parametrize(
    ("model", "names", "shape"),
    [
        (
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
            ["0", "2"],
            (32,),
        ),
        (
            nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, bias=False)),
            ["0", "2"],
            (16, 12, 12),
        ),
    ],
)
def test_factorising_meets_the_budget_of_the_whole_model(model, names, shape):
    x = torch.randn(100, *shape)
    before, expected = midl.count_flops(model, x), model(x).shape
    factorise(model, names, [x], 2.0)
    assert 2.0 <= before / midl.count_flops(model, x) < 2.2
    assert model(x).shape == expected


def test_a_budget_below_rank_one_is_an_error():
    with pytest.raises(MIDLError, match=r"budget=30 cannot be met, expected at most \d"):
        factorise(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)), ["0"], [torch.randn(50, 32)], 30.0)


def test_annealing_ends_at_the_configured_fraction():
    model = nn.Sequential(midl.MIDLinear(16, 32, rank=2, active=0.25))
    step = ablation._annealing(model)
    seen = [model[0].active]
    for done in range(1, 9):
        step(done, 8)
        seen.append(model[0].active)
    assert seen == pytest.approx([1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25, 0.25, 0.25, 0.25])


def test_what_each_input_takes_adds_up_to_the_recorded_activity():
    model = nn.Sequential(
        midl.MIDConv2d(3, 16, 3, rank=2, group_size=2, threshold=0.1), nn.Flatten(),
        midl.MIDLinear(64, 32, rank=2, threshold=0.2, most=0.5),
    ).eval()  # fmt: skip
    x = torch.randn(50, 3, 4, 4)
    with midl.record_activity(model) as activity:
        model(x)
    shares = threshold._shares(model, x)
    assert len(shares.unique()) > 5
    assert float(shares.mean()) == pytest.approx(activity.fraction_active)
    assert float(threshold._shares(model, x[7:8])) == pytest.approx(float(shares[7]))


def test_a_restart_goes_on_from_the_first_round(tmp_path):
    digits = subject_for(load("digits"))
    once = dataclasses.replace(digits, epochs=1)
    first = once.train_dense(0, tmp_path / "first")
    both = dataclasses.replace(once, further=1).train_dense(0, tmp_path / "both")
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), both.parameters(), strict=True))
    assert measure_accuracy(both, digits.dataset)[0] > measure_accuracy(first, digits.dataset)[0]
    assert [file.name for file in (tmp_path / "both").iterdir()] == ["digits-dense-seed0.safetensors"]


@pytest.mark.parametrize("model", ["cnn", "vgg", "gpt"])
def test_a_model_that_does_not_fit_the_data_is_an_error(model):
    with pytest.raises(MIDLError, match=f"model='{model}', expected 'mlp', None or, .* 'cnn' or 'vgg'"):
        subject_for(load("digits"), model)


def test_a_study_stopped_inside_a_row_keeps_what_it_has(tmp_path, monkeypatch):
    digits = dataclasses.replace(subject_for(load("digits")), epochs=1)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study._Study, "_gated", stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(digits, Settings((1.5,), (16,), 1), tmp_path)
    (begun,) = json.loads((tmp_path / "digits-seed0.json").read_text())
    assert {"distilled", "low_rank_distilled", "uniform"} <= begun.keys()
    assert not {"gated", "latency"} & begun.keys()
    with pytest.raises(MIDLError, match="has no finished rows"):
        render(tmp_path)
    for done in ("_adapted", "_distil", "_low_rank", "_uniform"):
        monkeypatch.setattr(study._Study, done, stop)
    (row,) = run_study(digits, Settings((1.5,), (16,), 1), tmp_path)
    assert row.items() >= begun.items()
    assert "latency" in row


@pytest.mark.slow
def test_every_study_runs_goes_on_and_is_rendered(tmp_path, monkeypatch, capsys):
    digits = dataclasses.replace(subject_for(load("digits")), epochs=2)
    first = run_study(digits, Settings((1.5,), (8,), 1), tmp_path)
    both = run_study(digits, Settings((1.5,), (8, 16), 1), tmp_path)
    assert both[0] == first[0]
    assert len(both) == 2
    assert all(row["flops_ratio"] >= 1.5 for row in both)
    names = ("dense", "plain", "calibrated", "oracle", "distilled", "uniform", "low_rank", "low_rank_distilled",
             "dense_distilled")  # fmt: skip
    assert all(10 < row[name] <= 100 for row in both for name in names)
    monkeypatch.setattr(elastic, "BUDGETS", (0.5, 1.0))
    assert len(elastic.run_elastic(digits, 0, tmp_path, distil_epochs=1)) == 2
    (row,) = threshold.run_threshold(digits, 0, tmp_path, budgets=(1.5,), distil_epochs=1)
    assert row["low"] < row["realised"] < row["high"]
    assert row["realised"] == pytest.approx(row["active"], abs=0.05)
    assert threshold.run_threshold(digits, 0, tmp_path, budgets=(1.5,), distil_epochs=1) == [row]
    few = {name: ablation.VARIANTS[name] for name in ("base", "annealed active", "random start", "distilled")}
    monkeypatch.setattr(ablation, "VARIANTS", few)
    for mode in ("scratch", "converted"):
        assert len(ablation.run_ablation(digits, 0, tmp_path, mode=mode, epochs=1)) == 4
    monkeypatch.setattr(sys, "argv", ["adapt_study", "render", "--out", str(tmp_path)])
    command.main()
    text = capsys.readouterr().out
    assert text.strip() == render(tmp_path).strip()
    assert "| 1.5x | 8 | 1 |" in text
    assert "a fixed number of groups against a threshold" in text
    assert "ablation, converted" in text


def test_budgets_of_time_are_rendered_beside_those_of_flops_and_found_again(tmp_path, monkeypatch, set_clock):
    set_clock()
    monkeypatch.setattr(latency, "_TURNS", 2)
    digits = dataclasses.replace(subject_for(load("digits")), epochs=1)
    choices = {"budgets": (1.4, 90.0), "group_sizes": (16,), "batches": (4,)}
    flops, met, refused = latency.run_latency(digits, 0, tmp_path, **choices)
    assert flops["flops_ratio"] >= 1.7
    assert met["latency_ratio"] >= 0.97 * 1.4
    assert met["latency"].keys() == {"4"}
    assert "budget=90 cannot be met on this machine" in refused["refused"]
    assert latency.run_latency(digits, 0, tmp_path, **choices) == [flops, met, refused]
    lines = render(tmp_path).splitlines()
    assert lines[2].count("|") == lines[4].count("|") == lines[6].count("|")
    assert lines[4].startswith("| 1.7x FLOPs | 16 | 1 |")
    assert lines[5].startswith("| 1.4x time at batch 4 | 16 | 1 |")
    assert "cannot be met: at most" in lines[6]


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(MIDLError, match="has no results"):
        render(tmp_path)
