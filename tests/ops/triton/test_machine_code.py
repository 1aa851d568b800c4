"""The Triton kernels compiled for GPUs that are not here: Tensor Cores in use, nothing spilled, wide loads."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="pip install 'midl[gpu]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from midl.lab.gpu.compile import (
    SHARED_MEMORY_LIMITS,
    TENSOR_CORE_KERNELS,
    Launch,
    MachineCode,
    compile_launch,
    conv2d_launches,
    linear_launches,
    shipped_launches,
)

SMALLEST_SHARED_MEMORY = 99 * 1024
"""What a block gets on compute capability 8.6 and 8.9 (RTX 4090, L4)."""


def name(launch: Launch) -> str:
    return launch.kernel.fn.__name__


def check(launch: Launch, target: str, dtype: torch.dtype, tf32: bool) -> MachineCode:
    code = compile_launch(launch, target)
    assert code.spilled == 0, f"{launch}: {code}"
    # The A100 has more than other cards of its instruction set, but one list of tiles serves all.
    limit = SMALLEST_SHARED_MEMORY if target == "sm_80" else SHARED_MEMORY_LIMITS[target]
    assert code.shared <= limit, f"{launch}: {code}"
    if name(launch) in TENSOR_CORE_KERNELS and (dtype != torch.float32 or tf32):
        assert code.matrix == matrix_instruction(launch, target), f"{launch}: {code}"
    if target.startswith("sm") and name(launch) in ("full_path_kernel", "project_kernel"):
        c = launch.constants
        # Each stage of the pipeline loads x and the weight's panel, 16 bytes by every thread at a time; the small x
        # tiles of exact float32, and its 16 x 16 panels, have less than that for each.
        exact = dtype == torch.float32 and not tf32
        step = (c["BLOCK_N"] + (0 if exact else c["BLOCK_M"])) * c["BLOCK_K"] * dtype.itemsize
        assert code.wide_loads >= launch.stages * (step // (16 * 32 * launch.warps)), f"{launch}: {code}"
    if name(launch) == "panels_kernel" and target.startswith("sm"):
        assert code.wide_loads >= 1
    return code


def matrix_instruction(launch: Launch, target: str) -> str:
    if target.startswith("gfx"):
        return "mfma"
    if target == "sm_80":
        return "mma.sync"
    sizes = launch.constants
    # Products with fewer than 64 rows, the least wgmma and tcgen05 take, stay on mma.sync.
    rows = sizes["BLOCK_N"] if name(launch) in ("weight_grad_kernel", "light_up_grad_kernel") else sizes["BLOCK_M"]
    if rows < 64:
        return "mma.sync"
    return "wgmma" if target == "sm_90" else "tcgen05.mma"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tensor_cores_and_no_spills_where_it_matters(target: str) -> None:
    launches = [
        *linear_launches(256, 1024, 4096, group_size=64, rank=112, dtype=torch.float16, backward=False),
        *linear_launches(1, 1024, 4096, group_size=64, rank=112, dtype=torch.float16, backward=False),
    ]
    seen = {name(launch): check(launch, target, torch.float16, False) for launch in launches}
    assert len(seen) == 12


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_gradients_and_convolution_compile_to_tensor_core_code(target: str) -> None:
    launches = [
        *linear_launches(256, 1024, 4096, group_size=64, rank=112, dtype=torch.bfloat16, backward=True),
        *conv2d_launches(8, 64, 32, 128, group_size=32, rank=32, dtype=torch.bfloat16, backward=False),
    ]
    for launch in launches:
        if name(launch) in TENSOR_CORE_KERNELS:
            check(launch, target, torch.bfloat16, False)


@pytest.mark.slow
def test_the_widest_selection_stays_in_registers() -> None:
    for rows, groups in ((256, 8192), (8, 1024)):
        for launch in linear_launches(rows, 64, groups, group_size=1, rank=16, dtype=torch.float16, backward=False):
            if name(launch) in ("select_groups_kernel", "select_code_kernel", "plan_tiles_kernel"):
                assert compile_launch(launch, "sm_80").spilled == 0


def test_launches_need_nothing_from_the_device() -> None:
    """On the meta device no tensor has values: a launch that asked for one, or a grid that hung on one, would fail."""
    for rows in (1, 8, 9, 700):
        for backward in (False, True):
            launches = linear_launches(rows, 96, 320, group_size=32, rank=24, dtype=torch.float16, backward=backward)
            assert all(isinstance(size, int) for launch in launches for size in launch.grid)


def test_no_intermediate_is_as_large_as_rows_times_neurons() -> None:
    """Beside the output (and its gradient), no launch touches a mask or a gathered copy of that size."""
    rows, d, n = 1024, 256, 8192
    for backward in (False, True):
        launches = linear_launches(rows, d, n, group_size=64, rank=32, dtype=torch.float16, backward=backward)
        sizes = {arg.numel() for launch in launches for arg in launch.args if isinstance(arg, torch.Tensor)}
        assert sorted(sizes)[-1] == rows * n
        assert max(sizes - {rows * n, n * d}) < rows * n / 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tf32", "target"),
    [
        *((torch.float16, False, target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
        *((torch.bfloat16, False, target) for target in ("sm_80", "sm_90")),
        *((torch.float32, tf32, target) for tf32 in (True, False) for target in ("sm_80", "sm_90")),
    ],
)
def test_every_shipped_configuration(dtype: torch.dtype, tf32: bool, target: str) -> None:
    for launch in shipped_launches(dtype, tf32=tf32):
        check(launch, target, dtype, tf32)
