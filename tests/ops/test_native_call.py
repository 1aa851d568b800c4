"""Prepared inference calls: the general path's bits, never stale, and out of the way whenever somebody watches."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

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
from midl.ops import linear as linear_op
from midl.ops.dispatch import unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.ops import native, native_packing
from midl.ops.native_call import call_op_prepared, call_prepared

LIMITS = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def _inference(poisoned_memory):
    """No autograd; instruction set and threads are restored, panels forgotten."""
    before, threads = native.instruction_set(), torch.get_num_threads()
    native_packing.clear_packed()
    with torch.no_grad():
        yield
    native.use_instruction_set(before)
    torch.set_num_threads(threads)


def warm(layer, x):
    """Call until the layer's panels are there and the next call is prepared."""
    for _ in range(3):
        layer(x)


def prepared(layer, x):
    return call_prepared(x, layer._parameters, layer.config)


def reference(layer, x):
    with midl.kernels("reference"):
        return layer(x)


def make(group_size=16, **choices):
    layer = midl.MIDLinear(40, 64, active=0.5, rank=5, group_size=group_size, **choices)
    if layer.gate_bias is not None:
        layer.gate_bias.copy_(torch.randn(64 // group_size))
    return layer


@pytest.mark.parametrize("kernels", ["native", "dense"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("gate", "interpolation"), [("projection", "sigmoid"), ("light", "hard")])
@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 16, 64])
def test_a_prepared_call_has_the_general_paths_bits(kernels, dtype, gate, interpolation, group_size):
    layer = make(group_size, gate=gate, interpolation=interpolation, dtype=dtype, bias=group_size != 2)
    with midl.kernels(kernels):
        warm(layer, torch.randn(9, 40).to(dtype))
        for shape in ((40,), (1, 40), (9, 40), (2, 3, 40), (0, 40)):
            x = torch.randn(shape, dtype=dtype)
            warm(layer, x)
            y = prepared(layer, x)
            with torch.enable_grad():
                general = layer(x)
            assert torch.equal(y, general)
            assert error_ratio(y, reference(layer, x)) < LIMITS[dtype]


def test_the_layer_takes_prepared_calls(monkeypatch):
    layer, x = make(), torch.randn(3, 40)
    expected = layer(x)
    warm(layer, x)
    monkeypatch.setattr(linear_op, "resolve", lambda *_, **__: pytest.fail("the general path was taken"))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("parameter", ["weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias"])
@pytest.mark.parametrize(
    "change", [change_by_copy, change_one_value, change_data, change_through_data, change_in_inference_mode]
)
@pytest.mark.parametrize("kernels", ["native", "dense"])
def test_a_changed_parameter_is_seen_at_once(parameter, change, kernels):
    layer, x = make(), torch.randn(10, 40)
    with midl.kernels(kernels):
        warm(layer, x)
        assert prepared(layer, x) is not None
        change(getattr(layer, parameter))
        for _ in range(4):
            assert error_ratio(layer(x), reference(layer, x)) < LIMITS[torch.float32]


@pytest.mark.parametrize("parameter", ["weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias"])
def test_a_replaced_parameter_is_seen_at_once(parameter):
    layer, x = make(), torch.randn(10, 40)
    warm(layer, x)
    setattr(layer, parameter, torch.nn.Parameter(torch.randn_like(getattr(layer, parameter))))
    for _ in range(4):
        assert error_ratio(layer(x), reference(layer, x)) < LIMITS[torch.float32]


@pytest.mark.parametrize("name", ["bias", "gate_bias", "light_up"])
def test_a_parameter_of_the_wrong_dtype_or_shape_is_an_error_still(name):
    layer, x = make(), torch.randn(10, 40)
    warm(layer, x)
    parameter = getattr(layer, name)
    for wrong in (parameter.double(), parameter[:-1].clone(), parameter.to("meta")):
        setattr(layer, name, torch.nn.Parameter(wrong))
        for rows in (10, 3):  # also where the call would be prepared anew
            with pytest.raises(MIDLError, match=rf"{name}\b.*expected"):
                layer(x[:rows])


def test_a_square_weight_transposed_in_its_own_memory_is_seen_at_once():
    layer, x = midl.MIDLinear(48, 48, active=0.5, rank=5, group_size=16), torch.randn(5, 48)
    warm(layer, x)
    layer.weight.data = layer.weight.data.t()
    for _ in range(4):
        assert error_ratio(layer(x), reference(layer, x)) < LIMITS[torch.float32]


def test_a_new_budget_batch_size_thread_count_or_instruction_set_is_seen_at_once():
    layer = make(1)
    for rows in (1, 7, 1, 300):
        x = torch.randn(rows, 40)
        for active in (0.5, 0.1):
            layer.active = active
            for name in native.supported_instruction_sets():
                native.use_instruction_set(name)
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    warm(layer, x)
                    assert error_ratio(layer(x), reference(layer, x)) < LIMITS[torch.float32]


def test_whoever_watches_sees_the_layer():
    layer, x = make(), torch.randn(5, 40)
    warm(layer, x)
    with midl.record_activity(layer) as activity:
        layer(x)
    assert activity[""].usage.sum() > 0
    assert midl.count_flops(layer, x) > 0
    with torch.profiler.profile() as profile:
        layer(x)
    assert "midl::linear" in {event.name for event in profile.events()}
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.enable_grad():
        assert layer(x).requires_grad
    assert layer(x).dtype == torch.float32


def test_exploration_noise_is_drawn_in_training_alone():
    layer, x = midl.MIDLinear(40, 64, active=0.25, group_size=1, noise=50.0), torch.randn(5, 40)
    warm(layer.eval(), x)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(40, 3),
        torch.randn(3, 20, 2),
        torch.randn(3, 40, dtype=torch.float64),
        torch.tensor(1.0),
        torch.ones(3, 40, dtype=torch.int64),
        [1.0] * 40,
    ],
    ids=["axes", "axes of the same size", "dtype", "scalar", "integers", "list"],
)
def test_wrong_inputs_are_errors_still(x):
    layer = make()
    warm(layer, torch.randn(3, 40))
    with pytest.raises(MIDLError, match="MIDLinear: input"):
        layer(x)


def test_inputs_of_any_layout():
    layer = make()
    wide = torch.randn(40, 3)
    warm(layer, torch.randn(3, 40))
    negative = torch.view_as_complex(torch.randn(3, 40, 2)).conj().imag
    assert negative.is_neg()
    for x in (wide.t(), torch.randn(3, 80)[:, ::2], torch.randn(1, 40).expand(3, 40), negative):
        assert error_ratio(layer(x), reference(layer, x.clone())) < LIMITS[torch.float32]


def test_copies_and_pickles_of_a_layer_that_has_prepared_calls():
    layer, x = make(), torch.randn(3, 40)
    warm(layer, x)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.weight.mul_(1)
        other.light_up.mul_(1)
        warm(other, x)
        assert torch.equal(other(x), expected)


def test_prepared_calls_die_with_their_layer():
    layer = make()
    warm(layer, torch.randn(3, 40))
    del layer
    assert native_packing.packed_bytes() == 0


def test_eight_python_threads_while_a_ninth_changes_the_weights():
    torch.set_num_threads(1)
    layer, inputs = make(), [torch.randn(rows, 40) for rows in (1, 2, 5, 9)]
    warm(layer, inputs[0])
    wrong = []

    def serve(seed):
        for i in range(200):
            with torch.no_grad():
                y = layer(inputs[(i + seed) % 4])
            if not y.isfinite().all():
                wrong.append(i)

    workers = [threading.Thread(target=serve, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for _ in range(50):
        layer.weight.mul_(1.001)
    for worker in workers:
        worker.join()
    assert wrong == []
    for x in inputs:
        assert error_ratio(layer(x), reference(layer, x)) < LIMITS[torch.float32]


def prepared_image(layer, x):
    window = layer.stride, tuple(layer._op_padding), layer.dilation
    return call_prepared(x, layer._parameters, layer.config, window)


@pytest.mark.parametrize("choices", [{}, {"gate": "light", "interpolation": "hard"}, {"span": 3}, {"select": "image"}])
@pytest.mark.parametrize("window", [{"padding": 1}, {"stride": (2, 1), "dilation": (1, 2), "bias": False}])
@pytest.mark.parametrize("group_size", [1, 16])
def test_a_prepared_convolution_has_the_general_paths_bits(choices, window, group_size):
    layer = midl.MIDConv2d(6, 32, 3, active=0.5, rank=4, group_size=group_size, **window, **choices)
    for shape in ((1, 6, 9, 8), (3, 6, 5, 7)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).contiguous(memory_format=memory_format)
            with midl.kernels("native"):
                warm(layer, x)
                y = prepared_image(layer, x)
                with torch.enable_grad():
                    general = layer(x)
            assert torch.equal(y, general)
            assert y.stride() == general.stride()
            assert error_ratio(y, reference(layer, x)) < LIMITS[torch.float32]


@pytest.mark.parametrize("parameter", ["weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias"])
@pytest.mark.parametrize("change", [change_by_copy, change_one_value, change_data, change_through_data])
def test_a_changed_parameter_of_a_convolution_is_seen_at_once(parameter, change):
    layer, x = midl.MIDConv2d(6, 32, 3, active=0.5, rank=4, group_size=16), torch.randn(2, 6, 7, 7)
    warm(layer, x)
    assert prepared_image(layer, x) is not None
    change(getattr(layer, parameter))
    for _ in range(4):
        assert error_ratio(layer(x), reference(layer, x)) < LIMITS[torch.float32]


def test_convolutions_of_other_kinds_take_the_general_path():
    x = torch.randn(2, 6, 7, 7)
    single = midl.MIDConv2d(6, 32, 3, active=0.1, rank=4, group_size=1)  # by dot products, not by panels
    half = midl.MIDConv2d(6, 32, 3, active=0.5, rank=4, group_size=16, dtype=torch.bfloat16)
    for layer, image, prepared in ((single, x, False), (half, x.bfloat16(), native.multiplies_as_is(torch.bfloat16))):
        with midl.kernels("native"):
            warm(layer, image)
            assert (prepared_image(layer, image) is not None) == prepared
            assert error_ratio(layer(image), reference(layer, image)) < LIMITS[image.dtype]
    with pytest.raises(MIDLError, match="MIDConv2d: input"):
        single(torch.randn(2, 5, 7, 7))


def op_arguments(layer, x):
    """The op's tensors behind x, its choices and its window, as a compiled graph passes them."""
    c, convolution = layer.config, x.dim() == 4
    tensors = layer.weight, layer.bias, layer.light_down, layer.light_up, layer.gate_weight, layer.gate_bias
    span = 0 if convolution and c.select == "image" else c.span
    choices = native.Choices(layer.num_slots, c.group_size, span, c.interpolation, c.threshold)
    return tensors, choices, (layer.stride, tuple(layer._op_padding), layer.dilation) if convolution else None


def layers_and_inputs():
    yield make(), torch.randn(9, 40)
    yield make(threshold=0.0, most=0.75), torch.randn(2, 3, 40)
    for choices in ({}, {"span": 3}, {"select": "image"}):
        yield midl.MIDConv2d(6, 32, 3, active=0.5, rank=4, group_size=16, padding=1, **choices), torch.randn(2, 6, 7, 7)


@pytest.mark.parametrize("kernels", ["native", "dense"])
def test_a_prepared_op_returns_what_the_op_returns(kernels):
    for layer, x in layers_and_inputs():
        tensors, choices, window = op_arguments(layer, x)
        op = torch.ops.midl.conv2d if window else torch.ops.midl.linear
        rest = (*(window or ()), choices.k, choices.group_size, choices.span, choices.interpolation, "selected")
        with midl.kernels(kernels):
            native_packing.clear_packed()
            assert call_op_prepared(x, tensors, choices, window) is None
            expected = op(x, *tensors, None, *rest, threshold=choices.threshold)
            warm(layer, x)
            prepared = call_op_prepared(x, tensors, choices, window)
            again = op(x, *tensors, None, *rest, threshold=choices.threshold)
        for results in (prepared, again):
            for result, general in zip(results, expected, strict=True):
                assert result.dtype == general.dtype
                assert result.stride() == general.stride()
                assert error_ratio(result, general) < LIMITS[torch.float32]


def test_a_prepared_op_takes_biases_made_anew_and_no_other_parameter():
    for layer, x in layers_and_inputs():
        warm(layer, x)
        tensors, *rest = op_arguments(layer, x)
        assert call_op_prepared(x, tensors, *rest) is not None
        for i, tensor in enumerate(tensors):
            anew = (*tensors[:i], tensor.clone(), *tensors[i + 1 :])
            assert (call_op_prepared(x, anew, *rest) is not None) == (i in (1, 5))
        layer.bias.copy_(torch.randn_like(layer.bias))
        layer.gate_bias.copy_(torch.randn_like(layer.gate_bias))
        biases = [t.clone() if i in (1, 5) else t for i, t in enumerate(tensors)]
        for given in (tensors, biases):
            y, _ = call_op_prepared(x, given, *rest)
            assert error_ratio(y, reference(layer, x)) < LIMITS[torch.float32]
        for wrong in (biases[1].double(), biases[1][:16], torch.stack([biases[1]] * 2, 1)[:, 0]):
            assert call_op_prepared(x, (tensors[0], wrong, *tensors[2:]), *rest) is None


@pytest.mark.parametrize("parameter", ["weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias"])
@pytest.mark.parametrize("change", [change_by_copy, change_one_value, change_data, change_through_data])
def test_a_changed_parameter_of_an_op_is_seen_at_once(parameter, change):
    layer, x = make(), torch.randn(10, 40)
    tensors, c, _ = op_arguments(layer, x)
    for _ in range(3):
        torch.ops.midl.linear(x, *tensors, None, c.k, c.group_size, c.span, c.interpolation, "selected")
    assert call_op_prepared(x, tensors, c) is not None
    change(getattr(layer, parameter))
    for _ in range(4):
        y, _ = torch.ops.midl.linear(x, *tensors, None, c.k, c.group_size, c.span, c.interpolation, "selected")
        assert error_ratio(y, reference(layer, x)) < LIMITS[torch.float32]


def test_parameters_with_gaps_in_memory_are_not_prepared():
    layer, x = make(), torch.randn(3, 40)
    warm(layer, x)
    layer.bias.data = torch.randn(128)[::2]
    for _ in range(4):
        assert error_ratio(layer(x), reference(layer, x)) < LIMITS[torch.float32]


_WITHOUT_EXCHANGE_API = """
import sys, torch
torch.Tensor.__dlpack_c_exchange_api__ = None
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not exchange", *sys.argv[1:]]))
"""


def test_all_of_it_with_a_torch_without_dlpacks_exchange_api():
    tests = [str(Path(__file__)), str(Path(__file__).with_name("test_plain_inference.py"))]
    run = subprocess.run([sys.executable, "-c", _WITHOUT_EXCHANGE_API, *tests], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "passed" in run.stdout
