"""dropout: the dense network with dropout after each of its layers while it trains."""

from __future__ import annotations

import dataclasses

from torch import nn

from midl.lab.methods.method import Budget, Method
from midl.lab.models import Architecture

__all__ = ["METHOD"]

_RATE = 0.2


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    return dataclasses.replace(architecture, dropout=_RATE).build()  # type: ignore[type-var]


METHOD = Method("dropout", "dense + dropout", _build, meets_ratio=False, settings={"rate": _RATE})
