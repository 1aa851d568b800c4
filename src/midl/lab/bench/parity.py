"""Parity before speed: a contender's output against the reference, by one scale-free error."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from midl.selection import selection_mask

__all__ = ["LIMITS", "Parity", "compare_selection", "compare_tensors", "error_ratio"]

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest error ratio allowed. Half precision rounds inputs of a product once and its result once (2^-9 or 2^-12)."""


@dataclass(frozen=True)
class Parity:
    """Result of a check: green if ``error`` is at most ``limit``."""

    error: float
    limit: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether speeds may be told. NaN is red."""
        return self.error <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, with the verdict."""
        return {"ok": self.ok, **asdict(self)}


def error_ratio(output: Tensor, reference: Tensor) -> float:
    """Return the root mean square of the difference over that of the reference; inf for NaN or another shape.

    >>> error_ratio(torch.tensor([1.0, 1.1]), torch.tensor([1.0, 1.0])) < 0.08
    True
    """
    if output.shape != reference.shape or not bool(output.isfinite().all()):
        return float("inf")
    difference = (output.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-30))


def compare_tensors(outputs: dict[str, Tensor], references: dict[str, Tensor], dtype: torch.dtype) -> Parity:
    """Return the worst of several named comparisons."""
    errors = {name: error_ratio(outputs[name], reference) for name, reference in references.items()}
    worst = max(errors, key=lambda name: errors[name])
    return Parity(errors[worst], LIMITS[dtype], worst)


def compare_selection(selected: Tensor, reference: Tensor, logits: Tensor, dtype: torch.dtype) -> tuple[Parity, Tensor]:
    """Return whether two selections differ in near ties alone, and the mask (..., N) of groups they agree on.

    Rounding may swap two groups whose logits are equal to working precision, and the outputs of those groups then
    differ for a good reason. The error is the distance of a swapped group's logit from the k-th largest, relative to
    the logits' root mean square.

    Args:
        selected: (..., k), the contender's groups.
        reference: (..., k).
        logits: (..., N), in float64.
        dtype: the layer's.
    """
    ours, theirs = (selection_mask(s, logits.shape[-1]) for s in (selected, reference))
    agree = ours == theirs
    threshold = logits.topk(reference.shape[-1], dim=-1).values[..., -1:]
    distance = torch.where(agree, 0.0, (logits - threshold).abs()).max() / logits.square().mean().sqrt()
    swapped = int((~agree).sum()) // 2
    return Parity(float(distance), LIMITS[dtype], f"{swapped} near ties swapped" if swapped else ""), agree
