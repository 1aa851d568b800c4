"""distilled: the trained dense network, taught its own answers and the labels for as long as a converted one is.

A control: what a converted network gains over dense by this much further training is not MID-L's merit.
"""

from __future__ import annotations

from torch import nn

from midl.lab.methods.method import Budget, Method
from midl.lab.models import Architecture

__all__ = ["METHOD"]


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    return teacher or architecture.build()


METHOD = Method("distilled", "dense distilled", _build, teacher=True, meets_ratio=False)
