from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from midl.lab.commands import app


def test_list_prints_names_alone() -> None:
    result = CliRunner().invoke(app, ["bench", "--list", "--only", "overhead"])
    assert (result.exit_code, result.stdout) == (0, "overhead/256x256/batch1\n")


def test_a_pattern_that_matches_nothing_is_one_line_and_exit_code_one() -> None:
    result = CliRunner().invoke(app, ["bench", "--only", "nothing"])
    assert result.exit_code == 1
    assert "only='nothing'" in result.output
    assert "Traceback" not in result.output


def test_render_of_a_folder_without_files_writes_no_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    result = CliRunner().invoke(app, ["bench", "--render", str(tmp_path), "--page", str(page)])
    assert result.exit_code == 1
    assert not page.exists()
