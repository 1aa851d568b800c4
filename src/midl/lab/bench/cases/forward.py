"""Forward pass of the linear layer against nn.Linear and best dense, float32 and bfloat16."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import midl
from midl.lab.bench.contest import Contender, Contest, hold
from midl.lab.bench.dense import add_dense_linears, dense_count, free_compiled
from midl.lab.bench.midl_layers import (
    check_forward,
    contender_name,
    count_flops,
    implementation,
    make_linear,
    traffic,
)
from midl.lab.bench.registry import Case, register
from midl.lab.bench.results import Row
from midl.lab.bench.session import Session, fresh_inputs

__all__ = ["forward_case", "midl_linear"]

ACTIVE = 0.45


@register
def cases() -> Iterator[Case]:
    """Yield the grid: (d, n) in {1024, 4096}^2, five batches, groups of 1, 16 and 32 neurons."""
    for dtype in (torch.float32, torch.bfloat16):
        for d, n in itertools.product((1024, 4096), repeat=2):
            for batch in (1, 8, 32, 128, 512):
                quick = (d, n) == (1024, 4096) and batch in ((1, 32, 512) if dtype == torch.float32 else (8,))
                yield forward_case(
                    f"forward/{str(dtype).removeprefix('torch.')}", d, n, batch, dtype, groups=(1, 16, 32), quick=quick
                )


def forward_case(
    group: str,
    d: int,
    n: int,
    batch: int,
    dtype: torch.dtype = torch.float32,
    *,
    groups: Sequence[int] = (32,),
    actives: Sequence[float] = (ACTIVE,),
    threads: int | None = None,
    hot_calls: int = 0,
    quick: bool = False,
) -> Case:
    """Return a case with one contender of ours per group size, active fraction and kernel.

    Args:
        group: of the case.
        d: in_features.
        n: out_features.
        batch: rows, each with a selection of its own.
        dtype: of weights and input.
        groups: group sizes.
        actives: active fractions; the rank is the one that ``active=0.45`` gets.
        threads: part of the name where the runner changes the number of threads.
        hot_calls: if not 0, weights stay in the cache and this many calls are timed at once: call overhead.
        quick: whether ``--quick`` includes the case.
    """

    def measure(session: Session, case: Case) -> list[Row]:
        with torch.no_grad():
            inputs = fresh_inputs(batch, d, dtype=dtype)
            weight_bytes = d * n * dtype.itemsize
            cold = session.keep_warm() if hot_calls else session.keep_cold(dense_count(session.compile) * weight_bytes)
            contest = Contest(cold, session.peak_gflops(dtype), inner=hot_calls or 1)
            add_dense_linears(contest, d, n, inputs, compiling=session.compile)
            for kernel, size, active in itertools.product(session.kernels, groups, actives):
                name = contender_name(kernel, G=size, active=active)
                contest.add(name, functools.partial(midl_linear, contest, kernel, n, size, active, inputs))
            rows = hold(contest, session, case)
        if session.compile:
            free_compiled()
        return rows

    params: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "in_features": d,
        "out_features": n,
        "batch": batch,
    }
    size = f"{d}x{n}/batch{batch}"
    if threads is not None:
        params["threads"], size = threads, f"{size}/threads{threads}"
    return Case(group, size, measure, quick, params)


def midl_linear(
    contest: Contest, kernel: str, out_features: int, group_size: int, active: float, inputs: list[Tensor],
    rank: int | str = "auto",
) -> Contender:  # fmt: skip
    """Return the contender ``MIDLinear`` under ``kernel``, in ``eval()`` without gradients."""
    batch, d = inputs[0].shape
    copies = contest.cold.copies
    layers = [
        make_linear(d, out_features, inputs[0].dtype, active=ACTIVE, group_size=group_size, rank=rank)
        for _ in range(copies)
    ]
    for layer in layers:
        layer.active = active

    def prepare(i: int) -> tuple[midl.MIDLinear, Tensor]:
        midl.kernels(kernel)
        return layers[i % copies], inputs[i % len(inputs)].clone()

    return Contender(
        name=contender_name(kernel, G=group_size, active=active),
        role="midl",
        prepare=prepare,
        call=lambda argument: argument[0](argument[1]),
        check=lambda: check_forward(layers[0], inputs[0], kernel),
        flops=count_flops(lambda: layers[0](inputs[0])),
        read_bytes=traffic(layers[0], batch * d, batch * out_features, batch),
        implementation=implementation(layers[0], inputs[0], kernel),
        params={"group_size": group_size, "active": active, "rank": layers[0].rank, "kernels": kernel},
    )
