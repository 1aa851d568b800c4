"""The choice of ``auto`` on a CPU follows constants, which are measured on demand, kept and found again."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from helpers import error_ratio

import midl
from midl.errors import MIDLError
from midl.ops.cpu_cost import BUILT_IN, ROWS, Constants, Rates, built_in, predict, sparse_wins
from midl.ops.dispatch import resolve, unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.ops import cpu_calibration, dense, native


def constants(dense=10.0, single=10.0, wide=10.0, bandwidth=10.0, cache=1e12) -> Constants:
    rates = Rates((dense,) * 4, (single,) * 4, (wide,) * 4, (wide,) * 4)
    return Constants("made up", rates, rates, rates, rates, bandwidth, dense_call=1000.0, cache=cache)


def use(monkeypatch, value):
    key = native.instruction_set(), torch.get_num_threads()
    monkeypatch.setitem(cpu_calibration._current, key, value)


def choice(rows, group_size, dtype=torch.float32):
    x, weight = torch.empty(rows, 512, dtype=dtype), torch.empty(1024, 512, dtype=dtype)
    k = round(0.45 * 1024 / group_size)
    return resolve("linear", x, weight=weight, k=k, group_size=group_size, span=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_follows_the_constants(monkeypatch, dtype):
    midl.kernels("auto")
    use(monkeypatch, constants(dense=1.0))
    assert choice(64, 1, dtype) is native.linear
    assert choice(64, 32, dtype) is native.linear
    use(monkeypatch, constants(dense=100.0))
    assert choice(64, 1, dtype) is dense.linear
    assert choice(64, 32, dtype) is dense.linear
    use(monkeypatch, constants(dense=30.0, wide=20.0))
    assert choice(64, 1, dtype) is dense.linear
    assert choice(64, 32, dtype) is native.linear


def convolution_choice(size, group_size, dtype=torch.float32):
    x, weight = torch.empty(3, 64, *size, dtype=dtype), torch.empty(128, 64, 3, 3, dtype=dtype)
    k = round(0.45 * 128 / group_size)
    return resolve("conv2d", x, weight=weight, k=k, group_size=group_size, span=1, positions=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_follows_the_constants_of_convolutions(monkeypatch, dtype):
    midl.kernels("auto")
    linear = constants(dense=10.0, wide=10.0).float32
    for dense_rate, single, wide in ((1.0, "native", "native"), (100.0, "dense", "dense"), (30.0, "dense", "native")):
        rates = Rates((dense_rate,) * 4, (10.0,) * 4, (20.0,) * 4, (20.0,) * 4)
        use(monkeypatch, Constants("made up", linear, linear, rates, rates, 10.0, dense_call=1000.0, cache=1e12))
        expected = {"native": native.convolution, "dense": dense.convolution}
        assert convolution_choice((8, 8), 1, dtype) is expected[single]
        assert convolution_choice((8, 8), 32, dtype) is expected[wide]


@pytest.mark.parametrize("dense_rate", [1e-3, 1e3])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("select", ["position", "image"])
def test_a_convolution_is_right_either_way_and_prepared_calls_follow(monkeypatch, dense_rate, dtype, limit, select):
    use(monkeypatch, constants(dense=dense_rate))
    layer = midl.MIDConv2d(6, 64, 3, padding=1, stride=2, active=0.4, group_size=16, select=select).to(dtype).eval()
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 6, 9, 10, dtype=dtype).contiguous(memory_format=format)
        with torch.no_grad(), midl.kernels("reference"):
            expected = layer(x)
        with torch.no_grad(), midl.kernels("auto"):
            for _ in range(4):
                assert error_ratio(layer(x), expected) < limit
            layer.weight.mul_(2)
            changed = layer(x)
        with torch.no_grad(), midl.kernels("reference"):
            assert error_ratio(changed, layer(x)) < limit


def test_small_batches_of_large_layers_go_by_the_bytes(monkeypatch):
    midl.kernels("auto")
    use(monkeypatch, constants(dense=1e6, single=1e6, cache=0.0))
    assert choice(1, 1) is native.linear
    use(monkeypatch, constants(dense=1e6, single=20.0))
    assert choice(1, 1) is dense.linear


def test_a_forced_choice_asks_no_model(monkeypatch):
    use(monkeypatch, constants(dense=1e9))
    with midl.kernels("native"):
        assert choice(64, 1) is native.linear
    use(monkeypatch, constants(dense=1e-9))
    with midl.kernels("dense"):
        assert choice(64, 32) is dense.linear


@pytest.mark.parametrize("dense_rate", [1e-3, 1e3])
def test_a_layer_is_right_either_way_and_prepared_calls_follow(monkeypatch, dense_rate):
    use(monkeypatch, constants(dense=dense_rate))
    layer, x = midl.MIDLinear(64, 128, active=0.4, group_size=4).eval(), torch.randn(9, 64)
    with torch.no_grad(), midl.kernels("reference"):
        expected = layer(x)
    with torch.no_grad(), midl.kernels("auto"):
        for _ in range(4):
            assert error_ratio(layer(x), expected) < 2e-6


def test_predictions_grow_with_the_work():
    small = predict(BUILT_IN, "linear", "float32", 8, 512, 512, k=230, group_size=1)
    for larger in (
        predict(BUILT_IN, "linear", "float32", 16, 512, 512, k=230, group_size=1),
        predict(BUILT_IN, "linear", "float32", 8, 1024, 512, k=230, group_size=1),
        predict(BUILT_IN, "linear", "float32", 8, 512, 1024, k=460, group_size=1),
    ):
        assert larger[0] > small[0]
        assert larger[1] > small[1]
    assert (
        predict(BUILT_IN, "linear", "float32", 64, 2048, 2048, 20, 32, span=8)[0]
        <= predict(BUILT_IN, "linear", "float32", 64, 2048, 2048, 20, 32)[0]
    )


def test_rates_between_and_beyond_the_measured_rows():
    rates = dataclasses.replace(BUILT_IN.float32, groups_of_32=(1.0, 2.0, 3.0, 4.0))
    assert [rates.sparse(rows, 32) for rows in (0, *ROWS, 10**6)] == [1.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    assert 2.0 < rates.sparse(20, 64) < 3.0
    single, wide = rates.sparse(8, 1), rates.sparse(8, 16)
    assert rates.sparse(8, 4) == pytest.approx((single + wide) / 2)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A quick measurement, kept in a folder of its own."""
    monkeypatch.setenv("MIDL_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(cpu_calibration, "_SIZE", 64)
    monkeypatch.setattr(cpu_calibration, "_TURNS", 1)
    monkeypatch.setattr(cpu_calibration, "_current", {})
    return tmp_path / "new" / "cpu-constants.json"


def test_constants_are_measured_on_demand_kept_and_found_again(small):
    assert cpu_calibration.constants() is built_in(native.instruction_set())
    assert not small.exists()
    result = cpu_calibration.measure()
    assert cpu_calibration.constants() is result
    assert cpu_calibration.measured().to_dict() == result.to_dict()
    assert min(min(form) for form in dataclasses.asdict(result.float32).values()) > 0
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_constants_of_another_setting_are_kept_apart(small, monkeypatch):
    cpu_calibration.measure()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert cpu_calibration.measured() is None
    assert cpu_calibration.constants() is built_in(native.instruction_set())
    cpu_calibration.measure()
    assert len(json.loads(small.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}'])
def test_a_damaged_file_is_no_measurement(small, content):
    small.parent.mkdir()
    small.write_text(content)
    assert cpu_calibration.constants() is built_in(native.instruction_set())
    cpu_calibration.measure()
    assert cpu_calibration.measured() is not None


def test_a_busy_machine_is_not_measured(small, monkeypatch):
    clock = itertools.accumulate(itertools.cycle([10, 100, 10, 900]))
    monkeypatch.setattr(cpu_calibration.time, "perf_counter_ns", lambda: next(clock))
    monkeypatch.setattr(cpu_calibration, "_TURNS", 4)
    with pytest.raises(MIDLError, match="something else keeps this machine busy"):
        cpu_calibration._best_nanoseconds({"a": int})
    assert cpu_calibration.measured() is None


def test_sparse_wins_remembers_per_constants():
    arguments = ("linear", "float32", 64, 512, 1024, 460, 1, 1)
    assert sparse_wins(constants(dense=1.0), *arguments)
    assert not sparse_wins(constants(dense=100.0), *arguments)
