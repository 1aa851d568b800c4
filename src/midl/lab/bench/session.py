"""The settings of one benchmark run and what its cases share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from midl.lab.bench.ceilings import Ceilings
from midl.lab.bench.machine import last_level_cache

__all__ = ["Coldness", "Session", "fresh_inputs"]

_INPUTS = 4
# More copies of small weights cost a compilation each; beyond this a sweep over other memory replaces them.
_MAX_COPIES = 4


@dataclass(frozen=True)
class Coldness:
    """How weights are kept out of the cache: ``copies`` in turn and, where they are small, a sweep over ``buffer``."""

    copies: int
    buffer: Tensor | None

    def sweep(self) -> None:
        """Read the buffer."""
        if self.buffer is not None:
            self.buffer.sum()


@dataclass(frozen=True)
class Session:
    """Settings of a run.

    Args:
        ceilings: of this machine, for the roofline.
        kernels: implementations of midl's ops to time, each as a contender of its own.
        compile: whether ``torch.compile`` is a baseline.
        seconds: measuring time per case.
        min_rounds: rounds per case at least.
        cache: bytes of the last-level cache.
    """

    ceilings: Ceilings
    kernels: tuple[str, ...] = ("auto",)
    compile: bool = True
    seconds: float = 0.6
    min_rounds: int = 7
    cache: int = field(default_factory=last_level_cache)

    def keep_cold(self, round_bytes: int) -> Coldness:
        """Return copies and sweep such that twice the cache is read between two uses of the same weights.

        Args:
            round_bytes: bytes of weights that the dense contenders read in one round.
        """
        target = 2 * self.cache
        copies = min(_MAX_COPIES, max(1, math.ceil(target / round_bytes)))
        missing = target // copies - round_bytes
        return Coldness(copies, torch.zeros(missing // 4) if missing > 0 else None)

    @staticmethod
    def keep_warm() -> Coldness:
        """Return one copy and no sweep: for call overhead, where the cache is not the subject."""
        return Coldness(1, None)

    def peak_gflops(self, dtype: torch.dtype) -> float | None:
        """Return the compute ceiling for ``dtype``, or None where the ceilings were measured with other threads."""
        if torch.get_num_threads() != self.ceilings.threads:
            return None
        return self.ceilings.peak_gflops(dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {
            "kernels": list(self.kernels),
            "compile": self.compile,
            "seconds_per_case": self.seconds,
            "min_rounds": self.min_rounds,
            "cold_bytes": 2 * self.cache,
        }


def fresh_inputs(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """Return a few independent standard normal inputs; a contender gets a fresh copy of one each round."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(_INPUTS)]
