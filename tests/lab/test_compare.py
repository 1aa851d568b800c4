"""The main job end to end, on the embedded digits: kill it, start it again, add seeds, read the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import midl
from midl.errors import MIDLError
from midl.lab.compare import METHODS, Comparison, Settings, compare
from midl.lab.compare_report import to_json, to_markdown, to_table, write_report
from midl.lab.models import architecture_for

QUICK = Settings(seeds=(0,), epochs=2, threads=1)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(QUICK, tmp_path_factory.mktemp("undisturbed"))


def final_results(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_row_of_every_method(comparison: Comparison) -> None:
    rows = comparison.rows
    assert tuple(rows) == METHODS
    assert rows["dense"].active_neurons == rows["dense"].neurons == 1024
    assert rows["dense"].flops == 2 * (64 * 512 + 512 * 512 + 512 * 10)
    for method in ("scratch", "converted"):
        assert rows[method].active_neurons == 2 * 29 * 8  # 29 of 64 groups
        assert rows["dense"].hidden_flops / rows[method].hidden_flops >= 1.7
        assert rows["narrow"].flops <= rows[method].flops * 1.01
    assert all(0 < row.accuracy <= 100 and row.spread is None for row in rows.values())
    assert all(latency["median"] > 0 for row in rows.values() for latency in row.latency.values())


def test_the_head_stays_dense_and_the_saved_models_load(comparison: Comparison) -> None:
    model = architecture_for("digits", (64,), 10).build()
    midl.load_(model, comparison.folder / "models" / "converted-seed0.safetensors")
    kinds = {name: type(module).__name__ for name, module in model.named_children()}
    assert (kinds["hidden1"], kinds["hidden2"], kinds["head"]) == ("MIDLinear", "MIDLinear", "Linear")


def test_the_converted_network_keeps_the_dense_accuracy_before_distillation(comparison: Comparison) -> None:
    results = {result["method"]: result for result in final_results(comparison.folder)}
    assert abs(results["converted"]["accuracy_before_distillation"] - results["dense"]["accuracy"]) < 10  # type: ignore[operator]


def test_a_second_start_trains_nothing(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midl.lab.compare.train", lambda *args, **kwargs: pytest.fail("trained again"))
    again = compare(QUICK, comparison.folder.parent)
    assert again.folder == comparison.folder
    assert [row.accuracies for row in again.rows.values()] == [row.accuracies for row in comparison.rows.values()]


def test_a_lost_model_is_trained_again_and_damaged_results_are_named(tmp_path: Path) -> None:
    quick = Settings(seeds=(0,), epochs=1, threads=1)
    first = compare(quick, tmp_path)
    (first.folder / "models" / "narrow-seed0.safetensors").unlink()
    again = compare(quick, tmp_path)
    assert [row.accuracies for row in again.rows.values()] == [row.accuracies for row in first.rows.values()]
    results = first.folder / "results.jsonl"
    results.write_text(results.read_text()[:-9])
    with pytest.raises(MIDLError, match=r"results\.jsonl is damaged"):
        compare(quick, tmp_path)


def test_seeds_can_be_added_and_other_settings_go_elsewhere(comparison: Comparison, tmp_path: Path) -> None:
    quick = Settings(seeds=(0,), epochs=1, threads=1)
    first = compare(quick, tmp_path)
    more = compare(Settings(seeds=(0, 1), epochs=1, threads=1), tmp_path)
    assert more.folder == first.folder != comparison.folder
    assert [row.accuracies[0] for row in more.rows.values()] == [row.accuracy for row in first.rows.values()]
    assert more.rows["dense"].spread is not None


def test_a_killed_comparison_resumes_to_the_undisturbed_result(comparison: Comparison, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from midl.cli import main; main()", "compare", "--seeds", "0", "--epochs", "2"]
    command += ["--threads", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    # Wait until a MID-L network is half trained, then kill without warning.
    while not list(tmp_path.glob("*/checkpoints/scratch-seed0.safetensors")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = tmp_path.iterdir()
    assert not (folder / "models" / "converted-seed0.safetensors").exists()
    resumed = compare(QUICK, tmp_path)
    assert resumed.folder == folder
    assert resumed.folder.name == comparison.folder.name
    assert final_results(folder) == final_results(comparison.folder)
    for method in METHODS:
        ours, theirs = (c.folder / "models" / f"{method}-seed0.safetensors" for c in (resumed, comparison))
        tensors, expected = load_file(ours), load_file(theirs)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not list((folder / "checkpoints").iterdir())


def test_threads_are_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    with pytest.raises(MIDLError):
        compare(Settings(group_size=3, threads=1), tmp_path)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seeds", (), r"seeds=\(\), expected different integers"),
        ("seeds", (1, 1), r"seeds=\(1, 1\), expected different integers"),
        ("seeds", (-1,), r"seeds=\(-1,\), expected different integers of at least 0"),
        ("epochs", 0, r"epochs=0, expected a positive int"),
        ("threads", 0, r"threads=0, expected a positive int"),
        ("active", 0.0, r"active=0\.0, expected a number in \(0, 1\]"),
        ("group_size", 0, r"group_size=0, expected a positive int"),
    ],
)
def test_settings_refuse_wrong_values(field: str, value: object, message: str) -> None:
    with pytest.raises(MIDLError, match=message):
        Settings(**{field: value})  # type: ignore[arg-type]


def test_settings_that_do_not_fit_fail_before_training(tmp_path: Path) -> None:
    with pytest.raises(MIDLError, match=r"group_size=48 does not divide out_features=512"):
        compare(Settings(group_size=48), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_report(comparison: Comparison) -> None:
    from rich.console import Console

    write_report(comparison)
    assert (comparison.folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((comparison.folder / "comparison.json").read_text()) == json.loads(
        json.dumps(to_json(comparison))
    )
    markdown = to_markdown(comparison)
    assert (comparison.folder / "table.md").read_text() == markdown
    lines = markdown.splitlines()
    assert lines[0] == "|  | dense | dense narrowed | MID-L scratch | MID-L converted |"
    columns = {line.count("|") for line in lines if line.startswith("|")}
    assert columns == {6}
    assert "| active neurons | 1024 of 1024 | 770 of 770 | 464 of 1024 | 464 of 1024 |" in lines
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(to_table(comparison))
    text = console.export_text()
    assert "fewer, hidden" in text
    assert "…" not in text
    assert next(line for line in text.splitlines() if line.startswith("┏")).endswith("┓")  # not cut off at 80 columns


def test_validation_never_touches_the_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from midl.lab import data

    digits = data.load("digits")
    digits.test.x.fill_(float("nan"))
    digits.test.y.fill_(-1)
    monkeypatch.setattr("midl.lab.compare.data.load", lambda name: digits)
    outcome = compare(Settings(seeds=(0,), epochs=1, threads=1, validation=True), tmp_path)
    assert outcome.rows["dense"].accuracy > 50
    assert "held-out acc. %" in to_markdown(outcome)
