"""The one place that starts a Triton kernel; ahead-of-time compilation listens here for what would run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["Launch", "launch", "record_launches"]


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel launch: which kernel, on which grid, with what."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_recorders: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
    """Run ``kernel`` on ``grid``; while recording, note the launch instead."""
    if _recorders:
        _recorders[-1].append(Launch(kernel, grid, args, constants, warps, stages))
        return
    kernel[grid](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches of the block without running them; tensors may be on the meta device."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.remove(launches)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make ``x``'s GPU the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
