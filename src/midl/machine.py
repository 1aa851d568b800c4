"""What midl asks the machine: where to keep what can be made again, and which processor this is."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

__all__ = ["cache_path", "processor_name"]


def cache_path() -> Path:
    """Return the cache folder: ``$MIDL_CACHE``, or ``midl`` in the platform's cache folder.

    >>> cache_path().is_absolute()
    True
    """
    if value := os.environ.get("MIDL_CACHE"):
        return Path(value).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "midl"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "midl"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "midl"


def processor_name() -> str:
    """Return the processor's name as its maker writes it.

    >>> len(processor_name()) > 0
    True
    """
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
