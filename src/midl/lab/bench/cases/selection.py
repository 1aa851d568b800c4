"""Selection of the k largest of N scores per row against torch.topk (float32)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from midl.config import num_active_groups
from midl.lab.bench.cases.forward import ACTIVE
from midl.lab.bench.contest import Contender, Contest, hold
from midl.lab.bench.parity import Parity
from midl.lab.bench.registry import Case, register
from midl.lab.bench.results import Row
from midl.lab.bench.session import Session, fresh_inputs
from midl.ops.dispatch import unavailable_reason
from midl.selection import topk_groups

__all__: list[str] = []

Select = Callable[[Tensor, int], Tensor]


@register
def cases() -> Iterator[Case]:
    """Yield rows of 32 to 4096 groups, batch 1 and 256."""
    for groups in (32, 128, 1024, 4096):
        for batch in (1, 256):
            yield Case(
                "selection/float32",
                f"{batch}x{groups}",
                functools.partial(_measure, batch, groups),
                quick=(batch, groups) == (256, 1024),
                params={"dtype": "float32", "batch": batch, "groups": groups, "active": ACTIVE},
            )


def _selectors() -> dict[str, Select]:
    """Return our selection functions: the reference and, where it runs, the native one."""
    selectors: dict[str, Select] = {"reference": topk_groups}
    if unavailable_reason("native") is None:
        selectors["native"] = importlib.import_module("midl.ops.native").topk_groups
    return selectors


def _measure(batch: int, groups: int, session: Session, case: Case) -> list[Row]:
    k = num_active_groups(ACTIVE, groups)
    scores = fresh_inputs(batch, groups, dtype=torch.float32)
    # Scores were just computed, so they are in the cache: nothing to rotate.
    contest = Contest(session.keep_warm(), session.peak_gflops(torch.float32), inner=10)
    contest.add("torch.topk", lambda: _contender("torch.topk", "user", _topk, scores, k))
    contest.add("torch.topk unsorted", lambda: _contender("torch.topk unsorted", "dense", _topk_unsorted, scores, k))
    for name, select in _selectors().items():
        contest.add(name, functools.partial(_contender, f"midl {name}", "midl", select, scores, k))
    return hold(contest, session, case)


def _topk(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k).indices


def _topk_unsorted(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k, sorted=False).indices


def _contender(name: str, role: str, select: Select, scores: list[Tensor], k: int) -> Contender:
    def check() -> Parity:
        chosen = select(scores[0], k).sort(dim=-1).values.int()
        wrong = int((chosen != topk_groups(scores[0], k)).sum())
        return Parity(float(wrong), 0.0, "indices that differ" if wrong else "")

    batch, groups = scores[0].shape
    return Contender(
        name=name,
        role=role,  # type: ignore[arg-type]
        prepare=lambda i: scores[i % len(scores)].clone(),
        call=lambda s: select(s, k),
        check=check,
        read_bytes=4 * batch * (groups + k),
        implementation=name.removeprefix("midl ") if role == "midl" else "",
        params={"k": k},
    )
