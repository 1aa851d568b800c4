"""Run folders: settings, environment, results, checkpoints and models of one experiment, safe to kill at any time.

A folder's name ends in a hash of its settings, so other settings go elsewhere and the same ones resume.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from midl.errors import MIDLError
from midl.lab.environment import describe_environment
from midl.lab.files import hash_json, parse_json, read_json, write_json, write_text
from midl.lab.lock import FolderLock

__all__ = ["RunFolder"]


class RunFolder:
    """The folder of one experiment; use it as a context manager, which keeps other processes out.

    ``config.json``: the settings. ``environment.json``: a list, one entry per start. ``results.jsonl``: one JSON object
    per finished run. ``checkpoints/``: runs under way. ``models/``: trained models, for ``midl.load_``.

    Args:
        parent: folder that holds run folders.
        title: readable start of the folder's name.
        settings: JSON values that the results depend on.

    Raises:
        MIDLError: the folder was made with other settings, or another process is working in it.
    """

    def __init__(self, parent: Path, title: str, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.path = parent / f"{title}-{hash_json(settings)[:10]}"
        self._lock = FolderLock(self.path)

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()
        config = self.path / "config.json"
        if config.exists():
            stored = read_json(config)
            if stored != self.settings:
                self._lock.__exit__(None, None, None)
                raise MIDLError(f"{config} holds {stored}, expected {self.settings}: choose another out folder")
        else:
            write_json(config, self.settings)
        self._record_environment()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def checkpoint(self, run: str) -> Path:
        """Return where a run's training checkpoint lies."""
        return self.path / "checkpoints" / f"{run}.safetensors"

    def model(self, run: str) -> Path:
        """Return where a run's trained model lies."""
        return self.path / "models" / f"{run}.safetensors"

    def results(self) -> list[dict[str, Any]]:
        """Return the finished runs, in the order they finished."""
        file = self.path / "results.jsonl"
        return [parse_json(line, file) for line in file.read_text().splitlines()] if file.exists() else []

    def append(self, result: dict[str, Any]) -> None:
        """Add a finished run."""
        lines = [json.dumps(entry) for entry in [*self.results(), result]]
        write_text(self.path / "results.jsonl", "\n".join(lines) + "\n")

    def _record_environment(self) -> None:
        file = self.path / "environment.json"
        starts = read_json(file) if file.exists() else []
        write_json(file, [*starts, describe_environment()])
