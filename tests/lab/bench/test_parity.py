import pytest
import torch

import midl
from midl.lab.bench.midl_layers import check_forward, implementation, make_conv2d, make_linear
from midl.lab.bench.parity import Parity, compare_selection, compare_tensors, error_ratio


def test_the_error_is_free_of_scale() -> None:
    reference = torch.randn(100)
    output = reference + 1e-3 * torch.randn(100)
    assert error_ratio(output, reference) == pytest.approx(error_ratio(1e6 * output, 1e6 * reference), rel=1e-3)
    assert error_ratio(reference, reference) == 0


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_output_that_is_not_finite_is_red(damage: float) -> None:
    output = torch.ones(4)
    output[2] = damage
    assert error_ratio(output, torch.ones(4)) == float("inf")
    assert not Parity(float("nan"), 1.0).ok


def test_output_of_another_shape_is_red() -> None:
    assert error_ratio(torch.ones(4, 1), torch.ones(4)) == float("inf")


def test_the_worst_of_several_tensors_decides_and_is_named() -> None:
    references = {"y": torch.ones(4), "grad x": torch.ones(4)}
    parity = compare_tensors({"y": torch.ones(4), "grad x": 1.5 * torch.ones(4)}, references, torch.float32)
    assert not parity.ok
    assert parity.detail == "grad x"


def test_swapped_groups_are_green_only_when_they_tie() -> None:
    logits = torch.tensor([[1.0, 0.5, 0.5 + 1e-9, -1.0]], dtype=torch.float64)
    swapped, agree = compare_selection(
        torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[0, 2]], dtype=torch.int32), logits, torch.float32
    )
    assert swapped.ok
    assert agree.tolist() == [[True, False, False, True]]
    wrong, _ = compare_selection(
        torch.tensor([[0, 3]], dtype=torch.int32), torch.tensor([[0, 2]], dtype=torch.int32), logits, torch.float32
    )
    assert not wrong.ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_that_are_timed_pass_the_check(dtype: torch.dtype) -> None:
    layer = make_linear(64, 96, dtype, active=0.45, group_size=16)
    assert check_forward(layer, torch.randn(9, 64).to(dtype), "auto").ok
    images = torch.randn(2, 16, 5, 5).to(dtype)
    assert check_forward(make_conv2d(16, 32, 3, dtype, active=0.45, group_size=8), images, "auto").ok


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from midl.ops.dispatch import _implementation

    dense = _implementation("dense")
    right = dense.ops["linear"]

    def wrong(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        y, selected = right(*args)
        return y * 1.001, selected

    monkeypatch.setitem(dense.ops, "linear", wrong)
    layer = make_linear(64, 96, torch.float32, active=0.45, group_size=16)
    assert not check_forward(layer, torch.randn(9, 64), "dense").ok
    assert check_forward(layer, torch.randn(9, 64), "reference").ok
    assert midl.layers.base.observers == []


def test_the_row_names_what_really_ran() -> None:
    layer, x = make_linear(64, 96, torch.float32, active=0.45, group_size=16), torch.randn(9, 64)
    assert implementation(layer, x, "reference", backward=True) == "reference"
    assert implementation(layer, x, "dense") == "dense"
    # The dense implementation takes the reference's backward pass.
    assert implementation(layer, x, "dense", backward=True) == "dense, backward reference"
