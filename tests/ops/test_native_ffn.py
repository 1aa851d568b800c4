"""The native kernel of midl::ffn against the reference, on every instruction set that this CPU runs."""

from __future__ import annotations

import pytest
import torch
from ffn_loop import random_ffn
from helpers import error_ratio, instruction_sets_to_test, with_gradients

import midl
from midl.ops import dispatch, native_packing, reference_ffn
from midl.ops.ffn import ffn
from midl.ops.reference_ffn import ACTIVATIONS

pytestmark = pytest.mark.skipif(
    dispatch.unavailable_reason("native") is not None, reason="native kernels are not built here"
)
# Rows, inputs, hidden units, outputs, units of a group, groups selected.
SIZES = [
    (1, 5, 12, 4, 3, 2), (7, 63, 96, 40, 8, 5), (300, 64, 256, 70, 16, 7), (33, 100, 600, 100, 100, 3),
    (65, 20, 64, 33, 1, 30), (9, 40, 160, 40, 40, 4), (0, 5, 12, 4, 3, 2),
]  # fmt: skip


# In half precision the hidden units and the code are rounded too.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


@pytest.fixture(
    autouse=True, params=["baseline", "avx2", "avx512-emulated", "avx512", "avx512bf16", "amx-emulated", "amx"]
)
def _instruction_set(request):
    native = pytest.importorskip("midl.ops.native")
    if request.param not in instruction_sets_to_test():
        pytest.skip(f"this CPU does not run {request.param}, or runs what it emulates")
    before = native.instruction_set()
    native.use_instruction_set(request.param)
    midl.kernels("native")
    yield
    native.use_instruction_set(before)


def check(tensors, *rest):
    y, selected = ffn(*tensors.values(), *rest)
    expected, chosen = reference_ffn.ffn(*tensors.values(), *rest)
    assert torch.equal(selected, chosen)
    assert y.dtype == expected.dtype
    assert error_ratio(y.float(), expected.float()) < LIMITS[y.dtype]
    for _ in range(2):  # from the second call on with panels that are kept
        assert torch.equal(ffn(*tensors.values(), *rest)[0], y)
    return y


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["sigmoid", "hard"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_output_equals_the_reference(poisoned_memory, sizes, interpolation, dtype):
    rows, d, hidden, out, size, k = sizes
    for activation in ACTIVATIONS:
        for gated in (False, True):
            tensors = random_ffn((rows, d), hidden, out, 3, size, gated=gated, bias=rows % 2 == 1, dtype=dtype)
            check(tensors, None, k, size, activation, interpolation, "selected")


def test_layouts_leading_shapes_and_noise():
    tensors = random_ffn((3, 20, 24), 64, 24, 4, 8, dtype=torch.float32)
    noise = torch.randn(3, 20, 8)
    y = check(tensors, noise, 3, 8, "gelu", "sigmoid", "selected")
    assert y.shape == (3, 20, 24)
    for name in ("x", "weight", "down_weight"):
        strided = dict(tensors)
        strided[name] = tensors[name].mT.contiguous().mT
        assert torch.equal(check(strided, noise, 3, 8, "gelu", "sigmoid", "selected"), y)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("group_size", [1, 8, 32])
def test_a_nan_row_harms_only_itself(dtype, group_size):
    tensors = random_ffn((40, 24), 64, 24, 4, group_size, dtype=dtype)
    rest = None, 24 // group_size or 1, group_size, "relu", "hard", "selected"
    clean, _ = ffn(*tensors.values(), *rest)
    tensors["x"][7, 3] = float("nan")
    y, _ = ffn(*tensors.values(), *rest)
    others = [i for i in range(40) if i != 7]
    assert torch.equal(y[others], clean[others])
    assert y[7].isnan().all()


WEIGHTS = ("weight", "value_weight", "down_weight")


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("change", ["in place", "data", "swap"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_panels_are_kept_while_no_weight_changes(name, change, dtype):
    tensors = random_ffn((9, 20), 64, 24, 4, 16, gated=True, dtype=dtype)
    rest = (None, 2, 16, "silu", "hard", "selected")
    native_packing.clear_packed()
    check(tensors, *rest)
    assert native_packing.packed_bytes() >= sum(tensors[name].nbytes for name in WEIGHTS)
    if change == "in place":
        tensors[name].mul_(2)
    elif change == "data":
        tensors[name].data[:, 0] = 3
    else:
        tensors[name] = tensors[name] * 2
    check(tensors, *rest)
    tensors.clear()
    assert native_packing.packed_bytes() == 0


def test_activations_hold_far_from_zero():
    x = torch.tensor([[-100.0], [-20.0], [-6.0], [-1e-4], [0.0], [1e-4], [6.0], [20.0], [100.0]])
    one, nothing = torch.ones(1, 1), torch.zeros(1)
    for activation in ACTIVATIONS:
        y, _ = ffn(
            x, one, None, None, None, one, None, one, nothing[:, None], nothing, nothing, one, nothing, None, 1, 1,
            activation, "hard", "selected",
        )  # fmt: skip
        torch.testing.assert_close(y, reference_ffn.activate(x, activation), rtol=1e-5, atol=1e-6)


# Rows of their own for every thread, the same rows for all, and those in two chunks.
@pytest.mark.parametrize(("rows", "counts"), [(600, (2, 3)), (9, (2, 3)), (100, (2, 5)), (300, (7,))])
@pytest.mark.parametrize("group_size", [16, 40])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_any_number_of_threads_gives_the_same_output(rows, counts, group_size, dtype):
    tensors = random_ffn((rows, 64), 16 * group_size, 200, 4, group_size, dtype=dtype)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, *counts):
            torch.set_num_threads(count)
            outputs.append(ffn(*tensors.values(), None, 7, group_size, "silu", "hard", "selected")[0])
    finally:
        torch.set_num_threads(threads)
    assert all(error_ratio(y.float(), outputs[0].float()) < LIMITS[dtype] / 2 for y in outputs)


# Few rows, whose gate every thread computes for itself; or the threads divide it by groups; or by rows.
@pytest.mark.parametrize("rows", [1, 2, 14])
@pytest.mark.parametrize("interpolation", ["sigmoid", "hard"])
def test_few_rows_are_shared_by_all_threads(poisoned_memory, rows, interpolation):
    tensors = random_ffn((rows, 200), 512 * 8, 301, 110, 8, gated=True, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for threshold in (None, 0.2):
                check(tensors, None, 200, 8, "silu", interpolation, "selected", threshold)
    finally:
        torch.set_num_threads(threads)


# Groups that fill panels, several panels, folded ones; more rows than are computed at once; narrow groups.
GRADIENT_SIZES = [
    (40, 24, 64, 24, 16, 3), (9, 40, 160, 41, 40, 4), (33, 100, 600, 100, 100, 3), (65, 33, 120, 37, 12, 6),
    (600, 64, 256, 70, 8, 7), (13, 20, 64, 33, 1, 30),
]  # fmt: skip


@pytest.mark.parametrize("sizes", GRADIENT_SIZES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_gradients_are_those_of_the_reference(poisoned_memory, sizes, gated, threshold):
    rows, d, hidden, out, size, k = sizes
    for activation in ACTIVATIONS:
        interpolation = "hard" if activation in ("gelu", "relu") else "sigmoid"
        tensors = random_ffn((rows, d), hidden, out, 3, size, gated=gated, bias=rows % 2 == 1, dtype=torch.float32)
        grad_y, rest = torch.randn(rows, out), (None, k, size, activation, interpolation, "selected", threshold)
        actual = with_gradients(ffn, tensors, *rest, grad_y=grad_y)
        with midl.kernels("reference"):
            expected = with_gradients(ffn, tensors, *rest, grad_y=grad_y)
        for name, value in expected.items():
            assert error_ratio(actual[name], value) < 4e-6, name


def test_gradients_are_the_same_on_every_run_and_with_any_number_of_threads():
    tensors = random_ffn((600, 64), 256, 70, 3, 16, gated=True, dtype=torch.float32)
    grad_y, rest = torch.randn(600, 70), (None, 7, 16, "gelu", "sigmoid", "selected")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(ffn, tensors, *rest, grad_y=grad_y))
    finally:
        torch.set_num_threads(threads)
    for name in ("weight", "value_weight", "down_weight", "bias", "light_hidden"):
        assert torch.equal(results[1][name], results[2][name])
        assert all(error_ratio(r[name], results[0][name]) < 1e-6 for r in results[1:])


def test_gradients_of_some_tensors_alone():
    tensors = random_ffn((20, 24), 64, 24, 4, 8, gated=True, dtype=torch.float32)
    grad_y, rest = torch.randn(20, 24), (3, 8, "gelu", "sigmoid", "selected")
    with midl.kernels("reference"):
        expected = with_gradients(ffn, tensors, None, *rest, grad_y=grad_y)
    for name in ("x", "weight", "down_weight", "light_down"):
        given = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        y, _ = ffn(*given.values(), None, *rest)
        (grad,) = torch.autograd.grad(y, given[name], grad_y)
        assert error_ratio(grad, expected[name]) < 4e-6


@pytest.mark.parametrize("group_size", [1, 8, 40])
def test_gradients_in_half_precision(group_size):
    tensors = random_ffn((20, 24), 160, 24, 4, group_size, gated=True, dtype=torch.bfloat16)
    grad_y, rest = torch.randn(20, 24).bfloat16(), (2, group_size, "gelu", "sigmoid", "selected")
    with midl.kernels("reference"):
        expected = with_gradients(ffn, tensors, None, *rest, grad_y=grad_y)
    found = with_gradients(ffn, tensors, None, *rest, grad_y=grad_y)
    assert found.keys() == expected.keys()
    assert torch.equal(found.pop("selected"), expected["selected"])
    for name, grad in found.items():
        assert grad.dtype == torch.bfloat16
        assert error_ratio(grad.float(), expected[name].float()) < LIMITS[torch.bfloat16], name
