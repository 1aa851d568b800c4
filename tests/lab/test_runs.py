"""Run folders: content-addressed, one process at a time, never half written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from midl.errors import MIDLError
from midl.lab.files import write_bytes
from midl.lab.runs import RunFolder


def test_other_settings_go_to_another_folder_and_equal_ones_to_the_same(tmp_path: Path) -> None:
    paths = [RunFolder(tmp_path, "x", {"a": a, "b": 2}).path for a in (1, 1, 3)]
    assert paths[0] == paths[1] == RunFolder(tmp_path, "x", {"b": 2, "a": 1}).path
    assert paths[0] != paths[2]


def test_results_survive_and_every_start_records_its_environment(tmp_path: Path) -> None:
    for i in range(2):
        with RunFolder(tmp_path, "x", {"a": 1}) as folder:
            folder.append({"run": i})
    assert folder.results() == [{"run": 0}, {"run": 1}]
    starts = json.loads((folder.path / "environment.json").read_text())
    assert len(starts) == 2
    assert set(starts[0]) == {"command", "versions", "machine", "commit", "kernels"}
    assert starts[0]["machine"]["threads"] >= 1
    assert json.loads((folder.path / "config.json").read_text()) == {"a": 1}


def test_a_folder_whose_settings_were_edited_is_an_error(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "x", {"a": 1}) as folder:
        pass
    (folder.path / "config.json").write_text('{"a": 2}')
    with pytest.raises(MIDLError, match=r"config\.json holds .*'a': 2.*, expected .*'a': 1"), folder:
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="advisory locks are POSIX")
def test_two_processes_in_one_folder_are_an_error(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path, "x", {}),
        pytest.raises(MIDLError, match="in use by another process"),
        RunFolder(tmp_path, "x", {}),
    ):
        pass
    with RunFolder(tmp_path, "x", {}):
        pass  # released


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "f", b"old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(tmp_path / "f", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"old")]
