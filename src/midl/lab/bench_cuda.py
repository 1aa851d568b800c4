"""``midl bench --device cuda``: the layers on a GPU against cuBLAS, parity first, beside the cost model's prediction.

Written and tested without a GPU: the arithmetic around the clock is tested on a CPU, the clock itself is not.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import midl
from midl.errors import KernelError
from midl.lab.bench.machine import describe_machine
from midl.lab.bench.midl_layers import check_forward, make_linear
from midl.lab.bench.timing import Spread
from midl.ops.gpu_cost import Call, device_of, predict

__all__ = ["CudaCase", "CudaStopwatch", "Stopwatch", "cuda_cases", "render_cuda", "run_cuda_bench", "run_cuda_cases"]

_SMALL = 64
"""Up to this many rows a call is shorter than its launches, so it is timed inside a CUDA graph."""


@dataclasses.dataclass(frozen=True)
class CudaCase:
    """One comparison: a layer's forward pass, a training step of it, or a converted two-layer network."""

    kind: str
    rows: int
    in_features: int
    out_features: int
    group_size: int
    dtype: torch.dtype
    active: float = 0.45

    @property
    def name(self) -> str:
        """``kind/dtype/shape``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind}/{dtype}/{self.in_features}x{self.out_features}/batch{self.rows}/G{self.group_size}"


def cuda_cases(*, quick: bool = False) -> list[CudaCase]:
    """Return the cases; ``quick`` keeps one large and one small shape in float16.

    >>> cuda_cases(quick=True)[0].name
    'forward/float16/4096x16384/batch1/G32'
    """
    shapes = ((4096, 16384),) if quick else ((4096, 16384), (1024, 4096))
    dtypes = (torch.float16,) if quick else (torch.float16, torch.bfloat16, torch.float32)
    cases = []
    for dtype in dtypes:
        for d, n in shapes:
            for rows in (1, 4096) if quick else (1, 8, 64, 512, 4096, 16384):
                for group_size in (32,) if rows <= 8 else (32, 128, 256):
                    cases.append(CudaCase("forward", rows, d, n, group_size, dtype))
                    if rows >= 512:
                        cases.append(CudaCase("training", rows, d, n, group_size, dtype))
                        cases.append(CudaCase("converted", rows, d, n, group_size, dtype))
    return cases


class Stopwatch(Protocol):
    """What times a call and tells its peak memory."""

    def prepare(self, call: Callable[[], object], *, graph: bool) -> Callable[[], object]:
        """Warm up and return what to time: ``call`` or, with ``graph``, its replay."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the duration of one call with a cold cache."""

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return the most memory that one call takes beside what is allocated already."""


class CudaStopwatch:
    """Times with CUDA events; between calls it overwrites more memory than the L2 cache holds."""

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(4 * size, dtype=torch.uint8, device="cuda")

    def prepare(self, call: Callable[[], object], *, graph: bool) -> Callable[[], object]:
        """Warm up and return what to time: ``call`` or, with ``graph``, its replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        if not graph:
            return call
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        return captured.replay

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the duration of one call with a cold cache."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return the most memory that one call takes beside what is allocated already."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def run_cuda_bench(*, out: Path | None = None, quick: bool = False, rounds: int = 50) -> dict[str, Any]:
    """Time every case on the current GPU and return the results, also written to ``out`` as JSON.

    Raises:
        KernelError: there is no GPU here.
    """
    if not torch.cuda.is_available():
        raise KernelError("bench: device='cuda', but torch finds no CUDA device here")
    name = torch.cuda.get_device_name()
    return run_cuda_cases(cuda_cases(quick=quick), CudaStopwatch(), "cuda", name, rounds=rounds, out=out)


def run_cuda_cases(
    cases: list[CudaCase], stopwatch: Stopwatch, device: str, device_name: str, *, kernels: str = "triton",
    compiled: bool = True, rounds: int = 50, out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run ``cases`` and return header and rows; a case whose parity is red gets no times.

    Args:
        cases: what to time.
        stopwatch: times calls on ``device``.
        device: where tensors live.
        device_name: as torch names it; the model's prediction is for the data sheet that fits.
        kernels: which of midl's implementations stands for the GPU path.
        compiled: whether ``torch.compile`` of the dense layer is a contender.
        rounds: calls per contender, interleaved.
        out: JSON file, written after every case.
    """
    header = {
        **describe_machine(),
        "device": device_name,
        "cuda": torch.version.cuda,
        "model": device_of(device_name).name,
    }
    results: dict[str, Any] = {"machine": header, "rows": []}
    for case in cases:
        results["rows"].append(_run(case, stopwatch, device, device_name, kernels, compiled, rounds))
        if out is not None:
            out.write_text(json.dumps(results, indent=2) + "\n")
    return results


def _run(
    case: CudaCase, stopwatch: Stopwatch, device: str, device_name: str, kernels: str, compiled: bool, rounds: int
) -> dict[str, Any]:
    layer = make_linear(
        case.in_features, case.out_features, case.dtype, active=case.active, group_size=case.group_size
    ).to(device)
    x = torch.randn(case.rows, case.in_features, device=device, dtype=case.dtype)
    parity = check_forward(layer, x, kernels)
    row: dict[str, Any] = {
        "case": case.name,
        "parity": parity.to_dict(),
        "model": _prediction(case, layer, device_name),
    }
    if not parity.ok:
        return row
    contenders = _contenders(case, layer, x, kernels, compiled)
    row["peak_bytes"] = {name: stopwatch.peak_bytes(call) for name, call in contenders.items()}
    graph = case.kind == "forward" and case.rows <= _SMALL
    runs = {name: stopwatch.prepare(call, graph=graph) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(1e6 * stopwatch.seconds(run))
    row["microseconds"] = {name: Spread.of(values).to_dict() for name, values in times.items()}
    return row


def _prediction(case: CudaCase, layer: midl.MIDLinear, device_name: str) -> dict[str, float] | None:
    """Return the model's microseconds; a converted network has other kernels between its layers."""
    if case.kind == "converted":
        return None
    device = device_of(device_name)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    call = Call(
        case.rows,
        case.in_features,
        case.out_features,
        case.group_size,
        layer.num_selected,
        layer.rank,
        case.dtype,
        tf32,
    )
    passes = (False, True) if case.kind == "training" else (False,)
    return {
        name: 1e6 * sum(predict(call, device, dense=dense, backward=backward) for backward in passes)
        for name, dense in (("midl", False), ("nn.Linear", True))
    }


def _contenders(
    case: CudaCase, layer: midl.MIDLinear, x: Tensor, kernels: str, compiled: bool
) -> dict[str, Callable[[], object]]:
    dense = nn.Linear(case.in_features, case.out_features, device=x.device, dtype=case.dtype)
    ours: nn.Module = layer
    theirs: nn.Module = dense
    if case.kind == "converted":
        theirs = nn.Sequential(
            dense, nn.GELU(), nn.Linear(case.out_features, case.in_features, device=x.device, dtype=case.dtype)
        )
        ours = copy.deepcopy(theirs)
        midl.convert_(ours, midl.MIDConfig(active=case.active, group_size=case.group_size))
    modules: dict[str, Any] = {"midl": ours, "nn.Linear": theirs}
    if compiled:
        modules["nn.Linear compiled"] = torch.compile(copy.deepcopy(theirs))
    training = case.kind == "training"
    if training:
        x = x.clone().requires_grad_()
    for module in modules.values():
        module.requires_grad_(training)

    def call(module: nn.Module, name: str) -> Callable[[], object]:
        def run() -> object:
            with midl.kernels(name):
                y = module(x)
                if training:
                    torch.autograd.grad(y.sum(), [x, *module.parameters()])
                return y

        return run

    return {name: call(module, kernels if name == "midl" else "auto") for name, module in modules.items()}


def render_cuda(results: dict[str, Any]) -> str:
    """Return a Markdown table: measured microseconds beside the model's."""
    lines = [
        f"Measured on {results['machine']['device']}; the model is that of the {results['machine']['model']}.",
        "",
        "| case | midl us | model | nn.Linear us | model | compiled us | speed-up | peak MB, midl / dense |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in results["rows"]:
        if "microseconds" not in row:
            lines.append(f"| {row['case']} | parity failed: {row['parity']['detail']} | | | | | | |")
            continue
        times = {name: spread["median"] for name, spread in row["microseconds"].items()}
        model = row["model"] or {}
        peak = row["peak_bytes"]
        lines.append(
            f"| {row['case']} | {times['midl']:.1f} | {_number(model.get('midl'))} | {times['nn.Linear']:.1f} "
            f"| {_number(model.get('nn.Linear'))} | {_number(times.get('nn.Linear compiled'))} "
            f"| {times['nn.Linear'] / times['midl']:.2f} | {peak['midl'] / 1e6:.1f} / {peak['nn.Linear'] / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
