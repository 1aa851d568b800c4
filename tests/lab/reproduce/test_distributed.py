"""Training in several processes gives what one process gives, up to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sweeping import results, run
from typer.testing import CliRunner

from midl.errors import MIDLError
from midl.lab.commands import app
from midl.lab.processes import accelerator, share_rows
from midl.lab.reproduce.listing import list_runs
from midl.lab.reproduce.plan import Request


class Place:
    """A process among others, without the others."""

    def __init__(self, index: int, processes: int) -> None:
        self.process_index, self.num_processes = index, processes


@pytest.mark.parametrize(("rows", "processes"), [(1, 1), (7, 1), (8, 2), (7, 2), (1, 2), (5, 3), (2, 4)])
def test_the_mean_over_processes_is_the_mean_over_the_batch(rows: int, processes: int) -> None:
    batch = torch.arange(10, 10 + rows)
    parts = [share_rows(batch, Place(i, processes)) for i in range(processes)]  # type: ignore[arg-type]
    mean = sum(weight * mine.double().mean().item() for mine, weight in parts) / processes
    assert mean == pytest.approx(batch.double().mean().item())
    kept = torch.cat([mine for mine, weight in parts if weight])
    assert kept.sort().values.tolist() == batch.tolist()


@pytest.mark.parametrize("asked", ["environment", "state"])
def test_sharded_parameters_are_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if asked == "environment":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch --use_fsdp sets it
    else:
        monkeypatch.setattr("accelerate.Accelerator.distributed_type", "FSDP")
    with pytest.raises(MIDLError, match=r"accelerate: FSDP was asked for .*, expected data parallelism \(DDP\)"):
        accelerator()


def test_a_sweep_with_sharded_parameters_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments = ["reproduce", "--profile", "smoke", "--data", "digits", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert done.output.startswith("midl: accelerate: FSDP was asked for")
    assert len(done.output.splitlines()) == 1


def launch(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``midl reproduce`` in two processes that talk through gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "midl"]
    command += ["reproduce", "--profile", "smoke", "--data", "digits", "--no-latency", "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    methods = ("dense", "scratch", "converted")
    run(one, Request("smoke", ("digits",), methods))
    done = launch(two, "--methods", ",".join(methods))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("digits, dense, seed 0: begins") == 1
    assert results(one).keys() == results(two).keys()
    for state in list_runs(one):
        # Sums in another order: rounding. In distillation a different rounding now and then selects another group.
        limit = 1e-5 if state.spec["method"] != "converted" else 1e-3
        model = state.folder.relative_to(one) / "model.safetensors"
        expected, found = load_file(one / model), load_file(two / model)
        for name, tensor in expected.items():
            assert float((found[name] - tensor).norm()) <= limit * float(tensor.norm()), (state.folder.name, name)


@pytest.mark.slow
def test_launched_processes_are_one_worker(tmp_path: Path) -> None:
    done = launch(tmp_path, "--workers", "2")
    assert done.returncode != 0
    assert "workers=2, launcher='local' in one of 2 launched processes, expected one local worker" in done.stderr
