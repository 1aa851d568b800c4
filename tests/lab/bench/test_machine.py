import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from midl.lab.bench.cases.memory import peak_bytes, saved_bytes
from midl.lab.bench.ceilings import measure_ceilings, roofline
from midl.lab.bench.machine import cache_sizes, describe_machine, last_level_cache
from midl.lab.bench.midl_layers import count_flops, make_linear, traffic


def test_caches_are_read_from_the_system_and_instruction_caches_are_not(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "512K"), ("3", "Unified", "32M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert cache_sizes(tmp_path) == {"L1": 2**15, "L2": 2**19, "L3": 2**25}
    assert last_level_cache(cache_sizes(tmp_path)) == 2**25


def test_an_unknown_cache_is_assumed_large(tmp_path: Path) -> None:
    assert last_level_cache(cache_sizes(tmp_path)) == 2**26


def test_the_header_is_json_and_names_no_host() -> None:
    header = describe_machine()
    assert {"cpu", "capability", "threads", "caches", "torch", "midl", "commit", "date", "load_average"} <= set(header)
    import socket

    assert socket.gethostname() not in json.dumps(header)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_ceilings_are_ordered_as_physics_has_them() -> None:
    ceilings = measure_ceilings(quick=True)
    assert ceilings.fma_gflops is not None
    assert ceilings.fma_gflops > 0.7 * ceilings.gemm_gflops
    assert ceilings.read_gbs > 0
    assert ceilings.threads == torch.get_num_threads()


def test_the_roofline_names_the_ceiling_that_binds() -> None:
    memory = roofline(flops=1e6, read_bytes=1e9, seconds=0.1, gflops=100.0, gbs=20.0)
    assert memory["bound"] == "memory"
    assert memory["share"] == pytest.approx(0.5)
    assert memory["gbs"] == pytest.approx(10.0)


def test_work_counts_what_the_formula_needs() -> None:
    layer = make_linear(32, 64, torch.float32, active=0.5, rank=4, group_size=8)
    batch = 3
    assert count_flops(lambda: layer(torch.randn(batch, 32))) == 2 * batch * (4 * 32 + 4 * 64 + 4 * 8 + 32 * 32)
    others = 64 + 4 * 32 + 4 * 64 + 4 * 8 + 8
    assert traffic(layer, 32, 64, choices=1) == 4 * (32 * 32 + others + 32 + 64)
    assert traffic(layer, 0, 0, choices=2) == 4 * (0.75 * 64 * 32 + others)


def test_saved_bytes_leave_parameters_out() -> None:
    x = torch.randn(6, 32, requires_grad=True)
    assert saved_bytes(nn.Linear(32, 64), x) == 6 * 32 * 4


def test_the_layer_saves_its_input_and_the_selection() -> None:
    x = torch.randn(6, 32, requires_grad=True)
    layer = make_linear(32, 64, torch.float32, active=0.5, group_size=8, rank=4).requires_grad_().train()
    assert saved_bytes(layer, x) == 6 * 32 * 4 + 6 * layer.num_selected * 4


def test_peak_bytes_see_a_large_buffer() -> None:
    size = 64 * 2**20
    peak = peak_bytes(lambda: torch.ones(size // 4).sum())
    assert peak is None or 0.9 * size < peak < 1.5 * size
