"""dense: the network as it is, which every other method is compared with."""

from __future__ import annotations

from torch import nn

from midl.lab.methods.method import Budget, Method
from midl.lab.models import Architecture

__all__ = ["METHOD"]


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    return architecture.build()


METHOD = Method("dense", "dense", _build, meets_ratio=False)
