"""The Triton kernels of midl::linear against the reference: outputs, selections and every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import TENSORS, error_ratio, random_tensors, with_gradients
from torch import Tensor

import midl
from midl.ops import reference
from midl.ops.linear import linear

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")

FLOAT32_LIMIT = 2e-6
"""Relative error allowed in float32: sums in another order than torch's."""


def run(tensors: dict[str, Any], *rest: Any, grad_y: Tensor, kernels: str) -> dict[str, Tensor]:
    with midl.kernels(kernels):
        return with_gradients(linear, tensors, *rest, grad_y=grad_y)


def dense_errors(tensors: dict[str, Any], grad_y: Tensor) -> dict[str, float]:
    """Return the errors of the dense product x @ weight.T in its dtype: what rounding alone costs."""
    x, weight, grad = tensors["x"].flatten(0, -2), tensors["weight"], grad_y.flatten(0, -2)
    wide_x, wide_weight, wide_grad = x.double(), weight.double(), grad.double()
    # The product is exact in float64; a GPU adds in float32 and rounds once, as this does.
    return {
        "y": error_ratio((wide_x @ wide_weight.T).to(x.dtype), wide_x @ wide_weight.T),
        "x": error_ratio((wide_grad @ wide_weight).to(x.dtype), wide_grad @ wide_weight),
        "weight": error_ratio((wide_grad.T @ wide_x).to(x.dtype), wide_grad.T @ wide_x),
    }


def check(
    x_shape: tuple[int, ...], n: int, rank: int, group_size: int, k: int, *, dtype: torch.dtype,
    gate: str = "projection", interpolation: str = "sigmoid", span: int = 1, bias: bool = True, noise: bool = False,
) -> None:  # fmt: skip
    tensors = random_tensors(x_shape, (n, x_shape[-1]), rank, group_size, gate=gate, bias=bias, dtype=dtype)
    grad_y = torch.randn(*x_shape[:-1], n).to(dtype)
    blocks = -(-x_shape[-2] // span)
    rest = (
        torch.randn(*x_shape[:-2], blocks, n // group_size) if noise else None,
        k, group_size, span, interpolation, "selected",
    )  # fmt: skip
    actual = run(tensors, *rest, grad_y=grad_y, kernels="triton")
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    expected = run(wide, *rest, grad_y=grad_y.double(), kernels="reference")
    assert torch.equal(actual["selected"], expected["selected"])
    rounding = dense_errors(tensors, grad_y)
    for name in ("y", *(name for name in TENSORS if name in expected)):
        limit = FLOAT32_LIMIT if dtype == torch.float32 else 2 * max(rounding.values())
        limit *= 1 + 2 * expected[name].numel() ** -0.5  # The error of a few numbers scatters.
        error = error_ratio(actual[name], expected[name])
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"
        assert actual[name].dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "gate"),
    [
        (torch.float32, "projection"),
        (torch.float32, "light"),
        (torch.float16, "projection"),
        (torch.bfloat16, "light"),
    ],
    ids=str,
)
def test_output_and_gradients_match_the_reference(dtype: torch.dtype, gate: str) -> None:
    check((17, 63), 96, 7, 16, 3, dtype=dtype, gate=gate)


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, 3), (torch.float16, 1), (torch.float16, 3), (torch.bfloat16, 3)], ids=str
)
def test_few_rows_take_panels_of_any_group_size(dtype: torch.dtype, rows: int) -> None:
    check((rows, 100), 17, 5, 1, 7, dtype=dtype)
    check((rows, 63), 60, 5, 20, 1, dtype=dtype, gate="light", interpolation="hard")


def test_few_rows_with_more_groups_than_one_program_takes() -> None:
    tensors = random_tensors((2, 16), (1100, 16), 3, 1, dtype=torch.float32)
    rest = (None, 495, 1, 1, "sigmoid", "selected")
    outputs = {}
    for kernels in ("triton", "reference"):
        with midl.kernels(kernels):
            outputs[kernels] = linear(*tensors.values(), *rest)
    assert torch.equal(outputs["triton"][1], outputs["reference"][1])
    assert error_ratio(outputs["triton"][0], outputs["reference"][0]) < FLOAT32_LIMIT


@pytest.mark.parametrize("group_size", [1, 3, 17])
def test_group_sizes_that_fill_no_tile(group_size: int) -> None:
    check((19, 33), 6 * group_size, 5, group_size, 2, dtype=torch.float32)


def test_group_wider_than_a_tile() -> None:
    check((40, 33), 3 * 136, 5, 136, 2, dtype=torch.float16)


def test_positions_that_share_a_selection() -> None:
    check((2, 11, 33), 48, 5, 16, 2, span=4, dtype=torch.float32)
    check((2, 11, 33), 48, 5, 16, 2, span=4, dtype=torch.float32, gate="light", interpolation="hard")


def test_exploration_noise_moves_the_selection_alone() -> None:
    check((18, 33), 96, 5, 16, 3, dtype=torch.float32, noise=True)
    check((2, 33), 96, 5, 16, 3, dtype=torch.float32, noise=True)


@pytest.mark.parametrize("k", [1, 6])
def test_one_group_and_all_groups(k: int) -> None:
    check((18, 33), 96, 5, 16, k, dtype=torch.float32, bias=False)


def test_unwritten_output_shows_as_nan(poisoned_memory: None) -> None:
    """Every element that is returned was written, though every allocation starts as NaN or a wild index."""
    check((17, 40), 96, 7, 16, 2, dtype=torch.float32)
    check((3, 40), 96, 7, 16, 2, dtype=torch.float16)


@pytest.mark.parametrize("rows", [2, 20])
def test_groups_that_no_row_or_every_row_selects(rows: int, poisoned_memory: None) -> None:
    tensors = random_tensors((rows, 33), (96, 33), 5, 16, dtype=torch.float32)
    tensors["gate_bias"] = torch.tensor([-90.0, 90.0, -90.0, 90.0, -90.0, -90.0])
    rest = (None, 2, 16, 1, "sigmoid", "selected")
    grad_y = torch.randn(rows, 96)
    actual = run(tensors, *rest, grad_y=grad_y, kernels="triton")
    expected = run(tensors, *rest, grad_y=grad_y, kernels="reference")
    assert actual["selected"].unique().tolist() == [1, 3]
    assert actual["weight"][:16].count_nonzero() == 0
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("rows", [3, 20])
def test_ties_go_to_the_lowest_index_and_negative_zero_is_zero(rows: int) -> None:
    tensors = random_tensors((rows, 16), (96, 16), 4, 16, dtype=torch.float32)
    assert tensors["gate_weight"] is not None
    tensors["gate_weight"].zero_()
    tensors["gate_bias"] = torch.tensor([-0.0, 0.0, -1.0, 0.0, -0.0, 1.0])
    with midl.kernels("triton"):
        _, selected = linear(*tensors.values(), None, 3, 16, 1, "sigmoid", "selected")
    assert selected.tolist() == [[0, 1, 5]] * rows


@pytest.mark.parametrize(("rows", "value"), [(4, math.nan), (20, math.nan), (20, math.inf)])
def test_a_bad_row_spoils_itself_alone(rows: int, value: float) -> None:
    tensors = random_tensors((rows, 33), (96, 33), 5, 16, dtype=torch.float32)
    x = tensors["x"]
    assert x is not None
    with midl.kernels("triton"):
        clean, _ = linear(*tensors.values(), None, 2, 16, 1, "sigmoid", "selected")
        x[1, 5] = value
        y, selected = linear(*tensors.values(), None, 2, 16, 1, "sigmoid", "selected")
    assert not y[1].isfinite().any()
    others = [i for i in range(rows) if i != 1]
    # Its group may differ now, and with it the place of other rows in a tile: their sums may round differently.
    torch.testing.assert_close(y[others], clean[others], rtol=1e-5, atol=1e-6)
    if math.isnan(value):
        assert selected[1].tolist() == [0, 1]


@pytest.mark.parametrize("rows", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_strided_and_expanded_inputs(rows: int) -> None:
    tensors = random_tensors((rows, 66), (96, 66), 5, 16, dtype=torch.float32)
    x = tensors["x"]
    assert x is not None
    rest = (None, 2, 16, 1, "sigmoid", "selected")
    for view in (x[:, ::2], x[:, :33], x[:1, :33].expand(rows, 33), x.T[:33].T):
        narrow = {**tensors, "x": view, **{n: tensors[n][:, :33] for n in ("weight", "light_down")}}  # type: ignore[index]
        with midl.kernels("triton"):
            y, _ = linear(*narrow.values(), *rest)
        with midl.kernels("reference"):
            expected, _ = linear(*narrow.values(), *rest)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_only_the_gradients_asked_for() -> None:
    tensors = random_tensors((18, 33), (96, 33), 5, 16, dtype=torch.float32)
    selected = torch.arange(2, dtype=torch.int32).expand(18, 2)
    grad_y = torch.randn(18, 96)
    for wanted in (0, 1, 2, 5, None):
        needs = [wanted == i for i in range(7)]
        args = (grad_y, selected, *tensors.values(), 16, 1, "sigmoid", "selected", needs)
        with midl.kernels("triton"):
            actual = torch.ops.midl.linear_backward(*args)
        for grad, value, need in zip(actual, reference.linear_backward(*args), needs, strict=True):
            assert (grad.numel() > 0) == need
            torch.testing.assert_close(grad, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 33), (3, 0, 33)])
def test_no_rows_at_all(shape: tuple[int, ...]) -> None:
    layer = midl.MIDLinear(33, 96, rank=5, group_size=16)
    with midl.kernels("triton"):
        y = layer(torch.randn(shape))
        y.sum().backward()
    assert y.shape == (*shape[:-1], 96)
    assert layer.weight.grad is not None
    assert layer.weight.grad.count_nonzero() == 0


def test_asking_for_what_the_kernels_cannot_do_says_why() -> None:
    layer = midl.MIDLinear(8, 32, rank=2, group_size=16, ste="dense")
    with midl.kernels("triton"):
        with pytest.raises(midl.errors.KernelError, match="expected float32, float16 or bfloat16"):
            layer.double()(torch.randn(2, 8, dtype=torch.float64))
        y = layer.float()(torch.randn(2, 8))
        with pytest.raises(midl.errors.KernelError, match="ste='dense' needs every neuron"):
            y.sum().backward()


def test_torch_compile_has_no_graph_break() -> None:
    layer = midl.MIDLinear(24, 96, rank=4, active=0.5, group_size=16)
    x = torch.randn(17, 24, requires_grad=True)
    with midl.kernels("triton"):
        y = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, y)
        for ours, theirs in zip(
            torch.autograd.grad(compiled.sum(), [x, *layer.parameters()]),
            torch.autograd.grad(y.sum(), [x, *layer.parameters()]),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_opcheck() -> None:
    tensors = random_tensors((18, 24), (96, 24), 5, 16, dtype=torch.float32, requires_grad=True)
    with midl.kernels("triton"):
        torch.library.opcheck(
            torch.ops.midl.linear, (*tensors.values(), None, 3, 16, 1, "sigmoid", "selected"),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17, 63, 100, 600])
@pytest.mark.parametrize(("fan_in", "groups", "group_size"), [(63, 100, 1), (100, 17, 3), (600, 9, 32), (17, 5, 100)])
def test_odd_sizes(dtype: torch.dtype, rows: int, fan_in: int, groups: int, group_size: int) -> None:
    gate, interpolation = ("projection", "sigmoid") if rows % 3 else ("light", "hard")
    check(
        (rows, fan_in), groups * group_size, min(11, fan_in), group_size, max(1, round(0.45 * groups)), dtype=dtype,
        gate=gate, interpolation=interpolation,
    )  # fmt: skip
