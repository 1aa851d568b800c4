"""Write the table of every shipped kernel configuration: ``python -m midl.lab.gpu.table > docs/gpu_kernels.md``."""

from __future__ import annotations

import concurrent.futures
import sys

import torch
import triton

from midl.lab.gpu.compile import MachineCode, compile_launch, shipped_launches
from midl.ops.triton.launch import Launch

__all__ = ["kernel_table"]

_HEAD = """# GPU kernels, compiled

Every kernel and tile configuration that `midl.kernels("triton")` can launch, compiled by Triton {version} without a
GPU and read back from the machine code. Command, also the source of the numbers:

    python -m midl.lab.gpu.table > docs/gpu_kernels.md

Regs: registers of a thread. Spill: bytes that did not fit them. Shared: bytes of a block. Blocks: how many blocks fit
one multiprocessor by registers, shared memory and warps, which is a prediction, not a measurement. Wide: 16-byte
loads from global memory in the code. The rank here is 112; a rank that 8 does not divide makes the loads of the light
path narrower, not those of the weight. Launches that differ only in the group size a tile is cut from share a row.
float32 convolutions follow cuDNN's switch and are TF32 by default, as torch's own are.
"""

_TARGETS = {"float16": ("sm_80", "sm_90", "sm_100", "gfx942"), "bfloat16": ("sm_80", "sm_90")}


def _name(launch: Launch) -> str:
    tile = [str(v) for k, v in launch.constants.items() if k.startswith("BLOCK_")]
    shape = "x".join(tile) or "-".join(
        str(launch.constants[k]) for k in ("ROWS", "CHUNK", "GROUPS") if k in launch.constants
    )
    kind = " conv" if launch.constants.get("GEOMETRY") is not None else ""
    return f"{launch.kernel.fn.__name__.removesuffix('_kernel')}{kind} {shape}"


def _compile(index: int, dtype: str, tf32: bool, target: str) -> MachineCode:
    # A launch does not travel between processes; its place in the list does.
    return compile_launch(shipped_launches(getattr(torch, dtype), tf32=tf32)[index], target)


def kernel_table(dtype: str, tf32: bool, target: str, workers: int = 2) -> str:
    """Return the Markdown table of one dtype on one target."""
    launches = shipped_launches(getattr(torch, dtype), tf32=tf32)
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        codes = list(
            pool.map(_compile, range(len(launches)), *([value] * len(launches) for value in (dtype, tf32, target)))
        )
    lines = [
        f"\n## {dtype}{', TF32' if tf32 else ''} on {target}\n",
        "| kernel and tile | warps | stages | regs | spill | shared | blocks | matrix instructions | wide |",
        "| --- | --: | --: | --: | --: | --: | --: | --- | --: |",
    ]
    for launch, code in sorted(zip(launches, codes, strict=True), key=lambda pair: _name(pair[0])):
        blocks = code.blocks_per_multiprocessor if target.startswith("sm") else ""
        lines.append(
            f"| {_name(launch)} | {launch.warps} | {launch.stages} | {code.registers} | {code.spilled} | {code.shared} "
            f"| {blocks} | {code.matrix} | {code.wide_loads} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the page."""
    print(_HEAD.format(version=triton.__version__), end="")
    for dtype, tf32 in (("float16", False), ("bfloat16", False), ("float32", True), ("float32", False)):
        for target in _TARGETS.get(dtype, ("sm_80", "sm_90")):
            print(kernel_table(dtype, tf32, target))
            print(f"{dtype} tf32={tf32} {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
