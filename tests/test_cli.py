"""The command line: what each command prints, how it fails and how it ends when interrupted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from midl import cli

pytest.importorskip("typer")

from typer.testing import CliRunner

from midl.lab.commands import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def _no_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("MIDL_DATA", raising=False)


def test_compare_prints_the_table_and_writes_the_run_folder(tmp_path: Path) -> None:
    result = runner.invoke(
        app, ["compare", "digits", "--epochs", "1", "--seeds", "0", "--threads", "1", "--out", str(tmp_path / "runs")]
    )
    assert result.exit_code == 0, result.output
    assert "test accuracy %" in result.output
    assert "MID-L converted, seed 0: " in result.output
    (folder,) = (tmp_path / "runs").iterdir()
    written = {path.name for path in folder.iterdir()}
    assert written >= {"config.json", "environment.json", "results.jsonl", "measurements.json", "comparison.json"}
    assert written >= {"table.md", "accuracy.png", "models"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compare", "mnits"], 1, "midl: dataset='mnits' is unknown, expected one of"),
        (["compare", "--active", "0"], 1, "midl: compare: active=0.0, expected a number in (0, 1]"),
        (["compare", "--group-size", "48"], 1, "group_size=48 does not divide out_features=512"),
        (["compare", "--seeds", "0,x"], 2, "'0,x', expected integers separated by commas"),
        (["compare", "--epochs", "0"], 1, "epochs=0, expected a positive int"),
        (["info", "--device", "b42"], 1, "device='b42', expected one of ['a100', 'h100', 'l4', 'rtx4090']"),
        (["bench", "--device", "tpu"], 1, "bench: device='tpu', expected 'cpu' or 'cuda'"),
        pytest.param(
            ["bench", "--device", "cuda"],
            1,
            "but torch finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time"),
        ),
    ],
)
def test_errors_are_one_line_and_no_traceback(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == code
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("midl.lab.compare.train", interrupt)
    result = runner.invoke(app, ["compare", "--epochs", "1", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "midl: stopped; the same command goes on from the last finished epoch" in result.output


def test_info_says_what_is_there_and_why_not() -> None:
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    for word in ("torch", "instruction set", "reference", "available", "MIDL_DATA", "embedded"):
        assert word in result.output


def test_info_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train.parquet").touch()
    monkeypatch.setenv("MIDL_DATA", str(tmp_path))
    facts = json.loads(runner.invoke(app, ["info", "--json"]).output)
    assert facts["kernels"]["reference"] is None
    assert set(facts["kernels"]) == {"reference", "native", "triton", "dense"}
    assert facts["data"]["sources"]["digits"] == "embedded"
    assert facts["data"]["sources"]["mnist"] == "missing in the mirror: test"
    assert facts["machine"]["cores"] >= 1
    if facts["kernels"]["native"] is None:
        assert "baseline" in facts["machine"]["native_kernels"]


def test_info_survives_a_mirror_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDL_DATA", str(tmp_path / "nowhere"))
    facts = json.loads(runner.invoke(app, ["info", "--json"]).output)
    assert "is no folder" in facts["data"]["problem"]
    assert facts["data"]["sources"]["mnist"] == "mirror unusable"


def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("midl.lab.commands")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "midl: typer is not installed, expected the extra lab: pip install 'midl[lab]'\n"
    )


def test_info_prints_what_the_model_predicts_for_a_gpu_and_says_that_it_is_a_model() -> None:
    result = runner.invoke(app, ["info", "--device", "h100"])
    assert result.exit_code == 0, result.output
    assert "a model from data sheets, nothing here was measured" in " ".join(result.output.split())
    rows = json.loads(runner.invoke(app, ["info", "--device", "h100", "--json"]).output)
    assert rows["model"]
    assert {row["batch"] for row in rows["rows"]} > {1}
