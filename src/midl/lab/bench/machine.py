"""The machine header of a benchmark file: what ran where."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import midl
from midl.machine import processor_name
from midl.ops import huge_pages

__all__ = ["busy_machine", "cache_sizes", "describe_machine", "last_level_cache"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Where the system does not tell: larger than most, so that "cold" stays true.
_ASSUMED_CACHE = 64 * 2**20


def describe_machine() -> dict[str, Any]:
    """Return the header: processor, threads, caches, versions, commit, date and load.

    >>> sorted(describe_machine())[:4]
    ['caches', 'capability', 'commit', 'cores']
    """
    return {
        "cpu": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": cache_sizes(),
        "memory_bytes": _memory_bytes(),
        "huge_page_bytes": huge_pages.page_size(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "midl": midl.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def busy_machine(header: dict[str, Any]) -> str:
    """Return a warning if others left fewer free cores than the run uses, else nothing.

    >>> busy_machine({"load_average": [3.0], "cores": 4, "threads": 2})
    'busy: load average 3.0 on 4 cores before this run of 2 threads; times and ratios are unreliable'
    >>> busy_machine({"load_average": [0.4], "cores": 4, "threads": 2})
    ''
    """
    load, cores, threads = header["load_average"][0], header["cores"], header["threads"]
    if load + threads <= cores:
        return ""
    return (
        f"busy: load average {load} on {cores} cores before this run of {threads} threads; "
        "times and ratios are unreliable"
    )


def cache_sizes(root: Path = _CACHES) -> dict[str, int]:
    """Return the data and unified caches that one core sees, name to bytes; empty where the system does not tell."""
    sizes = {}
    for index in sorted(root.glob("index*")):
        kind = (index / "type").read_text().strip()
        if kind != "Instruction":
            sizes[f"L{(index / 'level').read_text().strip()}"] = _parse_size((index / "size").read_text().strip())
    return sizes


def last_level_cache(sizes: dict[str, int] | None = None) -> int:
    """Return the bytes of the largest cache; 64 MiB are assumed where the system does not tell.

    >>> last_level_cache({"L1": 32768, "L3": 33554432})
    33554432
    """
    return max((cache_sizes() if sizes is None else sizes).values(), default=_ASSUMED_CACHE)


def _parse_size(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _commit() -> str | None:
    """Return the commit of the source tree that runs, marked if it has changes; None for an installed package."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(midl.__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
