"""Progress bars of a comparison: one over all runs, one for the run under way."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from midl.lab.compare import METHODS
from midl.lab.methods import find

__all__ = ["ProgressBars"]


class ProgressBars:
    """A watcher for :func:`midl.lab.compare.compare` that draws; a context manager.

    Args:
        seeds: of the comparison, for the number of runs.
    """

    def __init__(self, seeds: tuple[int, ...]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._runs = self._progress.add_task("runs", total=len(seeds) * len(METHODS))
        self._steps = self._progress.add_task("loading data", total=None)

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, method: str, seed: int) -> None:
        """Show which run is under way."""
        self._progress.reset(self._steps, total=None, description=f"{find(method).title}, seed {seed}")

    def step(self, done: int, total: int) -> None:
        """Show the training steps of the run under way."""
        self._progress.update(self._steps, completed=done, total=total)

    def end(self, method: str, seed: int, accuracy: float) -> None:
        """Print the result of a run, found finished or just trained."""
        self._progress.console.print(f"{find(method).title}, seed {seed}: {accuracy:.2f} %", highlight=False)
        self._progress.advance(self._runs)

    def measure(self) -> None:
        """Show that latency and memory are being measured."""
        self._progress.reset(self._steps, total=None, description="measuring latency and memory")
