"""``midl adapt`` end to end on digits."""

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("typer")
pytest.importorskip("safetensors")

import torch
from torch import nn
from typer.testing import CliRunner

import midl
from midl.lab.adapt_study.once import _inputs
from midl.lab.commands import app
from midl.lab.data import load
from midl.lab.models import architecture_for


def run(*arguments, command="adapt"):
    return CliRunner().invoke(app, [command, "digits", *arguments])


def small_network():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))


def no_network():
    return "a network"


def test_adapts_saves_and_reports(tmp_path):
    result = run("--epochs", "2", "--budget", "1.5", "--threads", "1", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "hidden2" in result.output
    assert "accuracy" in result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["accuracy"]["adapted"] > report["accuracy"]["dense"] - 5
    model = architecture_for("digits", (64,), 10).build()
    midl.load_(model, tmp_path / "run" / "adapted.safetensors")
    assert any(isinstance(m, midl.MIDLinear) for m in model.modules())
    again = run(
        "--checkpoint", str(tmp_path / "run" / "dense.safetensors"), "--budget", "1.5", "--max-active", "1",
        "--threads", "1", "--out", str(tmp_path / "again"),
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again" / "report.json").read_text())["accuracy"] == report["accuracy"]


def test_a_budget_of_time_is_met_and_in_the_report(tmp_path, set_clock):
    set_clock()
    result = run(
        "--epochs", "1", "--distil-epochs", "0", "--budget", "1.4", "--latency-batch", "4", "--threads", "1",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "x as fast" in result.output
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["settings"]["latency_batch"] == 4
    assert written["report"]["latency_before"] / written["report"]["latency_after"] >= 0.97 * 1.4


def test_thresholds_are_in_the_report_and_in_the_saved_model(tmp_path):
    result = run(
        "--epochs", "1", "--distil-epochs", "0", "--budget", "1.2", "--threshold", "--threads", "1",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "realised" in result.output
    written = json.loads((tmp_path / "report.json").read_text())["report"]["thresholds"]["layers"]
    loaded = midl.load_(architecture_for("digits", (64,), 10).build(), tmp_path / "adapted.safetensors")
    assert {found["name"]: found["threshold"] for found in written} == {
        name: layer.threshold for name, layer in loaded.named_modules() if isinstance(layer, midl.MIDLinear)
    }


def test_a_budget_that_cannot_be_met_is_one_line(tmp_path):
    result = run("--epochs", "1", "--budget", "40", "--threads", "1", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "budget=40 cannot be met, expected at most" in result.output


def test_a_curve_of_ones_own_model(tmp_path):
    result = run(
        "--model", f"{__name__}:small_network", "--epochs", "2", "--distil-epochs", "1", "--active", "0.25,1",
        "--group-size", "8", "--threads", "1", "--out", str(tmp_path), command="curve",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    curve = json.loads((tmp_path / "curve.json").read_text())
    low, high = curve["points"]
    assert (low["active"], high["active"]) == (0.25, 1.0)
    assert low["flops_ratio"] > 1 > high["flops_ratio"]
    assert high["accuracy"] > curve["dense_accuracy"] - 5
    assert (tmp_path / "curve.png").stat().st_size > 1000
    model = small_network()
    midl.load_(model, tmp_path / "elastic.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no_such_module:f"), "cannot be imported"),
        (("--model", f"{__name__}:no_network"), "returned a str, expected torch.nn.Module"),
        (("--model", "torch.nn:Linear"), "failed (TypeError: "),
        (("--threads", "0"), "threads=0"),
        (("--max-active", "1.5"), "max_active=1.5, expected None or a share of the neurons"),
        (("--budget", "0.5"), "budget=0.5, expected a ratio above 1"),
        (("--budget", "nan"), "budget=nan, expected a ratio above 1"),
        (("--checkpoint", "nowhere.safetensors"), "'nowhere.safetensors' is not a file"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_trained(tmp_path, arguments, message):
    result = run(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert message in result.output.replace("\n", "")
    assert not list(tmp_path.iterdir())


def test_a_curve_checks_its_fractions_before_anything_is_trained(tmp_path):
    for active in ("2", "0.5,nan", "0"):
        result = run("--active", active, "--out", str(tmp_path), command="curve")
        assert result.exit_code == 1
        assert "expected fractions in (0, 1]" in result.output
    assert not list(tmp_path.iterdir())


def test_more_inputs_than_rows_are_rows_again():
    dataset = load("digits")
    rows = len(dataset.train)
    inputs = _inputs(dataset, 2 * rows + 1)
    assert torch.equal(inputs[rows : 2 * rows], inputs[:rows])
    assert len(inputs) == 2 * rows + 1
