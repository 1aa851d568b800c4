"""A sweep: plan, workers, latency; the same call again goes on where the last one stopped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch

from midl.config import check_positive_int
from midl.errors import MIDLError
from midl.lab.processes import accelerator
from midl.lab.reproduce.latency import measure_latencies
from midl.lab.reproduce.launch import LAUNCHERS
from midl.lab.reproduce.plan import Plan, Request, make_plan
from midl.lab.reproduce.progress import Lines
from midl.lab.reproduce.worker import Outcome, prepare, work

__all__ = ["Options", "Sweep", "sweep"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep runs, which its results do not depend on.

    Args:
        launcher: ``"local"``: workers are processes of this machine. ``"ray"``: of a Ray cluster.
        workers: side by side.
        threads: of each worker, and of the timings; None: torch's, divided among the workers, all of them for timings.
        latency: measure latency when all runs are done.
    """

    launcher: str = "local"
    workers: int = 1
    threads: int | None = None
    latency: bool = True

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise MIDLError(f"reproduce: launcher={self.launcher!r}, expected one of {list(LAUNCHERS)}")
        check_positive_int("reproduce", "workers", self.workers)
        if self.threads is not None:
            check_positive_int("reproduce", "threads", self.threads)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep was and how it stands."""

    plan: Plan
    outcome: Outcome
    latencies: tuple[Path, ...]


def sweep(request: Request, out: Path, options: Options, say: Callable[[str], None]) -> Sweep | None:
    """Run what is not done of a sweep in folders below ``out``; None in a process that only trains along.

    Raises:
        MIDLError: nothing can be run, or ``out`` cannot be written.
    """
    since = time.time()
    place = accelerator()
    if place.num_processes > 1 and (options.workers > 1 or options.launcher != "local"):
        raise MIDLError(
            f"reproduce: workers={options.workers}, launcher={options.launcher!r} in one of {place.num_processes} "
            "launched processes, expected one local worker: they train together"
        )
    if not place.is_main_process:
        work(make_plan(request), out, since, Lines(Plan((), {}), out, 1, say))
        return None
    plan = make_plan(request, say)
    if not plan.tasks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.left_out.items())
        raise MIDLError(f"reproduce: nothing to run ({reasons}), expected at least one data set that can be read")
    prepare(plan, out)
    threads = options.threads or max(1, torch.get_num_threads() // options.workers)
    outcome = LAUNCHERS[options.launcher](request, plan, out, since, options.workers, threads, say)
    latencies = _measure_latencies(plan, out, options.threads, say) if options.latency else []
    return Sweep(plan, outcome, tuple(latencies))


def _measure_latencies(plan: Plan, out: Path, threads: int | None, say: Callable[[str], None]) -> list[Path]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    files = []
    try:
        for dataset in dict.fromkeys(task.spec["dataset"] for task in plan.tasks):
            say(f"{dataset}: measuring latency")
            files.append(measure_latencies(plan, out, dataset))
    finally:
        torch.set_num_threads(before)
    return [file for file in files if file is not None]
