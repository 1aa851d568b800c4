"""TensorBoard scalars of a training: ``tensorboard --logdir RUNS`` shows all curves of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["Scalars"]


class Scalars:
    """The curves of one training; writing goes on where an earlier start ended.

    Args:
        folder: for TensorBoard's files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._written = 0

    def write(self, log: list[dict[str, Any]]) -> None:
        """Add the epochs of ``log`` (epoch, loss, lr, seconds) that this object has not written yet.

        The first call is told what earlier starts had finished, which is on disk already.
        """
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Epochs that were written and then lost with the process are trained again: TensorBoard forgets the first.
            self._writer = SummaryWriter(str(self._folder), purge_step=len(log) + 1)
            self._written = len(log)
        for entry in log[self._written :]:
            for name in ("loss", "lr", "seconds"):
                self._writer.add_scalar(name, entry[name], entry["epoch"])
        self._written = len(log)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
