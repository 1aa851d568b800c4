"""The CUDA benchmark as far as a CPU can test it: cases, parity first, predictions, JSON and the table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from midl.errors import KernelError
from midl.lab.bench_cuda import CudaCase, cuda_cases, render_cuda, run_cuda_bench, run_cuda_cases


class WallStopwatch:
    """A stopwatch of the CPU; notes which calls would have been captured in a graph."""

    def __init__(self) -> None:
        self.graphs: list[bool] = []

    def prepare(self, call: Callable[[], object], *, graph: bool) -> Callable[[], object]:
        self.graphs.append(graph)
        return call

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], object]) -> int:
        call()
        return 1_000_000


CASES = [CudaCase(kind, 4, 48, 64, 16, torch.float32) for kind in ("forward", "training", "converted")]


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="torch finds no CUDA device here") as error:
        run_cuda_bench()
    assert "\n" not in str(error.value)


def test_every_case_has_parity_times_memory_and_the_model_beside_them(tmp_path: Path) -> None:
    stopwatch, out = WallStopwatch(), tmp_path / "cuda.json"
    results = run_cuda_cases(
        CASES, stopwatch, "cpu", "NVIDIA A100-SXM4-80GB", kernels="dense", compiled=False, rounds=3, out=out
    )
    assert json.loads(out.read_text()) == results
    assert results["machine"]["model"] == "A100 SXM4 80 GB"
    for row in results["rows"]:
        assert row["parity"]["ok"]
        assert set(row["microseconds"]) == set(row["peak_bytes"]) == {"midl", "nn.Linear"}
        assert all(spread["median"] > 0 for spread in row["microseconds"].values())
    forward, training, converted = (row["model"] for row in results["rows"])
    assert training["midl"] > forward["midl"] > 0
    assert converted is None
    # Two contenders each: only the small forward pass goes into a graph.
    assert stopwatch.graphs == [True, True, False, False, False, False]
    table = render_cuda(results)
    assert table.count("\n") == 4 + len(CASES)
    assert "1.0 / 1.0" in table


def test_a_case_whose_parity_fails_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from midl.lab import bench_cuda
    from midl.lab.bench.parity import Parity

    monkeypatch.setattr(bench_cuda, "check_forward", lambda *args: Parity(1.0, 1e-5, "output"))
    results = run_cuda_cases(CASES[:1], WallStopwatch(), "cpu", "NVIDIA L4", kernels="dense", compiled=False)
    assert "microseconds" not in results["rows"][0]
    assert "parity failed: output" in render_cuda(results)


def test_case_names_are_unique() -> None:
    names = [case.name for case in cuda_cases()]
    assert len(set(names)) == len(names)
    assert {case.name for case in cuda_cases(quick=True)} <= set(names)
