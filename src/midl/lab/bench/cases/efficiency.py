"""The full path by itself against the machine's ceilings: layers whose light path and gate cost next to nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from midl.lab.bench.cases.forward import ACTIVE, midl_linear
from midl.lab.bench.contest import Contender, Contest, hold
from midl.lab.bench.dense import add_dense_linears, dense_count
from midl.lab.bench.midl_layers import contender_name
from midl.lab.bench.reads import add_reads
from midl.lab.bench.registry import Case, register
from midl.lab.bench.results import Row
from midl.lab.bench.session import Session, fresh_inputs

__all__: list[str] = []

# Enough for rows to choose differently, and at most two percent of the multiply-adds of the layers below.
_RANK = 4
_GROUP_SIZE = 32


@register
def cases() -> Iterator[Case]:
    """Yield (d, n) in {1024, 4096}^2 at batch 1, where bytes bind, and 512, where multiply-adds do."""
    for d, n in itertools.product((1024, 4096), repeat=2):
        for batch in (1, 512):
            yield _case(d, n, batch, quick=(d, n, batch) == (1024, 4096, 512))


def _case(d: int, n: int, batch: int, *, quick: bool) -> Case:
    """Return a case whose roofline counts the selected neurons alone: their multiply-adds, or their weights' bytes."""

    def measure(session: Session, case: Case) -> list[Row]:
        dtype = torch.float32
        with torch.no_grad():
            inputs = fresh_inputs(batch, d, dtype=dtype)
            contest = Contest(
                session.keep_cold(dense_count(False) * d * n * dtype.itemsize), session.peak_gflops(dtype)
            )
            add_dense_linears(contest, d, n, inputs, compiling=False)

            selected = round(ACTIVE * n / _GROUP_SIZE) * _GROUP_SIZE

            def full_path() -> Contender:
                contender = midl_linear(contest, "native", n, _GROUP_SIZE, ACTIVE, inputs, rank=_RANK)
                # One row reads what it selected; many rows together want every neuron.
                wanted = selected if batch == 1 else n
                flops, read_bytes = 2.0 * batch * selected * d, float(wanted * d * dtype.itemsize)
                return dataclasses.replace(contender, flops=flops, read_bytes=read_bytes)

            contest.add(contender_name("native", G=_GROUP_SIZE, active=ACTIVE), full_path)
            if batch == 1:
                add_reads(contest, selected * d, dtype)
            return hold(contest, session, case)

    params = {"dtype": "float32", "in_features": d, "out_features": n, "batch": batch}
    return Case("efficiency/float32", f"{d}x{n}/batch{batch}", measure, quick, params)
