"""Compile midl's Triton kernels for GPUs that need not be here, and read what the machine code uses."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from midl.ops.triton.conv2d import conv2d, conv2d_backward
from midl.ops.triton.launch import Launch, record_launches
from midl.ops.triton.linear import linear, linear_backward

__all__ = [
    "SHARED_MEMORY_LIMITS",
    "TENSOR_CORE_KERNELS",
    "MachineCode",
    "compile_launch",
    "conv2d_launches",
    "linear_launches",
    "shipped_launches",
]

SHARED_MEMORY_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes that a block may use: CUDA C++ programming guide, table of compute capabilities; AMD CDNA 3 ISA guide."""

REGISTERS = 65536
"""32-bit registers of an NVIDIA multiprocessor, compute capabilities 8.0 to 10.0 (CUDA C++ programming guide)."""

TENSOR_CORE_KERNELS = (
    "project_kernel",
    "light_path_kernel",
    "full_path_kernel",
    "input_grad_kernel",
    "weight_grad_kernel",
    "code_grad_kernel",
    "light_up_grad_kernel",
)
"""Kernels whose inner loop is a matrix product in the input's dtype."""

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
_MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async\S*",
    "tcgen05.mma": r"tcgen05\.mma\S*",
    "mma.sync": r"\bmma\.sync\S*",
    "mfma": r"v_mfma_\w+",
}


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel uses: registers of a thread, bytes that spilled or were shared, and instructions."""

    target: str
    registers: int
    spilled: int
    shared: int
    warps: int
    matrix: str
    wide_loads: int
    assembly: str = dataclasses.field(repr=False)

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Blocks that fit one NVIDIA multiprocessor by registers, shared memory and its 64 warps: an upper bound."""
        by_registers = REGISTERS // (max(self.registers, 1) * 32 * self.warps)
        # A block reserves 1 KB of shared memory beside its own.
        by_shared = (SHARED_MEMORY_LIMITS[self.target] + 1024) // (self.shared + 1024)
        return min(by_registers, by_shared, 64 // self.warps, 32)


def target_of(name: str) -> GPUTarget:
    """Return Triton's target for ``"sm_80"``, ``"sm_90"``, ``"sm_100"`` or ``"gfx942"``."""
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


def compile_launch(launch: Launch, target: str) -> MachineCode:
    """Compile the kernel of ``launch`` exactly as that launch would, for ``target``."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or value == 1:
            constants[name] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    signature = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(
        source,
        target=target_of(target),
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True},
    )
    return _read(compiled, target, launch.warps)


def _read(compiled: Any, target: str, warps: int) -> MachineCode:
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
        wide = len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", text))
    else:
        text = compiled.asm["ptx"]
        registers, spilled = _resources(text, int(target[3:]))
        wide = len(
            re.findall(
                r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg\.\S+ \[[^\]]+\], \[[^\]]+\], 0x10", text
            )
        )
    found = [name for name, pattern in _MATRIX_INSTRUCTIONS.items() if re.search(pattern, text)]
    return MachineCode(
        target, registers, spilled, compiled.metadata.shared, warps, " ".join(found) or "none", wide, text
    )


def _resources(ptx: str, architecture: int) -> tuple[int, int]:
    """Return registers of a thread and bytes spilled, from the assembler and the flags that Triton itself uses."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            get_ptxas(architecture).path, "-v", "--regAllocOptLevel=2",
            f"--gpu-name={sm_arch_from_capability(architecture)}", source, "-o", Path(folder) / "kernel.cubin",
        ]  # fmt: skip
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))


def linear_launches(
    rows: int, in_features: int, out_features: int, *, group_size: int, rank: int, dtype: torch.dtype, backward: bool,
    active: float = 0.45,
) -> list[Launch]:  # fmt: skip
    """Return the kernel launches of a linear layer's forward (and backward) pass, without running anything."""
    groups = out_features // group_size
    k = max(1, round(active * groups))

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    args = (
        tensor(rows, in_features), tensor(out_features, in_features), tensor(out_features), tensor(rank, in_features),
        tensor(out_features, rank), tensor(groups, rank), tensor(groups),
    )  # fmt: skip
    with record_launches() as launches:
        if backward:
            selected = torch.empty((rows, k), dtype=torch.int32, device="meta")
            linear_backward(
                tensor(rows, out_features), selected, *args, group_size, 1, "sigmoid", "selected", [True] * 7
            )
        else:
            linear(*args, None, k, group_size, 1, "sigmoid", "selected")
    return launches


def conv2d_launches(
    images: int, channels: int, size: int, out_channels: int, *, group_size: int, rank: int, dtype: torch.dtype,
    backward: bool, active: float = 0.45,
) -> list[Launch]:  # fmt: skip
    """Return the kernel launches of a 3 x 3 convolution's forward (and backward) pass, without running anything."""
    groups = out_channels // group_size
    k = max(1, round(active * groups))

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    args = (
        tensor(images, channels, size, size), tensor(out_channels, channels, 3, 3), tensor(out_channels),
        tensor(rank, channels, 3, 3), tensor(out_channels, rank), tensor(groups, rank), tensor(groups),
    )  # fmt: skip
    window = ([1, 1], [1, 1], [1, 1])
    with record_launches() as launches:
        if backward:
            selected = torch.empty((images, size, size, k), dtype=torch.int32, device="meta")
            conv2d_backward(
                tensor(images, out_channels, size, size), selected, *args, *window, group_size, 1, "sigmoid",
                "selected", [True] * 7,
            )  # fmt: skip
        else:
            conv2d(*args, None, *window, k, group_size, 1, "sigmoid", "selected")
    return launches


def _distinct(launches: Iterable[Launch]) -> Iterator[Launch]:
    seen = set()
    for launch in launches:
        dtypes = tuple(a.dtype if isinstance(a, Tensor) else None for a in launch.args)
        # How a group is cut into tiles is all that its size changes; a table needs one row of each.
        constants = {**launch.constants, "GROUP_SIZE": None, "GEOMETRY": launch.constants.get("GEOMETRY") is not None}
        key = (launch.kernel.fn.__name__, dtypes, tuple(sorted(constants.items(), key=str)), launch.warps)
        if key not in seen:
            seen.add(key)
            yield launch


def shipped_launches(dtype: torch.dtype, *, tf32: bool = False) -> list[Launch]:
    """Return one launch of every kernel in every tile configuration that calls with ``dtype`` can choose."""
    launches: list[Launch] = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        for rows, group_size in [(1, 32), *((rows, size) for rows in (32, 256, 1024) for size in (16, 32, 64, 128))]:
            for backward in (False, True):
                launches += linear_launches(
                    rows, 1024, 4096, group_size=group_size, rank=112, dtype=dtype, backward=backward
                )
        for backward in (False, True):
            launches += conv2d_launches(8, 64, 32, 128, group_size=32, rank=32, dtype=dtype, backward=backward)
    finally:
        torch.set_float32_matmul_precision(before)
    return list(_distinct(launches))
