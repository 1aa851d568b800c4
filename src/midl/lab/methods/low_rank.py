"""low_rank: the light path alone; every layer is a product of two thin ones, as wide as its budget allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from midl.adaptation.calibrate import weight_of
from midl.errors import MIDLError
from midl.lab.methods.method import Budget, Method, Substitute, replace_layers
from midl.lab.models import Architecture
from midl.layers.lowrank import truncated_svd

__all__ = ["METHOD", "LowRank"]


class LowRank(Substitute):
    """Two thin layers in the place of a linear layer or a convolution, started as the best fit of its weight.

    >>> LowRank(nn.Linear(8, 4), rank=2)(torch.zeros(3, 8)).shape
    torch.Size([3, 4])
    """

    def __init__(self, dense: nn.Module, rank: int) -> None:
        super().__init__()
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if isinstance(dense, nn.Conv2d):
            self.down = nn.Conv2d(
                dense.in_channels, rank, dense.kernel_size, dense.stride, dense.padding, dense.dilation,  # type: ignore[arg-type]
                bias=False,
            )  # fmt: skip
            self.up = nn.Conv2d(rank, dense.out_channels, 1, bias=dense.bias is not None)
        elif isinstance(dense, nn.Linear):
            self.down = nn.Linear(dense.in_features, rank, bias=False)
            self.up = nn.Linear(rank, dense.out_features, bias=dense.bias is not None)
        else:
            raise MIDLError(f"LowRank: dense is a {type(dense).__name__}, expected nn.Linear or nn.Conv2d")
        self.neurons, self.full_neurons = dense.weight.shape[0], 0
        down, up = truncated_svd(dense.weight.flatten(1), rank)
        with torch.no_grad():
            self.down.weight.copy_(down.view_as(self.down.weight))
            self.up.weight.copy_(up.view_as(self.up.weight))
            if dense.bias is not None and self.up.bias is not None:
                self.up.bias.copy_(dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of both layers."""
        return self.up(self.down(x))


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    def thin(dense: nn.Module) -> LowRank:
        n, fan_in = weight_of(dense).shape
        return LowRank(dense, max(1, int(n * fan_in / budget.flops_ratio / (n + fan_in))))

    return replace_layers(architecture.build(), architecture.layer_names, thin)


METHOD = Method("low_rank", "low rank", _build, own_modules=True)
