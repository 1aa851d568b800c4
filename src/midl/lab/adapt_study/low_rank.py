"""Low rank alone at the same FLOPs: what the gate and the full path have to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from midl.adaptation import calibrate, fit_light_path, weigh_outputs
from midl.adaptation.calibrate import weight_of
from midl.analysis import count_flops
from midl.errors import MIDLError

__all__ = ["factorise"]


@torch.no_grad()
def factorise(model: nn.Module, names: Sequence[str], batches: Sequence[Any], budget: float) -> None:
    """Replace the named layers by two thinner ones, fitted to real inputs, all shrunk by the same ratio.

    A convolution becomes one to few channels with its kernel and a 1 x 1 behind it.

    Args:
        model: whose nn.Linear and nn.Conv2d layers are replaced in place.
        names: qualified names of the layers.
        batches: inputs of the model to fit to.
        budget: FLOPs of the whole model before, divided by those after, at least.

    Raises:
        MIDLError: the budget cannot be met.
    """
    layers = {name: model.get_submodule(name) for name in names}
    moments = calibrate(model, batches, layers)
    weigh_outputs(model, batches, layers, moments)
    principal = {name: found.principal_outputs() for name, found in moments.items()}
    dense = count_flops(model, batches[0])

    def thin(share: float) -> int:
        """Give every layer this share of its multiply-adds; return what the model then needs."""
        for name, layer in layers.items():
            n, fan_in = weight_of(layer).shape
            rank = min(n, fan_in, max(1, int(share * n * fan_in / (n + fan_in))))
            path = fit_light_path(weight_of(layer), principal[name], rank)
            model.set_submodule(name, _factors(layer, path.down, path.up))
        return count_flops(model, batches[0])

    low, high = 0.0, 1.0
    least = thin(low)
    if least > dense / budget:
        raise MIDLError(f"factorise: budget={budget:g} cannot be met, expected at most {dense / least:.3f}")
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if thin(middle) <= dense / budget else (low, middle)
    thin(low)


def _factors(layer: nn.Module, down_weight: torch.Tensor, up_weight: torch.Tensor) -> nn.Sequential:
    rank, n = len(down_weight), len(up_weight)
    bias = layer.bias is not None
    down: nn.Module
    up: nn.Module
    if isinstance(layer, nn.Conv2d):
        down = nn.Conv2d(
            layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False,  # type: ignore[arg-type]
            padding_mode=layer.padding_mode,  # type: ignore[arg-type]
        )  # fmt: skip
        up = nn.Conv2d(rank, n, 1, bias=bias)
    else:
        down, up = nn.Linear(down_weight.shape[1], rank, bias=False), nn.Linear(rank, n, bias=bias)
    down.weight.copy_(down_weight.view_as(down.weight))  # type: ignore[operator, arg-type]
    up.weight.copy_(up_weight.view_as(up.weight))  # type: ignore[operator, arg-type]
    if bias:
        up.bias.copy_(layer.bias)  # type: ignore[union-attr, operator, arg-type]
    return nn.Sequential(down, up).train(layer.training)
