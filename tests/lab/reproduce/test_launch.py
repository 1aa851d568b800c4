"""Launchers: workers elsewhere finish the same sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from sweeping import results, run

from midl.errors import MIDLError
from midl.lab.environment import describe_command
from midl.lab.reproduce.plan import Request
from midl.lab.reproduce.sweep import Options

SMALL = Request("smoke", ("digits",), ("dense",))


def test_two_workers_share_the_work_and_do_nothing_twice(tmp_path: Path) -> None:
    run(tmp_path / "one", SMALL)
    run(tmp_path / "two", SMALL, Options(workers=2, threads=1, latency=False))
    assert results(tmp_path / "two") == results(tmp_path / "one")
    found = [json.loads(file.read_text()) for file in (tmp_path / "two").glob("*/*/result.json")]
    # The command that a person gave, not what one process told the other.
    assert {result["environment"]["command"] for result in found} == {describe_command(sys.argv)}


def test_without_ray_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MIDLError, match=r"launcher='ray' needs Ray, expected it installed: pip install 'midl\[ray\]'"):
        run(tmp_path, SMALL, Options("ray", threads=1, latency=False))


@pytest.mark.slow
def test_a_ray_cluster_runs_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr("midl.lab.reproduce.worker.execute", lambda *_: pytest.fail("ran in the driver"))
    sweep, _ = run(tmp_path / "two", SMALL, Options("ray", workers=2, threads=1, latency=False))
    monkeypatch.undo()
    assert not ray.is_initialized()
    assert not sweep.outcome.failed
    run(tmp_path / "one", SMALL)
    assert results(tmp_path / "two") == results(tmp_path / "one")
