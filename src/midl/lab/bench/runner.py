"""Run benchmarks: choose cases, measure ceilings, hold the contests, print and write what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import midl
from midl.errors import MIDLError
from midl.lab.bench.ceilings import Ceilings, measure_ceilings, roofline
from midl.lab.bench.machine import describe_machine
from midl.lab.bench.registry import Case, select_cases
from midl.lab.bench.results import Results, Row, write_results
from midl.lab.bench.session import Session
from midl.ops.dispatch import NAMES, unavailable_reason

__all__ = ["list_benchmarks", "run_bench"]


def list_benchmarks(only: str | None = None, *, quick: bool = False) -> list[str]:
    """Return the names of the cases that :func:`run_bench` would run.

    >>> list_benchmarks("forward/float32/1024x1024")[0]
    'forward/float32/1024x1024/batch1'
    """
    return [case.name for case in select_cases(only, quick=quick)]


def _measure_constants() -> None:
    """Let ``auto`` choose by this machine's own constants, as ``midl info --measure`` would."""
    if unavailable_reason("native") is None:
        from midl.ops import cpu_calibration

        if cpu_calibration.measured() is None:
            with suppress(OSError, MIDLError):  # a cache that cannot be written or a busy machine stops no benchmark
                cpu_calibration.measure()


def run_bench(
    only: str | None = None,
    *,
    quick: bool = False,
    out: Path | None = None,
    threads: int | None = None,
    kernels: Sequence[str] = ("auto",),
    compile: bool = True,
    report: Callable[[Results, Case, list[Row]], object] = lambda results, case, rows: None,
) -> Results:
    """Run the benchmarks and return what was measured; torch's number of threads is the same afterwards.

    Args:
        only: a part of the name or a shell pattern; commas separate several.
        quick: a short list with few rounds.
        out: JSON file, written after every case.
        threads: for torch; ``None`` leaves the number as it is.
        kernels: implementations to time, each as a contender of its own; ``"all"`` adds every one available here.
        compile: whether ``torch.compile`` is among the dense baselines.
        report: called after each case.

    Raises:
        MIDLError: nothing matches ``only``, or ``kernels`` or ``threads`` is impossible.
    """
    cases = select_cases(only, quick=quick)
    names = _expand_kernels(kernels)
    if threads is not None and threads < 1:
        raise MIDLError(f"run_bench: threads={threads}, expected at least 1")
    with _threads(threads or torch.get_num_threads()):
        _measure_constants()
        machine = describe_machine()  # before our own work raises the load
        ceilings = measure_ceilings(quick=quick)
        seconds, min_rounds = (0.15, 5) if quick else (0.6, 7)
        session = Session(ceilings, names, compile, seconds, min_rounds)
        settings = {"quick": quick, "only": only, **session.to_dict()}
        results = Results(machine, ceilings.to_dict(), settings)
        start = time.perf_counter()
        for case in cases:
            with _threads(case.params.get("threads", torch.get_num_threads())):
                rows = case.measure(session, case)
            results.rows += rows
            results.settings["seconds_total"] = round(time.perf_counter() - start, 1)
            if out is not None:
                write_results(out, results)
            report(results, case, rows)
        # Once more: what runs beside us at the start may be gone at the end, and a ceiling must not be too low.
        _raise_ceilings(results, ceilings.best_of(measure_ceilings(quick=quick)))
        if out is not None:
            write_results(out, results)
    return results


def _raise_ceilings(results: Results, ceilings: Ceilings) -> None:
    """Put better ceilings into the results and the rows' shares of them."""
    results.ceilings = ceilings.to_dict()
    for row in results.rows:
        if row.roofline is not None:
            gflops = ceilings.peak_gflops(getattr(torch, row.params["dtype"]))
            flops, read_bytes = 1e9 * row.roofline["gflops"], 1e9 * row.roofline["gbs"]
            row.roofline = roofline(flops, read_bytes, 1.0, gflops, ceilings.read_gbs)


def _expand_kernels(kernels: Sequence[str]) -> tuple[str, ...]:
    names = []
    for name in kernels:
        if name == "all":
            names += ["auto", *(other for other in NAMES if unavailable_reason(other) is None)]
        else:
            with midl.kernels(name):  # raises for a name that is unknown or not available
                names.append(name)
    if not names:
        raise MIDLError("run_bench: kernels=(), expected at least one name")
    return tuple(dict.fromkeys(names))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
