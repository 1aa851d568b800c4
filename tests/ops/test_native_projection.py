"""The native product of the light path and its gradients against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from midl.ops.dispatch import unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.ops import native

LIMIT = 1e-6  # root-mean-square error; half precision is not rounded on the way


def storages() -> list[torch.dtype]:
    """What this instruction set multiplies as it is."""
    return [torch.float32, *([torch.bfloat16] if native.multiplies_as_is(torch.bfloat16) else [])]


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def project(x: torch.Tensor, weight: torch.Tensor, threads: int = 2) -> torch.Tensor:
    y = nan(len(x), len(weight))
    native.extension().projection(
        x.dtype == torch.bfloat16, x.data_ptr(), x.stride(0), *x.shape, len(weight), weight.data_ptr(), y.data_ptr(),
        threads,
    )  # fmt: skip
    return y


def gradients(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, grad_x: torch.Tensor | None, threads: int = 2,
    *, want_weight: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Gradients of x and weight; x's is added to ``grad_x`` where that is given."""
    to, of_weight = nan(*x.shape) if grad_x is None else grad_x.clone(), nan(*weight.shape)
    native.extension().projection_backward(
        x.dtype == torch.bfloat16, grad_y.data_ptr(), x.data_ptr(), x.stride(0), *x.shape, len(weight),
        weight.data_ptr(), to.data_ptr(), grad_x is not None, of_weight.data_ptr() if want_weight else 0, threads,
    )  # fmt: skip
    return to, of_weight if want_weight else None


def draw(rows: int, depth: int, neurons: int, dtype: torch.dtype, gap: int = 0) -> tuple[torch.Tensor, ...]:
    x = torch.randn(rows, depth + gap).to(dtype)[:, :depth]
    return x, torch.randn(neurons, depth).to(dtype), torch.randn(rows, neurons).to(dtype), torch.randn(rows, depth)


def error_of_product(
    actual: torch.Tensor, left: torch.Tensor, right: torch.Tensor, before: torch.Tensor | None = None
) -> float:
    """Error in units of the result or, where its terms happen to cancel, of what they usually add up to."""
    left, right = left.double(), right.double()
    expected = left @ right + (0 if before is None else before.double())
    usual = (left.square() @ right.square()).sqrt()
    return ((actual - expected).norm() / torch.maximum(expected.norm(), usual.norm())).item()


@pytest.mark.parametrize("rows", [1, 3, 63, 300])
@pytest.mark.parametrize("depth", [1, 17, 100, 1030])
@pytest.mark.parametrize("neurons", [1, 5, 75, 600])
def test_sizes_that_fill_no_panel(instruction_set: str, rows: int, depth: int, neurons: int) -> None:
    for dtype in storages():
        x, weight, grad_y, before = draw(rows, depth, neurons, dtype, gap=3)
        assert error_of_product(project(x, weight), x, weight.T) < LIMIT
        grad_x, grad_weight = gradients(grad_y, x, weight, None)
        assert error_of_product(grad_x, grad_y, weight) < LIMIT
        assert error_of_product(grad_weight, grad_y.T, x) < LIMIT
        added, _ = gradients(grad_y, x, weight, before, want_weight=False)
        assert error_of_product(added, grad_y, weight, before) < LIMIT


def test_the_same_bits_for_any_number_of_threads(instruction_set: str) -> None:
    for dtype in storages():
        x, weight, grad_y, before = draw(700, 200, 75, dtype)
        y, once = project(x, weight, 1), gradients(grad_y, x, weight, before, 1)
        for threads in (2, 3, 4):
            assert project(x, weight, threads).equal(y)
            assert all(a.equal(b) for a, b in zip(gradients(grad_y, x, weight, before, threads), once, strict=True))
