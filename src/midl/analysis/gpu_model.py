"""Predictions for GPUs that are not here, as rows for a table: latency, where MID-L can win, peak memory.

A model and not a measurement: see :mod:`midl.ops.gpu_cost` for its assumptions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from midl.errors import MIDLError
from midl.ops.gpu_cost import (
    DENSE_EFFICIENCY,
    DEVICES,
    MIDL_EFFICIENCY,
    Call,
    Device,
    dense_kernels,
    midl_kernels,
    predict,
    predicted_speedup,
)

__all__ = ["MemoryModel", "break_even_active", "device_named", "latency_rows", "layer_memory", "win_rows"]

LAYERS = ((1024, 4096), (4096, 16384))
"""(in_features, out_features) of the tables: a small and a large feed-forward layer."""

BATCHES = (1, 8, 64, 512, 4096, 16384)
GROUP_SIZES = (32, 128, 256)


def device_named(name: str) -> Device:
    """Return the data sheet of ``"h100"``, ``"a100"``, ``"l4"`` or ``"rtx4090"``.

    >>> device_named("a100").name
    'A100 SXM4 80 GB'

    Raises:
        MIDLError: unknown name.
    """
    if name not in DEVICES:
        raise MIDLError(f"device={name!r}, expected one of {sorted(DEVICES)}")
    return DEVICES[name]


def make_call(
    rows: int, in_features: int, out_features: int, *, group_size: int, active: float = 0.45,
    dtype: torch.dtype = torch.float16, tf32: bool = False,
) -> Call:  # fmt: skip
    """Return a call whose light path costs a tenth of the dense product."""
    groups = out_features // group_size
    rank = max(8, round(0.1 * in_features * out_features / (in_features + out_features) / 8) * 8)
    return Call(rows, in_features, out_features, group_size, max(1, round(active * groups)), rank, dtype, tf32)


def latency_rows(device: Device, call: Call, *, backward: bool = False) -> list[dict[str, Any]]:
    """Return one row per kernel launch of the call, MID-L's and then the dense layer's, and their totals.

    >>> rows = latency_rows(device_named("h100"), make_call(1, 4096, 16384, group_size=32))
    >>> [row["kernel"] for row in rows if row["bound"] == "memory"]
    ['panels', 'interpolation', 'dense']

    Each row: layer, kernel, memory (bytes), flops, microseconds (predicted) and bound, what decides the time.
    """
    out: list[dict[str, Any]] = []
    for layer, kernels, efficiency in (
        ("MID-L", midl_kernels(call, device, backward), MIDL_EFFICIENCY),
        ("dense", dense_kernels(call, backward), DENSE_EFFICIENCY),
    ):
        for kernel in kernels:
            bounds = kernel.bounds(device, call, efficiency)
            slowest = max(bounds, key=bounds.__getitem__)
            seconds = kernel.seconds(device, call, efficiency)
            out.append(
                {
                    "layer": layer,
                    "kernel": kernel.name,
                    "memory": kernel.memory,
                    "flops": kernel.matrix + kernel.scalar,
                    "microseconds": 1e6 * seconds,
                    "bound": slowest if bounds[slowest] > seconds / 2 else "launch",
                }
            )
        total = 1e6 * predict(call, device, dense=layer == "dense", backward=backward)
        out.append(
            {"layer": layer, "kernel": "total", "memory": None, "flops": None, "microseconds": total, "bound": ""}
        )
    return out


def break_even_active(
    device: Device, rows: int, in_features: int, out_features: int, group_size: int, *,
    dtype: torch.dtype = torch.float16, backward: bool = False,
) -> float:  # fmt: skip
    """Return the largest active fraction, in steps of 0.05, at which MID-L is predicted to beat dense; 0 if none."""
    for step in range(20, 0, -1):
        call = make_call(rows, in_features, out_features, group_size=group_size, active=step / 20, dtype=dtype)
        if predicted_speedup(call, device, backward=backward) > 1:
            return step / 20
    return 0.0


def win_rows(device: Device, dtype: torch.dtype = torch.float16) -> list[dict[str, Any]]:
    """Return where MID-L is predicted to win: one row per layer, batch and group size.

    Each row: in_features, out_features, batch, group_size, microseconds and dense_microseconds (forward, 45 % active),
    speedup, break_even (the largest active fraction that wins) and training_speedup (forward and backward).
    """
    out: list[dict[str, Any]] = []
    for d, n in LAYERS:
        for rows in BATCHES:
            for group_size in GROUP_SIZES:
                call = make_call(rows, d, n, group_size=group_size, dtype=dtype)
                ours, dense = predict(call, device), predict(call, device, dense=True)
                both = ours + predict(call, device, backward=True)
                dense_both = dense + predict(call, device, dense=True, backward=True)
                row = {
                    "in_features": d,
                    "out_features": n,
                    "batch": rows,
                    "group_size": group_size,
                    "microseconds": 1e6 * ours,
                    "dense_microseconds": 1e6 * dense,
                    "speedup": dense / ours,
                    "break_even": break_even_active(device, rows, d, n, group_size, dtype=dtype),
                    "training_speedup": dense_both / both,
                }
                out.append(row)
    return out


@dataclasses.dataclass(frozen=True)
class MemoryModel:
    """Bytes of a layer's call on the GPU path.

    ``saved`` lives from the forward to the backward pass beside the weights; ``forward_workspace`` and
    ``backward_workspace`` only during a call; ``gradients`` are those of the weights.
    """

    weights: int
    saved: int
    output: int
    forward_workspace: int
    backward_workspace: int
    gradients: int

    @property
    def peak(self) -> int:
        """Bytes at the busiest moment of a training step of this layer alone."""
        forward = self.weights + self.saved + self.output + self.forward_workspace
        # The gradient of the output replaces the output.
        backward = self.weights + self.saved + self.output + self.gradients + self.backward_workspace
        return max(forward, backward)


def layer_memory(call: Call, *, projection: bool = True, bias: bool = True) -> MemoryModel:
    """Return what a linear layer's call takes; nothing of it grows with rows times neurons but the output.

    >>> memory = layer_memory(make_call(512, 1024, 4096, group_size=32))
    >>> memory.saved == 512 * (1024 * 2 + 58 * 4)
    True
    """
    size = call.dtype.itemsize
    rows, d, n, rank, groups = call.rows, call.fan_in, call.width, call.rank, call.groups
    weights = size * (n * d + rank * (d + n) + bias * n + projection * groups * (rank + 1))
    gates = 4 * rows * groups
    entries = 4 * rows * call.k
    sorting = entries + 4 * (2 * -(-rows // 64) * groups + 2 * groups)
    return MemoryModel(
        weights=weights,
        saved=rows * d * size + entries,
        output=rows * n * size,
        forward_workspace=4 * rows * rank + 2 * gates + sorting,
        # Code, logits, gates and their gradient; the gradients of code and x in float32, then x's rounded.
        backward_workspace=8 * rows * rank + 3 * gates + sorting + (8 + size) * rows * d,
        gradients=weights,
    )
