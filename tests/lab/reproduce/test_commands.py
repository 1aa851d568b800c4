"""The commands: midl reproduce and midl runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from midl.errors import MIDLError
from midl.lab.commands import app
from midl.lab.reproduce import execute, launch

QUICK = ("--profile", "smoke", "--data", "digits", "--methods", "dense", "--threads", "1", "--no-latency")


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
        (("--seeds", "-1"), "expected integers of at least 0"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, output = invoke("reproduce", *QUICK, *arguments, "--out", tmp_path)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


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
