"""Prepared calls of FFNs: the general path's bits, never stale, and out of the way whenever somebody watches."""

from __future__ import annotations

import copy

import pytest
import torch
from changes import (
    change_by_copy,
    change_data,
    change_in_inference_mode,
    change_one_value,
    change_through_data,
)
from helpers import error_ratio

import midl
from midl.errors import MIDLError
from midl.ops import ffn as ffn_op
from midl.ops.dispatch import unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.ops import native, native_ffn, native_packing
from midl.ops.native_call import call_ffn_op_prepared, call_ffn_prepared

LIMIT = 2e-6
HALF_LIMIT = 5e-3  # hidden units and code are rounded too
NAMES = native_ffn.FFN_NAMES


@pytest.fixture(autouse=True)
def _inference(poisoned_memory):
    """No autograd; instruction set and threads are restored, panels forgotten."""
    before, threads = native.instruction_set(), torch.get_num_threads()
    native_packing.clear_packed()
    with torch.no_grad():
        yield
    native.use_instruction_set(before)
    torch.set_num_threads(threads)


def make(**choices):
    ffn = midl.MIDFFN(40, 96, 24, **{"rank": 5, "group_size": 16, "gated": True, "active": 0.5, **choices})
    for name in ("light_up", "light_hidden", "light_bias", "gate_bias"):
        getattr(ffn, name).copy_(torch.randn_like(getattr(ffn, name)))
    return ffn


def warm(ffn, x):
    """Call until the panels are there and the next call is prepared."""
    for _ in range(3):
        ffn(x)


def prepared(ffn, x):
    return call_ffn_prepared(x, ffn._parameters, ffn.config, ffn.activation)


def reference(ffn, x):
    with midl.kernels("reference"):
        return ffn(x)


@pytest.mark.parametrize("choices", [{}, {"gated": False, "bias": False}, {"interpolation": "hard", "threshold": 0.1}])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_call_has_the_general_paths_bits(choices, activation, dtype):
    ffn = make(activation=activation, dtype=dtype, **choices)
    warm(ffn, torch.randn(9, 40, dtype=dtype))
    for shape in ((40,), (1, 40), (9, 40), (2, 3, 40), (300, 40), (0, 40)):
        x = torch.randn(shape, dtype=dtype)
        y = prepared(ffn, x)
        with torch.enable_grad():
            general = ffn(x)
        assert torch.equal(y, general)
        limit = LIMIT if dtype == torch.float32 else HALF_LIMIT
        assert error_ratio(y.float(), reference(ffn, x).float()) < limit


def test_the_layer_takes_prepared_calls(monkeypatch):
    ffn, x = make(), torch.randn(3, 40)
    expected = ffn(x)
    warm(ffn, x)
    monkeypatch.setattr(ffn_op, "resolve", lambda *_, **__: pytest.fail("the general path was taken"))
    assert torch.equal(ffn(x), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change", [change_by_copy, change_one_value, change_data, change_through_data, change_in_inference_mode]
)
def test_a_changed_parameter_is_seen_at_once(name, change):
    ffn, x = make(), torch.randn(10, 40)
    warm(ffn, x)
    assert prepared(ffn, x) is not None
    change(getattr(ffn, name))
    for _ in range(4):
        assert error_ratio(ffn(x), reference(ffn, x)) < LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_a_replaced_parameter_is_seen_at_once(name):
    ffn, x = make(), torch.randn(10, 40)
    warm(ffn, x)
    setattr(ffn, name, torch.nn.Parameter(torch.randn_like(getattr(ffn, name))))
    for _ in range(4):
        assert error_ratio(ffn(x), reference(ffn, x)) < LIMIT
    setattr(ffn, name, torch.nn.Parameter(torch.randn(7)))
    with pytest.raises(MIDLError, match=rf"{name}\b.*expected"):
        ffn(x)


def test_a_new_budget_batch_size_thread_count_or_instruction_set_is_seen_at_once():
    ffn = make(group_size=8)
    for rows in (1, 7, 300):
        x = torch.randn(rows, 40)
        for active in (0.5, 0.2):
            ffn.active = active
            for name in native.supported_instruction_sets():
                native.use_instruction_set(name)
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    warm(ffn, x)
                    assert error_ratio(ffn(x), reference(ffn, x)) < LIMIT
    with midl.kernels("dense"):
        assert error_ratio(ffn(x), reference(ffn, x)) < LIMIT


def test_whoever_watches_sees_the_layer():
    ffn, x = make(), torch.randn(5, 40)
    warm(ffn, x)
    with midl.record_activity(ffn) as activity:
        ffn(x)
    assert activity[""].usage.sum() > 0
    assert midl.count_flops(ffn, x) > 0
    with torch.profiler.profile() as profile:
        ffn(x)
    assert "midl::ffn" in {event.name for event in profile.events()}
    with torch.autocast("cpu", torch.bfloat16):
        assert ffn(x).dtype == torch.bfloat16
    with torch.enable_grad():
        assert ffn(x).requires_grad


def test_exploration_noise_is_drawn_in_training_alone():
    ffn, x = make(active=0.2, noise=50.0), torch.randn(5, 40)
    warm(ffn.eval(), x)
    assert torch.equal(ffn(x), ffn(x))
    ffn.train()
    assert not torch.equal(ffn(x), ffn(x))


@pytest.mark.parametrize(
    "x",
    [torch.randn(40, 3), torch.randn(3, 40, dtype=torch.float64), torch.tensor(1.0), [1.0] * 40],
    ids=["axes", "dtype", "scalar", "list"],
)
def test_wrong_inputs_are_errors_still(x):
    ffn = make()
    warm(ffn, torch.randn(3, 40))
    with pytest.raises(MIDLError, match="MIDFFN: input"):
        ffn(x)


def test_inputs_of_any_layout_and_copies_of_the_layer():
    ffn = make()
    warm(ffn, torch.randn(3, 40))
    for x in (torch.randn(40, 3).t(), torch.randn(3, 80)[:, ::2], torch.randn(1, 40).expand(3, 40)):
        assert error_ratio(ffn(x), reference(ffn, x.clone())) < LIMIT
    other, x = copy.deepcopy(ffn), torch.randn(3, 40)
    ffn.weight.mul_(2)
    warm(other, x)
    assert error_ratio(other(x), reference(other, x)) < LIMIT
    del ffn, other
    assert native_packing.packed_bytes() == 0


def op_arguments(ffn):
    c, groups = ffn.config, ffn.num_groups
    choices = native.Choices(c.num_slots(groups), c.group_size, 1, c.interpolation, c.threshold)
    return [getattr(ffn, name) for name in NAMES], choices, ffn.activation


def call_op(ffn, x):
    tensors, c, activation = op_arguments(ffn)
    return torch.ops.midl.ffn(
        x, *tensors, None, c.k, c.group_size, activation, c.interpolation, "selected", threshold=c.threshold
    )


@pytest.mark.parametrize("choices", [{}, {"gated": False, "bias": False}, {"interpolation": "hard", "threshold": 0.1}])
def test_a_prepared_op_returns_what_the_op_returns(choices, monkeypatch):
    ffn = make(**choices)
    for shape in ((9, 40), (2, 3, 40), (0, 40)):
        x = torch.randn(shape)
        native_packing.clear_packed()
        assert call_ffn_op_prepared(x, *op_arguments(ffn)) is None
        expected = call_op(ffn, x)
        call_op(ffn, x)
        with monkeypatch.context() as patch:
            patch.setattr(ffn_op, "resolve", lambda *_, **__: pytest.fail("the general path was taken"))
            again = call_op(ffn, x)
        for results in (call_ffn_op_prepared(x, *op_arguments(ffn)), again):
            for result, general in zip(results, expected, strict=True):
                assert torch.equal(result, general)
                assert result.stride() == general.stride()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [change_by_copy, change_data, change_through_data])
def test_a_changed_parameter_of_an_op_is_seen_at_once(name, change):
    ffn, x = make(), torch.randn(10, 40)
    for _ in range(3):
        call_op(ffn, x)
    assert call_ffn_op_prepared(x, *op_arguments(ffn)) is not None
    change(getattr(ffn, name))
    for _ in range(4):
        assert error_ratio(call_op(ffn, x)[0], reference(ffn, x)) < LIMIT
