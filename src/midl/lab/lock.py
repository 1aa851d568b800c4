"""A folder's lock: one process at a time works in it; the system lets go of it even when the process is killed."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

from midl.errors import MIDLError

__all__ = ["FolderLock", "InUseError"]


class InUseError(MIDLError):
    """Another process works in the folder."""


class FolderLock:
    """An advisory lock on a folder, which must exist; a context manager.

    Args:
        folder: gets a file ``.lock``, which stays there.

    Raises:
        InUseError: on entry, another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Any = None

    def __enter__(self) -> FolderLock:
        try:
            import fcntl
        except ImportError:  # Windows has no such lock; two processes would only repeat each other's work.
            return self
        self._file = (self._folder / ".lock").open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._release()
            raise InUseError(f"{self._folder} is in use by another process, expected one at a time") from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @staticmethod
    def is_held(folder: Path) -> bool:
        """Return whether some process, this one included, works in the folder now."""
        try:
            import fcntl

            with (folder / ".lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (ImportError, FileNotFoundError):
            return False
        except OSError:
            return True
        return False
