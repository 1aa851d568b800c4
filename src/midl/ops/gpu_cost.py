"""A model of what the GPU kernels cost: bytes, multiply-adds and launches, from shapes and data sheets alone.

Nothing here was measured on a GPU. Each kernel takes as long as the slowest of its memory traffic, its cache traffic
and its arithmetic, plus the gap to the next launch; docs/gpu.md has the formula. ``auto`` asks it on CUDA whether the
Triton kernels or a dense product should run.
"""

from __future__ import annotations

import dataclasses
import math

import torch

__all__ = ["DEVICES", "Call", "Device", "Kernel", "dense_kernels", "midl_kernels", "predict", "predicted_speedup"]

LAUNCH_GAP = 1.5e-6
"""Assumed seconds between the ends of two dependent kernels, launched from a CUDA graph."""

DENSE_EFFICIENCY, MIDL_EFFICIENCY = 0.8, 0.6
"""Assumed share of the Tensor Cores' peak that cuBLAS and a gathering Triton kernel reach."""

MEMORY_EFFICIENCY = 0.9
"""Assumed share of the memory's peak rate that either reaches."""

L2_BYTES_PER_CLOCK = 32
"""Assumed bytes that a multiprocessor gets from the L2 cache per clock; no data sheet states it."""


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates of a GPU as its maker publishes them, without 2:4 sparsity; memory and cache in bytes, clock in Hz."""

    name: str
    half_flops: float
    tf32_flops: float
    float32_flops: float
    memory_rate: float
    memory: float
    l2: float
    multiprocessors: int
    clock: float
    source: str

    @property
    def l2_rate(self) -> float:
        """Assumed bytes per second from the L2 cache."""
        return L2_BYTES_PER_CLOCK * self.multiprocessors * self.clock

    def flops(self, dtype: torch.dtype, tf32: bool) -> float:
        """Return the peak of matrix products in ``dtype``."""
        if dtype.itemsize == 2:
            return self.half_flops
        return self.tf32_flops if tf32 else self.float32_flops


DEVICES = {
    "h100": Device(
        "H100 SXM5 80 GB", 989.4e12, 494.7e12, 66.9e12, 3.35e12, 80e9, 50e6, 132, 1.83e9,
        "NVIDIA H100 Tensor Core GPU data sheet; NVIDIA H100 Tensor Core GPU Architecture white paper",
    ),
    "a100": Device(
        "A100 SXM4 80 GB", 312e12, 156e12, 19.5e12, 2.039e12, 80e9, 40e6, 108, 1.41e9,
        "NVIDIA A100 Tensor Core GPU data sheet; NVIDIA A100 Tensor Core GPU Architecture white paper",
    ),
    "l4": Device(
        "L4 24 GB", 121e12, 60e12, 30.3e12, 0.3e12, 24e9, 48e6, 58, 2.04e9,
        "NVIDIA L4 Tensor Core GPU data sheet (its figures with sparsity, halved)",
    ),
    "rtx4090": Device(
        "GeForce RTX 4090 24 GB", 165.2e12, 82.6e12, 82.6e12, 1.008e12, 24e9, 72e6, 128, 2.52e9,
        "NVIDIA Ada GPU Architecture white paper, appendix A (float32 accumulation)",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes of a layer's call: ``rows`` inputs of ``fan_in`` values, ``width`` neurons in groups, ``k`` selected."""

    rows: int
    fan_in: int
    width: int
    group_size: int
    k: int
    rank: int
    dtype: torch.dtype = torch.float16
    tf32: bool = False

    @property
    def groups(self) -> int:
        """Neuron groups, N."""
        return self.width // self.group_size

    @property
    def density(self) -> float:
        """Share of the groups that a row selects."""
        return self.k / self.groups

    @property
    def groups_used(self) -> float:
        """Groups that at least one row selects, if rows chose independently."""
        return self.groups * (1 - (1 - self.density) ** self.rows)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Traffic of one launch: bytes from memory, bytes from the L2 cache, and operations of two kinds."""

    name: str
    memory: float
    cache: float
    matrix: float = 0.0
    scalar: float = 0.0

    def seconds(self, device: Device, call: Call, efficiency: float) -> float:
        """Return the predicted time, the gap to the next launch included."""
        return LAUNCH_GAP + max(self.bounds(device, call, efficiency).values())

    def bounds(self, device: Device, call: Call, efficiency: float) -> dict[str, float]:
        """Return the seconds that memory, cache and arithmetic each need."""
        return {
            "memory": self.memory / (MEMORY_EFFICIENCY * device.memory_rate),
            "L2": self.cache / device.l2_rate,
            "arithmetic": self.matrix / (efficiency * device.flops(call.dtype, call.tf32))
            + self.scalar / device.float32_flops,
        }


def _product(name: str, call: Call, m: int, n: int, k: int, tile: tuple[int, int], out_bytes: int) -> Kernel:
    """Return the cost of a plain (m, k) x (k, n) product."""
    size = call.dtype.itemsize
    tiles = math.ceil(m / tile[0]) * math.ceil(n / tile[1])
    memory = size * k * (m + n) + out_bytes * m * n
    return Kernel(name, memory, tiles * (tile[0] + tile[1]) * k * size + out_bytes * m * n, matrix=2.0 * m * n * k)


def dense_kernels(call: Call, backward: bool = False) -> list[Kernel]:
    """Return the kernels of the dense layer: one product forward, two backward."""
    size = call.dtype.itemsize
    tile = (min(128, max(16, _padded(call.rows))), 256 if call.rows >= 128 else 128)
    if not backward:
        return [_product("dense", call, call.rows, call.width, call.fan_in, tile, size)]
    return [
        _product("dense input gradient", call, call.rows, call.fan_in, call.width, tile, size),
        _product("dense weight gradient", call, call.width, call.fan_in, call.rows, tile, size),
    ]


def midl_kernels(call: Call, device: Device, backward: bool = False) -> list[Kernel]:
    """Return the launches of the Triton kernels for one call."""
    from midl.ops.triton.configs import FEW_ROWS

    if backward:
        return _backward_kernels(call, device)
    if call.rows <= FEW_ROWS:
        return _few_rows_kernels(call)
    rows, k, rank, size = call.rows, call.k, call.rank, call.dtype.itemsize
    return [
        *_code_and_gate(call),
        Kernel("Top-k", 8 * rows * call.groups + 4 * rows * k, 0, scalar=32.0 * rows * _padded(call.groups)),
        _product("light path", call, rows, call.width, rank, _plain_tile(rows, call.width), size),
        *_sorting(call),
        _gathered("full path", call, device, extra=2 * rank, written=size * rows * k * call.group_size),
    ]


def _code_and_gate(call: Call) -> list[Kernel]:
    code = _product("code", call, call.rows, call.rank, call.fan_in, _plain_tile(call.rows, call.rank), 4)
    gate_bytes = 4 * call.rows * (call.rank + call.groups) + call.dtype.itemsize * call.rank * call.groups
    return [
        code,
        Kernel("sum of the code's splits", 8 * call.rows * call.rank, 0),
        Kernel("gate", gate_bytes, gate_bytes, scalar=2.0 * call.rows * call.rank * call.groups),
    ]


def _sorting(call: Call) -> list[Kernel]:
    marks = 4 * call.rows * call.groups
    return [
        Kernel("count rows", marks, marks),
        Kernel("scan chunks", 0, marks / 32),
        Kernel("plan tiles", 0, 4 * call.groups**2),
        Kernel("place rows", marks + 4 * call.rows * call.k, marks),
    ]


def _tile(call: Call) -> tuple[int, int]:
    from midl.ops.triton.configs import full_path_tile

    tile = full_path_tile(call.rows * call.density, call.group_size, call.dtype, "tf32" if call.tf32 else "ieee")
    return tile.m, tile.n


def _gathered(name: str, call: Call, device: Device, *, extra: float, written: float) -> Kernel:
    """Return the cost of the grouped product: every group's panel meets its rows, in tiles that fill with lanes."""
    size, (tile_m, tile_n) = call.dtype.itemsize, _tile(call)
    lane_tiles = math.ceil(call.group_size / tile_n)
    entries = call.rows * call.k
    row_tiles = entries / tile_m + call.groups_used / 2
    x_bytes = call.rows * call.fan_in * size
    gathered = entries * call.fan_in * size * lane_tiles
    panels = call.groups_used * call.group_size * call.fan_in * size
    # Where x does not fit the L2 cache, each group reads its rows from memory.
    memory = panels + written + (x_bytes if x_bytes <= device.l2 else gathered)
    cache = gathered + row_tiles * lane_tiles * tile_n * call.fan_in * size + written
    lanes = lane_tiles * tile_n
    return Kernel(name, memory, cache, matrix=2.0 * row_tiles * tile_m * lanes * (call.fan_in + extra / 2))


def _few_rows_kernels(call: Call) -> list[Kernel]:
    rows, size = call.rows, call.dtype.itemsize
    code = size * call.rank * call.fan_in
    gate = size * call.rank * call.groups
    panels = call.groups_used * call.group_size * call.fan_in * size
    light = size * call.width * call.rank
    entries = rows * call.k * call.group_size
    return [
        Kernel("code", code, rows * code, scalar=2.0 * rows * call.rank * call.fan_in),
        Kernel("gate and Top-k", gate, rows * gate, scalar=rows * (2.0 * call.rank + 32) * call.groups),
        Kernel("panels", panels, entries * call.fan_in * size, scalar=2.0 * entries * call.fan_in),
        Kernel(
            "interpolation", light + size * rows * call.width, rows * light, scalar=2.0 * rows * call.width * call.rank
        ),
    ]


def _backward_kernels(call: Call, device: Device) -> list[Kernel]:
    rows, d, n, rank, size = call.rows, call.fan_in, call.width, call.rank, call.dtype.itemsize
    entries = rows * call.k
    inputs = _gathered("input and gate gradient", call, device, extra=2 * rank, written=0)
    weights = _gathered("weight gradient", call, device, extra=0, written=size * n * d)
    # Each program owns 64 inputs of a group's weight and reads the group's part of grad_y again.
    grad_y = entries * call.group_size * size * math.ceil(d / 64)
    weights = dataclasses.replace(weights, cache=weights.cache + grad_y)
    # Each selected group adds a row of float32 into x's gradient: an atomic reads and writes the cache.
    atomics = 8.0 * entries * d
    return [
        *_code_and_gate(call),
        *_sorting(call),
        dataclasses.replace(
            inputs, cache=inputs.cache + atomics,
            memory=inputs.memory + (4 * rows * d if 4 * rows * d <= device.l2 else atomics),
        ),
        weights,
        _product("code gradient", call, rows, rank, n, (64, 64), 4),
        _product("light_up gradient", call, n, rank, rows, (64, 64), size),
        _product("input gradient of the code", call, rows, d, rank, _plain_tile(rows, d), 4),
        _product("light_down gradient", call, rank, d, rows, (128, 128), size),
        Kernel("gate gradient", 4 * rows * (call.groups + rank), 0, scalar=2.0 * rows * call.groups * rank),
        Kernel("sum and round", rows * d * (8 + size), 0),
    ]  # fmt: skip


def _plain_tile(rows: int, columns: int) -> tuple[int, int]:
    from midl.ops.triton.configs import product_tile

    tile = product_tile(rows, columns, torch.float16, "ieee", widest=128)
    return tile.m, tile.n


def _padded(groups: int) -> int:
    return 1 << (groups - 1).bit_length()


def predict(call: Call, device: Device, *, dense: bool = False, backward: bool = False) -> float:
    """Return the predicted seconds of a forward or backward call, launched from a CUDA graph.

    >>> call = Call(rows=1, fan_in=4096, width=16384, group_size=32, k=230, rank=320)
    >>> predict(call, DEVICES["a100"]) < predict(call, DEVICES["a100"], dense=True)
    True
    """
    kernels = dense_kernels(call, backward) if dense else midl_kernels(call, device, backward)
    efficiency = DENSE_EFFICIENCY if dense else MIDL_EFFICIENCY
    return sum(kernel.seconds(device, call, efficiency) for kernel in kernels)


def predicted_speedup(call: Call, device: Device, *, backward: bool = False) -> float:
    """Return the predicted dense time divided by the predicted MID-L time."""
    return predict(call, device, dense=True, backward=backward) / predict(call, device, backward=backward)


def device_of(name: str) -> Device:
    """Return the data sheet of the GPU that torch calls ``name``; the H100's, the hardest to win on, if unknown."""
    known = {"H100": "h100", "H200": "h100", "A100": "a100", "RTX 4090": "rtx4090", "NVIDIA L4": "l4"}
    return DEVICES[next((key for part, key in known.items() if part in name), "h100")]
