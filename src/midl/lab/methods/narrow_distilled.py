"""narrow_distilled: the narrowed dense network, taught from its start by the dense one, for as long as the two phases.

A control: a converted network's FLOPs, its epochs and its teacher, but no MID-L.
"""

from __future__ import annotations

from torch import nn

from midl.lab.methods import narrow
from midl.lab.methods.method import Budget, Method
from midl.lab.models import Architecture

__all__ = ["METHOD"]


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    return narrow.METHOD.build(architecture, budget, None)


METHOD = Method("narrow_distilled", "narrow distilled", _build, teacher=True, long=True, own_modules=True)
