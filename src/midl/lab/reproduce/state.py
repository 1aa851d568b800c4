"""The state of a run, read from its folder: whoever wrote it, on whatever machine, and however it ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from midl.lab.files import read_json, write_json
from midl.lab.lock import FolderLock

__all__ = [
    "FINISHED", "State", "age_of", "describe_failure", "newest", "read_failure", "read_finished", "read_state",
    "record_failure",
]  # fmt: skip

FINISHED = {"tuning": "tuned.json", "run": "result.json"}
"""The file that is written last, by kind of task: where it is, the task is done."""

_FAILURE = "failure.json"


@dataclasses.dataclass(frozen=True)
class State:
    """What a folder says about its run.

    Args:
        folder: the run's.
        kind: ``tuning`` or ``run``.
        spec: of the run.
        state: ``stopped`` means begun and not finished, with nobody at work.
        finished: the content of the file that was written last, where done.
        epochs: finished ones.
        reason: of a failure.
    """

    folder: Path
    kind: str
    spec: dict[str, Any]
    state: Literal["done", "running", "failed", "stopped", "waiting"]
    finished: dict[str, Any] | None = None
    epochs: int = 0
    reason: str = ""


def read_state(folder: Path) -> State | None:
    """Return the state of a run's folder, or None where the folder is not one."""
    task = _read(folder / "run.json")
    if task is None:
        return None
    kind, spec = task["kind"], task["settings"]["spec"]
    finished = read_finished(folder, kind)
    if finished is not None:
        return State(folder, kind, spec, "done", finished)
    log = folder / "log.jsonl"
    epochs = len(log.read_text().splitlines()) if log.exists() else 0
    if FolderLock.is_held(folder):
        return State(folder, kind, spec, "running", epochs=epochs)
    failure = read_failure(folder)
    if failure is not None:
        return State(folder, kind, spec, "failed", epochs=epochs, reason=failure["reason"])
    begun = epochs or any(folder.glob("*.safetensors"))
    return State(folder, kind, spec, "stopped" if begun else "waiting", epochs=epochs)


def read_finished(folder: Path, kind: str) -> dict[str, Any] | None:
    """Return what a finished task wrote last, or None."""
    return _read(folder / FINISHED[kind])


def record_failure(folder: Path, error: BaseException, trace: str) -> None:
    """Write down why a task failed; it is tried again by the next start."""
    write_json(folder / _FAILURE, {"reason": f"{error}" or type(error).__name__, "time": time.time(), "trace": trace})


def read_failure(folder: Path) -> dict[str, Any] | None:
    """Return the last failure of a task (reason, time, trace), or None."""
    return _read(folder / _FAILURE)


def newest(states: Iterable[State]) -> list[State]:
    """Return the finished trainings, the youngest of those that only a reader of their settings could tell apart.

    That is, of the same profile, data set, method, variant, seed and precision: another recipe, version of the data or
    of midl makes a folder of its own.
    """
    found = {}
    names = ("profile", "dataset", "method", "seed", "train_fraction", "label_noise")
    for state in sorted((s for s in states if s.kind == "run" and s.finished is not None), key=age_of):
        found[(*(state.spec[name] for name in names), state.spec["recipe"]["precision"])] = state
    return list(found.values())


def age_of(state: State) -> tuple[int, str]:
    """Return what sorts finished trainings from the oldest to the youngest."""
    return (state.folder / FINISHED["run"]).stat().st_mtime_ns, state.folder.name


def describe_failure(state: State) -> str:
    """Return which task failed, and why, on one line."""
    spec = state.spec
    if state.kind == "tuning":
        return f"{spec['method']}, tuning: {state.reason}"
    fraction, noisy = spec.get("train_fraction", 1.0), spec.get("label_noise", 0.0)
    share = f", {fraction:.0%} of the rows" if fraction < 1 else ""
    noise = f", {noisy:.0%} random labels" if noisy else ""
    return f"{spec['method']}, seed {spec['seed']}{share}{noise}: {state.reason}"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return read_json(file)
    except FileNotFoundError:
        return None
