"""``midl adapt`` end to end on digits."""

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("typer")
pytest.importorskip("safetensors")

from typer.testing import CliRunner

import midl
from midl.lab.commands import app
from midl.lab.models import architecture_for


def run(*arguments):
    return CliRunner().invoke(app, ["adapt", "digits", *arguments])


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
        "--checkpoint", str(tmp_path / "run" / "dense.safetensors"), "--budget", "1.5", "--threads", "1",
        "--out", str(tmp_path / "again"),
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again" / "report.json").read_text())["accuracy"] == report["accuracy"]


def test_a_budget_that_cannot_be_met_is_one_line(tmp_path):
    result = run("--epochs", "1", "--budget", "40", "--threads", "1", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "budget=40 cannot be met, expected at most" in result.output
