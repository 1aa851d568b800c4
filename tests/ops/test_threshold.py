"""Thresholds: rows select as many groups as reach one, in every implementation, and gradients follow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    Options,
    assert_close_to_loop,
    error_ratio,
    instruction_sets_to_test,
    plain_conv2d,
    plain_linear,
    random_tensors,
    with_gradients,
)
from hypothesis import given
from hypothesis import strategies as st

import midl
from midl.errors import KernelError
from midl.ops import reference, reference_ffn
from midl.ops.conv2d import conv2d
from midl.ops.dispatch import resolve, unavailable_reason
from midl.ops.ffn import ffn
from midl.ops.linear import linear
from midl.selection import selection_mask, topk_groups

native = pytest.importorskip("midl.ops.native")
needs_native = pytest.mark.skipif(unavailable_reason("native") is not None, reason="native kernels are not built")

RULES = list(itertools.product(("projection", "light"), ("sigmoid", "hard"), ("selected", "dense")))
rules = pytest.mark.parametrize(("gate", "interpolation", "ste"), RULES)
WINDOW = ((1, 1), (1, 1), (1, 1))
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 3e-3}
SETS = instruction_sets_to_test()


@pytest.fixture(autouse=True)
def _reference(poisoned_memory):
    midl.kernels("reference")


def sizes_of(selected):
    """Return how many groups each block selected; the layout is checked on the way."""
    taken = selected >= 0
    assert taken[..., 0].all()
    assert (selected[~taken] == -1).all()
    count = taken.sum(-1)
    for row, size in zip(selected.flatten(0, -2), count.flatten(), strict=True):
        assert row[:size].tolist() == sorted(set(row[:size].tolist()))
        assert (row[size:] == -1).all()
    return count


@rules
@pytest.mark.parametrize(("shape", "span"), [((9, 5), 1), ((2, 7, 5), 3)])
@pytest.mark.parametrize("noisy", [False, True])
def test_linear_equals_the_loop(gate, interpolation, ste, shape, span, noisy):
    o = Options(5, 2, interpolation, ste, threshold=0.2)
    tensors = random_tensors(shape, (16, 5), 3, 2, gate=gate)
    noise = torch.randn(*shape[:-2], -(-shape[-2] // span), 8, dtype=torch.float64) if noisy else None
    grad_y = torch.randn(*shape[:-1], 16, dtype=torch.float64)
    rest = (noise, o.k, 2, span, interpolation, ste, o.threshold)
    actual = with_gradients(linear, tensors, *rest, grad_y=grad_y)
    assert_close_to_loop(actual, plain_linear(tensors, o, span, noise, grad_y))
    assert len(sizes_of(actual["selected"]).unique()) > 1


@rules
@pytest.mark.parametrize("span", [1, 2, 0], ids=["position", "span 2", "image"])
def test_conv2d_equals_the_loop(gate, interpolation, ste, span):
    o = Options(4, 2, interpolation, ste, threshold=0.1)
    tensors = random_tensors((3, 2, 3, 4), (10, 2, 3, 3), 3, 2, gate=gate)
    grad_y = torch.randn(3, 10, 3, 4, dtype=torch.float64)
    rest = (None, *WINDOW, o.k, 2, span, interpolation, ste, o.threshold)
    actual = with_gradients(conv2d, tensors, *rest, grad_y=grad_y)
    assert_close_to_loop(actual, plain_conv2d(tensors, o, *WINDOW, span, None, grad_y))
    sizes_of(actual["selected"])


IMPLEMENTATIONS = ["reference", "dense", pytest.param("native", marks=needs_native)]


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("group_size", [1, 4, 16])
@pytest.mark.parametrize("rows", [1, 70])
def test_below_every_logit_a_threshold_changes_no_bit(kernels, group_size, rows):
    midl.kernels(kernels)
    tensors = random_tensors((rows, 40), (96, 40), 6, group_size, dtype=torch.float32)
    grad_y = torch.randn(rows, 96)
    rest = (None, 3, group_size, 1, "sigmoid", "selected")
    plain = with_gradients(linear, tensors, *rest, grad_y=grad_y)
    low = with_gradients(linear, tensors, *rest, -1e30, grad_y=grad_y)
    assert all(torch.equal(plain[name], low[name]) for name in plain)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_above_every_logit_one_group_is_left(kernels, group_size):
    midl.kernels(kernels)
    tensors = random_tensors((21, 40), (96, 40), 6, group_size, dtype=torch.float32)
    grad_y = torch.randn(21, 96)
    high = with_gradients(linear, tensors, None, 4, group_size, 1, "sigmoid", "selected", 1e30, grad_y=grad_y)
    one = with_gradients(linear, tensors, None, 1, group_size, 1, "sigmoid", "selected", grad_y=grad_y)
    assert torch.equal(high["selected"][:, :1], one["selected"])
    assert (high["selected"][:, 1:] == -1).all()
    assert all(error_ratio(high[name], one[name]) < 2e-6 for name in tensors)


def test_a_row_of_nan_logits_selects_one_group_and_hurts_no_other_row():
    tensors = random_tensors((6, 40), (96, 40), 6, 16, dtype=torch.float32)
    clean, chosen = linear(*tensors.values(), None, 4, 16, 1, "sigmoid", "selected", 0.1)
    tensors["x"][2] = torch.nan
    for kernels in ("reference", *(["native"] if SETS else [])):
        midl.kernels(kernels)
        y, selected = linear(*tensors.values(), None, 4, 16, 1, "sigmoid", "selected", 0.1)
        assert selected[2].tolist() == [0, -1, -1, -1]
        others = torch.arange(6) != 2
        assert torch.equal(selected[others], chosen[others])
        assert y[2].isnan().all()
        assert error_ratio(y[others], clean[others]) < 2e-6


def exact(op, tensors, *rest, grad_y):
    """The reference in float64 on the same values."""
    doubles = {name: None if t is None else t.detach().double() for name, t in tensors.items()}
    rest = tuple(r.double() if isinstance(r, torch.Tensor) else r for r in rest)
    midl.kernels("reference")
    result = with_gradients(op, doubles, *rest, grad_y=grad_y.double())
    midl.kernels("native")
    return result


def check_native(op, tensors, *rest, grad_y, limit=2e-6, slack=10) -> None:
    expected = exact(op, tensors, *rest, grad_y=grad_y)
    actual = with_gradients(op, tensors, *rest, grad_y=grad_y)
    assert torch.equal(actual["selected"], expected["selected"])
    for name in ("y", *(name for name, t in tensors.items() if t is not None)):
        assert error_ratio(actual[name], expected[name]) < (limit if name == "y" else slack * limit), name
    with torch.no_grad():  # The second call without gradients packs the weights.
        for _ in range(2):
            y, selected = op(*tensors.values(), *rest)
            assert torch.equal(selected, expected["selected"])
            assert error_ratio(y, expected["y"]) < limit


@needs_native
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize(
    ("rows", "groups", "group_size"), [(1, 20, 16), (13, 6, 5), (33, 40, 1), (17, 3, 48), (600, 9, 8)]
)
def test_native_equals_the_reference(instruction_set, dtype, gate, rows, groups, group_size):
    n = groups * group_size
    tensors = random_tensors((rows, 37), (n, 37), 7, group_size, gate=gate, dtype=dtype)
    grad_y = torch.randn(rows, n).to(dtype)
    k = max(1, groups - 1)
    rest = (None, k, group_size, 1, "hard" if rows == 13 else "sigmoid", "selected", 0.1 / group_size)
    check_native(linear, tensors, *rest, grad_y=grad_y, limit=LIMITS[dtype])


@needs_native
@pytest.mark.parametrize(("shape", "span"), [((2, 7, 20), 3), ((3, 5, 20), 5)])
def test_native_blocks_with_noise_equal_the_reference(instruction_set, shape, span):
    tensors = random_tensors(shape, (48, 20), 4, 8, dtype=torch.float32)
    noise = torch.randn(shape[0], -(-shape[1] // span), 6)
    grad_y = torch.randn(*shape[:-1], 48)
    check_native(linear, tensors, noise, 4, 8, span, "sigmoid", "selected", 0.3, grad_y=grad_y)


@needs_native
@pytest.mark.parametrize("span", [1, 2, 0], ids=["position", "span 2", "image"])
@pytest.mark.parametrize(("channels", "group_size"), [(3, 8), (16, 16), (5, 2)])
def test_native_convolution_equals_the_reference(instruction_set, span, channels, group_size):
    tensors = random_tensors((2, channels, 6, 7), (5 * group_size, channels, 3, 3), 5, group_size, dtype=torch.float32)
    grad_y = torch.randn(2, 5 * group_size, 6, 7)
    rest = (None, *WINDOW, 4, group_size, span, "sigmoid", "selected", 0.1)
    check_native(conv2d, tensors, *rest, grad_y=grad_y)


@needs_native
@given(
    rows=st.integers(1, 40), groups=st.integers(1, 40), group_size=st.integers(1, 40), share=st.floats(0, 1),
    threshold=st.floats(-2, 2), span=st.integers(1, 4), name=st.sampled_from(SETS),
)  # fmt: skip
def test_any_native_layer_equals_the_reference(rows, groups, group_size, share, threshold, span, name):
    native.use_instruction_set(name)
    tensors = random_tensors((rows, 9), (groups * group_size, 9), 3, group_size, dtype=torch.float32)
    k = max(1, round(share * groups))
    logits = reference.gate_logits(
        tensors["x"] @ tensors["light_down"].T, None, tensors["light_up"], tensors["gate_weight"],
        tensors["gate_bias"], group_size, span,
    )  # fmt: skip
    # Halfway between two logits, lest rounding decide.
    values = torch.cat((logits.flatten(), torch.tensor([-3.0, 3.0]))).sort().values
    at = int((values[:-1] < threshold).sum().clamp(1))
    if values[at] - values[at - 1] > 1e-4:
        threshold = float(values[at - 1] + values[at]) / 2
        rest = (None, k, group_size, span, "sigmoid", "selected", threshold)
        # Gradients that cancel may lose digits; those of a wrong slot would lose all.
        check_native(linear, tensors, *rest, grad_y=torch.randn(rows, groups * group_size), slack=1000)
    native.use_instruction_set(SETS[-1])


@needs_native
@pytest.mark.parametrize("groups", [1, 2, 15, 16, 17, 33, 100, 1000])
def test_native_topk_equals_the_reference_with_ties_and_nan(instruction_set, groups):
    scores = torch.randn(40, groups)
    scores[::7] = scores[::7].round()
    scores[::5, ::3] = torch.nan
    scores[3], scores[4] = torch.nan, torch.inf
    for k, threshold in itertools.product(
        {1, -(-groups // 2), groups}, (-torch.inf, -0.5, 0.0, -0.0, 1.0, 9.0, torch.inf)
    ):
        assert torch.equal(native.topk_groups(scores, k, threshold), topk_groups(scores, k, threshold))


def ffn_tensors(dtype: torch.dtype, gated: bool = False) -> dict[str, Any]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5

    return {
        "x": torch.randn(11, 12, dtype=dtype), "weight": draw(48, 12), "bias": draw(48),
        "value_weight": draw(48, 12) if gated else None, "value_bias": draw(48) if gated else None,
        "down_weight": draw(10, 48), "down_bias": draw(10), "light_down": draw(3, 12), "light_up": draw(10, 3),
        "light_hidden": draw(48), "light_bias": draw(10), "gate_weight": draw(6, 3), "gate_bias": draw(6),
    }  # fmt: skip


@pytest.mark.parametrize("interpolation", ["sigmoid", "hard"])
@pytest.mark.parametrize("gated", [False, True])
def test_ffn_rows_equal_fixed_ffns_of_as_many_groups(interpolation, gated):
    tensors = ffn_tensors(torch.float64, gated)
    grad_y = torch.randn(11, 10, dtype=torch.float64)
    rest = (8, "gelu", interpolation, "selected")
    actual = with_gradients(ffn, tensors, None, 5, *rest, 0.1, grad_y=grad_y)
    sizes = sizes_of(actual["selected"])
    assert len(sizes.unique()) > 1
    summed: dict[str, Any] = {}
    for i, size in enumerate(sizes.tolist()):
        one = {**tensors, "x": tensors["x"][i : i + 1]}
        fixed = with_gradients(ffn, one, None, size, *rest, grad_y=grad_y[i : i + 1])
        assert torch.equal(fixed["selected"][0], actual["selected"][i, :size])
        for name in ("y", "x"):
            torch.testing.assert_close(actual[name][i], fixed[name][0], rtol=1e-12, atol=1e-12)
        for name in set(fixed) - {"y", "x", "selected"}:
            summed[name] = summed.get(name, 0) + fixed[name]
    for name, total in summed.items():
        torch.testing.assert_close(actual[name], total, rtol=1e-10, atol=1e-10)


@needs_native
@pytest.mark.parametrize("interpolation", ["sigmoid", "hard"])
def test_native_ffn_equals_the_reference(instruction_set, interpolation):
    tensors = ffn_tensors(torch.float32, gated=True)
    rest = (None, 5, 8, "silu", interpolation, "selected", 0.1)
    doubles = {name: t.double() for name, t in tensors.items()}
    y, selected = reference_ffn.ffn(*doubles.values(), *rest)
    actual, chosen = ffn(*tensors.values(), *rest)
    assert torch.equal(chosen, selected)
    assert error_ratio(actual, y) < 2e-6


@pytest.mark.parametrize(("kernels", "ste"), [("reference", "selected"), ("dense", "dense")])
def test_opcheck(kernels, ste):
    midl.kernels(kernels)
    tensors = random_tensors((5, 6), (12, 6), 3, 2, dtype=torch.float32)
    rest = (None, 3, 2, 1, "sigmoid", ste, 0.1)
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    torch.library.opcheck(torch.ops.midl.linear.default, (*leaves, *rest))
    y, selected = linear(*tensors.values(), *rest)
    needs = [True, False, True, True, False, True, True]
    backward = (torch.randn_like(y), selected, *tensors.values(), 2, 1, "sigmoid", ste, needs, True)
    torch.library.opcheck(torch.ops.midl.linear_backward.default, backward)
    image = random_tensors((2, 2, 4, 3), (6, 2, 3, 3), 3, 2, dtype=torch.float32)
    torch.library.opcheck(torch.ops.midl.conv2d.default, (*image.values(), None, *WINDOW, 2, 2, 0, "hard", ste, 0.1))


def test_gradcheck():
    tensors = random_tensors((4, 4), (8, 4), 2, 2, requires_grad=True)

    def output(*values):
        return linear(*values, None, 3, 2, 1, "sigmoid", "selected", 0.2)[0]

    assert torch.autograd.gradcheck(output, list(tensors.values()), eps=1e-6, atol=1e-7)


def test_triton_leaves_thresholds_to_the_dense_kernels():
    triton = pytest.importorskip("midl.ops.triton")
    x = torch.randn(3, 8, device="meta")
    reason = triton._unsupported("linear", x, weight=x, k=2, group_size=1, threshold=0.0)
    assert reason is not None


def test_a_forced_implementation_that_cannot_says_why(monkeypatch):
    from midl.ops import dispatch

    none = dispatch.Implementation(
        "triton", {"linear": linear}, unsupported=lambda op, x, threshold=None, **_: "threshold"
    )
    monkeypatch.setitem(dispatch._registry, "triton", none)
    monkeypatch.setattr(dispatch, "_choice", "triton")
    with pytest.raises(KernelError, match="cannot take this call: threshold"):
        resolve("linear", torch.randn(3, 8), weight=None, k=2, group_size=1, threshold=0.0)


def test_unselected_slots_are_nowhere_in_the_mask():
    selected = torch.tensor([[1, 3, -1], [0, -1, -1]], dtype=torch.int32)
    assert selection_mask(selected, 4).tolist() == [[False, True, False, True], [True, False, False, False]]
