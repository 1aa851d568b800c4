"""elastic: a converted network that serves many budgets: every training step draws its active fraction from a range."""

from __future__ import annotations

import torch
from torch import nn

from midl.budget import set_active
from midl.lab.methods import converted
from midl.lab.methods.method import Budget, Method

__all__ = ["METHOD", "RANGE"]

RANGE = (0.2, 0.6)


def _draw_active(model: nn.Module) -> None:
    low, high = RANGE
    set_active(model, low + (high - low) * float(torch.rand(())))


def _settle(model: nn.Module, budget: Budget) -> None:
    set_active(model, budget.active)


METHOD = Method(
    "elastic", "MID-L elastic", converted.METHOD.build, teacher=True, before_step=_draw_active, settle=_settle,
    settings={**converted.CHOICES, "range": list(RANGE)},
)  # fmt: skip
