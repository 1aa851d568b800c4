"""Runs tests/ops/triton/interpreted in a process of its own, where Triton interprets its kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install 'midl[gpu]'")

FOLDER = Path(__file__).parent / "interpreted"


def run_interpreted(file: str, marker: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, str(FOLDER / file)]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # pytest-xdist tells its workers who they are; this process is none.
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


FILES = sorted(p.name for p in FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    run_interpreted(file, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted_slow(file: str) -> None:
    run_interpreted(file, "slow")
