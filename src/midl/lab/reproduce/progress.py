"""What a worker says while it works: a line when a run begins and ends, with what is left and how long it may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from midl.lab.methods import find
from midl.lab.reproduce.plan import Plan, Task
from midl.lab.reproduce.state import read_finished

__all__ = ["Lines", "describe_task", "estimate_seconds", "format_seconds"]


class Lines:
    """A watcher that prints.

    Args:
        plan: whose tasks are counted.
        out: folder of the sweep.
        workers: at work side by side, for the remaining time.
        say: prints a line.
    """

    def __init__(self, plan: Plan, out: Path, workers: int, say: Callable[[str], None]) -> None:
        self._plan, self._out, self._workers, self._say = plan, out, workers, say
        self._shown = 0.0

    def begin(self, task: Task) -> None:
        """Say which task is about to run."""
        self._say(f"{describe_task(task.spec, task.kind)}: begins")
        self._shown = time.monotonic()

    def step(self, done: int, total: int) -> None:
        """Say now and then how far the training under way is."""
        if time.monotonic() - self._shown >= 60:
            self._shown = time.monotonic()
            self._say(f"  step {done} of {total}")

    def end(self, task: Task, finished: dict[str, Any]) -> None:
        """Say what came out, how many tasks are done and how long the others may take."""
        if task.kind == "run":
            outcome = f"{finished['accuracy']:.2f} %"
        else:
            outcome = f"lr {finished['tuned']['lr']:g}, weight decay {finished['tuned']['weight_decay']:g}"
        done = {t.folder: read_finished(self._out / t.folder, t.kind) for t in self._plan.tasks}
        left = estimate_seconds(self._plan, {folder: r for folder, r in done.items() if r is not None})
        counted = sum(result is not None for result in done.values())
        remaining = "" if left is None else f", about {format_seconds(left / self._workers)} left"
        self._say(
            f"{describe_task(task.spec, task.kind)}: {outcome} after {format_seconds(finished['seconds'])} "
            f"({counted} of {len(done)}{remaining})"
        )

    def fail(self, task: Task, reason: str) -> None:
        """Say why a task failed."""
        self._say(f"{describe_task(task.spec, task.kind)}: FAILED: {reason}")


def describe_task(spec: dict[str, Any], kind: str) -> str:
    """Return a task's name for readers.

    >>> describe_task({"dataset": "mnist", "method": "scratch", "seed": 1, "train_fraction": 0.1, "label_noise": 0},
    ...               kind="run")
    'mnist, MID-L scratch, seed 1, 10 % of the rows'
    """
    parts = [spec["dataset"], find(spec["method"]).title]
    if kind == "tuning":
        return ", ".join([*parts, "tuning"])
    parts.append(f"seed {spec['seed']}")
    if spec["train_fraction"] < 1:
        parts.append(f"{100 * spec['train_fraction']:g} % of the rows")
    if spec["label_noise"]:
        parts.append(f"{100 * spec['label_noise']:g} % random labels")
    return ", ".join(parts)


def estimate_seconds(plan: Plan, finished: dict[Path, dict[str, Any]]) -> float | None:
    """Return how long the tasks that are not finished may take one after the other; None before the first is finished.

    A task takes as long per training row as those of its data set and method did, or else those of its data set, or
    else all.
    """
    spent: dict[tuple[str, ...], list[float]] = {}
    for task in plan.tasks:
        if task.folder in finished:
            result = finished[task.folder]
            seconds = result["seconds"] + result.get("measure_seconds", 0.0)
            for key in _keys(task):
                total = spent.setdefault(key, [0.0, 0.0])
                total[0] += seconds
                total[1] += task.work
    if not spent:
        return None
    left = 0.0
    for task in plan.tasks:
        if task.folder not in finished:
            seconds, work = next(spent[key] for key in _keys(task) if key in spent)
            left += task.work * seconds / work
    return left


def _keys(task: Task) -> list[tuple[str, ...]]:
    return [(task.spec["dataset"], task.spec["method"]), (task.spec["dataset"],), ()]


def format_seconds(seconds: float) -> str:
    """Return a duration for readers.

    >>> [format_seconds(s) for s in (3.21, 75, 5400)]
    ['3.2 s', '1 min 15 s', '1 h 30 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
