"""The cache of decoded data sets: NumPy files, written once, memory-mapped by every later run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from midl.errors import DataError
from midl.lab.data.dataset import Arrays
from midl.machine import cache_path

__all__ = ["cache_path", "read_arrays", "scratch_folder", "write_arrays"]


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder inside the cache, where there is room for a whole data set.

    Raises:
        DataError: the cache cannot be written.
    """
    with _usable():
        cache_path().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=cache_path(), prefix="scratch-", ignore_cleanup_errors=True)


def read_arrays(key: str) -> Arrays | None:
    """Return the arrays stored under ``key``, memory-mapped, or None where they are absent or damaged.

    Raises:
        DataError: the cache is no folder or may not be read.
    """
    folder = cache_path() / "data" / key
    try:
        # "c": writable in memory, so that torch takes the array as it is; the file never changes.
        return Arrays(**{f.name: np.load(folder / f"{f.name}.npy", mmap_mode="c") for f in dataclasses.fields(Arrays)})
    except (PermissionError, NotADirectoryError) as error:
        raise _unusable(error) from error
    except (OSError, ValueError):
        return None


def write_arrays(key: str, arrays: Arrays) -> None:
    """Store the arrays under ``key``: a finished folder appears at once or not at all.

    Raises:
        DataError: the cache cannot be written.
    """
    with _usable():
        _write(cache_path() / "data" / key, key, arrays)


def _write(folder: Path, key: str, arrays: Arrays) -> None:
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


@contextmanager
def _usable() -> Iterator[None]:
    """Turn the system's errors inside the block into one that names the cache."""
    try:
        yield
    except OSError as error:
        raise _unusable(error) from error


def _unusable(error: OSError) -> DataError:
    path, value = cache_path(), os.environ.get("MIDL_CACHE")
    named = f"MIDL_CACHE={value!r}" if value else f"the cache {path} (MIDL_CACHE is not set)"
    found = "is no folder" if os.path.exists(path) and not path.is_dir() else f"cannot be used ({error})"
    return DataError(f"{named} {found}, expected a folder that can be read and written")
