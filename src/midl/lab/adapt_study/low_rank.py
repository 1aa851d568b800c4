"""Low rank alone at the same FLOPs: what the gate and the full path have to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from midl.adaptation import calibrate, fit_light_path
from midl.adaptation.calibrate import weight_of
from midl.analysis import count_flops
from midl.errors import MIDLError

__all__ = ["factorise"]


@torch.no_grad()
def factorise(model: nn.Module, names: Sequence[str], batches: Sequence[Any], budget: float) -> None:
    """Replace the named nn.Linear layers by two thinner ones, fitted to real inputs, all shrunk by the same ratio.

    Raises:
        MIDLError: the budget cannot be met.
    """
    layers = {name: model.get_submodule(name) for name in names}
    moments = calibrate(model, batches, layers)
    dense = count_flops(model, batches[0])
    own = sum(2 * len(batches[0]) * weight_of(layer).numel() for layer in layers.values())
    share = (dense / budget - (dense - own)) / own
    if share <= 0:
        raise MIDLError(f"factorise: budget={budget:g}, the other layers alone cost more")
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        n, d = layer.weight.shape
        rank = max(1, int(share * n * d / (n + d)))
        path = fit_light_path(layer.weight, *moments[name].principal_outputs(), rank)
        down, up = nn.Linear(d, rank, bias=False), nn.Linear(rank, n)
        down.weight.copy_(path.down)
        up.weight.copy_(path.up)
        up.bias.copy_(layer.bias)
        model.set_submodule(name, nn.Sequential(down, up))
