"""A worker: takes the tasks of a plan one by one, whoever else is at work on them, until none is left."""

from __future__ import annotations

import dataclasses
import errno
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from midl.errors import MIDLError
from midl.lab.files import write_json
from midl.lab.lock import FolderLock, InUseError
from midl.lab.processes import accelerator, tell_all
from midl.lab.reproduce.execute import clear, execute
from midl.lab.reproduce.plan import MEASURES_VERSION, Plan, Task
from midl.lab.reproduce.state import FINISHED, read_failure, read_finished, record_failure

__all__ = ["Outcome", "Watcher", "prepare", "work"]

_PAUSE = 0.2


class Watcher(Protocol):
    """Is told what a worker does."""

    def begin(self, task: Task) -> None:
        """A task is about to run."""

    def step(self, done: int, total: int) -> None:
        """The training under way has done so many steps."""

    def end(self, task: Task, finished: dict[str, Any]) -> None:
        """A task is done."""

    def fail(self, task: Task, reason: str) -> None:
        """A task ended with an error."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a plan stands when nothing is left to do: folders of the failed tasks, and of those that need them."""

    failed: tuple[Path, ...]
    blocked: tuple[Path, ...]


def prepare(plan: Plan, out: Path) -> None:
    """Make every task's folder and write down what it is to be, so that ``midl runs`` shows what waits."""
    for task in plan.tasks:
        file = out / task.folder / "run.json"
        if not file.exists():
            needs = [str(path) for path in task.needs]
            write_json(file, {"kind": task.kind, "needs": needs, "settings": task.settings})
        elif (file.parent / FINISHED[task.kind]).exists():
            clear(file.parent)  # for a process that was killed right after it had finished


def work(plan: Plan, out: Path, since: float, watcher: Watcher) -> Outcome:
    """Run every task that is not done, as soon as what it needs is, and return when none is left.

    Several workers may run at once, on one machine or on several that share ``out``: a task's folder is locked while
    it runs. A task that failed after ``since`` is not tried again.

    Processes that ``accelerate launch`` or ``torchrun`` started are one worker: the first decides, all train.

    Raises:
        MIDLError: the disk is full or cannot be written; what was finished stays.
    """
    place = accelerator()
    if not place.is_main_process:
        _follow(plan, out)
        return Outcome((), ())
    failed: set[Path] = set()
    blocked: set[Path] = set()
    open_tasks = list(plan.tasks)
    kinds = {task.folder: task.kind for task in plan.tasks}
    while open_tasks:
        advanced = False
        for task in list(open_tasks):
            folder = out / task.folder
            if _is_done(task, out):
                open_tasks.remove(task)
                continue
            if _failed_since(folder, since):
                failed.add(task.folder)
                open_tasks.remove(task)
                continue
            if any(need in failed or need in blocked for need in task.needs):
                blocked.add(task.folder)
                open_tasks.remove(task)
                continue
            if any(read_finished(out / need, kinds[need]) is None for need in task.needs):
                continue
            try:
                with FolderLock(folder):
                    if not _is_done(task, out) and not _failed_since(folder, since):
                        tell_all(plan.tasks.index(task), place)
                        _attempt(task, out, watcher)
                        advanced = True
            except InUseError:
                continue
        if not advanced and open_tasks:
            time.sleep(_PAUSE)
    tell_all(None, place)
    return Outcome(tuple(sorted(failed)), tuple(sorted(blocked)))


def _follow(plan: Plan, out: Path) -> None:
    """Train along with the first process, which says what, until it says that nothing is left."""
    place = accelerator()
    while (index := tell_all(None, place)) is not None:
        with suppress(MIDLError):  # the first process meets the same error and writes it down
            execute(plan.tasks[index], out)


def _attempt(task: Task, out: Path, watcher: Watcher) -> None:
    watcher.begin(task)
    try:
        finished = execute(task, out, watcher.step)
    except Exception as error:  # whatever it is, the other runs go on
        if _disk_is_full(error):
            raise MIDLError(
                f"reproduce: {out / task.folder} cannot be written ({error}); finished runs are kept: make room and "
                "start the same command again"
            ) from error
        record_failure(out / task.folder, error, traceback.format_exc())
        if not isinstance(error, MIDLError) and accelerator().num_processes > 1:
            raise  # the other processes may be waiting for this one; only the launcher can end them
        watcher.fail(task, str(error))
    else:
        watcher.end(task, finished)


def _is_done(task: Task, out: Path) -> bool:
    finished = read_finished(out / task.folder, task.kind)
    return finished is not None and (task.kind == "tuning" or finished["measures_version"] == MEASURES_VERSION)


def _failed_since(folder: Path, since: float) -> bool:
    failure = read_failure(folder)
    return failure is not None and failure["time"] >= since


def _disk_is_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    # safetensors passes the system's error on as text.
    return getattr(error, "errno", None) in full or any(f"os error {number})" in str(error) for number in full)
