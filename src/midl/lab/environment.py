"""What a result depends on besides its settings: command, versions, machine, source commit, kernels, data mirror."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import midl
from midl.errors import DataError
from midl.lab.data import names
from midl.lab.data.cache import cache_path
from midl.lab.data.mirror import ENVIRONMENT_VARIABLE, SPLITS, mirror_path
from midl.lab.data.registry import find
from midl.machine import processor_name
from midl.ops import huge_pages, native
from midl.ops.dispatch import NAMES, selected_kernels, unavailable_reason

__all__ = [
    "describe_choice",
    "describe_command",
    "describe_data",
    "describe_environment",
    "describe_extras",
    "describe_kernels",
    "describe_machine",
]

_PACKAGES = (
    "torch", "numpy", "accelerate", "datasets", "safetensors", "scikit-learn", "matplotlib", "rich", "typer", "triton",
)  # fmt: skip
_EXTRAS = {
    "save": ("safetensors",),
    "lab": (
        "accelerate",
        "datasets",
        "matplotlib",
        "numpy",
        "PIL",
        "rich",
        "safetensors",
        "scipy",
        "sklearn",
        "tensorboard",
        "tokenizers",
        "typer",
    ),
    "ray": ("ray",),
    "transformers": ("transformers",),
}


def describe_environment() -> dict[str, Any]:
    """Return everything beside the settings that a result should be read with, as JSON values."""
    return {
        "command": describe_command(sys.argv),
        "versions": describe_versions(),
        "machine": describe_machine(),
        "commit": describe_commit(),
        "kernels": {"selected": selected_kernels(), **describe_kernels()},
    }


def describe_command(arguments: Sequence[str]) -> str:
    """Return a command line without the folders of this machine: absolute paths keep their last part.

    >>> describe_command(["/opt/bin/midl", "report", "/home/me/runs", "--out=/home/me/page.html"])
    'midl report runs --out=page.html'
    """
    parts = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if Path(value).is_absolute():
            argument = f"{option}{equals}{Path(value).name}"
        parts.append(Path(argument).name if Path(argument).is_absolute() else argument)
    return shlex.join(parts)


def describe_versions() -> dict[str, str | None]:
    """Return the versions of midl, Python and the packages that results depend on; None where not installed."""
    versions: dict[str, str | None] = {"midl": midl.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, threads, instruction sets of torch and of the native kernels, memory, accelerator.

    Huge pages are those that kept panels get; 0 where the system has none for the asking.
    """
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor_name(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "native_kernels": _native_instruction_sets(),
        "memory_gib": _memory_gib(),
        "huge_page_mib": huge_pages.page_size() / 2**20,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe_kernels() -> dict[str, str | None]:
    """Return, for each implementation of midl's ops, why it cannot run here, or None if it can."""
    return {name: unavailable_reason(name) for name in NAMES}


def describe_choice() -> dict[str, str]:
    """Return the constants by which ``auto`` chooses on this CPU, and what it chooses for a few layers."""
    if unavailable_reason("native") is not None:
        return {"linear layers": "dense, no native kernels"}
    from midl.config import num_active_groups
    from midl.ops.cpu_calibration import constants
    from midl.ops.cpu_cost import ROWS, sparse_wins

    c = constants()
    described = {
        "constants": c.source,
        "memory": f"{c.bandwidth:g} GB/s",
        "dense call": f"{c.dense_call / 1000:.1f} µs",
    }
    at = "/".join(map(str, ROWS))
    measured = {
        "float32": c.float32, "bfloat16": c.bfloat16,
        "convolution float32": c.convolution_float32, "convolution bfloat16": c.convolution_bfloat16,
    }  # fmt: skip
    for dtype, rates in measured.items():
        forms = {"dense": rates.dense, "G=1": rates.single, "G=16": rates.groups_of_16, "G=32": rates.groups_of_32}
        described[dtype] = "; ".join(f"{form} {'/'.join(f'{r:g}' for r in values)}" for form, values in forms.items())
        described[dtype] += f" GMAC/s at {at} rows"
    for n in (256, 1024, 4096):
        for group_size in (1, 32):
            k = num_active_groups(0.45, n // group_size)
            kernels = [
                "native" if sparse_wins(c, "linear", "float32", rows, n, n, k, group_size, 1) else "dense"
                for rows in ROWS
            ]
            described[f"{n}x{n} G={group_size}"] = f"{'/'.join(kernels)} at {at} rows"
    for group_size in (8, 16):
        k = num_active_groups(0.45, 128 // group_size)
        wins = sparse_wins(c, "conv2d", "float32", 256, 1152, 128, k, group_size, 1)
        described[f"128 channels 3x3 16x16 G={group_size}"] = "native" if wins else "dense"
    return described


def describe_extras() -> dict[str, bool]:
    """Return which optional parts are installed."""
    return {
        extra: all(importlib.util.find_spec(module) is not None for module in modules)
        for extra, modules in _EXTRAS.items()
    }


def describe_data() -> dict[str, Any]:
    """Return the mirror's folder, the cache's folder and where each data set would come from."""
    try:
        mirror, problem = mirror_path(), None
    except DataError as error:
        mirror, problem = None, str(error)
    sources = {}
    for name in names():
        spec = find(name)
        if not spec.columns:
            sources[name] = "embedded"
        elif mirror is None:
            sources[name] = (problem and "mirror unusable") or spec.origin
        else:
            missing = [split for split in SPLITS if not (mirror / name / f"{split}.parquet").is_file()]
            sources[name] = f"missing in the mirror: {', '.join(missing)}" if missing else "mirror"
    return {
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE),
        "problem": problem,
        "cache": str(cache_path()),
        "sources": sources,
    }


def describe_commit() -> str | None:
    """Return the commit of the source tree that midl runs from, with ``+changes`` if it has any; None if installed."""
    folder = Path(midl.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # A virtual environment inside somebody's repository is not midl's source tree.
        if not git("ls-files", "--", "__init__.py"):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _native_instruction_sets() -> str | None:
    if unavailable_reason("native"):
        return None
    return f"{native.instruction_set()}, of {', '.join(native.supported_instruction_sets())}"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
