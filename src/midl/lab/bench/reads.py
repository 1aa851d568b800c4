"""Plain reads of memory beside a contender that waits for it: what the machine gives in the same seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from midl.lab.bench.contest import Contender, Contest
from midl.lab.bench.parity import Parity
from midl.ops import huge_pages

__all__ = ["add_reads"]


def add_reads(contest: Contest, count: int, dtype: torch.dtype) -> None:
    """Add readers of ``count`` elements that lie side by side, in huge pages as kept panels do, in as many copies.

    >>> from midl.lab.bench.session import Session
    >>> contest = Contest(Session.keep_warm(), gflops=None)
    >>> add_reads(contest, 1000, torch.float32)
    >>> [contender.name for contender in contest.contenders]
    ['torch.sum of as much', 'torch.max of as much']

    Args:
        contest: where they take turns.
        count: of the elements that ours must read.
        dtype: theirs.
    """
    readers: dict[str, Callable[[Tensor], object]] = {"torch.sum": torch.sum, "torch.max": torch.max}
    for name, read in readers.items():
        buffers = [huge_pages.empty(count, dtype).fill_(1.0) for _ in range(contest.cold.copies)]
        contest.contenders.append(
            Contender(
                name=f"{name} of as much",
                role="read",
                prepare=functools.partial(_in_turn, buffers),
                call=read,
                check=lambda: Parity(0.0, 0.0),
            )
        )


def _in_turn(buffers: Sequence[Tensor], round_: int) -> Tensor:
    return buffers[round_ % len(buffers)]
