"""The cache of decoded data sets: NumPy files, written once, memory-mapped by every later run."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np

from midl.lab.data.dataset import Arrays
from midl.machine import cache_path

__all__ = ["cache_path", "read_arrays", "scratch_folder", "write_arrays"]


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder inside the cache, where there is room for a whole data set."""
    cache_path().mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=cache_path(), prefix="scratch-", ignore_cleanup_errors=True)


def read_arrays(key: str) -> Arrays | None:
    """Return the arrays stored under ``key``, memory-mapped, or None where they are absent or damaged."""
    folder = cache_path() / "data" / key
    try:
        # "c": writable in memory, so that torch takes the array as it is; the file never changes.
        return Arrays(**{f.name: np.load(folder / f"{f.name}.npy", mmap_mode="c") for f in dataclasses.fields(Arrays)})
    except (OSError, ValueError):
        return None


def write_arrays(key: str, arrays: Arrays) -> None:
    """Store the arrays under ``key``: a finished folder appears at once or not at all."""
    folder = cache_path() / "data" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{key}."))
    try:
        for field in dataclasses.fields(Arrays):
            np.save(temporary / f"{field.name}.npy", getattr(arrays, field.name))
        if folder.exists() and read_arrays(key) is None:
            shutil.rmtree(folder)
        try:
            temporary.rename(folder)
        except OSError:
            if read_arrays(key) is None:  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
