"""Memory of forward and backward: bytes saved for the backward pass and peak resident bytes (float32)."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import midl
from midl.lab.bench.cases.forward import ACTIVE
from midl.lab.bench.midl_layers import check_forward, contender_name, implementation, make_linear
from midl.lab.bench.registry import Case, register
from midl.lab.bench.results import Row
from midl.lab.bench.session import Session

__all__ = ["peak_bytes", "saved_bytes"]


@register
def cases() -> Iterator[Case]:
    """Yield three shapes at batch 512; each has nn.Linear and both straight-through rules."""
    for d, n, batch in ((1024, 1024, 512), (1024, 4096, 512), (4096, 1024, 512)):
        yield Case(
            "memory/float32",
            f"{d}x{n}/batch{batch}",
            functools.partial(_measure, d, n, batch),
            quick=(d, n) == (1024, 4096),
            params={"dtype": "float32", "in_features": d, "out_features": n, "batch": batch},
        )


def _measure(d: int, n: int, batch: int, session: Session, case: Case) -> list[Row]:
    x = torch.randn(batch, d, requires_grad=True)
    dense = nn.Linear(d, n)
    baseline = _footprint(dense, x)
    rows = []
    for kernel in session.kernels:
        for ste in ("selected", "dense"):
            layer = make_linear(d, n, torch.float32, active=ACTIVE, group_size=32, ste=ste).requires_grad_().train()
            parity = check_forward(layer, x.detach(), kernel)
            name = contender_name(kernel, G=32, active=ACTIVE, ste=ste)
            with midl.kernels(kernel):
                memory = {"nn.Linear": baseline, name: _footprint(layer, x)} if parity.ok else None
            rows.append(
                Row(
                    case=case.name,
                    group=case.group,
                    contender=name,
                    params={**case.params, "group_size": 32, "active": ACTIVE, "ste": ste, "kernels": kernel},
                    implementation=implementation(layer, x, kernel, backward=True),
                    parity=parity.to_dict(),
                    user="nn.Linear",
                    memory=memory,
                )
            )
    return rows


def _footprint(layer: nn.Module, x: Tensor) -> dict[str, int | None]:
    def forward_backward() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).sum().backward()

    return {"saved": saved_bytes(layer, x), "peak": peak_bytes(forward_backward)}


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes that ``layer(x)`` keeps for its backward pass, parameters left out, each storage once.

    >>> saved_bytes(nn.Linear(8, 16), torch.ones(4, 8, requires_grad=True))
    128
    """
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)  # kept, so that no storage is freed and counted again under the same address
    del y
    return sum(saved.values())


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Return by how much ``call`` raises resident memory at its peak, whoever allocates; None outside Linux.

    A first call fills pools and caches, which are not counted.
    """
    if not sys.platform.startswith("linux"):
        return None
    call()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide what the call takes again
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
