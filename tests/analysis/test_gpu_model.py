"""The GPU cost model: its arithmetic against the kernels' own launches, its memory against what autograd saves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import midl
from midl.analysis.gpu_model import (
    break_even_active,
    device_named,
    latency_rows,
    layer_memory,
    make_call,
    win_rows,
)
from midl.ops.gpu_cost import DEVICES, dense_kernels, midl_kernels, predict, predicted_speedup


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_no_prediction_beats_the_data_sheet(name: str) -> None:
    device = device_named(name)
    call = make_call(4096, 4096, 16384, group_size=128)
    seconds = predict(call, device, dense=True)
    assert seconds > 2 * 4096 * 4096 * 16384 / device.half_flops
    one = make_call(1, 4096, 16384, group_size=128)
    assert predict(one, device, dense=True) > 4096 * 16384 * 2 / device.memory_rate


def test_matrix_flops_are_at_least_those_of_the_formula() -> None:
    call = make_call(4096, 1024, 4096, group_size=128)
    flops = sum(k.matrix + k.scalar for k in midl_kernels(call, DEVICES["h100"]))
    counted = 2 * call.rows * (call.rank * (1024 + 4096 + call.groups) + call.k * 128 * 1024)
    assert counted < flops < 1.5 * counted
    assert dense_kernels(call)[0].matrix == 2 * call.rows * 1024 * 4096


def test_fewer_active_groups_are_never_predicted_slower() -> None:
    for rows in (1, 4096):
        times = [
            predict(make_call(rows, 4096, 16384, group_size=128, active=a), DEVICES["a100"]) for a in (0.1, 0.45, 0.9)
        ]
        assert times == sorted(times)


def test_one_row_of_a_large_layer_is_predicted_to_win_and_a_small_layer_to_lose() -> None:
    for device in DEVICES.values():
        assert predicted_speedup(make_call(1, 4096, 16384, group_size=32), device) > 1
    assert break_even_active(DEVICES["h100"], 1, 256, 256, 32) == 0


def test_rows_for_tables_name_what_bounds_each_kernel() -> None:
    rows = latency_rows(device_named("l4"), make_call(16, 1024, 4096, group_size=32), backward=True)
    assert {row["bound"] for row in rows} <= {"memory", "L2", "arithmetic", "launch", ""}
    assert [row["layer"] for row in rows if row["kernel"] == "total"] == ["MID-L", "dense"]
    assert len(win_rows(device_named("l4"))) == 36


def test_an_unknown_device_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(
        midl.errors.MIDLError, match=r"device='k80', expected one of \['a100', 'h100', 'l4', 'rtx4090'\]"
    ):
        device_named("k80")


@pytest.mark.parametrize("gate", ["projection", "light"])
def test_saved_memory_is_what_the_reference_saves(gate: str) -> None:
    layer = midl.MIDLinear(64, 256, active=0.25, rank=8, group_size=16, gate=gate)
    x = torch.randn(32, 64, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with midl.kernels("reference"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters()}
    call = make_call(32, 64, 256, group_size=16, active=0.25, dtype=torch.float32)
    memory = layer_memory(dataclasses.replace(call, rank=8), projection=gate == "projection")
    assert memory.weights == sum(parameters.values())
    assert memory.saved == sum(size for pointer, size in saved.items() if pointer not in parameters)
    assert memory.gradients == memory.weights


def test_training_memory_grows_with_the_output_alone() -> None:
    narrow = layer_memory(make_call(4096, 1024, 4096, group_size=32))
    wide = layer_memory(make_call(4096, 1024, 8192, group_size=64))
    assert wide.output == 2 * narrow.output
    assert wide.forward_workspace < 1.5 * narrow.forward_workspace
    assert narrow.peak > narrow.weights + narrow.saved + narrow.output
