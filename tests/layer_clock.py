"""A clock for tests of latency budgets, on which every layer takes what the test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from midl.layers import MIDLayer


class LayerClock:
    """Nanoseconds that pass while modules run: a dense layer's weights, by default a MID-L layer's multiply-adds."""

    def __init__(
        self, sparse: Callable[[Any], float] = lambda layer: layer.macs, other: Callable[[Any], int] = lambda module: 0
    ) -> None:
        self.now, self.sparse, self.other = 0, sparse, other

    def __call__(self, wall: bool = False) -> int:
        return self.now

    def see(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let the time pass that ``module``, which has just run, takes; a forward hook for all modules."""
        if isinstance(module, MIDLayer):
            self.now += round(self.sparse(module))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            self.now += module.weight.numel()
        else:
            self.now += self.other(module)
