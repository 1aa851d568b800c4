"""The state of a run, read from its folder: whoever wrote it, on whatever machine, and however it ended."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Literal

from midl.lab.files import write_json
from midl.lab.lock import FolderLock

__all__ = ["FINISHED", "State", "read_failure", "read_finished", "read_state", "record_failure"]

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


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
