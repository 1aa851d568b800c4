"""The commands: midl reproduce and midl runs."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from midl.errors import MIDLError
from midl.lab.commands import app
from midl.lab.report import read_results
from midl.lab.reproduce import execute, launch
from midl.lab.reproduce.export import export
from midl.lab.reproduce.plan import Request, make_plan
from midl.lab.reproduce.profiles import PROFILES

QUICK = ("--profile", "smoke", "--data", "digits", "--methods", "dense", "--threads", "1", "--no-latency")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    code, output = invoke("reproduce", *QUICK, "--out", out)
    assert code == 0, output
    return out


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_reproduce_then_runs_then_export(tmp_path: Path) -> None:
    code, output = invoke("reproduce", *QUICK, "--out", tmp_path / "runs")
    assert code == 0, output
    assert "digits, dense, seed 0: begins" in output
    assert "(4 of 4, about 0.0 s left)" in output
    code, output = invoke("runs", tmp_path / "runs")
    assert code == 0
    assert "4 done" in output
    assert output.count("digits") == 4
    code, output = invoke("runs", tmp_path / "runs", "--export", tmp_path / "results")
    assert code == 0
    content = json.loads((tmp_path / "results" / "digits-smoke.json").read_text())
    assert {run["spec"]["method"] for run in content["runs"]} == {"dense"}


def test_a_sweep_with_failures_ends_with_code_1_and_runs_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MIDLError("train: the loss of epoch 1 is nan, expected a finite one")

    monkeypatch.setattr(execute, "train", fail)
    code, output = invoke("reproduce", *QUICK, "--out", tmp_path)
    assert code == 1
    assert "digits, dense, tuning: FAILED: train: the loss of epoch 1 is nan" in output
    assert "1 failed, 3 need them" in output
    code, output = invoke("runs", tmp_path)
    assert "failed: train: the loss of epoch 1 is nan" in output
    assert "1 failed, 3 waiting" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--profile", "large"), "profile='large' is unknown"),
        (("--methods", "magic"), "method='magic' is unknown"),
        (("--precision", "fp4"), "precision='fp4', expected one of"),
        (("--seeds", "-1"), "expected integers from 0 to"),
        (("--seeds", "99999999999999999999"), "expected integers from 0 to"),
        (("--data", "adult", "--methods", "dense"), "nothing to run (adult:"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, output = invoke("reproduce", *QUICK, *arguments, "--out", tmp_path)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_a_bad_mirror_does_not_keep_embedded_data_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDL_DATA", str(tmp_path / "nowhere"))
    plan = make_plan(Request("smoke", ("digits", "mnist"), ("dense",)))
    assert {task.spec["dataset"] for task in plan.tasks} == {"digits"}
    assert "is no folder" in plan.left_out["mnist"]


def test_methods_that_a_profile_lacks_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dataclasses.replace(PROFILES["smoke"], methods={"digits": ("dense", "narrow")})
    monkeypatch.setitem(PROFILES, "smoke", known)
    said: list[str] = []
    plan = make_plan(Request("smoke", ("digits",), ("scratch",)), said.append)
    assert not plan.tasks
    assert "(dense, narrow) none was asked for" in plan.left_out["digits"]
    assert said[-1].startswith("digits: left out: ")


@pytest.mark.parametrize(
    ("command", "file"),
    [("runs", "run.json"), ("runs", "result.json"), ("report", "result.json"), ("reproduce", "tuned.json")],
)
def test_damaged_files_are_named_in_one_line(command: str, file: str, sweep: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(sweep, tmp_path / "runs")
    damaged = sorted(runs.glob(f"digits/*/{file}"))[0]
    damaged.write_text("{")
    if command == "reproduce":
        code, output = invoke("reproduce", *QUICK, "--out", runs)
    else:
        code, output = invoke(command, runs, *(("--out", tmp_path / "x.html") if command == "report" else ()))
    assert code == 1
    assert f"{file} is damaged" in output.replace("\n", "")
    assert "Traceback" not in output


def test_a_file_where_a_folder_is_wanted_is_one_line(sweep: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for arguments in (
        ("reproduce", *QUICK, "--out", file), ("runs", sweep, "--export", file), ("report", sweep, "--out", file / "x"),
        ("report", sweep, "--out", tmp_path), ("compare", "digits", "--out", file),
    ):  # fmt: skip
        code, output = invoke(*arguments)
        assert code == 1, arguments
        assert output.splitlines()[-1].startswith("midl: "), arguments


def test_an_export_says_what_its_folder_says(sweep: Path, tmp_path: Path) -> None:
    runs = shutil.copytree(sweep, tmp_path / "runs")
    (dense,) = (folder for folder in runs.glob("digits/dense-s0-*") if not re.search("-[fn]0", folder.name))
    older = shutil.copytree(dense, dense.with_name("dense-s0-zzzzzzzzzz"))
    result = json.loads((older / "result.json").read_text())
    (older / "result.json").write_text(json.dumps({**result, "accuracy": 1.0}))
    os.utime(older / "result.json", (1, 1))
    failed = shutil.copytree(dense, dense.with_name("dense-s7-zzzzzzzzzz"))
    (failed / "result.json").unlink()
    (failed / "failure.json").write_text(json.dumps({"reason": "no luck", "time": 0, "trace": ""}))
    export(runs, tmp_path / "results")
    folder, compact = read_results(runs), read_results(tmp_path / "results")
    for read in (folder, compact):
        assert read.values("digits", "dense", "accuracy") == {0: result["accuracy"]}
    assert folder.failed == compact.failed
    assert "no luck" in compact.failed["digits"][0]


def _lose_parent(file: str) -> None:
    """Start a process that ends with this one, write down its id, and die."""
    child = multiprocessing.get_context("fork").Process(target=_wait)
    child.start()
    Path(file).write_text(str(child.pid))
    os._exit(0)


def _wait() -> None:
    launch.end_with_parent()
    time.sleep(60)


def test_a_worker_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["midl.lab.reproduce.sweep", "sweeping"])
    process = context.Process(target=_lose_parent, args=(str(tmp_path / "pid"),))
    process.start()
    process.join()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while _is_alive(pid):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # where nobody collects orphans they stay as zombies
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
