"""Gradients of the native kernels against the reference in float64, on every instruction set."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import TENSORS, error_ratio, instruction_sets_to_test
from helpers import random_tensors as draw_tensors
from hypothesis import given
from hypothesis import strategies as st

import midl
from midl.ops import reference
from midl.ops.dispatch import unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.ops import native

pytestmark = pytest.mark.usefixtures("native_kernels")
SETS = instruction_sets_to_test()
# Root-mean-square error in units of the gradient's root-mean-square.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

random_tensors = functools.partial(draw_tensors, dtype=torch.float32)
backward = torch.ops.midl.linear_backward


def doubles(tensors):
    return [None if t is None else t.detach().double() for t in tensors.values()]


def check(tensors, k, group_size, *, span=1, rule="sigmoid", ste="selected", needs=None):
    n, dtype = tensors["weight"].shape[0], tensors["x"].dtype
    _, selected = reference.linear(*doubles(tensors), None, k, group_size, span, rule, ste)
    grad_y = torch.randn(*tensors["x"].shape[:-1], n).to(dtype)
    needs = [t is not None for t in tensors.values()] if needs is None else needs
    rest = (group_size, span, rule, ste, needs)
    grads = backward(grad_y, selected, *tensors.values(), *rest)
    expected = reference.linear_backward(grad_y.double(), selected, *doubles(tensors), *rest)
    for name, need, actual, right in zip(TENSORS, needs, grads, expected, strict=True):
        assert actual.dtype == dtype
        assert actual.shape == (right.shape if need else (0,)), name
        if need:
            # The gate's gradients are sums that cancel.
            limit = LIMITS[dtype] * (10 if name.startswith("gate") else 1)
            assert error_ratio(actual, right) < limit, name
    return grads


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("rule", ["sigmoid", "hard"])
@pytest.mark.parametrize("group_size", [1, 3, 5, 8, 16, 48])
def test_gradients_equal_the_reference(instruction_set, dtype, gate, rule, group_size):
    tensors = random_tensors((13, 40), (group_size * 6, 40), 7, group_size, gate=gate, dtype=dtype)
    check(tensors, 3, group_size, rule=rule)


@pytest.mark.parametrize("rows", [1, 3, 17, 63, 300])
@pytest.mark.parametrize("depth", [1, 17, 100, 600])
def test_rows_and_depths_that_fill_no_tile(instruction_set, rows, depth):
    check(random_tensors((rows, depth), (48, depth), min(depth, 5), 16), 2, 16)


@pytest.mark.parametrize(("n", "group_size"), [(9, 9), (63, 9), (100, 20), (600, 100), (1000, 1000)])
def test_widths_that_fill_no_panel(instruction_set, n, group_size):
    groups = n // group_size
    for k in {1, max(1, groups // 2), groups}:
        check(random_tensors((9, 33), (n, 33), 6, group_size), k, group_size)


@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize(("shape", "span"), [((2, 7, 20), 3), ((3, 5, 20), 5), ((2, 4, 20), 9), ((700, 20), 64)])
def test_neighbours_that_share_a_selection(instruction_set, gate, shape, span):
    check(random_tensors(shape, (48, 20), 4, 8, gate=gate), 2, 8, span=span)


@pytest.mark.parametrize("only", range(7))
@pytest.mark.parametrize("gate", ["projection", "light"])
def test_each_gradient_alone(only, gate):
    tensors = random_tensors((5, 20), (48, 20), 4, 8, gate=gate)
    if list(tensors.values())[only] is not None:
        check(tensors, 2, 8, needs=[i == only for i in range(7)])


def test_no_bias(instruction_set):
    for gate in ("projection", "light"):
        check(random_tensors((7, 30), (64, 30), 5, 16, gate=gate, bias=False), 2, 16)


@pytest.mark.parametrize("group_size", [1, 16])
def test_dense_straight_through(group_size):
    check(random_tensors((7, 30), (64, 30), 5, group_size), 2, group_size, ste="dense")


def test_inputs_that_are_not_contiguous(instruction_set):
    tensors = random_tensors((12, 50), (64, 50), 6, 16)
    for x in (torch.randn(50, 12).T, torch.randn(12, 101)[:, ::2][:, :50], torch.randn(1, 50).expand(12, 50)):
        check({**tensors, "x": x}, 2, 16)
    y = torch.randn(12, 64).sum(1, keepdim=True).expand(12, 64)
    _, selected = reference.linear(*tensors.values(), None, 2, 16, 1, "sigmoid", "selected")
    rest = (16, 1, "sigmoid", "selected", [True] * 7)
    actual = backward(y, selected, *tensors.values(), *rest)
    assert torch.equal(actual[1], backward(y.contiguous(), selected, *tensors.values(), *rest)[1])


def test_empty_batch():
    grads = check(random_tensors((0, 5), (32, 5), 2, 8), 2, 8)
    assert not grads[1].any()


@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("rule", ["sigmoid", "hard"])
@pytest.mark.parametrize(("rows", "span"), [(31, 1), (32, 1), (150, 1), (1100, 1), (530, 60)])
@pytest.mark.parametrize(("group_size", "k"), [(1, 1), (1, 12), (1, 43), (2, 20)])
def test_many_rows_that_picked_among_narrow_groups(instruction_set, gate, rule, rows, span, group_size, k):
    for depth in (17, 193, 416):
        tensors = random_tensors((rows, depth), (70, depth), 5, group_size, gate=gate)
        check(tensors, k, group_size, span=span, rule=rule)


def test_neurons_without_a_gradient_and_those_that_nobody_picked_do_not_matter(instruction_set):
    tensors = random_tensors((150, 200), (70, 200), 5, 1)
    _, selected = reference.linear(*tensors.values(), None, 1, 1, 1, "sigmoid", "selected")
    grad_y = torch.randn(150, 70).relu()
    rest = (1, 1, "sigmoid", "selected", [True] * 7)
    expected = reference.linear_backward(grad_y.double(), selected, *doubles(tensors), *rest)
    idle = [j for j in range(70) if j not in selected]
    assert idle
    if native.extension().backward_picks(False, 150, 70, 1, 1):  # elsewhere they are multiplied by zeros
        tensors["weight"][idle] = torch.nan
    for actual, right in zip(backward(grad_y, selected, *tensors.values(), *rest), expected, strict=True):
        assert error_ratio(actual, right) < 10 * LIMITS[torch.float32]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(("group_size", "k"), [(16, 7), (1, 110)])
def test_the_same_bits_on_every_run(threads, group_size, k):
    tensors = random_tensors((300, 520), (256, 520), 24, group_size)
    _, selected = reference.linear(*tensors.values(), None, k, group_size, 1, "sigmoid", "selected")
    grad_y = torch.randn(300, 256)
    rest = (group_size, 1, "sigmoid", "selected", [True] * 7)
    torch.set_num_threads(threads)
    first, second = (backward(grad_y, selected, *tensors.values(), *rest) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@given(
    rows=st.integers(1, 40), depth=st.integers(1, 70), groups=st.integers(1, 10), group_size=st.integers(1, 40),
    rank=st.integers(1, 12), share=st.floats(0, 1), span=st.integers(1, 4),
    gate=st.sampled_from(["projection", "light"]), rule=st.sampled_from(["sigmoid", "hard"]), bias=st.booleans(),
    name=st.sampled_from(SETS),
)  # fmt: skip
def test_gradients_of_any_layer_equal_the_reference(
    rows, depth, groups, group_size, rank, share, span, gate, rule, bias, name
):
    native.use_instruction_set(name)
    tensors = random_tensors((rows, depth), (groups * group_size, depth), rank, group_size, gate=gate, bias=bias)
    check(tensors, max(1, round(share * groups)), group_size, span=span, rule=rule)


def test_a_layer_trains_through_the_native_kernels_as_through_the_reference():
    def losses(name):
        torch.manual_seed(1)
        layer = midl.MIDLinear(30, 64, active=0.5, group_size=16)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        x, target, out = torch.randn(40, 30), torch.randn(40, 64), []
        with midl.kernels(name):
            for _ in range(10):
                loss = (layer(x) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                out.append(loss.item())
        return torch.tensor(out)

    torch.testing.assert_close(losses("native"), losses("reference"), rtol=1e-4, atol=1e-5)
