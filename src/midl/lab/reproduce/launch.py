"""Launchers: where the workers of a sweep run. All share the sweep's folder, whose locks divide the work."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from midl.errors import MIDLError
from midl.lab.reproduce.plan import Plan, Request, make_plan
from midl.lab.reproduce.progress import Lines
from midl.lab.reproduce.worker import Outcome, work

__all__ = ["LAUNCHERS", "end_with_parent", "run_child"]

Say = Callable[[str], None]


def _run_worker(request: Request, out: str, since: float, workers: int, threads: int) -> None:
    """Work the sweep off in a process of its own."""
    torch.set_num_threads(threads)
    plan = make_plan(request)
    work(plan, Path(out), since, Lines(plan, Path(out), workers, _say))


def run_child(arguments: str) -> None:
    """Be a worker that another process of this machine started; ``arguments`` is what it said, as JSON."""
    end_with_parent()
    told = json.loads(arguments)
    sys.argv = told["command"]  # what results say they were made by
    fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in told["request"].items()}
    _run_worker(Request(**fields), told["out"], told["since"], told["workers"], told["threads"])


def end_with_parent() -> None:
    """End this process soon after the one that started it: a sweep that is killed leaves no worker behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _say(line: str) -> None:
    print(line, flush=True)


def _local(request: Request, plan: Plan, out: Path, since: float, workers: int, threads: int, say: Say) -> Outcome:
    """Run the workers as processes of this machine; a single one in this very process."""
    told = {
        "request": dataclasses.asdict(request), "out": str(out), "since": since, "workers": workers, "threads": threads,
        "command": sys.argv,
    }  # fmt: skip
    # Not by multiprocessing, which would import the caller's main script again.
    program = "import sys; from midl.lab.reproduce.launch import run_child; run_child(sys.argv[1])"
    command = [sys.executable, "-c", program, json.dumps(told)]
    others = [subprocess.Popen(command) for _ in range(workers - 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outcome = work(plan, out, since, Lines(plan, out, workers, say))
        for process in others:
            process.wait()
    finally:
        for process in others:
            process.kill()
        torch.set_num_threads(before)
    return outcome


def _ray(request: Request, plan: Plan, out: Path, since: float, workers: int, threads: int, say: Say) -> Outcome:
    """Run the workers on the Ray cluster that ``RAY_ADDRESS`` names, or on one that starts and ends here.

    Every machine must see ``out`` and the data under the same path.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise MIDLError("reproduce: launcher='ray' needs Ray, expected it installed: pip install 'midl[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(("MIDL_", "OMP_"))}
        ray.init(include_dashboard=False, runtime_env={"env_vars": passed_on})
    try:
        worker = ray.remote(num_cpus=threads)(_run_worker)
        ray.get([worker.remote(request, str(out.absolute()), since, workers, threads) for _ in range(workers)])
    finally:
        if ours:
            ray.shutdown()
    # What a machine that was lost left behind is done here; mostly that is nothing.
    return work(plan, out, since, Lines(plan, out, 1, say))


LAUNCHERS: dict[str, Callable[[Request, Plan, Path, float, int, int, Say], Outcome]] = {"local": _local, "ray": _ray}
